"""The finished cells on disk: one JSON file each in the working folder, and all of them in `cells.csv`.

The table has one line per cell; values other than text are JSON, and the digits of `recalled` are in hexadecimal after
a leading 1.
"""

import csv
import json
import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data import InputError
from data.atomic import atomic_file

BASE = "base"
MIXTURE = "loramoe"
ARMS = (
    BASE, "full", "lora", "rslora", "lora_kl", "loramoe_beta0", MIXTURE, "loramoe_kl", "null_expert_beta0",
    "null_expert", "lora_null_beta0", "lora_null", "lora_null_kl",
)  # fmt: skip
TABLE = "cells.csv"
IDENTITY = ("cell", "arm", "knowledge_share", "size", "learning_rate", "scaling", "seed")
MEASURED = ("knowledge_known", "knowledge", "task_loss", "task_score")
TEXT = ("cell", "arm", "model", "commit", "machine", "processor", "command", "recalled")
OPTIONAL = (
    "learning_rate", "scaling", "knowledge_known", "knowledge", "recalled", "task_score", "tasks", "parameter_change",
    "routing",
)  # fmt: skip
csv.field_size_limit(2**31 - 1)  # a field holds a digit for each fact

Pair = Annotated[list, Field(min_length=2, max_length=2)]


class Routing(BaseModel):
    """By task type the weights of the groups, and the distance of the types."""

    model_config = ConfigDict(strict=True)

    group_shares: Annotated[list[Pair], Field(min_length=2, max_length=2)]
    type_distance: float


class Record(BaseModel):
    """The fields that every finished cell has; `relations` and `guessed...` are those of the base model.

    A training that diverged has an infinite task loss, and neither knowledge nor a score.
    """

    model_config = ConfigDict(strict=True)

    cell: str
    arm: str
    is_variant: bool
    knowledge_share: float
    size: int
    learning_rate: float | None
    scaling: float | None
    seed: int
    model: str
    trainable_parameters: int
    commit: str
    machine: str
    processor: str
    seconds: float
    knowledge: float | None
    knowledge_known: float | None
    recalled: Annotated[str, Field(pattern="^[01]+$")] | None
    task_score: float | None
    task_loss: float
    tasks: dict[str, float] | None
    parameter_change: float | None
    routing: Routing | None
    relations: list[str] | None = None
    guessed: dict[str, float] | None = None
    guessed_tasks: dict[str, float] | None = None
    lm_eval: dict[str, dict] | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if not self.is_variant and self.arm not in ARMS:
            raise ValueError(f"arm is {self.arm!r}, but has to be one of {', '.join(ARMS)}")
        if self.arm == BASE and None in (self.relations, self.guessed, self.guessed_tasks):
            raise ValueError("relations, guessed or guessed_tasks is missing")
        if math.isnan(self.task_loss):
            raise ValueError("task_loss is not a number")
        measured = (self.knowledge, self.recalled, self.task_score, self.tasks)
        if None in measured and math.isfinite(self.task_loss):
            raise ValueError("knowledge, recalled, task_score or tasks is missing, although the training ended")
        return self


def cell_file(work: str | Path, name: str) -> Path:
    """The JSON file of a cell."""
    return Path(work) / "cells" / f"{name}.json"


def _files(work: str | Path) -> list[Path]:
    return sorted((Path(work) / "cells").glob("*.json"))


def find_record(results: str | Path, work: str | Path, name: str) -> tuple[Path, dict | None]:
    """A cell's record, from its JSON file or else from the table, and the file that it is from; None if neither has it.

    Raises:
        InputError: the file is damaged.
    """
    file = cell_file(work, name)
    if file.is_file():
        return file, _read_json(file)
    table = Path(results) / TABLE
    return table, _table_by_name(table, table.stat().st_mtime_ns if table.is_file() else 0).get(name)


def finished_names(results: str | Path, work: str | Path) -> set[str]:
    """The names of all cells in the table and in JSON files."""
    return {record["cell"] for record in _read_table(Path(results) / TABLE)} | {file.stem for file in _files(work)}


def read_records(results: Path, work: Path) -> list[dict]:
    """All finished cells, sorted by name: those of the table, replaced by the JSON files of the same cells.

    Raises:
        InputError: there is none, one is damaged or misnamed, or they are of several models or processors.
    """
    found = {record["cell"]: (results / TABLE, record) for record in _read_table(results / TABLE)}
    for file in _files(work):
        found[file.stem] = file, _read_json(file)
    if not found:
        raise InputError(f"{results / TABLE} does not exist, nor a JSON file in {work / 'cells'}: no finished cell")
    records = []
    for name, (file, record) in sorted(found.items()):
        _check(record, name, f"{file}" if file.suffix == ".json" else f"{file}, cell {name}")
        records.append(record)
        for field in ("model", "processor"):
            if record[field] != records[0][field]:
                raise InputError(
                    f"{file} has {name} of the {field} {record[field]}, but {records[0]['cell']} is of "
                    f"{records[0][field]}; a results folder holds the cells of one model and one processor"
                )
    return records


def write_table(results: Path, records: Iterable[dict]) -> Path:
    """Write `cells.csv`. Returns its path."""
    rows = [_row(record) for record in records]
    names = dict.fromkeys([*IDENTITY, *MEASURED, *sorted({name for row in rows for name in row})])
    file = results / TABLE
    with atomic_file(file) as temporary, temporary.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return file


def problem(error: dict) -> str:
    """One of pydantic's errors in words."""
    place = ".".join(map(str, error["loc"])) or "the file"
    if error["type"] == "missing":
        return f"the field {place} is missing"
    if error["type"] == "unexpected_keyword_argument":
        return f"unknown field {place}"
    if error["type"] == "value_error" and not error["loc"]:
        return str(error["ctx"]["error"])
    return f"{place} is {error['input']!r}: {error['msg']}"


def _check(record: object, name: str, source: str) -> None:
    try:
        found = Record.model_validate(record)
    except ValidationError as error:
        raise InputError(f"{source} is not a finished cell: {'; '.join(map(problem, error.errors()))}") from None
    if found.cell != name:
        raise InputError(f"{source} holds the cell {found.cell}, which would count twice; delete it")


def _read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is damaged ({error}); delete it, and the cell is run again") from None


@lru_cache(maxsize=1)
def _table_by_name(file: Path, _modified: int) -> dict[str, dict]:
    """Each cell of the table, which is read again only if it has been modified."""
    return {record["cell"]: record for record in _read_table(file)}


def _read_table(file: Path) -> Iterator[dict]:
    if not file.is_file():
        return
    row: dict[str, str] = {}
    with file.open(newline="") as stream:
        try:
            for row in csv.DictReader(stream):
                yield _record(row)
        except (csv.Error, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{file}, cell {row.get('cell')}, is damaged ({error}); restore the file") from None


def _row(record: dict) -> dict[str, str]:
    recalled = record["recalled"] and f"{int('1' + record['recalled'], 2):x}"
    fields = {name: value for name, value in (record | {"recalled": recalled}).items() if value is not None}
    return {n: v if n in TEXT else json.dumps(v, separators=(",", ":")) for n, v in fields.items()}


def _record(row: dict[str, str]) -> dict:
    found = {name: text if name in TEXT else json.loads(text) for name, text in row.items() if text}
    record = dict.fromkeys(OPTIONAL) | found
    if record["recalled"]:
        record["recalled"] = f"{int(record['recalled'], 16):b}"[1:]
    return record
