"""Rows of data files: checking and completing them.

A row is a conversation in one of the formats of `formats.py`, with an optional `task_type` (a number, or a name if the
run names its task types), an optional string `task` that names the task, and an optional list `aliases` of other
correct answers, which only evaluation uses. Other columns are ignored, unless their names suggest that they were meant
to be trained on.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

from tqdm import tqdm

from data.errors import InputError
from data.files import Block, Unreadable, is_unicode, read_block, shown, split_files
from data.formats import FORMATS, Conversation, Format, find_format, is_empty, to_conversation
from data.workers import map_blocks

# Columns of every format.
COMMON = ("task_type", "task", "aliases")
# Names, without underscores, that other formats give to the text before an instruction.
CONVERSATION = {
    "system", "systemmessage", "systemprompt", "history", "chathistory", "conversationhistory", "messages", "turns",
    "chat", "conversation", "conversations", "dialog", "dialogue",
}  # fmt: skip
# Names that formats give to the text that a prompt is about.
CONTEXTS = {"context", "input"}
# Least ratio of matching letters for a name to be a misspelt field: `inputs`, `ouput`, `alias`; not `task_id`.
MISSPELT = 0.83
UNLABELLED = -1
_NEEDED_BY_FORMATS = frozenset(column for form in FORMATS.values() for column in form.needed)
_COLUMNS_OF_FORMATS = frozenset(column for form in FORMATS.values() for column in form.columns)
MOST_PROBLEMS_SHOWN = 10


@dataclass(frozen=True)
class Reading:
    """How the rows of a source are read.

    Args:
        format: a name in `formats.FORMATS`; None recognises it from a row's columns.
        columns: maps the format's column names to the file's: `{"prompt": "question"}`.
        task_type: default for rows without one.
        task: default for rows without one.
        prefix: precedes the file's name in `source`.
    """

    format: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    task_type: int | str | None = None
    task: str = ""
    prefix: str = ""

    def renamed(self, row: dict) -> dict:
        """A row with the format's column names.

        Raises:
            InputError: the row lacks a mapped column that a format needs.
        """
        if not self.columns:
            return row
        for column, name in self.columns.items():
            if name not in row and column in _NEEDED_BY_FORMATS:
                raise InputError(f"has no {name!r}, which is mapped to {column!r}; its fields are {', '.join(row)}")
        rest = {name: value for name, value in row.items() if name not in self.columns.values()}
        renamed = rest | {column: row[name] for column, name in self.columns.items() if name in row}
        if "task_type" in self.columns and re.fullmatch("[0-9]{1,9}", str(renamed.get("task_type"))):
            renamed["task_type"] = int(renamed["task_type"])  # text in CSV, which knows the column by its own name
        return renamed


# Recognises the format of each row, without defaults.
RECOGNISED = Reading()


def check_rows(
    files: list[Path],
    num_task_types: int,
    task_type_names: Sequence[str] = (),
    num_proc: int = 1,
    reading: Reading = RECOGNISED,
    plain: bool = False,
) -> tuple[int, list[str]]:
    """Check every row. Returns the number of rows and the names of ignored columns.

    Args:
        plain: the rows are for the template `plain`, which has no turns.

    Raises:
        InputError: rows are invalid (the first few are listed with file and row), or there are none.
    """
    problems: list[str] = []
    count, ignored = 0, set()
    check = partial(
        _check_block, num_task_types=num_task_types, task_type_names=task_type_names, reading=reading, plain=plain
    )
    with tqdm(desc="checking rows", unit=" rows", delay=1) as bar:
        for rows, found, others in map_blocks(check, split_files(files), num_proc):
            bar.update(rows)
            count += rows
            problems += found
            ignored |= others
            refuse_rows(problems, at_least=MOST_PROBLEMS_SHOWN + 1)
    refuse_rows(problems)
    if not count:
        raise InputError(f"{', '.join(map(str, files))}: there are no rows")
    return count, sorted(ignored)


def refuse_rows(problems: list[str], at_least: int = 1) -> None:
    """Raise InputError with the first problems if there are `at_least` so many."""
    if len(problems) >= at_least:
        more = ["... and perhaps more; fix these first"] if len(problems) > MOST_PROBLEMS_SHOWN else []
        raise InputError("\n".join([*problems[:MOST_PROBLEMS_SHOWN], *more]))


def row_problem(
    row: object,
    num_task_types: int,
    task_type_names: Sequence[str] = (),
    reading: Reading = RECOGNISED,
    plain: bool = False,
) -> str | None:
    """The first problem of a row, or None.

    Args:
        plain: the rows are for the template `plain`, which has no turns.
    """
    try:
        conversation = read_row(row, reading)
    except InputError as error:
        return str(error)
    assert isinstance(row, dict)
    if plain and (problem := plain_problem(conversation)):
        return problem
    row = reading.renamed(row)
    if problem := _text_problem(row):
        return problem
    problem = task_type_problem(row.get("task_type"), num_task_types, task_type_names)
    return f"'task_type' {problem}" if problem else None


def read_row(row: object, reading: Reading = RECOGNISED, answered: bool = True) -> Conversation:
    """Convert a row into a conversation; see `formats.to_conversation`.

    Raises:
        InputError: the row is invalid, or has columns that were probably meant to be read.
    """
    if not isinstance(row, dict):
        raise InputError(f"is {shown(row)}, but has to be an object, for example with instruction and output")
    row = reading.renamed(row)
    form = find_format(row, reading.format, answered)
    # Whoever names the format knows that the columns of others are there.
    known = _COLUMNS_OF_FORMATS if reading.format else frozenset()
    for name in _other_columns(row, form):
        if name not in known and (problem := _column_problem(row, form, name, answered)):
            raise InputError(problem)
    return to_conversation(row, form, answered)


def complete_rows(block: Block, task_type_names: Sequence[str] = (), reading: Reading = RECOGNISED) -> list[dict]:
    """Checked rows as `conversation`, `task_type`, `task`, `aliases` and `source`, the file and number of the row.

    Names of task types become numbers. A missing `task_type` becomes the reading's or -1, a missing `task` the
    reading's or empty, missing `aliases` an empty list.
    """
    rows = []
    for number, row in read_block(block):
        row = reading.renamed(row)
        task_type = reading.task_type if row.get("task_type") is None else row["task_type"]
        if isinstance(task_type, str):
            task_type = task_type_names.index(task_type)
        rows.append(
            {
                "conversation": to_conversation(row, find_format(row, reading.format)),
                "task_type": UNLABELLED if task_type is None else task_type,
                "task": row.get("task") or reading.task,
                "aliases": row.get("aliases") or [],
                "source": f"{reading.prefix}{block.file.name} row {number}",
            }
        )
    return rows


def _check_block(
    block: Block, num_task_types: int, task_type_names: Sequence[str], reading: Reading, plain: bool
) -> tuple[int, list[str], set[str]]:
    """The number of rows, their problems and the names of ignored columns."""
    rows = list(read_block(block))
    problems = [
        f"{block.file}: row {number}: {problem}"
        for number, row in rows
        if (problem := row_problem(row, num_task_types, task_type_names, reading, plain))
    ]
    others: set[str] = set()
    if not problems:
        renamed = [reading.renamed(row) for _, row in rows]
        others = {name for row in renamed for name in _other_columns(row, find_format(row, reading.format))}
    return len(rows), problems, others


def plain_problem(conversation: Conversation) -> str | None:
    """The reason why the template `plain` cannot show a conversation, or None."""
    roles = [turn["role"] for turn in conversation.messages]
    if roles in (["user", "assistant"], ["user"]) and not conversation.tools:
        return None
    return (
        f"is a conversation ({', '.join(roles[:MOST_PROBLEMS_SHOWN])}), but prompt_template plain takes only a "
        "prompt and an answer: use prompt_template chat, with a tokenizer that has a chat template"
    )


def _text_problem(row: dict) -> str | None:
    """The problem with `task` or `aliases`, or None."""
    for name in ("task_type", "task", "aliases"):
        if isinstance(value := row.get(name), Unreadable):
            return f"{name!r} cannot be read: {value.reason}"
    task, aliases = row.get("task"), row.get("aliases")
    if task is not None and not isinstance(task, str):
        return f"'task' is {shown(task)}, but has to be a string"
    if task is not None and not is_unicode(task):
        return f"'task' holds half of a surrogate pair, which is not a character: {shown(task)}"
    if aliases is not None and not (
        isinstance(aliases, list) and all(isinstance(alias, str) and is_unicode(alias) for alias in aliases)
    ):
        return f"'aliases' is {shown(aliases)}, but has to be a list of strings, or be left out"
    return None


def task_type_problem(task_type: object, num_task_types: int, names: Sequence[str] = ()) -> str | None:
    """What is wrong with the number or name of a task type, or None."""
    if task_type is None or (isinstance(task_type, str) and task_type in names):
        return None
    if type(task_type) is not int or not 0 <= task_type < num_task_types:
        named = f"one of {', '.join(names)}, or " if names else ""
        allowed = " or ".join(map(str, range(num_task_types))) if num_task_types < 4 else f"0 to {num_task_types - 1}"
        return f"is {shown(task_type)}, but has to be {named}{allowed} (a whole number), or be left out"
    return None


def _other_columns(row: dict, form: Format) -> list[str]:
    """The non-empty columns of a row that are not read."""
    return [name for name in row if name not in form.columns and name not in COMMON and not is_empty(row[name])]


def _column_problem(row: dict, form: Format, name: str, answered: bool) -> str | None:
    """The problem with a column that is not read, or None if it may be ignored."""
    if form.question in row and _letters(name) in CONVERSATION and _says_something(row[name]):
        return (
            f"has a {name!r}, which is not read: write a conversation as 'messages' and a system prompt as 'system', "
            "or remove the column"
        )
    if form.answer and not form.context and _letters(name) in CONTEXTS and form.question in row:
        return f"has a {name!r}, which is not read: add it to {form.question!r}, or remove the column"
    field = _meant_field(name, form, answered)
    if field and is_empty(row.get(field)) and (form.question in row or field == form.question):
        return f"{name!r} is not a known column: rename it to {field!r}, or remove it"
    return None


@lru_cache(maxsize=1024)
def _meant_field(name: str, form: Format, answered: bool) -> str | None:
    """The field of which a column's name is another spelling, or None."""
    read = (*form.columns, *COMMON) if answered else [field for field in form.columns if field != form.answer]
    fields = {_letters(field): field for field in read}
    if any(re.fullmatch(rf"{field}(ids?|\d+)", _letters(name)) for field in fields):
        return None  # token ids, the number of a row, one of several
    near = difflib.get_close_matches(_letters(name), fields, n=1, cutoff=MISSPELT)
    if near:
        return fields[near[0]]
    return form.context if _letters(name) in CONTEXTS else None


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name)).lower()


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
