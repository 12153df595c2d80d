"""The finished cells of an experiment, grouped by method and setting."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

import numpy as np

from workbench.experiments.frontier import Frontier
from workbench.experiments.plan import Experiment
from workbench.experiments.records import ARMS, BASE

HARNESS_METRICS = ("exact_match", "acc_norm", "acc", "f1")  # the first one of a task represents it

Setting = tuple[float, float | None]  # learning rate, scaling


@dataclass(frozen=True)
class Method:
    """The runs of one arm at one share of type 1 rows.

    Args:
        arm: its name.
        knowledge_share: as in `Cell`.
        runs: of each setting, by seed; smaller rates first.
        contenders: the settings that all seeds are planned for, by the runs of the first.
        loss_range: as in `Frontier`.
    """

    arm: str
    knowledge_share: float
    runs: dict[Setting, dict[int, dict]]
    contenders: list[Setting]
    loss_range: tuple[float, float]

    @property
    def seeds(self) -> list[int]:
        """Those that every contender was run with."""
        return sorted(set.intersection(*(set(self.runs[setting]) for setting in self.contenders or self.runs)))

    @property
    def repeated(self) -> list[Setting]:
        """The settings with all of these seeds."""
        return [setting for setting, runs in self.runs.items() if set(self.seeds) <= set(runs)]

    @cached_property
    def frontier(self) -> Frontier:
        """Of the repeated settings; what a diverged run keeps counts as nothing."""
        loss, kept = (
            [[self.runs[setting][seed][field] or 0.0 for seed in self.seeds] for setting in self.repeated]
            for field in ("task_loss", "knowledge_known")
        )
        return Frontier(np.array(loss), np.array(kept), self.loss_range)

    def place(self, setting: Setting) -> tuple[float, float]:
        """Task loss and share kept, means over the runs of a setting."""
        runs = self.runs[setting].values()
        return fmean(run["task_loss"] for run in runs), fmean(run["knowledge_known"] or 0.0 for run in runs)

    def best(self, least_kept: float) -> Setting | None:
        """The setting with the lowest loss among those that keep at least so much; None if there is none."""
        able = [setting for setting in self.runs if self.place(setting)[1] >= least_kept]
        return min(able, key=lambda setting: self.place(setting)[0], default=None)


def methods(experiment: Experiment, cells: Iterable[dict]) -> tuple[list[Method], list[str]]:
    """The methods of the grid whose settings have all been run with the first seed, and what others lack, in words.

    Smaller shares of type 1 rows come first, arms in the order of `ARMS`.
    """
    settings: dict[tuple[float, str], list[Setting]] = {}
    for cell in experiment.grid(experiment.seeds[:1]):
        settings.setdefault((cell.knowledge_share, cell.arm), []).append((cell.learning_rate, cell.scaling))
    found: dict[tuple[float, str], dict[Setting, dict[int, dict]]] = {}
    for record in cells:
        if not record["is_variant"] and record["arm"] != BASE:
            runs = found.setdefault((record["knowledge_share"], record["arm"]), {})
            runs.setdefault((record["learning_rate"], record["scaling"]), {})[record["seed"]] = record
    finished, unfinished = [], []
    for share, arm in sorted(settings, key=lambda place: (place[0], ARMS.index(place[1]))):
        planned, runs = settings[share, arm], found.get((share, arm), {})
        first = {setting: runs[setting][experiment.seeds[0]] for setting in planned if setting in runs}
        if len(first) < len(planned):
            unfinished.append(f"{arm} at {100 * share:g} % ({len(first)} of {len(planned)} settings)")
            continue
        contenders = [setting for setting, run in first.items() if experiment.is_contender(run, first.values())]
        ordered = {setting: runs[setting] for setting in sorted(planned, key=_order)}
        finished.append(Method(arm, share, ordered, contenders, experiment.loss_range))
    return finished, unfinished


def _order(setting: Setting) -> tuple[float, float]:
    return setting[0], setting[1] or 0


def guessed_share(base: dict) -> float:
    """Share of the probe facts that the one best answer to each relation gets right.

    Args:
        base: the cell of the base model, with the relation of each fact and by relation what guessing gets.
    """
    return float(np.mean([base["guessed"][relation] for relation in base["relations"]]))


def main_metric(numbers: dict) -> str | None:
    """The metric of lm-evaluation-harness that represents a task.

    Args:
        numbers: by the harness's names, a metric and its filter, such as `acc,none`.

    Returns:
        The name of the first of `HARNESS_METRICS` that it has, else of the first number; None if it has none.
    """
    names = [
        name
        for name, value in numbers.items()
        if isinstance(value, int | float) and "_stderr" not in name and name != "sample_len"
    ]
    ranks = {metric: rank for rank, metric in enumerate(HARNESS_METRICS)}
    return min(names, key=lambda name: ranks.get(name.split(",")[0], len(ranks)), default=None)
