"""Mixtures of LoRA experts with a localized balancing constraint, under the public names of PEFT.

Read in this order: `router.py`, `layer.py`, `balance.py` are the method, `functions.py` its computations, with
help from `products.py` and `dropout.py`; `inject.py` and `model.py` put it onto a base model; `config.py` and
`saving.py` are what goes to disk; `static.py` makes plain LoRAs of mixtures.
"""

from .balance import balance_coefficients, localized_balance_term, sample_shares
from .config import LoraConfig, PeftConfig, PeftType, TaskType
from .inject import LoraModel, find_targets
from .layer import LoraExperts, LoraLayer
from .model import (
    PeftMixedModel,
    PeftModel,
    PeftModelForCausalLM,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from .router import Router
from .saving import get_peft_model_state_dict, set_peft_model_state_dict
from .static import Calibration, merged_linear, static_lora
from .trained_copy import TrainedCopy

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "LoraConfig",
    "LoraExperts",
    "LoraLayer",
    "LoraModel",
    "PeftConfig",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftType",
    "Router",
    "TaskType",
    "TrainedCopy",
    "__version__",
    "balance_coefficients",
    "find_targets",
    "get_peft_model",
    "get_peft_model_state_dict",
    "localized_balance_term",
    "merged_linear",
    "prepare_model_for_kbit_training",
    "sample_shares",
    "set_peft_model_state_dict",
    "static_lora",
]
