"""The finished cells of an experiment, grouped by method and setting."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from workbench.experiments.frontier import Frontier
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
        loss_range: as in `Frontier`.
    """

    arm: str
    knowledge_share: float
    runs: dict[Setting, dict[int, dict]]
    loss_range: tuple[float, float]

    @property
    def seeds(self) -> list[int]:
        """Those of the setting with the most."""
        return sorted(max(self.runs.values(), key=len))

    @property
    def repeated(self) -> list[Setting]:
        """The settings with all of these seeds; the others were no contenders, or are still to be run."""
        return [setting for setting, runs in self.runs.items() if sorted(runs) == self.seeds]

    @property
    def frontier(self) -> Frontier:
        return Frontier(self._values("task_loss"), self._values("knowledge_known"), self.loss_range)

    def best(self, least_kept: float) -> tuple[Setting, list[dict]] | None:
        """The setting with the lowest loss among those that keep at least so much, and its runs."""
        found = self.frontier.best(least_kept)
        if found is None:
            return None
        setting = self.repeated[found]
        return setting, list(self.runs[setting].values())

    def _values(self, field: str) -> np.ndarray:
        """Of each repeated setting and seed; what a diverged run keeps counts as nothing."""
        runs = [[self.runs[setting][seed] for seed in self.seeds] for setting in self.repeated]
        return np.array([[run[field] or 0.0 for run in by_seed] for by_seed in runs])


def methods(cells: Iterable[dict], loss_range: tuple[float, float]) -> list[Method]:
    """The methods of the grid, smaller shares of type 1 rows first, arms in the order of `ARMS`."""
    found: dict[tuple[float, str], dict[Setting, dict[int, dict]]] = {}
    grid = [cell for cell in cells if not cell["is_variant"] and cell["arm"] != BASE]
    for cell in sorted(grid, key=_place):
        runs = found.setdefault((cell["knowledge_share"], cell["arm"]), {})
        runs.setdefault((cell["learning_rate"], cell["scaling"]), {})[cell["seed"]] = cell
    return [Method(arm, share, runs, loss_range) for (share, arm), runs in found.items()]


def _place(cell: dict) -> tuple:
    return cell["knowledge_share"], ARMS.index(cell["arm"]), cell["learning_rate"], cell["scaling"], cell["seed"]


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
