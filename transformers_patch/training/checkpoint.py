"""Checkpoints that are whole or not there: recognising a torn one, finding the last whole one."""

import json
import re
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

# Where a checkpoint lies, inside the run's folder, while it is being written. Hidden, and not named like a checkpoint.
ASIDE = ".checkpoint-being-written"
NAME = re.compile(r"checkpoint-(\d+)")
WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")
STATE = "trainer_state.json"


def checkpoint_problem(folder: Path) -> str | None:
    """What keeps a checkpoint from being resumed, or None. Reads headers and tables of contents, not the tensors."""
    if not any((folder / name).is_file() for name in WEIGHTS):
        return f"it has none of {', '.join(WEIGHTS)}"
    if not (folder / STATE).is_file():
        return f"it has no {STATE}"
    for file in sorted(folder.rglob("*")):
        if problem := _file_problem(file):
            return f"{file.relative_to(folder)} is damaged or incomplete ({problem})"
    return None


def find_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The last whole checkpoint in a run's folder, if there is one, and a sentence on each later one that is torn."""
    numbered = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := NAME.fullmatch(path.name))]
    torn = []
    for _, path in sorted(numbered, reverse=True):
        problem = checkpoint_problem(path)
        if problem is None:
            return path, torn
        torn.append(f"{path} cannot be resumed and is skipped: {problem}")
    return None, torn


def put_in_place(aside: Path, name: str) -> None:
    """Move a checkpoint that is written out of the folder `aside`, in one step, and remove that folder.

    One of the same step that is whole stays: it is the same, and there is no moment without it.
    """
    place = aside.parent / name
    if place.exists() and checkpoint_problem(place):
        shutil.rmtree(place)
    if not place.exists():
        (aside / name).rename(place)
    shutil.rmtree(aside)


def unwritten_message(run_folder: Path, name: str, error: Exception) -> str:
    """What to tell the user after a checkpoint could not be written."""
    shutil.rmtree(run_folder / ASIDE, ignore_errors=True)
    last, _ = find_checkpoint(run_folder)
    free = shutil.disk_usage(run_folder).free // 1_000_000
    return (
        f"{run_folder / name} could not be written: {str(error).splitlines()[0]} ({free:,} MB are free on this disk). "
        f"The last good checkpoint is {last or 'none'}; make room and run the same command again to go on from it"
    )


def _file_problem(file: Path) -> str | None:
    try:
        if file.suffix == ".json":
            json.loads(file.read_text())
        elif file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                pass
        elif file.suffix in (".pt", ".pth"):
            # torch.save writes a zip archive, whose table of contents comes last.
            zipfile.ZipFile(file).close()
    except (ValueError, SafetensorError, zipfile.BadZipFile) as error:
        return str(error)
    return None
