"""Checkpoints that are whole or not there: recognising a torn one, finding the last whole one."""

import errno
import json
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from data import InputError, first_line
from data.errors import UNWRITABLE
from loading.run_files import CHECKPOINT_NAME, STATE_NAME

# Where a checkpoint lies, inside the run's folder, while it is being written. Hidden, and not named like a checkpoint.
ASIDE = ".checkpoint-being-written"
# Where the files of a finished run lie in the same way.
FILES_ASIDE = ".files-being-written"
# Files of weights, and the file without which each cannot be read.
WEIGHTS = {
    "adapter_model.safetensors": "adapter_config.json",
    "model.safetensors": "config.json",
    "model.safetensors.index.json": "config.json",
}
# What training goes on with. DeepSpeed keeps both in a folder of its own.
OPTIMIZER_STATE = ("optimizer.pt", "scheduler.pt")
DEEPSPEED_STATE = "global_step*"
# What helps where a file cannot be written.
REMEDIES = {
    errno.EACCES: "make the folder writable",
    errno.EROFS: "mount the disk so that it can be written",
    errno.EDQUOT: "make room or have your quota raised",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EIO: "see whether the disk is broken",
    errno.ENOSPC: "make room",
}
TORCH_CANNOT_WRITE = re.compile("PytorchStreamWriter failed|inline_container.*unexpected pos|basic_ios::clear")


def checkpoint_problem(folder: Path, finished: bool = False) -> str | None:
    """What keeps a checkpoint from being resumed, or None. Reads headers and tables of contents, not the tensors.

    Args:
        finished: it is a finished run's folder: like a checkpoint, but without the optimizer's state, and with others
            in it, which do not count.
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
    """The last whole checkpoint in a run's folder, if there is one, and a sentence on each later one that is torn."""
    numbered = [
        (int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := CHECKPOINT_NAME.fullmatch(path.name))
    ]
    torn = []
    for _, path in sorted(numbered, reverse=True):
        problem = checkpoint_problem(path)
        if problem is None:
            return path, torn
        torn.append(f"{path} cannot be resumed and is skipped: {problem}")
    return None, torn


def writers(folder: Path) -> int:
    """Number of processes that wrote a checkpoint: each leaves its random states."""
    return len(list(folder.glob("rng_state*.pth")))


def put_in_place(aside: Path, name: str) -> None:
    """Move a checkpoint that is written out of the folder `aside`, in one step, and remove that folder.

    One of the same step that is whole stays, and there is no moment without it. It is the same, but for its state: an
    epoch's end may have been logged in between.
    """
    place = aside.parent / name
    if place.exists() and checkpoint_problem(place):
        shutil.rmtree(place)
    if place.exists():
        (aside / name / STATE_NAME).replace(place / STATE_NAME)
    else:
        (aside / name).rename(place)
    shutil.rmtree(aside)


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


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """A hidden folder aside. Its files go into `folder`, those of folders within it into folders of the same names,
    where the context ends well; otherwise nothing of it stays."""
    aside = folder / FILES_ASIDE
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for file in filter(Path.is_file, list(aside.rglob("*"))):
            place = folder / file.relative_to(aside)
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)
    finally:
        shutil.rmtree(aside)


def clear_unfinished(folder: Path) -> None:
    """Remove what a killed run was just writing into its folder."""
    for aside in (ASIDE, FILES_ASIDE):
        shutil.rmtree(folder / aside, ignore_errors=True)
    for file in folder.glob(".*.tmp"):
        file.unlink()


def cannot_write(error: Exception) -> bool:
    """Whether an exception says that a file cannot be written. Torch says so in words alone."""
    return _error_number(error) in UNWRITABLE or bool(TORCH_CANNOT_WRITE.search(str(error)))


def _error_number(error: Exception) -> int | None:
    """The system's number of an error; libraries in Rust have it in their message alone."""
    if isinstance(error, OSError):
        return error.errno
    number = re.search(r"\(os error (\d+)\)", str(error))
    return int(number[1]) if number else None


def _unwritten_message(run_folder: Path, name: str, error: Exception) -> str:
    shutil.rmtree(run_folder / ASIDE, ignore_errors=True)
    last, _ = find_checkpoint(run_folder)
    free = shutil.disk_usage(run_folder.parent).free // 1_000_000
    remedy = REMEDIES.get(_error_number(error), "make room, or make the folder writable,")
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
