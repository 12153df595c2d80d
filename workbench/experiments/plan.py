"""The plan of an experiment: a YAML file as a list of cells, each one training run and its measurements."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import ConfigDict, PlainValidator, StrictInt, TypeAdapter, ValidationError

from data import InputError
from data.dataset import file_hash
from data.facts import FACTS_FILE
from data.mix import YamlLoader
from scripts.prepare_data import COUNTS_NAME
from workbench.experiments.frontier import is_contender
from workbench.experiments.records import ARMS, BASE, MIXTURE, find_record, problem

EQUAL = "equal"  # as lora_rank: the rank with as many trainable parameters as the arm MIXTURE
PLACE = ("knowledge_share", "learning_rate", "scaling")  # of a cell
OWN_FLAGS = {
    "learning_rate": "learning_rates",
    "lora_alpha": "scalings",
    "prompt_template": "the model's tokenizer",
    "seed": "seeds",
}

KNOWN_FIELDS_ONLY = ConfigDict(extra="forbid")


def _number(value: object) -> int | float:
    if type(value) not in (int, float):
        raise ValueError("it has to be a number")
    return value


Number = Annotated[float, PlainValidator(_number)]  # as it is written: names of cells show 0 and 0.2


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
    learning_rates: list[Number] | None = None
    scalings: list[Number] | None = None


@dataclass(frozen=True)
class Change:
    """What a variant has instead of the values of its arm; fields as in `Cell`."""

    __pydantic_config__ = KNOWN_FIELDS_ONLY

    flags: dict = field(default_factory=dict)
    knowledge_share: Number | None = None
    learning_rate: Number | None = None
    scaling: Number | None = None
    size: StrictInt | None = None


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
    knowledge_share: Number
    learning_rate: Number
    scaling: Number
    seeds: list[StrictInt]
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
    learning_rates: list[Number]
    scalings: list[Number]
    knowledge_shares: list[Number]
    size: StrictInt
    seeds: list[StrictInt]
    margin: Number
    loss_range: tuple[Number, Number]
    variants: Variants | None = None
    facts: StrictInt | None = None
    rows_per_task: StrictInt = 100
    batch_size: StrictInt = 64
    rows: str | None = None
    lm_eval: list[str] = field(default_factory=list)
    launcher: list[str] = field(default_factory=list)

    def cells(self) -> list[Cell]:
        """All cells in running order: every setting with the first seed, then the variants, then the other seeds."""
        first, *others = self.seeds
        return [
            Cell(BASE, 0.0, None, None, 0, 0),
            *self._grid([first]),
            *self._variants(),
            *self._grid(others),
        ]

    def _grid(self, seeds: Iterable[int]) -> Iterator[Cell]:
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
            for each in self._grid(self.seeds[:1])
            if (each.arm, each.knowledge_share) == (cell.arm, cell.knowledge_share)
        ]
        records = {each: self.finished(each) for each in rivals}
        if missing := [each.name for each, record in records.items() if record is None]:
            raise InputError(
                f"whether {cell.name} is worth running follows from cells that are still to be run: {missing}"
            )
        (own,) = (record for each, record in records.items() if each.setting == cell.setting)
        return is_contender(own, list(records.values()), self.margin, self.loss_range[1])

    def settings(self, cell: Cell) -> dict:
        """Everything that a result of this cell depends on, as JSON values."""
        settings = {name: getattr(self, name) for name in ("model", "rows", "facts", "rows_per_task")}
        settings |= {"model_sha256": weights_sha256(self.model), "facts_sha256": file_hash(FACTS_FILE)[:12]}
        settings |= {"rows_sha256": self.rows and rows_sha256(self.rows), "lm_eval": self.lm_eval or None}
        settings |= {"size": cell.size, "knowledge_share": cell.knowledge_share, "seed": cell.seed, "flags": cell.flags}
        settings |= {"learning_rate": cell.learning_rate, "scaling": cell.scaling}
        if cell.flags.get("lora_rank") == EQUAL:
            settings |= {"equal_to": self.flags(MIXTURE)}
        return json.loads(json.dumps({name: value for name, value in settings.items() if value is not None}))

    def finished(self, cell: Cell) -> dict | None:
        """The record of a cell; None if it has not been run.

        Raises:
            InputError: its file is damaged, or was written under another configuration.
        """
        file, record = find_record(self.results, self.work, cell.name)
        if record is None:
            return None
        wanted, found = self.settings(cell), record.get("settings", {})
        if names := sorted(name for name in found | wanted if found.get(name) != wanted.get(name)):
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
    if not experiment.seeds:
        yield "seeds is empty"
        return
    low, high = experiment.loss_range
    if not 0 < low < high:
        yield f"loss_range is {low:g}, {high:g}, but has to rise from a number above 0"
    names = [cell.name for cell in experiment.cells()]
    yield from (f"two cells would be named {name}" for name in sorted({n for n in names if names.count(n) > 1}))
