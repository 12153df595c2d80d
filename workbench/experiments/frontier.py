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
class Frontier:
    """The settings of one method, all of them trained with the same seeds.

    At each task loss, the frontier is the highest share of known facts that a setting with this loss or a lower one
    keeps; 0 at losses that no setting reaches.

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
        """The frontier at these losses, (P,), both loss and share kept as means over the seeds."""
        return self._of(np.arange(self.loss_KS.shape[1]))

    @cached_property
    def kept_by_seed(self) -> np.ndarray:
        """The frontier of each seed alone, (S, P)."""
        return np.stack([self._of(np.array([seed])) for seed in range(self.loss_KS.shape[1])])

    def _of(self, drawn_S: np.ndarray) -> np.ndarray:
        loss_K, kept_K = self.loss_KS[:, drawn_S].mean(1), self.kept_KS[:, drawn_S].mean(1)
        return np.where(loss_K <= self.losses[:, None], kept_K, 0).max(1)

    def band(self) -> tuple[np.ndarray, np.ndarray]:
        """Bounds of the middle 95 % of a bootstrap at each loss, (P,) each.

        It resamples the seeds, the same ones for all settings, since a seed stands for the same rows in all of them. A
        few seeds have few resamples, so it takes each of them once, instead of drawing. Three seeds have 27, whose
        middle is narrower than an interval that holds the mean of all seeds 95 times in 100.
        """
        seeds = range(self.loss_KS.shape[1])
        kept_RP = np.stack([self._of(np.array(drawn)) for drawn in product(seeds, repeat=len(seeds))])
        outside = (1 - CONFIDENCE) / 2
        low, high = np.quantile(kept_RP, (outside, 1 - outside), axis=0)
        return low, high

    def area(self) -> Estimate | None:
        """The area under the frontier of each seed as a share of the largest possible, with losses on a logarithmic
        axis: the mean of what is kept, losses that are not reached included."""
        return estimate(self.kept_by_seed.mean(1).tolist())

    def kept_over(self, other: "Frontier") -> Estimate | None:
        """How much more is kept than by another method, seed by seed, as a mean over the losses that both reach with
        this seed; None if a seed has no such loss."""
        differences = []
        for ours, theirs in zip(self.kept_by_seed, other.kept_by_seed, strict=True):
            common = (ours > 0) & (theirs > 0)
            if not common.any():
                return None
            differences.append(float((ours - theirs)[common].mean()))
        return estimate(differences)


def is_contender(own: dict, rivals: Iterable[dict], margin: float, highest_loss: float) -> bool:
    """Whether a run keeps at most `margin` less of the known facts than the frontier of the runs with as low a loss.

    Args:
        own: record of the run.
        rivals: those of all settings of the same method with the same seed.
        highest_loss: a run with a higher one has learnt too little to count, or diverged.
    """
    if own["task_loss"] > highest_loss:
        return False
    most = max(each["knowledge_known"] or 0 for each in rivals if each["task_loss"] <= own["task_loss"])
    return (own["knowledge_known"] or 0) >= most - margin
