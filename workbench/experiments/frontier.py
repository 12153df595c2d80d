"""What a method can keep at each task loss, over all of its settings, and how sure that is from a few seeds.

Shape suffixes: K settings, S seeds, R resamples, P points along the axis of losses.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from statistics import fmean, stdev

import numpy as np
from scipy.stats import t

CONFIDENCE = 0.95
POINTS = 1000  # along the axis of losses


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Args:
        mean: of the values.
        half: half the width of the 95 % t-interval; None of one value, or of one that is infinite.
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
    if count > 1 and all(map(math.isfinite, found)):
        half = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * stdev(found) / math.sqrt(count)
    return Estimate(fmean(found), half, count)


@dataclass(frozen=True)
class Interval:
    """A value of all seeds, and the middle 95 % of those of the resamples; the bounds are None for one seed."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Frontier:
    """The settings of one method, all of them trained with the same seeds.

    At each task loss, the frontier is the highest share of known facts that a setting with this loss or a lower one
    keeps, both as means over seeds; 0 at losses that no setting reaches. The bootstrap resamples the seeds, the same
    ones for all settings, since a seed stands for the same rows in all of them. A few seeds have few resamples, so it
    takes each of them once, instead of drawing.

    Args:
        loss_KS: task loss.
        kept_KS: share of the known facts that are kept.
        loss_range: the losses that count.
    """

    loss_KS: np.ndarray
    kept_KS: np.ndarray
    loss_range: tuple[float, float]

    @property
    def losses(self) -> np.ndarray:
        """The axis, (P,)."""
        return np.geomspace(*self.loss_range, POINTS)

    @cached_property
    def kept(self) -> np.ndarray:
        """The frontier at these losses, (P,)."""
        return self._of(np.arange(self.loss_KS.shape[1]))

    @cached_property
    def kept_of_resamples(self) -> np.ndarray:
        """The frontier of each resample of the seeds, (R, P)."""
        seeds = range(self.loss_KS.shape[1])
        return np.stack([self._of(np.array(drawn)) for drawn in product(seeds, repeat=len(seeds))])

    def _of(self, drawn_S: np.ndarray) -> np.ndarray:
        loss_K, kept_K = self.loss_KS[:, drawn_S].mean(1), self.kept_KS[:, drawn_S].mean(1)
        return np.where(loss_K <= self.losses[:, None], kept_K, 0).max(1)

    def band(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper bound of the frontier at each loss, (P,) each."""
        low, high = _middle(self.kept_of_resamples)
        return low, high

    def area(self) -> Interval:
        """The area under the frontier as a share of the largest possible, with losses on a logarithmic axis: the mean
        of what is kept."""
        return self._interval(self.kept.mean(), self.kept_of_resamples.mean(1))

    def area_over(self, other: "Frontier") -> Interval:
        """How much larger the area is than that of another method with the same seeds."""
        return self._interval(
            self.kept.mean() - other.kept.mean(), self.kept_of_resamples.mean(1) - other.kept_of_resamples.mean(1)
        )

    def _interval(self, value: float, value_R: np.ndarray) -> Interval:
        if len(value_R) == 1:
            return Interval(float(value), None, None)
        low, high = _middle(value_R)
        return Interval(float(value), float(low), float(high))

    def best(self, least_kept: float) -> int | None:
        """The setting with the lowest loss among those that keep at least so much; None if there is none."""
        loss_K = np.where(self.kept_KS.mean(1) >= least_kept, self.loss_KS.mean(1), math.inf)
        found = int(loss_K.argmin())
        return found if math.isfinite(loss_K[found]) else None


def is_contender(own: dict, rivals: Iterable[dict], margin: float, highest_loss: float) -> bool:
    """Whether a run keeps at most `margin` less of the known facts than the frontier of the runs with as low a loss.

    Args:
        own: record of the run.
        rivals: those of all settings of the same method with the same seed.
        highest_loss: a run with a higher one has learnt too little to count.
    """
    if own["knowledge_known"] is None or own["task_loss"] > highest_loss:  # None: diverged
        return False
    most = max(each["knowledge_known"] or 0 for each in rivals if each["task_loss"] <= own["task_loss"])
    return own["knowledge_known"] >= most - margin


def _middle(values: np.ndarray) -> np.ndarray:
    outside = (1 - CONFIDENCE) / 2
    return np.quantile(values, (outside, 1 - outside), axis=0)
