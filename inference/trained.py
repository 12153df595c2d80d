"""Loading a trained adapter on its base model, or a complete fine-tuned model, for inference."""

import json
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError
from safetensors import SafetensorError
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from data import Encoding, InputError, first_line, resolve_template
from data.errors import reading
from data.files import shown
from inference.generation import drop_proposed_settings, end_tokens
from loading.arguments import KBITS, DataArguments
from loading.base_model import check_base_model, load_tokenizer, other_base_warning, quantization
from loading.command_line import at_least, flag, listed, one_of, range_problems, refuse
from loading.run_files import CHECKPOINT_NAME, PUBLISHED, RUN_CONFIG_NAME, with_current_names
from peft import LoraConfig, LoraLayer, PeftModel
from peft.config import CONFIG_NAME as ADAPTER_CONFIG_NAME
from peft.model import keep_4bit_packing
from transformers_patch.auto import AutoModelForCausalLM

MODEL_CONFIG_NAME = "config.json"
# The fields of a run's configuration that are read here, all optional: what they have to be, and the types.
TEXT_OR_NULL = ("a string or null", {str, type(None)})
RUN_FIELDS: dict[str, tuple[str, set]] = {
    "blc_weight": ("a number", {int, float}),
    "max_seq_length": ("a whole number", {int}),
    "model_name_or_path": ("a string", {str}),
    "num_task_types": ("a whole number", {int}),
    "prompt_template": ("a string", {str}),
    "task_type_names": TEXT_OR_NULL,
    "train_on": ("a string", {str}),
    "knowledge_probe": ("a string", {str}),
    "probe_facts": ("a whole number", {int}),
    "dataset_dir": TEXT_OR_NULL,
    "validation_file": TEXT_OR_NULL,
}
PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass
class InferenceArguments:
    """Flags of every program that runs a trained model."""

    adapter: str = flag(None, "adapter or complete model: a folder or a hub id", required=True)
    base_model: str | None = flag(None, "base model: a folder or a hub id; by default the one named in the adapter")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", "dtype of the base model; auto is bfloat16 on GPUs (float16 if they lack it), float32 on a CPU"
    )
    device_map: str = flag(
        "auto", "auto spreads the layers over all GPUs, or uses the CPU; or a device, such as cpu or cuda:1"
    )
    load_in_kbits: int = flag(16, "4 (nf4) or 8 (int8) quantises the base model; 16 does not quantise it")
    batch_size: int = flag(8, "rows per batch; lower it if memory runs out")

    def problems(self) -> list[str]:
        problems = range_problems(self, [one_of(KBITS, "load_in_kbits"), at_least(1, "batch_size")])
        if self.device_map not in PLACEMENTS and (problem := _device_problem(self.device_map)):
            problems.append(f"--device_map {self.device_map}: {problem}; allowed are {', '.join(PLACEMENTS)}, a device")
        return problems

    @property
    def torch_dtype(self) -> torch.dtype:
        if self.dtype != "auto":
            return getattr(torch, self.dtype)
        if self.device_map == "cpu" or not torch.cuda.is_available():
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


@dataclass(frozen=True)
class TrainedModel:
    """A loaded model with its tokenizer and the configuration of its run.

    Args:
        model: in eval mode, on its devices; a PeftModel, or the complete model of a folder without an adapter. Its
            generation settings are greedy, whatever the base model's folder proposes.
        tokenizer: with a padding token.
        run_config: the run's `run_config.json` (its `prompt_template`, `max_seq_length`, `validation_file` ...);
            empty if the folder has none.
        base_model: folder or hub id of the base model.
        proposed_generation: the generation settings in the base model's folder, for a model that is saved from this
            one.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    run_config: dict
    base_model: str
    proposed_generation: GenerationConfig = field(default_factory=GenerationConfig)

    def template(self, wanted: str | None = None) -> str:
        """The prompt template, `plain` or `chat`: the wanted one, or else that of the run.

        Raises:
            InputError: see `data.resolve_template`.
        """
        return resolve_template(wanted or self.run_config.get("prompt_template", "auto"), self.tokenizer)

    @property
    def max_seq_length(self) -> int:
        """Maximum length of a row in tokens: that of the run, or else the default of a run."""
        return self.run_config.get("max_seq_length", DataArguments.max_seq_length)

    def encoding(self, template: str | None = None, max_seq_length: int | None = None) -> Encoding:
        """How rows become tokens: as in the run, apart from what is given."""
        return Encoding(
            self.template(template),
            max_seq_length or self.max_seq_length,
            self.num_task_types,
            self.task_type_names,
            self.run_config.get("train_on", "all"),
        )

    def end_tokens(self, template: str) -> list[int]:
        """See `generation.end_tokens`."""
        return end_tokens(self.model, self.tokenizer, template)

    @property
    def num_task_types(self) -> int:
        if isinstance(self.model, PeftModel):
            return self.model.active_peft_config.num_task_types
        return self.run_config.get("num_task_types", 2)

    @property
    def task_type_names(self) -> tuple[str, ...]:
        if isinstance(self.model, PeftModel):
            return tuple(self.model.active_peft_config.task_type_names or ())
        return tuple(listed(self.run_config.get("task_type_names")) or ())

    def as_base(self) -> AbstractContextManager:
        """A context in which the model is the base model.

        Raises:
            InputError: the model does not have an adapter.
        """
        if not isinstance(self.model, PeftModel):
            raise InputError(
                "this folder holds a complete model, not an adapter, so there is no base model to compare with; "
                "give the base model's own folder as --adapter to run it"
            )
        return self.model.disable_adapter()


def read_run_config(folder: Path) -> dict:
    """The configuration of the run that wrote a folder, which may be a checkpoint; {} if there is none.

    Raises:
        InputError: it is damaged: not a JSON object, or a field that is read here has another type.
    """
    is_checkpoint = CHECKPOINT_NAME.fullmatch(folder.absolute().name)
    file = (folder.absolute().parent if is_checkpoint else folder) / RUN_CONFIG_NAME
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON ({error}): the file is damaged, restore it") from None
    if not isinstance(config, dict):
        raise InputError(f"{file} holds {shown(config)} instead of an object: the file is damaged, restore it")
    config = with_current_names(config)
    refuse(
        [
            f"{file}: {name!r} is {shown(config[name])}, but has to be {kind}: the file is damaged, restore it"
            for name, (kind, types) in RUN_FIELDS.items()
            if name in config and type(config[name]) not in types
        ]
    )
    return config


@dataclass(frozen=True)
class TrainedFolder:
    """A folder with an adapter or a complete model, checked, before any weights are loaded.

    Args:
        folder: where it is.
        config: the adapter's configuration; None for a complete model.
        base_model: folder or hub id of the base model.
        tokenizer: that of the folder, or else the base model's.
        skeleton: the model with its adapter, without weights.
    """

    folder: Path
    config: LoraConfig | None
    base_model: str
    tokenizer: PreTrainedTokenizerBase
    skeleton: nn.Module


def find_trained(adapter: str, base_model: str | None = None) -> TrainedFolder:
    """Find an adapter and its base model, or a complete model, and check everything but the weights of the base.

    Args:
        adapter: a folder or a hub id.
        base_model: likewise; None for the one that the adapter names.

    Raises:
        InputError: the folder or hub id does not exist or is not an adapter, its base model is missing or does not fit
            (the message names the layers), or a file is damaged.
    """
    folder = _local_folder(adapter)
    config = _adapter_config(folder)
    base = (base_model or config.base_model_name_or_path) if config else str(folder)
    if not base:
        raise InputError(f"{folder}: its {ADAPTER_CONFIG_NAME} does not name a base model; give one with --base_model")
    if _is_missing_folder(base):
        named = "--base_model" if base_model else f"the base model that {folder} names"
        raise InputError(f"{base}: no such folder ({named}); give the base model's folder or hub id with --base_model")
    tokenizer = load_tokenizer(str(folder) if (folder / "tokenizer_config.json").is_file() else base)
    if config and (warning := other_base_warning(config.base_model_name_or_path, base)):
        print(warning, file=sys.stderr)
    skeleton = check_base_model(base, tokenizer, partial(_put_adapter, folder=folder, config=config))
    return TrainedFolder(folder, config, base, tokenizer, skeleton)


def load_trained(args: InferenceArguments, casts_experts: bool = True) -> TrainedModel:
    """Load an adapter on its base model, or a complete model. Everything is checked before any weights are loaded.

    Args:
        casts_experts: see `cast_experts`; for a model that is only run.

    Raises:
        InputError: see `find_trained`; or the weights of the base model cannot be read.
    """
    found = find_trained(args.adapter, args.base_model)
    run_config = read_run_config(found.folder)
    model = _load_weights(found.base_model, args)
    proposed = model.generation_config
    drop_proposed_settings(model, found.tokenizer.pad_token_id)
    model = _put_adapter(model, found.folder, found.config).eval()
    if casts_experts:
        cast_experts(model)
    return TrainedModel(model, found.tokenizer, run_config, found.base_model, proposed)


def _put_adapter(model: nn.Module, folder: Path, config: LoraConfig | None) -> nn.Module:
    return PeftModel.from_pretrained(model, folder, config=config) if config else model.eval()


def cast_experts(model: nn.Module) -> None:
    """Give the experts and routers of each half-precision Linear its dtype, once instead of in every call.

    The products are those of the call bit for bit, and the softmax of the routers stays float32. Quantised Linears are
    left alone.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer) and module.weight.dtype in (torch.float16, torch.bfloat16):
            module.experts.to(module.weight.dtype)


def _local_folder(name: str) -> Path:
    """The folder of this name, or else a download of the hub repository."""
    if _is_missing_folder(name):
        raise InputError(f"--adapter {name}: no such folder")
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=list(PUBLISHED)))
    except (HTTPError, OSError, HFValidationError) as error:
        raise InputError(
            f"--adapter {name}: no such folder, and it could not be downloaded from the hub: {first_line(error)}"
        ) from error


def _adapter_config(folder: Path) -> LoraConfig | None:
    """The adapter's configuration; None for the folder of a complete model."""
    with reading(folder):
        is_adapter, is_model = ((folder / name).is_file() for name in (ADAPTER_CONFIG_NAME, MODEL_CONFIG_NAME))
        if not is_adapter and is_model:
            return None
        try:
            return LoraConfig.from_pretrained(folder)
        except ValueError as error:
            raise InputError(str(error)) from error


def _load_weights(base: str, args: InferenceArguments) -> nn.Module:
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=args.torch_dtype,
            device_map=args.device_map if torch.cuda.is_available() else "cpu",
            quantization_config=quantization(args.load_in_kbits, args.torch_dtype),
        )
    except (OSError, SafetensorError) as error:
        raise InputError(f"the weights of {base} could not be read: {first_line(error)}") from error
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InputError(f"{base} does not fit into the memory of the GPUs; quantise it with --load_in_kbits 4")
    keep_4bit_packing(model)
    return model


def _is_missing_folder(base: str) -> bool:
    """True if a name can only be a local folder (a hub id has at most one slash), but does not exist.

    Raises:
        InputError: the system does not allow the check.
    """
    with reading(Path(base)):
        is_folder, has_parent = Path(base).is_dir(), Path(base).parent.is_dir()
    is_path = base.startswith((".", "/", "~")) or base.count("/") > 1 or has_parent
    return is_path and "/" in base and not is_folder


def _device_problem(device: str) -> str | None:
    try:
        kind = torch.device(device).type
    except RuntimeError:
        return "no such device"
    if kind == "cpu":
        return None
    return None if kind == "cuda" and torch.cuda.is_available() else "this machine does not have such a device"
