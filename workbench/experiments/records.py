"""The finished cells on disk: one JSON file each in the working folder, and all of them in `cells.csv`.

The table keeps what tables and figures need, and the origin of each number: one line per cell, nested values as JSON, a
list of objects as one list for each of their fields (`checkpoints.knowledge`), the digits of `recalled` in hexadecimal
after a leading 1. Of the training log it keeps the curve of the routing; the losses are in the JSON files only.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data import InputError
from data.atomic import atomic_file

BASE = "base"
MIXTURE = "loramoe"
ARMS = (BASE, "full", "lora", "loramoe_beta0", MIXTURE)
TABLE = "cells.csv"
IDENTITY = ("cell", "stage", "arm", "size", "knowledge_share", "seed", "learning_rate")
TEXT = ("cell", "stage", "arm", "model", "commit", "machine", "command")
LISTS = ("checkpoints", "log")
CURVE = ("step", "routing_cv")
csv.field_size_limit(2**31 - 1)  # a field holds a digit for each fact and checkpoint

Pair = Annotated[list, Field(min_length=2, max_length=2)]


class Checkpoint(BaseModel):
    """Measurements at one point of a training; a trial that diverged has neither knowledge nor a score."""

    model_config = ConfigDict(strict=True)

    knowledge: float | None
    knowledge_known: float | None
    tasks: dict[str, float]
    task_score: float | None
    task_loss: float
    recalled: str | None = None


class Routing(BaseModel):
    """Expert weights by task, and by task type those of the two groups."""

    model_config = ConfigDict(strict=True)

    experts_by_task: dict[str, list[float]]
    group_shares: Annotated[list[Pair], Field(min_length=2, max_length=2)]


class Record(BaseModel):
    """The fields of a finished cell that the report reads; `relations` and `guessed...` are those of the base model."""

    model_config = ConfigDict(strict=True)

    cell: str
    stage: Literal["grid", "tuning", "ablation"]
    arm: str
    size: int
    knowledge_share: float
    seed: int
    learning_rate: float | None
    model: str
    trainable_parameters: int
    commit: str
    machine: str
    seconds: float
    checkpoints: Annotated[list[Checkpoint], Field(min_length=1)]
    parameter_change: float | None
    routing: Routing | None
    log: list[dict]
    relations: list[str] | None = None
    guessed: dict[str, float] | None = None
    guessed_tasks: dict[str, float] | None = None
    lm_eval: dict[str, dict] | None = None

    @model_validator(mode="after")
    def _fits_its_stage(self) -> Self:
        if self.stage != "ablation" and self.arm not in ARMS:
            raise ValueError(f"arm is {self.arm!r}, but has to be one of {', '.join(ARMS)}")
        if self.stage == "grid" and self.arm != BASE and len(self.checkpoints) == 1:
            raise ValueError("checkpoints holds the start of the training alone")
        if self.arm == BASE and None in (self.relations, self.guessed, self.guessed_tasks):
            raise ValueError("relations, guessed or guessed_tasks is missing")
        needed = chain(*((each.knowledge, each.task_score, each.recalled) for each in self.checkpoints))
        if self.stage != "tuning" and None in needed:
            raise ValueError("a checkpoint has no knowledge, task_score or recalled, which only a trial may lack")
        return self


def cell_file(work: str | Path, name: str) -> Path:
    """The JSON file of a cell."""
    return Path(work) / "cells" / f"{name}.json"


def find_record(results: str | Path, work: str | Path, name: str) -> tuple[Path, dict | None]:
    """A cell's record, from its JSON file or else from the table, and the file that it is from; None if neither has it.

    Raises:
        InputError: the file is damaged.
    """
    file = cell_file(work, name)
    if file.is_file():
        return file, _read_json(file)
    table = Path(results) / TABLE
    return table, next((record for record in _read_table(table) if record["cell"] == name), None)


def read_records(results: Path, work: Path) -> list[dict]:
    """All finished cells, sorted by name: those of the table, replaced by the JSON files of the same cells.

    Raises:
        InputError: there is none, one is damaged or misnamed, or they are of several models.
    """
    found = {record["cell"]: (results / TABLE, record) for record in _read_table(results / TABLE)}
    for file in sorted((work / "cells").glob("*.json")):
        found[file.stem] = file, _read_json(file)
    if not found:
        raise InputError(f"{results / TABLE} does not exist, nor a JSON file in {work / 'cells'}: no finished cell")
    records = []
    for name, (file, record) in sorted(found.items()):
        _check(record, name, f"{file}" if file.suffix == ".json" else f"{file}, cell {name}")
        records.append(record)
        if record["model"] != records[0]["model"]:
            raise InputError(
                f"{file} has {name} of the model {record['model']}, but {records[0]['cell']} is of "
                f"{records[0]['model']}; a results folder holds the cells of one model"
            )
    return records


def write_table(results: Path, records: Iterable[dict]) -> Path:
    """Write `cells.csv`. Returns its path."""
    rows = [_row(record) for record in records]
    names = dict.fromkeys([*IDENTITY, *sorted({name for row in rows for name in row})])
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
    points = [point | _recoded(point, lambda digits: f"{int('1' + digits, 2):x}") for point in record["checkpoints"]]
    log = [{name: entry[name] for name in CURVE} for entry in record["log"] if "routing_cv" in entry]
    fields = {name: value for name, value in record.items() if name not in LISTS}
    for name, entries in zip(LISTS, (points, log), strict=True):
        fields |= {f"{name}.{field}": values for field, values in _columns(entries).items()}
    return {n: v if n in TEXT else json.dumps(v, separators=(",", ":")) for n, v in fields.items()}


def _record(row: dict[str, str]) -> dict:
    record = {name: text if name in TEXT else json.loads(text) for name, text in row.items() if text}
    for name in LISTS:
        columns = {each: record.pop(each) for each in list(record) if each.startswith(f"{name}.")}
        record[name] = _entries({each.removeprefix(f"{name}."): values for each, values in columns.items()})
    for point in record["checkpoints"]:
        point |= _recoded(point, lambda digits: f"{int(digits, 16):b}"[1:])
    return record


def _recoded(point: dict, recode: Callable[[str], str]) -> dict[str, str]:
    """`recalled` of a checkpoint in other digits; nothing for a trial without it."""
    return {"recalled": recode(point["recalled"])} if point.get("recalled") is not None else {}


def _columns(entries: list[dict]) -> dict:
    """A list of objects as an object of lists, nested ones too.

    Raises:
        ValueError: the objects have different fields.
    """
    if any(entry.keys() != entries[0].keys() for entry in entries):
        raise ValueError("a record's entries have different fields, so they cannot become columns")
    columns = {name: [entry[name] for entry in entries] for name in (entries[0] if entries else ())}
    return {name: _columns(values) if isinstance(values[0], dict) else values for name, values in columns.items()}


def _entries(columns: dict) -> list[dict]:
    """The inverse of `_columns`."""
    lists = [_entries(values) if isinstance(values, dict) else values for values in columns.values()]
    return [dict(zip(columns, values, strict=True)) for values in zip(*lists, strict=True)]
