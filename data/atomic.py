"""Atomic writes: what is written appears under its name complete, or not at all.

It is written under a temporary name next to its place, `.NAME.RANDOM.tmp`, flushed to the disk and renamed. Only a
process that is killed leaves a temporary file or folder; where one process alone writes, `remove_temporaries` clears it
away.
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A context that yields the path to write to; where it ends well, the file replaces one at `path`."""
    temporary = _temporary(path)
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A context that yields a folder to fill; where it ends well, the folder is renamed to `path`.

    `path` may be an empty folder, or a link to one, and its parents are made.
    """
    path = path.resolve()  # a link cannot be replaced by a folder
    with _temporary_folder(path) as temporary:
        yield temporary
        for file in filter(Path.is_file, temporary.rglob("*")):
            _flush(file)
        temporary.rename(path)


@contextmanager
def atomic_files(folder: Path) -> Iterator[Path]:
    """A context that yields a folder to fill; where it ends well, each of its files is moved to the same place in
    `folder`, whose other files stay. It lies in `folder`, so that one who clears that away clears it away, too."""
    with _temporary_folder(folder / "files") as temporary:
        yield temporary
        for file in filter(Path.is_file, list(temporary.rglob("*"))):
            _flush(file)
            place = folder / file.relative_to(temporary)
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def remove_temporaries(folder: Path, name: str = "*") -> None:
    """Remove what killed processes were writing into a folder under `name`. Nobody else may be writing there now."""
    for path in folder.glob(f".{name}.tmp"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


@contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    temporary = _temporary(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush(file: Path) -> None:
    """Wait until a file is on the disk: a name that a power cut leaves has its content."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
