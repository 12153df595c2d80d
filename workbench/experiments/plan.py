"""The plan of an experiment: a YAML file as a list of cells, each one training run and its measurements."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated, TypeVar

import yaml
from pydantic import ConfigDict, Field, PlainValidator, StrictInt, TypeAdapter, ValidationError

from data import InputError
from data.dataset import file_hash
from data.facts import FACTS_FILE
from data.mix import YamlLoader
from scripts.prepare_data import COUNTS_NAME
from workbench.experiments.frontier import is_contender
from workbench.experiments.records import ARMS, BASE, MIXTURE, find_record, problem

EQUAL = "equal"  # as lora_rank: the rank with as many trainable parameters as the arm MIXTURE
LOCAL = {"model_sha256", "rows_sha256"}  # settings that tell what is on this machine
PLACE = ("knowledge_share", "learning_rate", "scaling")  # of a cell
OWN_FLAGS = {
    "learning_rate": "learning_rates",
    "lora_alpha": "scalings",
    "prompt_template": "the model's tokenizer",
    "seed": "seeds",
    "model_name_or_path": "model",
    **dict.fromkeys(("dataset_dir", "data_cache_dir", "output_dir"), "work"),
}

KNOWN_FIELDS_ONLY = ConfigDict(extra="forbid")


def _number(least: float, most: float) -> PlainValidator:
    """Takes a number as it is written: names of cells show 0 and 0.2."""

    def check(value: object) -> int | float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError("it has to be a number")
        if not least <= value <= most:
            raise ValueError(f"it has to be from {least:g} to {most:g}")
        return value

    return PlainValidator(check)


Share = Annotated[float, _number(0, 1)]
Rate = Annotated[float, _number(1e-12, 1e6)]  # of learning, or a scaling
Loss = Annotated[float, _number(1e-6, 1e6)]
Count = Annotated[StrictInt, Field(ge=1)]
Item = TypeVar("Item")
NonEmpty = Annotated[list[Item], Field(min_length=1)]
MOST_SEEDS = 5  # the bootstrap takes every resample of them


@dataclass(frozen=True)
class Cell:
    """One training run (none for the arm `base`) and its measurements.

    Args:
        arm: name of the method, or of a variant of one.
        knowledge_share: share of closed-book questions (task type 1) among the rows.
        learning_rate: its highest, as a flag of `train.py`.
        scaling: lora_alpha / lora_rank; None if all weights are trained.
        seed: of the mixture, its order and the initial weights.
        size: instruction rows.
        flags: of `train.py`, except those that follow from the other fields.
        is_variant: of one arm at one setting, not a point of the grid.
    """

    arm: str
    knowledge_share: float
    learning_rate: float | None
    scaling: float | None
    seed: int
    size: int
    flags: dict = field(default_factory=dict, hash=False)
    is_variant: bool = False

    @property
    def name(self) -> str:
        """Its name, also of its file: without slashes."""
        if self.arm == BASE:
            return BASE
        parts = (self.arm, self.knowledge_share, self.learning_rate, self.scaling, self.seed)
        return "-".join(str(part) for part in parts if part is not None)

    @property
    def setting(self) -> tuple:
        """What it shares with the same cell of other seeds."""
        return self.arm, self.knowledge_share, self.learning_rate, self.scaling


@dataclass(frozen=True)
class Arm:
    """A method, trained with every learning rate, scaling and share of closed-book questions.

    Args:
        flags: of `train.py`; `lora_rank: equal` is the rank whose LoRA has as many trainable parameters as the arm
            `loramoe`, as nearly as possible.
        learning_rates: instead of the experiment's.
        scalings: likewise; [] where there is no adapter to scale.
    """

    __pydantic_config__ = KNOWN_FIELDS_ONLY

    flags: dict
    learning_rates: NonEmpty[Rate] | None = None
    scalings: list[Rate] | None = None


@dataclass(frozen=True)
class Change:
    """What a variant has instead of the values of its arm; fields as in `Cell`."""

    __pydantic_config__ = KNOWN_FIELDS_ONLY

    flags: dict = field(default_factory=dict)
    knowledge_share: Share | None = None
    learning_rate: Rate | None = None
    scaling: Rate | None = None
    size: Count | None = None


@dataclass(frozen=True)
class Variants:
    """Changes of one arm at one setting.

    Args:
        of: the arm that is changed.
        knowledge_share, learning_rate, scaling, seeds: as in `Cell`.
        changes: by name.
    """

    __pydantic_config__ = KNOWN_FIELDS_ONLY

    of: str
    knowledge_share: Share
    learning_rate: Rate
    scaling: Rate
    seeds: NonEmpty[StrictInt]
    changes: dict[str, Change]


@dataclass(frozen=True)
class Experiment:
    """A configuration file.

    Args:
        model: base model, a folder or a hub id.
        results: folder that is committed: table of the cells, report, figures.
        work: folder that is not committed: a file of each cell, rows and weights.
        train: flags of `train.py` for every arm.
        arms: the methods by name.
        learning_rates, scalings: of every arm that does not name its own.
        knowledge_shares: in running order.
        size: instruction rows of a training.
        seeds: the first is run at every setting, the others at `contenders` alone.
        margin: how much knowledge may lie between a contender and the frontier of its arm.
        loss_range: lowest and highest task loss between which the area under a frontier is measured; settings with a
            higher one are no contenders.
        variants: changes of one arm.
        facts: number of probe facts that are asked; None is all.
        rows_per_task: held-out rows of each other task.
        batch_size: rows per batch of a measurement.
        rows: folder of `scripts.prepare_data` to draw the mixture from; None generates it.
        lm_eval: tasks of lm-evaluation-harness, measured at the end of each run.
        launcher: arguments between `python` and `train.py`, such as `-m torch.distributed.run` and its flags.
    """

    __pydantic_config__ = KNOWN_FIELDS_ONLY

    model: str
    results: str
    work: str
    train: dict
    arms: dict[str, Arm]
    learning_rates: NonEmpty[Rate]
    scalings: NonEmpty[Rate]
    knowledge_shares: NonEmpty[Share]
    size: Count
    seeds: Annotated[list[StrictInt], Field(min_length=1, max_length=MOST_SEEDS)]
    margin: Share
    loss_range: tuple[Loss, Loss]
    variants: Variants | None = None
    facts: Count | None = None
    rows_per_task: Count = 100
    batch_size: Count = 64
    rows: str | None = None
    lm_eval: list[str] = field(default_factory=list)
    launcher: list[str] = field(default_factory=list)

    def cells(self) -> list[Cell]:
        """All cells in running order: every setting with the first seed, then the variants, then the other seeds."""
        first, *others = self.seeds
        return [
            Cell(BASE, 0.0, None, None, 0, 0),
            *self.grid([first]),
            *self._variants(),
            *self.grid(others),
        ]

    def grid(self, seeds: Iterable[int]) -> Iterator[Cell]:
        """Every setting of each arm, with these seeds."""
        for seed, share, (name, arm) in product(seeds, self.knowledge_shares, self.arms.items()):
            rates = self.learning_rates if arm.learning_rates is None else arm.learning_rates
            scalings: list = (self.scalings if arm.scalings is None else arm.scalings) or [None]
            for rate, scaling in product(rates, scalings):
                yield Cell(name, share, rate, scaling, seed, self.size, self.flags(name))

    def _variants(self) -> Iterator[Cell]:
        if not (changed := self.variants):
            return
        place = {name: getattr(changed, name) for name in PLACE} | {"size": self.size}
        for seed, (name, change) in product(changed.seeds, changed.changes.items()):
            moved = {field: value for field in place if (value := getattr(change, field)) is not None}
            flags = self.flags(changed.of) | change.flags
            yield Cell(name, seed=seed, flags=flags, is_variant=True, **(place | moved))

    def flags(self, arm: str) -> dict:
        """Flags of `train.py` for an arm."""
        return self.train | self.arms[arm].flags

    def is_due(self, cell: Cell) -> bool:
        """False if its setting is not a contender by the first seed's runs, all of which have to be finished.

        Raises:
            InputError: one of them is still to be run.
        """
        if cell.arm == BASE or cell.is_variant or cell.seed == self.seeds[0]:
            return True
        rivals = [
            each
            for each in self.grid(self.seeds[:1])
            if (each.arm, each.knowledge_share) == (cell.arm, cell.knowledge_share)
        ]
        records = {each: self.finished(each) for each in rivals}
        if missing := [each.name for each, record in records.items() if record is None]:
            raise InputError(
                f"whether {cell.name} is worth running follows from cells that are still to be run: {missing}"
            )
        (own,) = (record for each, record in records.items() if each.setting == cell.setting)
        return self.is_contender(own, records.values())

    def is_contender(self, own: dict, rivals: Iterable[dict]) -> bool:
        """See `frontier.is_contender`."""
        return is_contender(own, list(rivals), self.margin, self.loss_range[1])

    def settings(self, cell: Cell) -> dict:
        """Everything that a result of this cell depends on, as JSON values."""
        settings = {name: getattr(self, name) for name in ("model", "rows", "facts", "rows_per_task")}
        settings |= {"model_sha256": weights_sha256(self.model), "facts_sha256": file_hash(FACTS_FILE)[:12]}
        settings |= {"rows_sha256": self.rows and rows_sha256(self.rows)}
        settings |= {"lm_eval": self.lm_eval or None, "launcher": self.launcher or None}
        settings |= {"size": cell.size, "knowledge_share": cell.knowledge_share, "seed": cell.seed, "flags": cell.flags}
        settings |= {"learning_rate": cell.learning_rate, "scaling": cell.scaling}
        if cell.flags.get("lora_rank") == EQUAL:
            settings |= {"equal_to": self.flags(MIXTURE)}
        return json.loads(json.dumps({name: value for name, value in settings.items() if value is not None}))

    def finished(self, cell: Cell, is_only_read: bool = False) -> dict | None:
        """The record of a cell; None if it has not been run.

        Args:
            is_only_read: no cell is to be run with it, so that the base model and the rows need not be here.

        Raises:
            InputError: its file is damaged, or was written under another configuration.
        """
        file, record = find_record(self.results, self.work, cell.name)
        if record is None:
            return None
        wanted, found = self.settings(cell), record.get("settings", {})
        compared = (found.keys() | wanted.keys()) - (LOCAL if is_only_read else set())
        if names := sorted(name for name in compared if found.get(name) != wanted.get(name)):
            other = ", ".join(f"{name} {found.get(name)} instead of {wanted.get(name)}" for name in names)
            raise InputError(
                f"{file} was made with other settings: {other}. Choose another folder with --results, or delete it"
            )
        return record


@cache
def weights_sha256(model: str) -> list[str]:
    """Start of the SHA-256 of each weight file of a model's folder, to detect that it was pretrained again; empty for a
    hub id."""
    return [file_hash(file)[:12] for file in sorted(Path(model).glob("*.safetensors"))]


def rows_sha256(folder: str) -> str | None:
    """SHA-256 of the counts of `scripts.prepare_data`, to detect that rows were prepared again; None if it has not made
    the folder."""
    counts = Path(folder).parent / COUNTS_NAME
    return file_hash(counts)[:12] if counts.is_file() else None


def read_experiment(file: str | Path) -> Experiment:
    """Read a configuration.

    Raises:
        InputError: the file is not valid YAML, or its fields differ from those of `Experiment` in name or type.
    """
    try:
        values = yaml.load(Path(file).read_text(), YamlLoader)
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"--config {file} cannot be read: {error}") from None
    try:
        experiment = TypeAdapter(Experiment).validate_python(values)
    except ValidationError as error:
        raise InputError(f"{file}: {'; '.join(map(problem, error.errors()))}") from None
    if problems := [*_problems(experiment)]:
        raise InputError(f"{file}: {'; '.join(problems)}")
    return experiment


def _problems(experiment: Experiment) -> Iterator[str]:
    if unknown := sorted(experiment.arms.keys() - set(ARMS[1:])):
        yield f"an arm is named {', '.join(unknown)}, but has to be one of {', '.join(ARMS[1:])}"
    every_flag = [experiment.train, *(arm.flags for arm in experiment.arms.values())]
    if MIXTURE not in experiment.arms and any(flags.get("lora_rank") == EQUAL for flags in every_flag):
        yield f"lora_rank is {EQUAL}, but there is no arm {MIXTURE} to be equal to"
    if variants := experiment.variants:
        every_flag += [change.flags for change in variants.changes.values()]
        if variants.of not in experiment.arms:
            yield f"variants are of {variants.of}, which is not an arm"
            return
    for name in sorted(OWN_FLAGS.keys() & {name for flags in every_flag for name in flags}):
        yield f"{name} cannot be set: it follows from {OWN_FLAGS[name]}"
    low, high = experiment.loss_range
    if not low < high:
        yield f"loss_range is {low:g}, {high:g}, but has to rise"
    cells = experiment.cells()
    counts = Counter((cell.setting, cell.seed) for cell in cells)
    for cell in cells:
        if counts.pop((cell.setting, cell.seed), 1) > 1:
            yield f"two cells would be the same as {cell.name}"
        if not re.fullmatch(r"[\w.-]+", cell.name):
            yield f"{cell.name} cannot be the name of a file; a change is named with letters, digits and _"
    if unscaled := sorted({cell.arm for cell in cells if cell.scaling is not None and "lora_rank" not in cell.flags}):
        yield f"{', '.join(unscaled)}: lora_rank is missing, which scalings are multiplied by"
