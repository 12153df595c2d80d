"""The tensors of an adapter: taking them out of a model, putting them back, and their file."""

import os
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

WEIGHTS_NAME = "adapter_model.safetensors"


def adapter_parameters(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """Parameters of one adapter by their key in the file: the parameter's name without the adapter's own name.

    A parameter that two modules share (tied embeddings) is there once.
    """
    return {key: parameter for name, parameter in model.named_parameters() if (key := adapter_key(name, adapter_name))}


def adapter_key(name: str, adapter_name: str) -> str | None:
    """The key in the file for a parameter's name, None if it is not of this adapter."""
    for part in ("experts", "trained"):
        if (marker := f".{part}.{adapter_name}.") in name:
            return name.replace(marker, f".{part}.")
    return None


def get_peft_model_state_dict(
    model: nn.Module, state_dict: dict[str, Tensor] | None = None, adapter_name: str = "default"
) -> dict[str, Tensor]:
    """Full tensors of one adapter, by their key in the file.

    If ZeRO (stages 1 to 3) trains the adapter, these are the float32 weights that its optimizer keeps, not their
    copies in half precision. They are distributed over the ranks, and every rank has to take part in gathering them.

    Args:
        model: a PeftModel.
        state_dict: tensors by the model's own parameter names, to be used instead of the parameters (what trainers
            pass that have gathered the tensors themselves).

    Raises:
        ValueError: the adapter has parameters that `state_dict` does not have.
    """
    parameters = adapter_parameters(model, adapter_name)
    if state_dict is not None:
        keys = ((adapter_key(name, adapter_name), value) for name, value in state_dict.items())
        given = {key: value for key, value in keys if key in parameters}
        if missing := sorted(parameters.keys() - given.keys()):
            raise ValueError("these tensors are not the complete adapter, missing: " + ", ".join(missing))
        return given
    if parameters and all(map(_has_float32_weight, parameters.values())):
        from deepspeed.utils import safe_get_full_fp32_param

        return {key: safe_get_full_fp32_param(parameter) for key, parameter in parameters.items()}
    with gathered(parameters.values()):
        return {key: parameter.detach().clone() for key, parameter in parameters.items()}


def set_peft_model_state_dict(model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str = "default") -> None:
    """Copy tensors into one adapter. The keys have to be exactly the adapter's own.

    Raises:
        ValueError: keys are missing or unexpected, or shapes differ; it names them all, and nothing is copied.
    """
    parameters = adapter_parameters(model, adapter_name)
    problems = [f"missing: {key}" for key in sorted(parameters.keys() - state_dict.keys())]
    problems += [f"unexpected: {key}" for key in sorted(state_dict.keys() - parameters.keys())]
    with gathered(parameters.values(), modify=True):
        problems += [
            f"{key} has shape {tuple(state_dict[key].shape)}, the model needs {tuple(parameters[key].shape)}"
            for key in sorted(parameters.keys() & state_dict.keys())
            if state_dict[key].shape != parameters[key].shape
        ]
        if problems:
            raise ValueError("the adapter does not fit this model:\n  " + "\n  ".join(problems))
        with torch.no_grad():
            for key, parameter in parameters.items():
                parameter.copy_(state_dict[key])


def save_adapter_weights(tensors: dict[str, Tensor], directory: str | os.PathLike) -> None:
    """Write the tensors as safetensors into the folder, replacing a file that is there in a single step."""
    path = Path(directory) / WEIGHTS_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".safetensors.tmp")
    content = save({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, {"format": "pt"})
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_adapter_weights(directory: str | os.PathLike) -> dict[str, Tensor]:
    """Read the tensors of an adapter folder onto the CPU.

    Raises:
        ValueError: the file is missing or is not a complete safetensors file.
    """
    path = Path(directory) / WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"{directory} holds no adapter weights: it has no {WEIGHTS_NAME}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or incomplete ({error}); restore it from a copy") from None


def gathered(parameters, modify: bool = False):
    """A context in which parameters that ZeRO-3 has partitioned are gathered."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if modify else None)


def _has_float32_weight(parameter: nn.Parameter) -> bool:
    """True if a DeepSpeed optimizer (stages 1 and 2, stage 3) keeps a float32 weight of this parameter."""
    return parameter.requires_grad and (hasattr(parameter, "_hp_mapping") or hasattr(parameter, "_z3_optimizer"))
