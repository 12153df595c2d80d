"""The tensors of an exported model: read one at a time, renamed, and written in shards."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate.hooks import remove_hook_from_submodules
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.integrations.accelerate import load_offloaded_parameter

from data import InputError, first_line
from inference.trained import TrainedFolder
from peft import PeftModel, TrainedCopy
from peft.saving import adapter_parameters, load_adapter_weights
from transformers_patch import AutoModelForCausalLM

MAX_SHARD_SIZE = "5GB"
# The names of dtypes in a safetensors file.
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor that is read when it is needed.

    Args:
        like: a tensor of its shape and dtype.
        read: reads it.
    """

    like: Tensor
    read: Callable[[], Tensor]


def load_offloaded(base: str, scratch: Path) -> PreTrainedModel:
    """A base model, in the dtype of its checkpoint, whose weights stay on the disk: each module reads its own when it
    is called, cast to the dtype that the model then has.

    Args:
        scratch: a folder for the weights that the checkpoint stores in another form (the experts of some bases).

    Raises:
        InputError: the weights are missing or damaged.
    """
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # it warns that weights are on the disk
    try:
        return AutoModelForCausalLM.from_pretrained(
            base, dtype="auto", device_map={"": "disk"}, offload_folder=str(scratch)
        )
    except (OSError, SafetensorError) as error:
        raise InputError(f"the weights of {base} could not be read: {first_line(error)}") from error


def routed_in_float32(base: PreTrainedModel, trained: TrainedFolder) -> PeftModel:
    """The routed model on a base model whose weights stay on the disk; the adapter's own are in memory.

    All weights are rounded to the dtype of the base model, as a loader of the export rounds them, and then used in
    float32: in bfloat16, small faults would be lost among rounding errors.
    """
    dtype = base.dtype
    model = PeftModel.from_pretrained(base.float(), trained.folder, config=trained.config)
    for module in model.modules():
        if isinstance(module, TrainedCopy):
            remove_hook_from_submodules(module.trained)  # they would read the base model's weights
    tensors = {key: tensor.to(dtype).float() for key, tensor in load_adapter_weights(trained.folder).items()}
    keys = {parameter: key for key, parameter in adapter_parameters(model, model.active_adapter).items()}
    named = model.named_parameters(remove_duplicate=False)
    state = {name: tensors[keys[parameter]] for name, parameter in named if parameter in keys}
    model.load_state_dict(state, assign=True, strict=False)
    return model.eval()


def exported_tensors(base: PreTrainedModel, adapter: dict[str, Tensor]) -> dict[str, Stored]:
    """All tensors of the exported model, by their names in it.

    Those of the adapter keep the dtype that they have in its folder, float32: a loader casts them to that of the model.

    Args:
        base: see `load_offloaded`.
        adapter: the tensors in the adapter's folder.
    """
    targets = target_names(adapter)
    found = {}
    for name, tensor in base.state_dict().items():
        module, _, leaf = name.rpartition(".")
        stored = Stored(tensor, partial(load_offloaded_parameter, base, name) if tensor.is_meta else tensor.clone)
        if module in targets:
            found[f"{module}.base_layer.{leaf}"] = stored
        elif name not in base.all_tied_weights_keys:
            found[name] = stored
    return found | {_exported_name(key): Stored(tensor, tensor.clone) for key, tensor in adapter.items()}


def target_names(adapter: dict[str, Tensor]) -> list[str]:
    """The names of the adapted Linears in the base model."""
    names = (key.removeprefix("base_model.model.") for key in adapter)
    return sorted({name.partition(".experts.")[0] for name in names if ".experts." in name})


def write_shards(tensors: dict[str, Stored], folder: Path) -> None:
    """Write tensors as safetensors, and an index if there is more than one file. One tensor at a time is in memory."""
    split = split_torch_state_dict_into_shards(
        {name: stored.like.to("meta") for name, stored in tensors.items()},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=MAX_SHARD_SIZE,
    )
    size = split.metadata["total_size"]
    with tqdm(total=size, unit="B", unit_scale=True, desc="writing", disable=None) as bar:
        for file, names in split.filename_to_tensors.items():
            _write_shard({name: tensors[name] for name in names}, folder / file, bar)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_shard(tensors: dict[str, Stored], path: Path, bar: tqdm) -> None:
    """Write one file: the length of the header in 8 bytes, the header as JSON, the tensors' bytes."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, stored in tensors.items():
        start, end = end, end + stored.like.nbytes
        shape = list(stored.like.shape)
        header[name] = {"dtype": DTYPES[stored.like.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors are aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for stored in tensors.values():
            file.write(stored.read().contiguous().view(-1).view(torch.uint8).numpy().data)
            bar.update(stored.like.nbytes)


def _exported_name(key: str) -> str:
    """The name in the exported model of a tensor in the adapter's folder."""
    name = key.removeprefix("base_model.model.").replace(".experts.", ".").replace(".trained.", ".")
    return name + ".weight" if name.endswith((".lora_A", ".lora_B")) else name
