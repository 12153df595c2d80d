"""Checkpoints: recognising an incomplete or corrupt one, finding the last complete one, writing them atomically."""

import errno
import json
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from data import InputError, first_line
from data.errors import cannot_write, error_number
from loading.run_files import CHECKPOINT_NAME, STATE_NAME

# The folder, inside the run's, in which a checkpoint is written. Hidden, and not named like a checkpoint; fixed, since
# all processes write into it.
TEMPORARY_NAME = ".checkpoint.tmp"
# Files of weights, and the file without which each cannot be read.
WEIGHTS = {
    "adapter_model.safetensors": "adapter_config.json",
    "model.safetensors": "config.json",
    "model.safetensors.index.json": "config.json",
}
# What training resumes from. DeepSpeed keeps both in a separate folder.
OPTIMIZER_STATE = ("optimizer.pt", "scheduler.pt")
DEEPSPEED_STATE = "global_step*"
# Advice for errors of writing.
REMEDIES: dict[int | None, str] = {
    errno.EACCES: "make the folder writable",
    errno.EROFS: "mount the disk so that it can be written",
    errno.EDQUOT: "make room or have your quota raised",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EIO: "see whether the disk is broken",
    errno.ENOSPC: "make room",
}


def checkpoint_problem(folder: Path, finished: bool = False) -> str | None:
    """The reason why a checkpoint cannot be resumed, or None. Reads headers and tables of contents, not the tensors.

    Args:
        finished: it is a finished run's folder: like a checkpoint, but without the optimizer's state. Checkpoints in it
            are not looked at.
    """
    weights = [name for name in WEIGHTS if (folder / name).is_file()]
    if not weights:
        return f"it has none of {', '.join(WEIGHTS)}"
    needed = [WEIGHTS[weights[0]], STATE_NAME]
    if not finished and not any(folder.glob(DEEPSPEED_STATE)):
        needed += OPTIMIZER_STATE
    for name in needed:
        if not (folder / name).is_file():
            return f"it has no {name}"
    for file in sorted(folder.glob("*" if finished else "**/*")):
        if problem := _file_problem(file):
            return f"{file.relative_to(folder)} is damaged or incomplete ({problem})"
    return None


def find_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The last complete checkpoint in a run's folder, if any, and a sentence on each later one that is not."""
    numbered = [
        (int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := CHECKPOINT_NAME.fullmatch(path.name))
    ]
    skipped: list[str] = []
    for _, path in sorted(numbered, reverse=True):
        problem = checkpoint_problem(path)
        if problem is None:
            return path, skipped
        skipped.append(f"{path} cannot be resumed and is skipped: {problem}")
    return None, skipped


def writers(folder: Path) -> int:
    """Number of processes that wrote a checkpoint: each leaves its random states."""
    return len(list(folder.glob("rng_state*.pth")))


def put_in_place(temporary: Path, name: str) -> None:
    """Move a checkpoint out of the folder `temporary`, in which it was written, in one step, and remove that folder.

    Unlike `data.atomic`, this has one folder for several processes, and a checkpoint of the same step may be there
    already. If that one is complete it stays, so that the checkpoint is never missing: the two differ in their state
    alone, since an epoch's end may have been logged in between.
    """
    place = temporary.parent / name
    if place.exists() and checkpoint_problem(place):
        shutil.rmtree(place)
    if place.exists():
        (temporary / name / STATE_NAME).replace(place / STATE_NAME)
    else:
        (temporary / name).rename(place)
    shutil.rmtree(temporary)


@contextmanager
def writing(run_folder: Path, name: str) -> Iterator[None]:
    """A context in which something is written into a run's folder.

    Raises:
        InputError: it could not be written (the disk is full, say). Checkpoints are as they were before.
    """
    try:
        yield
    except InputError:  # of a checkpoint within
        raise
    except Exception as error:
        if not cannot_write(error):
            raise
        raise InputError(_unwritten_message(run_folder, name, error)) from error


def _unwritten_message(run_folder: Path, name: str, error: Exception) -> str:
    shutil.rmtree(run_folder / TEMPORARY_NAME, ignore_errors=True)
    last, _ = find_checkpoint(run_folder)
    free = shutil.disk_usage(run_folder.parent).free // 1_000_000
    remedy = REMEDIES.get(error_number(error), "make room, or make the folder writable,")
    return (
        f"{run_folder / name} could not be written: {first_line(error)} ({free:,} MB are free on this disk). "
        f"The last good checkpoint is {last or 'none'}; {remedy} and run the same command again to go on from it"
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
