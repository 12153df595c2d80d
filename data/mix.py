"""`mix.yaml`: the sources of a run, how many rows are taken from each, and how many are held out for evaluation.

docs/DATA.md describes every key. The file is checked as a whole, and all its problems are reported together.
"""

import difflib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from data.errors import InputError, first_line, reading
from data.files import find_files, read_block, shown, split_files
from data.formats import FORMATS
from data.rows import COMMON, Reading, task_type_problem

SUFFIXES = (".yaml", ".yml")
LARGEST = 2**63 - 1  # of an integer, as in the rows
PATH_TAG, HUB_TAG = "source with a path", "source with a hub"

Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, le=LARGEST)]


@dataclass
class _Checks:
    """Context of the checks of a file, and what they have found so far."""

    folder: Path
    num_task_types: int
    task_type_names: Sequence[str]
    weights: list[float] = field(default_factory=list)
    taken: set[tuple] = field(default_factory=set)

    def take(self, place: str, info: "ValidationInfo[_Checks]") -> None:
        """Raise InputError if an earlier source reads the same data in the same way."""
        key = (place, info.data.get("format"), *sorted((info.data.get("columns") or {}).items()))
        if key in self.taken:
            raise InputError(f"{place} is in another source already, and its rows would count twice")
        self.taken.add(key)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Source(_Model):
    """Keys of every source. Without `rows` and `weight`, all rows are taken.

    Args:
        format: a key of `FORMATS`; by default recognised from a row's columns.
        columns: maps the format's column names to the source's.
        task_type: number or name of the task type, for rows without one.
        task: name of the task, for rows without one.
        rows: number of rows to take, chosen by the seed.
        weight: number of rows to take, relative to the other sources with a weight.
        held_out: share of the rows taken that is kept for evaluation; by default the mix's.
    """

    format: str | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    task_type: int | str | None = None
    task: str | None = None
    rows: Count | None = None
    weight: Annotated[float, Field(ge=0)] | None = None
    held_out: Share | None = None

    @field_validator("format")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and value not in FORMATS:
            raise InputError(f"{value!r} is not a format; {_nearest(value, FORMATS)}")
        return value

    @field_validator("columns")
    @classmethod
    def _of_format(cls, columns: dict[str, str], info: ValidationInfo[_Checks]) -> dict[str, str]:
        name = info.data.get("format")
        known = [column for form in ([FORMATS[name]] if name else FORMATS.values()) for column in form.columns]
        for column in columns:
            if column not in (*known, *COMMON):
                of = f"the format {name}" if name else "any format"
                raise InputError(f"{column!r} is not a column of {of}; {_nearest(column, [*known, *COMMON])}")
        return columns

    @field_validator("task_type", mode="plain")
    @classmethod
    def _in_range(cls, value: object, info: ValidationInfo[_Checks]) -> object:
        if problem := task_type_problem(value, info.context.num_task_types, info.context.task_type_names):
            raise InputError(problem)
        return value

    @field_validator("weight")
    @classmethod
    def _alone(cls, weight: float | None, info: ValidationInfo[_Checks]) -> float | None:
        if weight is not None:
            info.context.weights.append(weight)
            if info.data.get("rows") is not None:
                raise InputError("a source has rows or a weight, not both")
        return weight

    def reading(self, prefix: str) -> Reading:
        """The settings for reading its rows."""
        return Reading(self.format, self.columns, self.task_type, self.task or "", prefix)


class FileSource(Source):
    """A file or folder.

    Args:
        path: relative to the folder of the mix.
    """

    path: Annotated[str, Field(min_length=1)]

    @field_validator("path")
    @classmethod
    def _usable(cls, path: str, info: ValidationInfo[_Checks]) -> str:
        columns = info.data.get("columns") or {}
        for file in find_files(info.context.folder / path):
            info.context.take(str(file.resolve()), info)
            if columns:
                check_columns(file, columns)
        return path

    @property
    def name(self) -> str:
        return self.path


class HubSource(Source):
    """A data set on the hub.

    Args:
        hub: its id, OWNER/NAME.
        config: the configuration; by default the only one.
        split: the split.
        revision: commit, branch or tag; by default the newest commit when it is first fetched.
        stream: read row by row without downloading all first; with `rows`, little more than these.
    """

    config: str | None = None
    split: str = "train"
    revision: str | None = None
    stream: bool = False
    hub: Annotated[str, Field(min_length=1)]

    @field_validator("hub")
    @classmethod
    def _once(cls, hub: str, info: ValidationInfo[_Checks]) -> str:
        info.context.take(" ".join(filter(None, (hub, *map(info.data.get, ("config", "split", "revision"))))), info)
        return hub

    @property
    def name(self) -> str:
        return " ".join(filter(None, (f"hub:{self.hub}", self.config, self.split, self.revision)))


def _tag(source: Any) -> str:
    names = source if isinstance(source, dict) else ()
    return HUB_TAG if "hub" in names and "path" not in names else PATH_TAG


class Mix(_Model):
    """The content of a mix file.

    Args:
        sources: in the order of their rows in the data set; an epoch shuffles them.
        seed: decides which rows of a source are taken and which of them are held out.
        held_out: default for the sources.
    """

    sources: Annotated[
        list[
            Annotated[
                Annotated[FileSource, Tag(PATH_TAG)] | Annotated[HubSource, Tag(HUB_TAG)],
                Discriminator(_tag),
            ]
        ],
        Field(min_length=1),
    ]
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    held_out: Share = 0.0


class YamlLoader(yaml.SafeLoader):
    """Refuses duplicate keys, and reads 1e-5 as a number, as YAML 1.2 does; to PyYAML it is text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.MarkedYAMLError(problem=f"the key {twice!r} occurs twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def is_mix(path: str | Path) -> bool:
    """Tell from its name whether a path is a mix."""
    return Path(path).suffix.lower() in SUFFIXES


def read_mix(file: str | Path, num_task_types: int, task_type_names: Sequence[str] = ()) -> Mix:
    """Read a mix and check everything that does not need its rows: names, ranges, files, columns.

    Raises:
        InputError: it lists every problem with its place in the file.
    """
    file = Path(file)
    content = _content(file)
    checks = _Checks(file.parent, num_task_types, task_type_names)
    mix, problems = None, []
    try:
        mix = Mix.model_validate(content, context=checks)
    except ValidationError as error:
        problems = [_in_words(each) for each in error.errors()]
    if checks.weights and not any(checks.weights):
        problems.append("sources: all weights are 0; at least one has to be above 0")
    if problems or not mix:
        raise InputError("\n".join(f"{file}: {problem}" for problem in problems))
    return mix


def check_columns(file: Path, columns: dict[str, str]) -> None:
    """Raise InputError if no row of a file has a mapped column. Rows are read until all have occurred."""
    names: dict[str, None] = {}
    for block in split_files([file]):
        names |= dict.fromkeys(name for _, row in read_block(block) if isinstance(row, dict) for name in row)
        if names.keys() >= set(columns.values()):
            return
    for name, there in columns.items():
        if there not in names:
            raise InputError(f"{file} has no column {there!r}, which columns.{name} names; {_nearest(there, names)}")


def _content(file: Path) -> object:
    if not file.exists():
        raise InputError(f"{file}: no such file")
    try:
        with reading(file):
            return yaml.load(file.read_bytes(), YamlLoader)
    except InputError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        reason = getattr(error, "problem", None) or first_line(error)
        raise InputError(f"{file}: {line}not readable as YAML ({reason})") from None


def _in_words(error: Any) -> str:
    """A message for one of pydantic's errors, with the place as in Python: `sources[0].rows`."""
    tag = next((part for part in error["loc"] if part in (PATH_TAG, HUB_TAG)), None)
    parts = [part for part in error["loc"] if part not in (PATH_TAG, HUB_TAG, "[key]")]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")
    if error["type"] == "missing":
        return "it has no sources" if place == "sources" else f"{place.rpartition('.')[0]}: has neither path nor hub"
    if error["type"] == "extra_forbidden":
        if tag and parts[-1] in HubSource.model_fields:
            return f"{place}: not allowed in a source with a path"
        known = {**FileSource.model_fields, **HubSource.model_fields} if tag else Mix.model_fields
        return f"{place}: unknown key; {_nearest(parts[-1], known)}"
    if error["type"] == "value_error":
        text = str(error["ctx"]["error"])
        return f"{place} {text}" if text.startswith("is ") else f"{place}: {text}"
    if error["type"].endswith("too_short"):
        return f"{place} is empty"
    allowed = error["msg"].removeprefix("Input should be ")
    if error["type"] == "model_type":
        allowed = "a mapping of keys to values"
    return f"{place or 'the file'} is {_shown(error['input'])}, but has to be {allowed}"


def _shown(value: object) -> str:
    try:
        return shown(value)
    except (TypeError, ValueError):  # keys that are not text, a value that holds itself: only YAML has them
        return repr(value)[:60]


def _nearest(name: object, known: Collection[str]) -> str:
    """The end of a message about an unknown name."""
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"available: {', '.join(dict.fromkeys(known)) or 'none'}"
