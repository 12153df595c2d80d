"""Turn a checkpoint of the authors' code into an adapter that `PeftModel.from_pretrained` loads.

Run as ``python -m scripts.import_reference --checkpoint DIR --output DIR`` from the repository root. The authors' code
writes `adapter_config.json` and the pickle `adapter_model.bin`, with a Linear of its own for each expert:

    base_model.model.MODULE.lora_route.weight (E, I)    .lora_A{n}.weight (R, I)    .lora_B{n}.weight (O, R)

Here the experts are stacked in their order, as `MODULE.experts.router.weight` (E, I), `.lora_A` (E*R, I) and `.lora_B`
(O, E*R), E experts of rank R on a Linear from I to O features. The numbers stay as they are, and so do delta and beta:
both codes draw the same half of the experts to the same task type. The output folder appears complete or not at all.
"""

import argparse
import json
import re
import shlex
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from statistics import mode

import torch
from safetensors import SafetensorError
from torch import Tensor

from data import InputError
from data.atomic import atomic_folder
from data.errors import writing
from loading.arguments import FLAG_OF_FIELD
from loading.command_line import output_problem
from peft import LoraConfig, TaskType
from peft.config import CONFIG_NAME
from peft.saving import save_adapter_weights

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
# Any other field may change what the adapter computes, unless its value is neutral. The authors' code never merges.
HARMLESS = {"base_model_name_or_path", "inference_mode", "init_lora_weights", "merge_weights", "revision"}
NEUTRAL = (None, False, "", "none", [], {})


def main(argv: list[str] | None = None) -> None:
    """Read the command line, import the checkpoint and say how to use the adapter.

    Raises:
        InputError: see `import_checkpoint`.
    """
    parser = argparse.ArgumentParser(
        prog="python -m scripts.import_reference",
        description="Turn a LoRAMoE checkpoint of the authors' code into an adapter of this code.",
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help=f"folder with {CONFIG_NAME} and {PICKLE_NAME}; only read")
    add("--output", type=Path, required=True, help="adapter folder to make; must be empty or not exist yet")
    add("--num_task_types", type=int, default=2, help="task types, each with a group of experts (default: %(default)s)")
    add("--base_model", help="base model to name in the adapter, instead of the one that the checkpoint names")
    args = parser.parse_args(argv)
    output = args.output.resolve()
    config, modules = import_checkpoint(args.checkpoint, output, args.num_task_types, args.base_model)
    print(*summary_lines(config, modules, output), sep="\n")


def import_checkpoint(
    checkpoint: Path, output: Path, num_task_types: int = 2, base_model: str | None = None
) -> tuple[LoraConfig, list[str]]:
    """Write the adapter of a checkpoint folder into the folder `output`.

    Args:
        checkpoint: a folder that the authors' code has saved.
        output: the adapter folder; its parents are made where they are missing.
        num_task_types: number of task types K, which the authors' configuration does not hold (their code has two).
        base_model: name of the base model, where it is not the one in the checkpoint's configuration.

    Returns:
        The adapter's configuration and the names of the adapted Linears.

    Raises:
        InputError: the output folder is taken, files are missing or damaged, or something in them cannot be imported.
            Nothing has been written then.
    """
    if problem := output_problem(output, is_folder=True):
        raise InputError(problem)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise InputError(f"{output} exists and is not an empty folder; move it away or choose another --output")
    if missing := [name for name in (CONFIG_NAME, PICKLE_NAME) if not (checkpoint / name).is_file()]:
        raise InputError(
            f"{checkpoint} is no checkpoint of the authors' code: it has no {' and no '.join(missing)} (their code "
            "saves both into folders named sft_lora_model)"
        )
    config = read_config(checkpoint / CONFIG_NAME, num_task_types, base_model)
    tensors = read_tensors(checkpoint / PICKLE_NAME)
    modules = adapted_modules(tensors)
    if problems := tensor_problems(tensors, modules, config):
        raise InputError(f"{checkpoint / PICKLE_NAME} does not fit its {CONFIG_NAME}:\n  " + "\n  ".join(problems))
    config.target_modules = targets_for(config.target_modules, modules)
    with (
        writing(f"{output} cannot be written", "once it can, run the same command again"),
        atomic_folder(output) as folder,
    ):
        save_adapter_weights(stack_experts(tensors, modules, config.lora_nums), folder)
        config.save_pretrained(folder)
    return config, modules


def read_config(path: Path, num_task_types: int, base_model: str | None) -> LoraConfig:
    """The configuration of this code that says the same as one of the authors'.

    Raises:
        InputError: it is not JSON, fields are missing or of the wrong type, `LoraConfig` does not allow their values,
            or a field asks for something that this code does not have.
    """
    try:
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
            **{name: values[name] for name in NUMBERS},
        )
    except ValueError as error:
        raise InputError(f"{path} with {num_task_types} task types: {error}") from None


def config_problems(values: dict) -> list[str]:
    """One line for each field that is missing, of the wrong type, or not to be represented in this code."""
    problems = []
    for name, kinds in NUMBERS.items():
        if type(values.get(name)) not in kinds:
            needed = "whole number" if kinds == (int,) else "number"
            problems.append(f"{name} is {_shown(values, name)}, but has to be a {needed}")
    targets = values.get("target_modules")
    if not isinstance(targets, str) and not (isinstance(targets, list) and all(isinstance(t, str) for t in targets)):
        problems.append(f"target_modules is {_shown(values, 'target_modules')}, but has to be a list of names")
    neutral = {"peft_type": (None, "LORA"), "task_type": (None, "CAUSAL_LM")}
    for name in values.keys() - NUMBERS.keys() - HARMLESS - {"target_modules"}:
        if values[name] not in neutral.get(name, NEUTRAL):
            problems.append(f"{name} is {_shown(values, name)}, which adapters of this code do not have")
    return sorted(problems)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of the pickle by name, on the CPU. No code that the pickle may hold is run.

    Raises:
        InputError: it is damaged, or holds anything else than tensors by name.
    """
    try:
        # torch warns of odd files before it fails on them.
        with path.open("rb") as file, warnings.catch_warnings(action="ignore"):
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # what the bytes of a damaged pickle spell can fail in any way, as an OSError, too
        named = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, UnpicklingError) else None
        if named:
            raise InputError(
                f"{path} holds more than tensors: it refers to {named[1]}. Loading that could run any code, so it is "
                "not loaded, for safety; ask its maker for a file with tensors alone"
            ) from None
        raise InputError(
            f"{path} is damaged or incomplete, or torch.save did not write it ({type(error).__name__}); restore it "
            "from a copy"
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(key, str) for key in tensors):
        raise InputError(f"{path} holds a {type(tensors).__name__}, but has to be a dictionary of tensors by name")
    if others := [key for key, value in tensors.items() if not isinstance(value, Tensor)]:
        raise InputError(f"{path} has to hold tensors alone, but these are none: {', '.join(others)}")
    return tensors


def adapted_modules(keys: Iterable[str]) -> list[str]:
    """Names of the Linears that have experts or a router, in the base model and in the order of the keys."""
    return list(dict.fromkeys(match[1] for key in keys if (match := KEY.fullmatch(key))))


def tensor_problems(tensors: dict[str, Tensor], modules: list[str], config: LoraConfig) -> list[str]:
    """One line for each tensor that is missing, surplus, of the wrong shape or no floating-point numbers."""
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
        problems.insert(0, f"there is no expert: no key is like {_key('MODULE', 'lora_A0')}")
    if any(tensor.numel() == 0 for tensor in found.values()):
        problems.append("empty tensors are what ZeRO-3 leaves where a model is saved without gathering its weights")
    return problems


def targets_for(wanted: list[str], modules: list[str]) -> list[str]:
    """`target_modules` that find exactly these Linears.

    The authors' code compares a list with the bare end of a name ("proj" finds "up_proj") and takes a string for a
    regular expression; this one compares whole parts of the dotted name. Where the difference matters, each Linear is
    named in full.
    """
    found = {target: {name for name in modules if f".{name}".endswith(f".{target}")} for target in wanted}
    enough = set().union(*found.values()) == set(modules)
    return sorted(target for target in wanted if found[target]) if enough else sorted(modules)


def stack_experts(tensors: dict[str, Tensor], modules: list[str], num_experts: int) -> dict[str, Tensor]:
    """The tensors of an adapter of this code, float32. One expert has no router: softmax over it is always 1."""

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
    """What was imported, and how to use it."""
    names = ", ".join(sorted({module.rsplit(".", 1)[-1] for module in modules}))
    experts = f"{config.lora_nums} expert{'s' if config.lora_nums > 1 else ''} of rank {config.r}"
    lines = [f"{len(modules)} adapted Linears ({names}), each with {experts}, are now in {output}"]
    if config.lora_nums == 1:
        lines.append("note: the routers (lora_route) were left out, since softmax over one expert is always 1")
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
    """Flags of `train.py` that continue from the adapter with its own settings."""
    flags = ["--peft_path", str(output), "--prompt_template", "plain"]
    for name, flag in FLAG_OF_FIELD.items():
        value = getattr(config, name)
        if value is not None:
            flags += [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return flags


def _needed_shapes(tensors: dict[str, Tensor], module: str, config: LoraConfig) -> dict[str, tuple]:
    """Shapes of a Linear's tensors by key. Its width is what most of its tensors say."""
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
    try:
        main()
    except (InputError, OSError, SafetensorError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted; nothing half-made was left")
