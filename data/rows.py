"""Rows of instruction data: checking and completing them.

A row has the string fields `instruction`, `input` (may be empty or missing) and `output`, an optional `task_type` (a
number, or a name if the run has names for them), an optional string `task` that names the task, and an optional list
`aliases` of other right answers, which only evaluation uses. Other columns are ignored, unless their names say that
they were meant to be trained on.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

from tqdm import tqdm

from data.errors import InputError
from data.files import Block, Unreadable, is_unicode, read_block, shown, split_files
from data.workers import map_blocks

FIELDS = ("instruction", "input", "output", "task_type", "task", "aliases")
# Names, without underscores, under which other formats keep what comes before an instruction.
CONVERSATION = {
    "system", "systemmessage", "systemprompt", "history", "chathistory", "conversationhistory", "messages", "turns",
    "chat", "conversation", "conversations", "dialog", "dialogue",
}  # fmt: skip
# What Dolly's format calls a field.
SYNONYMS = {"context": "input"}
# Ratio of matching letters from which a name is a misspelt field: `inputs`, `ouput`, `alias`; not `task_id`.
MISSPELT = 0.83
UNLABELLED = -1
MOST_PROBLEMS_SHOWN = 10


@dataclass(frozen=True)
class Reading:
    """How the rows of a source are read.

    Args:
        format: a key of `FORMATS`; None: recognised from a row's columns.
        columns: the file's name of a format's column, by the format's.
        task_type: of rows that do not say theirs, as a row would say it.
        task: of rows that do not say theirs.
        prefix: stands before the file's name in the `source` of a row.
    """

    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    task_type: int | str | None = None
    task: str | None = None
    prefix: str = ""

    def row(self, row):  # placeholder
        if not isinstance(row, dict):
            return row
        named = {there: name for name, there in self.columns.items()}
        row = {named.get(name, name): value for name, value in row.items()}
        if "completion" in row:
            row = {"instruction": row.pop("prompt"), "output": row.pop("completion"), **row}
        for name in ("task_type", "task"):
            if row.get(name) is None and getattr(self, name) is not None:
                row[name] = getattr(self, name)
        return row


def check_rows(
    files: list[Path],
    num_task_types: int,
    task_type_names: Sequence[str] = (),
    num_proc: int = 1,
    reading: Reading = Reading(),  # noqa: B008
) -> tuple[int, list[str]]:
    """Check every row. Returns the number of rows, and the names of columns that are ignored.

    Raises:
        InputError: rows are invalid (the first few are listed with file and row), or there are none.
    """
    problems: list[str] = []
    count, ignored = 0, set()
    check = partial(_check_block, num_task_types=num_task_types, task_type_names=task_type_names, reading=reading)
    with tqdm(desc="checking rows", unit=" rows", delay=1) as bar:
        for rows, found, others in map_blocks(check, split_files(files), num_proc):
            bar.update(rows)
            count += rows
            problems += found
            ignored |= others
            refuse_rows(problems, at_least=MOST_PROBLEMS_SHOWN + 1)
    refuse_rows(problems)
    if not count:
        raise InputError(f"{', '.join(map(str, files))}: there is no row")
    return count, sorted(ignored)


def refuse_rows(problems: list[str], at_least: int = 1) -> None:
    """Raise InputError with the first of the problems that rows have, if there are so many."""
    if len(problems) >= at_least:
        more = ["... and perhaps more; fix these first"] if len(problems) > MOST_PROBLEMS_SHOWN else []
        raise InputError("\n".join([*problems[:MOST_PROBLEMS_SHOWN], *more]))


def row_problem(row: object, num_task_types: int, task_type_names: Sequence[str] = ()) -> str | None:
    """The first problem of a row, or None."""
    if not isinstance(row, dict):
        return f"is {shown(row)}, but has to be an object with instruction, input and output"
    if problem := next(filter(None, (_column_problem(row, name) for name in _other_columns(row))), None):
        return problem
    for name in FIELDS:
        if isinstance(value := row.get(name), Unreadable):
            return f"{name!r} cannot be read: {value.reason}"
    for name in ("instruction", "input", "output", "task"):
        value = row.get(name)
        if value is None and name in ("input", "task"):
            continue
        if name not in row:
            return f"has no {name!r}; its fields are {', '.join(map(repr, row)) or 'none'}"
        if not isinstance(value, str):
            return f"{name!r} is {shown(value)}, but has to be a string"
        if not is_unicode(value):
            return f"{name!r} holds half of a surrogate pair, which is not a character: {shown(value)}"
    if not row["output"].strip():
        return "'output' is empty: there is nothing to learn from"
    aliases = row.get("aliases")
    if aliases is not None and not (
        isinstance(aliases, list) and all(isinstance(alias, str) and is_unicode(alias) for alias in aliases)
    ):
        return f"'aliases' is {shown(aliases)}, but has to be a list of strings, or be left out"
    problem = task_type_problem(row.get("task_type"), num_task_types, task_type_names)
    return f"'task_type' {problem}" if problem else None


def task_type_problem(value: object, num_task_types: int, task_type_names: Sequence[str] = ()) -> str | None:
    """What is wrong with the number or name of a task type, or None."""
    if value is None or (isinstance(value, str) and value in task_type_names):
        return None
    if type(value) is int and 0 <= value < num_task_types:
        return None
    named = f"one of {', '.join(task_type_names)}, or " if task_type_names else ""
    allowed = " or ".join(map(str, range(num_task_types))) if num_task_types < 4 else f"0 to {num_task_types - 1}"
    return f"is {shown(value)}, but has to be {named}{allowed} (a whole number), or be left out"


def complete_rows(block: Block, task_type_names: Sequence[str] = (), reading: Reading = Reading()) -> list[dict]:  # noqa: B008
    """Checked rows with all fields, and `source`, which says where a row comes from.

    A missing task type becomes -1, a missing `input`, `task` or `aliases` empty, the name of a task type its number.
    """
    rows = []
    for number, row in read_block(block):
        row = reading.row(row)
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
                "source": f"{reading.prefix}{block.file.name} row {number}",
            }
        )
    return rows


def _check_block(
    block: Block, num_task_types: int, task_type_names: Sequence[str], reading: Reading
) -> tuple[int, list[str], set[str]]:
    """The number of rows, their problems, and the names of other columns."""
    rows = [(number, reading.row(row)) for number, row in read_block(block)]
    problems = [
        f"{block.file}: row {number}: {problem}"
        for number, row in rows
        if (problem := row_problem(row, num_task_types, task_type_names))
    ]
    return len(rows), problems, {name for _, row in rows if isinstance(row, dict) for name in _other_columns(row)}


def _other_columns(row: dict) -> list[str]:
    """The columns of a row that are not its fields and hold something."""
    return [name for name in row if name not in FIELDS and not _is_empty(row[name])]


def _column_problem(row: dict, name: str) -> str | None:
    """The problem with a column that is not a field, or None if it may be ignored."""
    if _letters(name) in CONVERSATION and _says_something(row[name]):
        return (
            f"has a {name!r}, which is not supported: a row is one instruction and one answer; put its text into "
            "'instruction' or 'input', or take it out"
        )
    field = _meant_field(name)
    if field and _is_empty(row.get(field)):
        return f"{name!r} is not a known column: rename it to {field!r}, or take it out"
    return None


@lru_cache(maxsize=1024)
def _meant_field(name: str) -> str | None:
    """The field of which a column's name is another spelling, or None."""
    fields = {_letters(field): field for field in FIELDS}
    if any(re.fullmatch(rf"{field}(ids?|\d+)", _letters(name)) for field in fields):
        return None  # token ids, the number of a row, one of several
    near = difflib.get_close_matches(_letters(name), fields, n=1, cutoff=MISSPELT)
    return fields[near[0]] if near else SYNONYMS.get(_letters(name))


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name)).lower()


def _is_empty(value: object) -> bool:
    return value is None or (value.strip() if isinstance(value, str) else value) in ("", [], {})


def _says_something(value: object) -> bool:
    """Tell whether a value holds text, however nested; numbers and the like count turns or name them."""
    values = [value]
    while values:
        value = values.pop()
        if isinstance(value, dict | list):
            values += value.values() if isinstance(value, dict) else value
        elif isinstance(value, Unreadable) or (isinstance(value, str) and value.strip()):
            return True
    return False
