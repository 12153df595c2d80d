"""Rows of instruction data: finding the files, reading them block by block, checking every row.

A row has the string fields `instruction`, `input` (may be empty or missing) and `output`, an optional `task_type` (a
number, or a name where the run has names for them), an optional string `task` that names the kind of task, and an
optional list `aliases` of other answers that are right, which evaluation alone looks at. Files are JSON (a list of
rows), JSON Lines or Parquet; the last two are streamed, so their size does not matter.
"""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet
from tqdm import tqdm

from data.errors import InputError
from data.workers import map_blocks

SUFFIXES = (".json", ".jsonl", ".parquet")
UNLABELLED = -1
MOST_PROBLEMS_SHOWN = 10
# The last is what nesting without end gives.
NOT_JSON = (json.JSONDecodeError, UnicodeDecodeError, RecursionError)
# About how many bytes of JSON Lines make a block, and how many rows of the other kinds.
BYTES_OF_A_BLOCK = 2**18
ROWS_OF_A_BLOCK = 1000


class Block(NamedTuple):
    """Consecutive rows of a data file.

    Args:
        file: the data file.
        first: number of the first row (in JSON Lines, of the first line), counting from 1.
        content: lines of JSON Lines as they stand in the file; else the rows.
    """

    file: Path
    first: int
    content: bytes | list[object]


def find_files(path: str | Path) -> list[Path]:
    """The data files that a path means: the file itself, or every data file in the folder, in name order.

    Hidden files are none.

    Raises:
        InputError: nothing is there, nothing of a known kind, or what has the name of a data file is none.
    """
    path = Path(path)
    if path.is_dir():
        files = [entry for entry in _entries(path) if entry.suffix.lower() in SUFFIXES]
        if not files:
            raise InputError(f"{path}: no data files in this folder; looked for {', '.join(SUFFIXES)}")
        if odd := [str(file) for file in files if not file.is_file()]:
            raise InputError(f"{', '.join(odd)}: no file, but a folder or a broken link with the name of a data file")
        return files
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: unknown kind of data file {path.suffix!r}; allowed are {', '.join(SUFFIXES)}")
    return [path]


def passed_over(path: str | Path) -> tuple[str, ...]:
    """The names of what `find_files` does not take from a folder, folders in it among them; of a file none."""
    path = Path(path)
    if not path.is_dir():
        return ()
    return tuple(entry.name + "/" * entry.is_dir() for entry in _entries(path) if entry.suffix.lower() not in SUFFIXES)


def _entries(folder: Path) -> list[Path]:
    """What is not hidden, in name order. The system hides files of its own beside data, as macOS does `._a.jsonl`."""
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def split_files(files: list[Path]) -> Iterator[Block]:
    """The rows of the files in blocks, in their order.

    Raises:
        InputError: a file is empty or is not what its name says.
    """
    splitters = {".json": _split_json, ".jsonl": _split_json_lines, ".parquet": _split_parquet}
    for file in files:
        if file.stat().st_size == 0:
            raise InputError(f"{file}: the file is empty")
    for file in files:
        yield from splitters[file.suffix.lower()](file)


def read_block(block: Block) -> Iterator[tuple[int, object]]:
    """Raw rows of a block with their numbers, counting from 1 in the file; in JSON Lines the number is the line's.

    Raises:
        InputError: a line is not JSON.
    """
    if isinstance(block.content, bytes):
        yield from _read_json_lines(block)
    else:
        yield from enumerate(block.content, start=block.first)


def check_rows(files: list[Path], num_task_types: int, task_type_names: Sequence[str] = (), num_proc: int = 1) -> int:
    """Read every row once and check it. Returns the number of rows.

    Raises:
        InputError: some row is not as it has to be (the first few are listed with file and row), or there is no row.
    """
    problems: list[str] = []
    count = 0
    check = partial(_check_block, num_task_types=num_task_types, task_type_names=task_type_names)
    with tqdm(desc="checking rows", unit=" rows", delay=1) as bar:
        for rows, found in map_blocks(check, split_files(files), num_proc):
            bar.update(rows)
            count += rows
            problems += found
            if len(problems) > MOST_PROBLEMS_SHOWN:
                shown = problems[:MOST_PROBLEMS_SHOWN]
                raise InputError("\n".join([*shown, "... and perhaps more; mend these first"]))
    if problems:
        raise InputError("\n".join(problems))
    if not count:
        raise InputError(f"{', '.join(map(str, files))}: there is no row")
    return count


def row_problem(row: object, num_task_types: int, task_type_names: Sequence[str] = ()) -> str | None:
    """What is wrong with a row, or None."""
    if not isinstance(row, dict):
        return f"is {_shown(row)}, but has to be an object with instruction, input and output"
    for name in ("instruction", "input", "output", "task"):
        value = row.get(name)
        if value is None and name in ("input", "task"):
            continue
        if value is None:
            return f"has no {name!r}; its fields are {', '.join(map(repr, row)) or 'none'}"
        if not isinstance(value, str):
            return f"{name!r} is {_shown(value)}, but has to be a string"
        if not _is_unicode(value):
            return f"{name!r} holds half of a surrogate pair, which is no character: {_shown(value)}"
    if not row["output"].strip():
        return "'output' is empty: there is nothing to learn from"
    aliases = row.get("aliases") or []
    if not (isinstance(aliases, list) and all(isinstance(alias, str) and _is_unicode(alias) for alias in aliases)):
        return f"'aliases' is {_shown(aliases)}, but has to be a list of strings, or be left out"
    task_type = row.get("task_type")
    if isinstance(task_type, str) and task_type in task_type_names:
        return None
    if task_type is not None and (type(task_type) is not int or not 0 <= task_type < num_task_types):
        named = f"one of {', '.join(task_type_names)}, or " if task_type_names else ""
        allowed = " or ".join(map(str, range(num_task_types))) if num_task_types < 4 else f"0 to {num_task_types - 1}"
        return f"'task_type' is {_shown(task_type)}, but has to be {named}{allowed} (a whole number), or be left out"
    return None


def complete_rows(block: Block, task_type_names: Sequence[str] = ()) -> list[dict]:
    """Checked rows with every field present; a missing task type is -1, a missing `input`, `task` or `aliases` empty,
    and a name of a task type is its number.

    `source` says where a row comes from.
    """
    rows = []
    for number, row in read_block(block):
        task_type = row.get("task_type")
        if isinstance(task_type, str):
            task_type = task_type_names.index(task_type)
        rows.append(
            {
                "instruction": row["instruction"],
                "input": row.get("input") or "",
                "output": row["output"],
                "task_type": UNLABELLED if task_type is None else task_type,
                "task": row.get("task") or "",
                "aliases": row.get("aliases") or [],
                "source": f"{block.file.name} row {number}",
            }
        )
    return rows


def _check_block(block: Block, num_task_types: int, task_type_names: Sequence[str]) -> tuple[int, list[str]]:
    """The number of rows, and what is wrong with them."""
    rows = list(read_block(block))
    return len(rows), [
        f"{block.file}: row {number}: {problem}"
        for number, row in rows
        if (problem := row_problem(row, num_task_types, task_type_names))
    ]


def _split_json(file: Path) -> Iterator[Block]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
    except NOT_JSON as error:
        raise InputError(f"{file}: not JSON ({error}); JSON Lines files are named .jsonl") from None
    if not isinstance(rows, list):
        raise InputError(f"{file}: holds {_shown(rows)}, but a .json file has to be a list of rows")
    for start in range(0, len(rows), ROWS_OF_A_BLOCK):
        yield Block(file, start + 1, rows[start : start + ROWS_OF_A_BLOCK])


def _split_json_lines(file: Path) -> Iterator[Block]:
    first = 1
    with file.open("rb") as stream:
        while lines := stream.read(BYTES_OF_A_BLOCK) + stream.readline():
            yield Block(file, first, lines)
            first += lines.count(b"\n")


def _read_json_lines(block: Block) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(block.content.split(b"\n"), start=block.first):
        if line.strip():
            try:
                yield number, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except NOT_JSON as error:
                raise InputError(f"{block.file}: row {number}: not JSON ({error})") from None


def _split_parquet(file: Path) -> Iterator[Block]:
    first = 1
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(ROWS_OF_A_BLOCK):
                yield Block(file, first, batch.to_pylist())
                first += len(batch)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{file}: not a readable Parquet file ({error})") from None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:60]}..."
