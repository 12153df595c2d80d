"""Everything that knows the internals of transformers.

`mixin.py` adds task types and the balance term to a stock model class, `recorder.py` is how routing leaves the
layers, `labels.py` holds logits and loss to the labelled positions, `modeling_*.py` name the patched classes, and
`training/` is the Trainer with what surrounds it.
"""

from transformers_patch.version import check_environment

check_environment()

from transformers_patch.auto import AutoModelForCausalLM  # noqa: E402
from transformers_patch.mixin import LoRAMoEMixin, LoRAMoEOutput  # noqa: E402
from transformers_patch.modeling_llama import LlamaLoRAMoEForCausalLM  # noqa: E402
from transformers_patch.recorder import RoutingRecorder  # noqa: E402

__all__ = ["AutoModelForCausalLM", "LlamaLoRAMoEForCausalLM", "LoRAMoEMixin", "LoRAMoEOutput", "RoutingRecorder"]
