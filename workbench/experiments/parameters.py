"""Parameters of the arms: their number, the LoRA of equal size, and how far training moves them."""

import math
from dataclasses import fields

import torch
from torch import nn

from data import InputError
from loading.arguments import ModelArguments
from loading.base_model import with_adapter
from peft import PeftModel
from peft.inject import find_targets
from peft.static import static_lora
from transformers_patch import AutoModelForCausalLM
from transformers_patch.auto import damage_refused, load_config


def equal_rank(model: str, flags: dict, mixture_flags: dict) -> int:
    """The rank of a LoRA whose number of trainable parameters is nearest to a mixture's.

    Args:
        model: base model.
        flags: of `train.py`, for the LoRA.
        mixture_flags: the same for the mixture.
    """
    alternatives = (mixture_flags, flags | {"lora_rank": 1}, flags | {"lora_rank": 2})
    mixture, of_rank_1, of_rank_2 = (adapter_size(_model_arguments(model, each)) for each in alternatives)
    # A router, which a null expert needs, has the same size with any rank.
    return max(1, 1 + round((mixture - of_rank_1) / (of_rank_2 - of_rank_1)))


def adapter_size(arguments: ModelArguments) -> int:
    """Number of trainable parameters of a fresh adapter, found without loading weights.

    Raises:
        InputError: a value in the model's config.json cannot be used.
    """
    name = arguments.model_name_or_path
    try:
        config = load_config(name)
        with torch.device("meta"), damage_refused(f"config.json of {name}"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise InputError(str(error)) from error
    with torch.device("meta"):
        return num_trainable(with_adapter(model, arguments))


def num_trainable(model: nn.Module) -> int:
    """Number of parameters that training changes: those of the adapter, or all if there is none."""
    if not isinstance(model, PeftModel):
        return model.num_parameters()
    return sum(p.numel() for layer in model.base_model.layers() for p in layer.experts["default"].parameters())


def parameter_change(tuned: nn.Module, base_model: str) -> float:
    """Relative L2 change of the adapted Linears' weights, all together: |W - W0| / |W0|.

    For a mixture, W is that of even expert weights. Under full fine-tuning, the same Linears count as for an adapter.
    """
    changes = _adapter_changes(tuned) if isinstance(tuned, PeftModel) else _weight_changes(tuned, base_model)
    moved, original = zip(*changes, strict=True)
    return math.hypot(*moved) / math.hypot(*original)


def _adapter_changes(tuned: PeftModel) -> list[tuple[float, float]]:
    """Norm of the change and of the original weight, by Linear."""
    norms = []
    for layer in tuned.base_model.layers():
        experts = layer.experts["default"]
        A, B = static_lora(experts, torch.full((experts.num_experts,), 1 / tuned.active_peft_config.routed_experts))
        norms.append((experts.scaling * _norm(B @ A), _norm(layer.base_layer.weight)))
    return norms


def _weight_changes(tuned: nn.Module, base_model: str) -> list[tuple[float, float]]:
    # In the dtype of the tuned weights, so that rounding does not count; those may be on another device.
    base = AutoModelForCausalLM.from_pretrained(base_model, dtype=tuned.dtype)
    modules = dict(tuned.named_modules())
    adapted = find_targets(base, list(base.default_target_modules))
    return [
        (_norm(modules[name].weight.cpu().float() - linear.weight.float()), _norm(linear.weight))
        for name, linear in adapted.items()
    ]


def _norm(matrix: torch.Tensor) -> float:
    return torch.linalg.matrix_norm(matrix.detach().float()).item()


def _model_arguments(model: str, flags: dict) -> ModelArguments:
    known = {each.name for each in fields(ModelArguments)}
    return ModelArguments(model_name_or_path=model, **{name: value for name, value in flags.items() if name in known})
