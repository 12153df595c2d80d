"""The plan of an experiment: a YAML file as a list of cells, each one training run and its measurements."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import ConfigDict, PlainValidator, StrictInt, TypeAdapter, ValidationError

from data import InputError
from data.dataset import file_hash
from data.facts import FACTS_FILE
from data.mix import YamlLoader
from scripts.prepare_data import COUNTS_NAME
from workbench.experiments.records import ARMS, BASE, MIXTURE, find_record, problem

EQUAL = "equal"  # as lora_rank: the rank with as many trainable parameters as the arm MIXTURE

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
        stage: `grid`, `tuning` (learning rates, judged on separate rows) or `ablation`.
        arm: name of the method.
        size: instruction rows.
        knowledge_share: share of closed-book questions (task type 1) among them.
        seed: of the mixture, its order and the initial weights.
        flags: of `train.py`, except the learning rate.
        learning_rate: None if it has to be tuned.
    """

    stage: str
    arm: str
    size: int
    knowledge_share: float
    seed: int
    flags: dict = field(default_factory=dict, hash=False)
    learning_rate: float | None = None

    @property
    def name(self) -> str:
        """Its name, also of its file: without slashes."""
        if self.arm == BASE:
            return BASE
        parts = [self.arm, self.size, self.knowledge_share, self.seed]
        if self.stage == "tuning":
            parts = ["tuning", self.arm, self.learning_rate]
        return "-".join(map(str, parts))


@dataclass(frozen=True)
class Tuning:
    """Trials of learning rates: each arm takes the one with the lowest validation loss over the other tasks.

    Args:
        size: instruction rows of a trial.
        knowledge_share: as in `Cell`.
        seed: of the trials; different from the grid's.
        learning_rates: those that are tried, by arm.
    """

    __pydantic_config__ = KNOWN_FIELDS_ONLY

    size: StrictInt
    knowledge_share: Number
    seed: StrictInt
    learning_rates: dict[str, list[Number]]


@dataclass(frozen=True)
class Ablations:
    """Variants of one arm at one size, with its learning rate unless they set one.

    Args:
        of: the arm that is changed.
        size: as in `Cell`, as are the others.
        changes: flags of `train.py`, optionally with a learning rate, by name of the change.
    """

    __pydantic_config__ = KNOWN_FIELDS_ONLY

    of: str
    size: StrictInt
    knowledge_share: Number
    seeds: list[StrictInt]
    changes: dict[str, dict]


@dataclass(frozen=True)
class Experiment:
    """A configuration file.

    Args:
        model: base model, a folder or a hub id.
        results: folder that is committed: table of the cells, report, figures.
        work: folder that is not committed: a file of each cell, rows and weights.
        arms: flags of `train.py` by arm; `lora_rank: equal` is the rank whose LoRA has as many trainable parameters
            as the arm `loramoe`, as nearly as possible.
        train: flags of every arm.
        sizes: seeds by number of instruction rows.
        knowledge_shares: shares of closed-book questions.
        tuning: how learning rates are found.
        ablations: changes of one arm.
        checkpoints: number of points along each run, including its end, at which it is measured.
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
    arms: dict[str, dict]
    train: dict
    sizes: dict[StrictInt, list[StrictInt]]
    knowledge_shares: list[Number]
    tuning: Tuning
    ablations: Ablations | None = None
    checkpoints: StrictInt = 4
    facts: StrictInt | None = None
    rows_per_task: StrictInt = 100
    batch_size: StrictInt = 64
    rows: str | None = None
    lm_eval: list[str] = field(default_factory=list)
    launcher: list[str] = field(default_factory=list)

    def cells(self) -> list[Cell]:
        """All cells in running order: small sizes first, so that an interrupted experiment has finished those."""
        return [Cell("grid", BASE, 0, 0.0, 0), *self.trials(), *self._grid(), *self._ablations()]

    def trials(self) -> list[Cell]:
        """The cells that find the learning rates."""
        tuning = self.tuning
        return [
            Cell("tuning", arm, tuning.size, tuning.knowledge_share, tuning.seed, self.flags(arm), rate)
            for arm, rates in tuning.learning_rates.items()
            for rate in rates
        ]

    def _grid(self) -> Iterator[Cell]:
        for size, seeds in sorted(self.sizes.items()):
            for seed in seeds:
                for share in self.knowledge_shares:
                    for arm in self.arms:
                        yield Cell("grid", arm, size, share, seed, self.flags(arm))

    def _ablations(self) -> Iterator[Cell]:
        if not self.ablations:
            return
        changed = self.ablations
        for seed in changed.seeds:
            for name, change in changed.changes.items():
                flags = self.flags(changed.of) | change
                rate = flags.pop("learning_rate", None)
                yield Cell("ablation", name, changed.size, changed.knowledge_share, seed, flags, rate)

    def flags(self, arm: str) -> dict:
        """Flags of `train.py` for an arm."""
        return self.train | self.arms[arm]

    def settings(self, cell: Cell) -> dict:
        """Everything that a result of this cell depends on, as JSON values."""
        settings = {name: getattr(self, name) for name in ("model", "rows", "facts", "rows_per_task", "checkpoints")}
        settings |= {"model_sha256": weights_sha256(self.model), "facts_sha256": file_hash(FACTS_FILE)}
        settings |= {"rows_sha256": self.rows and rows_sha256(self.rows), "lm_eval": self.lm_eval or None}
        settings |= {"size": cell.size, "knowledge_share": cell.knowledge_share, "seed": cell.seed, "flags": cell.flags}
        settings |= {"learning_rates": self._rates(cell)}
        if cell.learning_rate is None and cell.arm != BASE:
            settings |= {"tuning": {name: getattr(self.tuning, name) for name in ("size", "knowledge_share", "seed")}}
        if cell.flags.get("lora_rank") == EQUAL:
            settings |= {"equal_to": self.flags(MIXTURE)}
        return json.loads(json.dumps(settings))

    def _rates(self, cell: Cell) -> list[float]:
        if cell.learning_rate is not None:
            return [cell.learning_rate]
        return self.tuning.learning_rates.get(self._tuned_arm(cell), [])

    def _tuned_arm(self, cell: Cell) -> str:
        return self.ablations.of if cell.stage == "ablation" else cell.arm

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

    def rate(self, cell: Cell) -> float:
        """The learning rate of a cell: its own, or the best one of its arm's trials.

        Raises:
            InputError: a trial has not been run yet.
        """
        if cell.learning_rate is not None:
            return cell.learning_rate
        trials = {trial: self.finished(trial) for trial in self.trials() if trial.arm == self._tuned_arm(cell)}
        if missing := [trial.name for trial, record in trials.items() if record is None]:
            raise InputError(f"{cell.name} takes the best learning rate of cells that are still to be run: {missing}")
        best = best_rate({trial.learning_rate: record for trial, record in trials.items()})
        if best is None:
            rates = ", ".join(f"{trial.learning_rate:g}" for trial in trials)
            raise InputError(f"{cell.name}: every learning rate that was tried ({rates}) diverged; add lower ones")
        return best


@cache
def weights_sha256(model: str) -> list[str]:
    """SHA-256 of each weight file of a model's folder, to detect that it was pretrained again; empty for a hub id."""
    return [file_hash(file) for file in sorted(Path(model).glob("*.safetensors"))]


def rows_sha256(folder: str) -> str | None:
    """SHA-256 of the counts of `scripts.prepare_data`, to detect that rows were prepared again; None if it has not made
    the folder."""
    counts = Path(folder).parent / COUNTS_NAME
    return file_hash(counts) if counts.is_file() else None


def best_rate(trials: dict[float, dict]) -> float | None:
    """The learning rate of the trial with the lowest validation loss; None if all have diverged.

    Args:
        trials: records of the trials, by learning rate.
    """
    losses = {rate: trial["checkpoints"][-1]["task_loss"] for rate, trial in trials.items()}
    return min((rate for rate in losses if math.isfinite(losses[rate])), key=losses.get, default=None)


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
    problems = [
        f"no learning rates for the arm {arm}" for arm in experiment.arms.keys() - experiment.tuning.learning_rates
    ]
    problems += [f"unknown arm {arm}" for arm in experiment.tuning.learning_rates.keys() - experiment.arms]
    if unknown := sorted(experiment.arms.keys() - set(ARMS[1:])):
        problems.append(f"an arm is named {', '.join(unknown)}, but has to be one of {', '.join(ARMS[1:])}")
    every_flag = [experiment.train, *experiment.arms.values()]
    if MIXTURE not in experiment.arms and any(flags.get("lora_rank") == EQUAL for flags in every_flag):
        problems.append(f"lora_rank is {EQUAL}, but there is no arm {MIXTURE} to be equal to")
    if any("prompt_template" in flags for flags in every_flag):
        problems.append("prompt_template cannot be set: all models are measured with the one of their tokenizer")
    if experiment.checkpoints < 2:
        problems.append("checkpoints has to be at least 2")
    if experiment.ablations and experiment.ablations.of not in experiment.arms:
        problems.append(f"ablations are of {experiment.ablations.of}, which is not an arm")
    changes = experiment.ablations.changes if experiment.ablations else {}
    problems += [
        f"the learning_rate of {name} is {rate!r}, but has to be a number"
        for name, change in changes.items()
        if type(rate := change.get("learning_rate", 0.0)) not in (int, float)
    ]
    names = [] if problems else [cell.name for cell in experiment.cells()]
    problems += [f"two cells would be named {name}" for name in sorted({n for n in names if names.count(n) > 1})]
    if problems:
        raise InputError(f"{file}: {'; '.join(problems)}")
    return experiment
