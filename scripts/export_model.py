"""Export a mixture, routed as it was trained, as a model folder that loads without this repository.

Run as ``python -m scripts.export_model --adapter DIR --output DIR`` from the repository root. The output holds the base
model's weights, the adapter's, and one file of code that needs torch and transformers only: plain transformers, vLLM
and other servers load it with `trust_remote_code`. docs/EXPORT.md tells it from the other exports.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from data import InputError
from data.atomic import atomic_folder
from data.errors import writing
from inference.standalone import compare
from inference.standalone.folder import stock_classes, write_card, write_code, write_config, write_generation_config
from inference.standalone.weights import exported_tensors, load_offloaded, routed_in_float32, write_shards
from inference.trained import TrainedFolder, find_trained
from loading.command_line import flag, output_problem, parse_flags, run_verb
from peft.saving import load_adapter_weights
from transformers_patch.auto import base_of

COMMAND = "python -m scripts.export_model"
PROMPT = "The capital of Kenya is Nairobi"
# Largest allowed difference of logits in float32, as a part of the largest logit. The sums have the same order, but the
# scaling, unless it is a power of two, is rounded elsewhere.
TOLERANCE = 1e-5


@dataclass
class ExportArguments:
    """Where from and where to."""

    adapter: str = flag(None, "adapter: a folder or a hub id", required=True)
    output: str = flag(None, "folder to create; has to be empty if it exists", required=True)
    base_model: str | None = flag(None, "base model: a folder or a hub id; by default the one named in the adapter")

    def problems(self) -> list[str | None]:
        return [output_problem(self.output, is_folder=True)]


def main(argv: list[str] | None = None) -> None:
    """Read the command line, write the folder, load it in another process and compare the logits.

    Raises:
        InputError: flags, adapter or base model cannot be used, or the logits differ. Nothing has been written.
    """
    (args,) = parse_flags(COMMAND, __doc__.splitlines()[0], (ExportArguments,), argv)
    trained = find_trained(args.adapter, args.base_model)
    check_export(trained, Path(args.output))
    with (
        writing(f"{args.output} cannot be written", "once it can, run the same command again"),
        atomic_folder(Path(args.output)) as folder,
        TemporaryDirectory(dir=folder) as scratch,
    ):
        base = load_offloaded(trained.base_model, Path(scratch))
        write_model(base, trained, folder)
        line = check_logits(base, trained, folder, Path(scratch))
    print(line, f"saved a model in {args.output}", sep="\n")


def check_export(trained: TrainedFolder, output: Path) -> None:
    """Raises InputError if this model cannot be exported there."""
    if trained.config is None:
        raise InputError("this folder holds a complete model, not an adapter: it does not need an export")
    base = base_of(trained.skeleton)
    if getattr(base.config, "quantization_config", None):
        raise InputError(
            f"the weights of {trained.base_model} are quantised, and an export holds unquantised ones: name the base "
            "model that it was made from with --base_model; servers can quantise the export as they load it"
        )
    stock_classes(base)
    dtype = base.config.dtype or torch.float32
    needed = sum(parameter.numel() for parameter in base.parameters()) * dtype.itemsize
    place = next(filter(Path.is_dir, (output.absolute(), *output.absolute().parents)))
    if needed > (free := shutil.disk_usage(place).free):
        raise InputError(
            f"--output {output} needs {needed / 1e9:.1f} GB, and {place} has {free / 1e9:.1f} GB of free disk space; "
            "free some, or choose another place"
        )


def write_model(base: PreTrainedModel, trained: TrainedFolder, folder: Path) -> None:
    """Write all files of the export."""
    write_shards(exported_tensors(base, load_adapter_weights(trained.folder)), folder)
    write_code(base, folder)
    write_config(base, trained, folder)
    write_generation_config(base.generation_config, folder)
    trained.tokenizer.save_pretrained(folder)
    write_card(trained, folder)


def check_logits(base: PreTrainedModel, trained: TrainedFolder, folder: Path, scratch: Path) -> str:
    """Load the export in a process that does not see this repository, and compare its logits with the routed model's.

    Returns:
        A line that tells the largest difference.

    Raises:
        InputError: it cannot be loaded, or the logits differ.
    """
    compare.give_freed_memory_back()
    ids = trained.tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = routed_in_float32(base, trained)(ids).logits
    save_file({"input_ids": ids, "logits": logits}, scratch / "expected.safetensors")
    result = subprocess.run(
        [sys.executable, "-I", compare.__file__, folder, scratch / "expected.safetensors"],
        cwd=scratch,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch / "modules")},
        capture_output=True,
        text=True,
    )
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        raise InputError(f"the exported model cannot be loaded, nothing was kept: {reason}")
    found = json.loads(result.stdout.splitlines()[-1])
    bound = TOLERANCE * logits.abs().max().item()
    line = f"largest difference of logits, in a process without this repository: {found['difference']:.1e}"
    if found["odd"] or not found["difference"] <= bound:
        raise InputError("\n".join([f"{line}, but can be at most {bound:.1e}; nothing was kept", *found["odd"]]))
    return line


if __name__ == "__main__":
    run_verb(main)
