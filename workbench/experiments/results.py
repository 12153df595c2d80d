"""The finished cells of an experiment, grouped and averaged over seeds."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev

from scipy.stats import t

from workbench.experiments.records import ARMS, BASE

CONFIDENCE = 0.95
HARNESS_METRICS = ("exact_match", "acc_norm", "acc", "f1")  # the first one of a task represents it

# Measures of the tasks, with functions that pick the best and the worst of several values.
MEASURES = (("task_score", max, min), ("task_loss", min, max))

Place = tuple[float, int]  # share of type 1 rows, instruction rows


def by_place(cells: Iterable[dict]) -> dict[Place, list[dict]]:
    """Cells by the mixture that they were trained on, smaller shares and sizes first."""
    places: dict[Place, list[dict]] = {}
    for cell in cells:
        places.setdefault((cell["knowledge_share"], cell["size"]), []).append(cell)
    return dict(sorted(places.items()))


def by_arm(cells: Iterable[dict]) -> dict[str, list[dict]]:
    """Cells by arm: those of the grid in the order of `ARMS`, then those of ablations by name, numbers by value."""
    arms: dict[str, list[dict]] = {}
    for cell in cells:
        arms.setdefault(cell["arm"], []).append(cell)
    return {arm: arms[arm] for arm in [*ARMS, *sorted(arms.keys() - set(ARMS), key=_by_value)] if arm in arms}


def _by_value(name: str) -> list[str | float]:
    parts = re.split(r"(\d+(?:\.\d+)?)", name)
    return [float(part) if index % 2 else part for index, part in enumerate(parts)]


def largest_common(cells: list[dict], arms: Iterable[str]) -> dict[Place, list[dict]]:
    """For each share of type 1 rows, the cells of these arms at the largest size that all of the arms have.

    Shares at which they have no size in common are left out.
    """
    cells_of = [[cell for cell in cells if cell["arm"] == arm] for arm in arms]
    common = set.intersection(*(set(by_place(each)) for each in cells_of)) if cells_of else set()
    largest = dict(sorted(common))
    return by_place(cell for each in cells_of for cell in each if largest.get(cell["knowledge_share"]) == cell["size"])


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Args:
        mean: of the values.
        half: half the width of the 95 % t-interval; None of one value.
        count: number of values.
    """

    mean: float
    half: float | None
    count: int


def estimate(values: Iterable[float | None]) -> Estimate | None:
    """Mean and interval of the values that are not None; None if there are none."""
    found = [value for value in values if value is not None]
    if not found:
        return None
    count, half = len(found), None
    if count > 1:
        half = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * stdev(found) / math.sqrt(count)
    return Estimate(fmean(found), half, count)


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


def matching_targets(runs: list[dict]) -> dict[str, float]:
    """Targets at which runs are compared, by measure: the worst, over the runs, of the best value that each reaches.

    A measure is left out if a run is never better than the base model: the target would be the base model's value.

    Args:
        runs: of all arms and seeds, with the base model or without.
    """
    trained = [run["checkpoints"] for run in runs if run["arm"] != BASE]
    if not trained:
        return {}
    targets = {}
    for measure, best, worst in MEASURES:
        target = worst(best(point[measure] for point in points) for points in trained)
        base = best(points[0][measure] for points in trained)
        if target != base and best(target, base) == target:
            targets[measure] = target
    return targets


def matched_knowledge(checkpoints: list[dict], measure: str, target: float | None) -> float | None:
    """Knowledge at the point where a measure first crosses the target, interpolated linearly between checkpoints.

    None if it never does, or if it has done so by the first checkpoint of the training: most knowledge is lost before
    that checkpoint, and nothing was measured in between.

    Args:
        checkpoints: the base model, then those of the training.
    """
    if target is None:
        return None
    for number, (before, after) in enumerate(pairwise(checkpoints)):
        distance, step = target - before[measure], after[measure] - before[measure]
        if step and 0 <= distance / step <= 1:
            part = distance / step
            if number == 0 and part < 1:
                return None
            return before["knowledge"] + part * (after["knowledge"] - before["knowledge"])
    return None


def outcome(run: dict, targets: dict[str, float]) -> dict[str, float | None]:
    """Final values of a run, and as `matched_...` its knowledge at the target of each measure."""
    last = run["checkpoints"][-1]
    ends = {name: last[name] for name in ("knowledge", "knowledge_known", "task_score", "task_loss")}
    matched = {
        f"matched_{measure}": matched_knowledge(run["checkpoints"], measure, targets.get(measure))
        for measure, *_ in MEASURES
    }
    return ends | matched | {"parameter_change": run["parameter_change"]}


def runs_over_sizes(cells: list[dict]) -> dict[Place, list[dict]]:
    """The ends of the runs of one arm, share and seed as one run over sizes, for comparisons at a target.

    All of its checkpoints are trained to their end, whereas the learning rate falls along one training. Only sizes
    that each arm has with each seed count.

    Returns:
        Runs by share of type 1 rows and largest size; shares with fewer than two sizes are left out.
    """
    base = [cell["checkpoints"][-1] for cell in cells if cell["arm"] == BASE]
    trained = [cell for cell in cells if cell["arm"] != BASE]
    found = {}
    for share in sorted({cell["knowledge_share"] for cell in trained}):
        paths: dict[tuple, dict[int, dict]] = {}
        for cell in trained:
            if cell["knowledge_share"] == share:
                paths.setdefault((cell["arm"], cell["seed"]), {})[cell["size"]] = cell
        sizes = sorted(set.intersection(*map(set, paths.values())))
        if len(sizes) > 1:
            found[share, sizes[-1]] = [
                path[sizes[-1]] | {"checkpoints": base + [path[size]["checkpoints"][-1] for size in sizes]}
                for path in paths.values()
            ]
    return found


def guessed_share(base: dict) -> float:
    """Share of the probe facts that the one best answer to each relation gets right.

    Args:
        base: the cell of the base model, with the relation of each fact and by relation what guessing gets.
    """
    return fmean(base["guessed"][relation] for relation in base["relations"])


def paired_growth(runs: list[dict], sizes: tuple[int, int], field: str) -> list[float | None]:
    """`field` of `outcome` at the second size minus that at the first, for every seed that both have; size 0 is the
    base model, which has one run for all seeds; None if a run lacks it."""
    first, second = ({run["seed"]: outcome(run, {})[field] for run in runs if run["size"] == size} for size in sizes)
    if sizes[0] == 0:
        first = dict.fromkeys(second, *first.values())
    return _difference_by_seed(second, first)


def paired_differences(
    runs: list[dict], arms: tuple[str, str], field: str, targets: dict[str, float]
) -> list[float | None]:
    """`field` of `outcome`, first arm minus second, for every seed that both have; None if a run lacks it."""
    first, second = ({run["seed"]: outcome(run, targets)[field] for run in runs if run["arm"] == arm} for arm in arms)
    return _difference_by_seed(first, second)


def _difference_by_seed(first: dict[int, float | None], second: dict[int, float | None]) -> list[float | None]:
    """First minus second for every seed that both have."""
    pairs = [(first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())]
    return [None if None in pair else pair[0] - pair[1] for pair in pairs]
