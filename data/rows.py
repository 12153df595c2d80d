"""Rows of instruction data: finding the files, reading them row by row, checking every row.

A row has the string fields `instruction`, `input` (may be empty or missing) and `output`, an optional `task_type` (a
number, or a name where the run has names for them), an optional string `task` that names the kind of task, and an
optional list `aliases` of other answers that are right, which evaluation alone looks at. Files are JSON (a list of
rows), JSON Lines or Parquet; the last two are streamed in parts, so their size does not matter.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet
from tqdm import tqdm

from data.errors import InputError

SUFFIXES = (".json", ".jsonl", ".parquet")
UNLABELLED = -1
MOST_PROBLEMS_SHOWN = 10
# The last is what nesting without end gives.
NOT_JSON = (json.JSONDecodeError, UnicodeDecodeError, RecursionError)
# JSON Lines are cut into parts of about so many bytes, which processes share.
BYTES_OF_A_PART = 2**23


class Part(NamedTuple):
    """A stretch of a data file that can be read by itself.

    Args:
        file: the data file.
        first: number of its first row (in JSON Lines, of its first line), counting from 1.
        start, end: first byte and the one behind the last (JSON Lines); first row group and the one behind the last
            (Parquet); of no meaning in JSON, which is one part.
    """

    file: Path
    first: int = 1
    start: int = 0
    end: int = 0


def find_files(path: str | Path) -> list[Path]:
    """The data files that a path means: the file itself, or every data file in the folder, in name order.

    Raises:
        InputError: nothing is there, or nothing of a known kind.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if not files:
            raise InputError(f"{path}: no data files in this folder; looked for {', '.join(SUFFIXES)}")
        return files
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: unknown kind of data file {path.suffix!r}; allowed are {', '.join(SUFFIXES)}")
    return [path]


def split_files(files: list[Path]) -> list[Part]:
    """The files in parts, in their order.

    Raises:
        InputError: a file is empty, or no Parquet file although its name says so.
    """
    splitters = {".json": lambda file: iter([Part(file)]), ".jsonl": _split_json_lines, ".parquet": _split_parquet}
    for file in files:
        if file.stat().st_size == 0:
            raise InputError(f"{file}: the file is empty")
    return [part for file in files for part in splitters[file.suffix](file)]


def read_part(part: Part) -> Iterator[tuple[int, object]]:
    """Raw rows of a part with their numbers, counting from 1 in the file; in JSON Lines the number is the line's.

    Raises:
        InputError: the file is not what its name says.
    """
    readers = {".json": _read_json, ".jsonl": _read_json_lines, ".parquet": _read_parquet}
    return readers[part.file.suffix](part)


def check_rows(parts: list[Part], num_task_types: int, task_type_names: Sequence[str] = ()) -> int:
    """Read every row once and check it. Returns the number of rows.

    Raises:
        InputError: some row is not as it has to be (the first few are listed with file and row), or there is no row.
    """
    problems: list[str] = []
    count = 0
    for part in tqdm(parts, desc="checking rows", unit="part", disable=len(parts) < 2):
        for number, row in read_part(part):
            count += 1
            if problem := row_problem(row, num_task_types, task_type_names):
                problems.append(f"{part.file}: row {number}: {problem}")
            if len(problems) > MOST_PROBLEMS_SHOWN:
                raise InputError("\n".join([*problems[:-1], "... and perhaps more; mend these first"]))
    if problems:
        raise InputError("\n".join(problems))
    if not count:
        names = dict.fromkeys(str(part.file) for part in parts)
        raise InputError(f"{', '.join(names)}: there is no row")
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


def generate_rows(parts: list[Part], task_type_names: Sequence[str] = ()) -> Iterator[dict]:
    """Checked rows with every field present; a missing task type is -1, a missing `input`, `task` or `aliases` empty,
    and a name of a task type is its number.

    `source` says where a row comes from.
    """
    for part in parts:
        for number, row in read_part(part):
            task_type = row.get("task_type")
            if isinstance(task_type, str):
                task_type = task_type_names.index(task_type)
            yield {
                "instruction": row["instruction"],
                "input": row.get("input") or "",
                "output": row["output"],
                "task_type": UNLABELLED if task_type is None else task_type,
                "task": row.get("task") or "",
                "aliases": row.get("aliases") or [],
                "source": f"{part.file.name} row {number}",
            }


def _split_json_lines(file: Path) -> Iterator[Part]:
    size, start, first = file.stat().st_size, 0, 1
    with file.open("rb") as stream:
        while start < size:
            text = stream.read(BYTES_OF_A_PART) + stream.readline()
            yield Part(file, first, start, start + len(text))
            first, start = first + text.count(b"\n"), start + len(text)


def _split_parquet(file: Path) -> Iterator[Part]:
    first = 1
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for group in range(table.num_row_groups):
                yield Part(file, first, group, group + 1)
                first += table.metadata.row_group(group).num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{file}: not a readable Parquet file ({error})") from None


def _read_json(part: Part) -> Iterator[tuple[int, object]]:
    try:
        rows = json.loads(part.file.read_text(encoding="utf-8-sig"))
    except NOT_JSON as error:
        raise InputError(f"{part.file}: not JSON ({error}); JSON Lines files are named .jsonl") from None
    if not isinstance(rows, list):
        raise InputError(f"{part.file}: holds {_shown(rows)}, but a .json file has to be a list of rows")
    yield from enumerate(rows, start=1)


def _read_json_lines(part: Part) -> Iterator[tuple[int, object]]:
    with part.file.open("rb") as lines:
        lines.seek(part.start)
        number = part.first
        while lines.tell() < part.end:
            line = lines.readline()
            if line.strip():
                try:
                    yield number, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except NOT_JSON as error:
                    raise InputError(f"{part.file}: row {number}: not JSON ({error})") from None
            number += 1


def _read_parquet(part: Part) -> Iterator[tuple[int, object]]:
    number = part.first
    try:
        with pyarrow.parquet.ParquetFile(part.file) as table:
            for batch in table.iter_batches(row_groups=range(part.start, part.end)):
                for row in batch.to_pylist():
                    yield number, row
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{part.file}: not a readable Parquet file ({error})") from None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:60]}..."
