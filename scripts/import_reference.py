"""Convert a checkpoint of the authors' code to an adapter that `PeftModel.from_pretrained` loads.

Run as ``python -m scripts.import_reference --checkpoint DIR --output DIR`` from the repository root. The authors' code
writes `adapter_config.json` and the pickle `adapter_model.bin`, with separate Linears for each expert:

    base_model.model.MODULE.lora_route.weight (E, I)    .lora_A{n}.weight (R, I)    .lora_B{n}.weight (O, R)

Here the experts are stacked in order, as `MODULE.experts.router.weight` (E, I), `.lora_A` (E*R, I) and `.lora_B`
(O, E*R), for E experts of rank R on a Linear from I to O features. The numbers do not change, nor do `blc_alpha` and
`blc_weight`: both implementations pull the same half of the experts towards the same task type. The output folder is
either complete or not created.
"""

import json
import re
import shlex
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from statistics import mode

import torch
from torch import Tensor

from data import InputError
from data.atomic import atomic_folder
from data.errors import reading, writing
from loading.arguments import FLAG_OF_FIELD
from loading.command_line import flag, output_problem, parse_flags, run_verb
from peft import LoraConfig, TaskType
from peft.config import CONFIG_NAME
from peft.saving import save_adapter_weights

COMMAND = "python -m scripts.import_reference"
PICKLE_NAME = "adapter_model.bin"
PREFIX = "base_model.model."
KEY = re.compile(re.escape(PREFIX) + r"(.+)\.lora_(?:route|A\d+|B\d+)\.weight")

NUMBERS = {
    "r": (int,),
    "lora_nums": (int,),
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "blc_alpha": (int, float),
    "blc_weight": (int, float),
}
# Any other field may change the adapter's output, unless its value is neutral. The authors' code never merges.
HARMLESS = {"base_model_name_or_path", "inference_mode", "init_lora_weights", "merge_weights", "revision"}
NEUTRAL: tuple = (None, False, "", "none", [], {})


@dataclass
class ImportArguments:
    """The checkpoint to import, and the place of the adapter."""

    checkpoint: str = flag(None, f"folder with {CONFIG_NAME} and {PICKLE_NAME}; only read", required=True)
    output: str = flag(None, "adapter folder to create; has to be empty if it exists", required=True)
    num_task_types: int = flag(2, "number of task types, each with a group of experts")
    base_model: str | None = flag(None, "base model to name in the adapter; by default the one in the checkpoint")

    def problems(self) -> list[str | None]:
        return [output_problem(self.output, is_folder=True)]


def main(argv: list[str] | None = None) -> None:
    """Read the command line, import the checkpoint and say how to use the adapter.

    Raises:
        InputError: the output folder is taken, or see `import_checkpoint`.
    """
    (args,) = parse_flags(COMMAND, __doc__.splitlines()[0], (ImportArguments,), argv)
    output = Path(args.output).resolve()
    config, modules = import_checkpoint(Path(args.checkpoint), output, args.num_task_types, args.base_model)
    print(*summary_lines(config, modules, output), sep="\n")


def import_checkpoint(
    checkpoint: Path, output: Path, num_task_types: int = 2, base_model: str | None = None
) -> tuple[LoraConfig, list[str]]:
    """Write the adapter of a checkpoint folder into the folder `output`.

    Args:
        checkpoint: a folder that the authors' code has saved.
        output: the adapter folder; missing parents are created.
        num_task_types: number of task types, which is not in the authors' configuration (their code has two).
        base_model: name of the base model, if it is not the one in the checkpoint's configuration.

    Returns:
        The adapter's configuration and the names of the adapted Linears.

    Raises:
        InputError: files are missing or damaged, something in them cannot be imported, or the output folder cannot be
            written. Nothing has been written.
    """
    with reading(checkpoint):
        missing = [name for name in (CONFIG_NAME, PICKLE_NAME) if not (checkpoint / name).is_file()]
    if missing:
        raise InputError(
            f"{checkpoint} is not a checkpoint of the authors' code: it does not have {' and '.join(missing)} (their "
            "code saves both in folders named sft_lora_model)"
        )
    config = read_config(checkpoint / CONFIG_NAME, num_task_types, base_model)
    tensors = read_tensors(checkpoint / PICKLE_NAME)
    modules = adapted_modules(tensors)
    if problems := tensor_problems(tensors, modules, config):
        raise InputError(f"{checkpoint / PICKLE_NAME} does not fit its {CONFIG_NAME}:\n  " + "\n  ".join(problems))
    wanted = config.target_modules if isinstance(config.target_modules, list) else []
    config.target_modules = targets_for(wanted, modules)
    with (
        writing(f"{output} cannot be written", "once it can, run the same command again"),
        atomic_folder(output) as folder,
    ):
        save_adapter_weights(stack_experts(tensors, modules, config.lora_nums), folder)
        config.save_pretrained(folder)
    return config, modules


def read_config(path: Path, num_task_types: int, base_model: str | None) -> LoraConfig:
    """The configuration of this code that is equivalent to one of the authors'.

    Raises:
        InputError: it is not JSON, fields are missing or of the wrong type, `LoraConfig` does not allow their values,
            or a field needs something that this code does not support.
    """
    try:
        with reading(path):
            values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}): the file is damaged, restore it") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a {type(values).__name__}, but has to be a JSON object")
    if problems := config_problems(values):
        raise InputError(f"{path} cannot be imported:\n  " + "\n  ".join(problems))
    try:
        return LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            base_model_name_or_path=base_model or values.get("base_model_name_or_path"),
            num_task_types=num_task_types,
            target_modules=values["target_modules"],
            lora_rslora=bool(values.get("use_rslora")),
            **{name: values[name] for name in NUMBERS},
        )
    except ValueError as error:
        raise InputError(f"{path} with {num_task_types} task types: {error}") from None


def config_problems(values: dict) -> list[str]:
    """One line for each field that is missing, of the wrong type, or not supported by this code."""
    problems = []
    for name, kinds in NUMBERS.items():
        if type(values.get(name)) not in kinds:
            needed = "whole number" if kinds == (int,) else "number"
            problems.append(f"{name} is {_shown(values, name)}, but has to be a {needed}")
    targets = values.get("target_modules")
    if not isinstance(targets, str) and not (isinstance(targets, list) and all(isinstance(t, str) for t in targets)):
        problems.append(f"target_modules is {_shown(values, 'target_modules')}, but has to be a list of names")
    neutral = {"peft_type": (None, "LORA"), "task_type": (None, "CAUSAL_LM"), "use_rslora": (True, *NEUTRAL)}
    for name in values.keys() - NUMBERS.keys() - HARMLESS - {"target_modules"}:
        if values[name] not in neutral.get(name, NEUTRAL):
            problems.append(f"{name} is {_shown(values, name)}, which adapters of this code do not have")
    return sorted(problems)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of the pickle by name, on the CPU. Code in the pickle is not executed.

    Raises:
        InputError: it is damaged, or contains anything but tensors by name.
    """
    try:
        # torch warns about unusual files before it fails on them.
        with path.open("rb") as file, warnings.catch_warnings(action="ignore"):
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # a damaged pickle can fail with any exception, even an OSError
        named = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, UnpicklingError) else None
        if named:
            raise InputError(
                f"{path} contains more than tensors: it refers to {named[1]}. Loading it could run any code, so it is "
                "refused for safety; ask its author for a file that only contains tensors"
            ) from None
        raise InputError(
            f"{path} is damaged or incomplete, or torch.save did not write it ({type(error).__name__}); restore it "
            "from a copy"
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(key, str) for key in tensors):
        raise InputError(f"{path} holds a {type(tensors).__name__}, but has to be a dictionary of tensors by name")
    if others := [key for key, value in tensors.items() if not isinstance(value, Tensor)]:
        raise InputError(f"{path} may only contain tensors, but these are not: {', '.join(others)}")
    return tensors


def adapted_modules(keys: Iterable[str]) -> list[str]:
    """Names in the base model of the Linears that have experts or a router, in the order of the keys."""
    return list(dict.fromkeys(match[1] for key in keys if (match := KEY.fullmatch(key))))


def tensor_problems(tensors: dict[str, Tensor], modules: list[str], config: LoraConfig) -> list[str]:
    """One line for each tensor that is missing, unexpected, of the wrong shape or not floating-point."""
    needed = {key: shape for module in modules for key, shape in _needed_shapes(tensors, module, config).items()}
    problems = [f"missing: {key}" for key in sorted(needed.keys() - tensors.keys())]
    problems += [f"unexpected: {key}" for key in sorted(tensors.keys() - needed.keys())]
    found = {key: tensors[key] for key in sorted(needed.keys() & tensors.keys())}
    problems += [
        f"{key} has shape {_size(tensor.shape)}, but has to have {_size(needed[key])}"
        for key, tensor in found.items()
        if tuple(tensor.shape) != needed[key]
    ]
    problems += [f"{key} holds {t.dtype}, but has to be float" for key, t in found.items() if not t.is_floating_point()]
    if not modules:
        problems.insert(0, f"there are no experts: no key is like {_key('MODULE', 'lora_A0')}")
    if any(tensor.numel() == 0 for tensor in found.values()):
        problems.append("empty tensors come from ZeRO-3, if a model is saved without gathering its weights")
    return problems


def targets_for(wanted: list[str], modules: list[str]) -> list[str]:
    """`target_modules` that match exactly these Linears.

    The authors' code compares a list with the end of a name ("proj" matches "up_proj") and uses a string as a regular
    expression; this code compares complete parts of the dotted name. If the difference matters, each Linear is named in
    full.
    """
    found = {target: {name for name in modules if f".{name}".endswith(f".{target}")} for target in wanted}
    enough = set().union(*found.values()) == set(modules)
    return sorted(target for target in wanted if found[target]) if enough else sorted(modules)


def stack_experts(tensors: dict[str, Tensor], modules: list[str], num_experts: int) -> dict[str, Tensor]:
    """The tensors of an adapter of this code, float32. A single expert has no router: softmax over it is always 1."""

    def joined(module: str, parts: list[str], dim: int) -> Tensor:
        return torch.cat([tensors[_key(module, part)].detach().float() for part in parts], dim=dim)

    stacked = {}
    for module in modules:
        experts = f"{PREFIX}{module}.experts"
        stacked[f"{experts}.lora_A"] = joined(module, [f"lora_A{n}" for n in range(num_experts)], dim=0)
        stacked[f"{experts}.lora_B"] = joined(module, [f"lora_B{n}" for n in range(num_experts)], dim=1)
        if num_experts > 1:
            stacked[f"{experts}.router.weight"] = joined(module, ["lora_route"], dim=0)
    return stacked


def summary_lines(config: LoraConfig, modules: list[str], output: Path) -> list[str]:
    """A summary of the import, and how to use the adapter."""
    names = ", ".join(sorted({module.rsplit(".", 1)[-1] for module in modules}))
    experts = f"{config.lora_nums} expert{'s' if config.lora_nums > 1 else ''} of rank {config.r}"
    lines = [f"{len(modules)} adapted Linears ({names}), each with {experts}, are now in {output}"]
    if config.lora_nums == 1:
        lines.append("note: the routers (lora_route) were dropped, since softmax over one expert is always 1")
    base = config.base_model_name_or_path or "BASE_MODEL"
    flags = training_flags(config, output)
    lines += [
        "to use them:",
        "  from peft import PeftModel",
        "  from transformers_patch import AutoModelForCausalLM",
        f"  base = AutoModelForCausalLM.from_pretrained({json.dumps(base)})",
        f"  model = PeftModel.from_pretrained(base, {json.dumps(str(output))})",
        "to train them further (plain is the authors' prompt format):",
        f"  pretrained_model={shlex.quote(base)} exp_name=further bash run_loramoe.sh {shlex.join(flags)}",
    ]
    return lines


def training_flags(config: LoraConfig, output: Path) -> list[str]:
    """Flags of `train.py` that continue from the adapter with the same settings."""
    flags = ["--peft_path", str(output), "--prompt_template", "plain"]
    for name, spelling in FLAG_OF_FIELD.items():
        value = getattr(config, name)
        if value is not None:
            flags += [spelling, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return flags


def _needed_shapes(tensors: dict[str, Tensor], module: str, config: LoraConfig) -> dict[str, tuple]:
    """Shapes of a Linear's tensors by key. Its width is the most common one of its tensors."""
    As = [_key(module, f"lora_A{n}") for n in range(config.lora_nums)]
    Bs = [_key(module, f"lora_B{n}") for n in range(config.lora_nums)]
    route = _key(module, "lora_route")

    def width(keys: list[str], axis: int, unknown: str) -> int | str:
        sizes = [tensors[key].shape[axis] for key in keys if key in tensors and tensors[key].ndim == 2]
        return mode(sizes) if sizes else unknown

    in_features, out_features = width([*As, route], 1, "in"), width(Bs, 0, "out")
    shapes = dict.fromkeys(As, (config.r, in_features)) | dict.fromkeys(Bs, (out_features, config.r))
    return shapes | {route: (config.lora_nums, in_features)}


def _key(module: str, part: str) -> str:
    return f"{PREFIX}{module}.{part}.weight"


def _size(shape: tuple) -> str:
    return f"({', '.join(map(str, shape))})"


def _shown(values: dict, name: str) -> str:
    return json.dumps(values[name]) if name in values else "missing"


if __name__ == "__main__":
    run_verb(main)
