"""Times of variants that take turns, so that other load on the machine affects all of them equally."""

import statistics
import time
from collections.abc import Callable

import numpy as np

from workbench.instruments import trim_heap
from workbench.variants import Variant

# Much slower than the others, so they run in every third round only.
SLOW = ("loop", "xlora")
LEAST_ROUNDS = 3


class Times:
    """Seconds by variant and round.

    Args:
        runs: for every variant, a function that runs it once and returns the seconds.
        rounds: number of rounds; each variant runs once per round.
        end: time of `time.monotonic` after which no round begins but the first LEAST_ROUNDS.
        is_warm: every variant has run before; otherwise a first round is not counted.
    """

    def __init__(
        self,
        runs: dict[Variant, Callable[[], float]],
        rounds: int,
        end: float = float("inf"),
        is_warm: bool = False,
    ):
        self.rounds: dict[Variant, dict[int, float]] = {variant: {} for variant in runs}
        order = list(runs)
        for number in range(0 if is_warm else -1, rounds):
            if number >= LEAST_ROUNDS and time.monotonic() > end:
                break
            for variant in order:
                if variant.name in SLOW and number >= 0 and number % 3:
                    continue
                seconds = runs[variant]()
                if variant.name in SLOW:  # these are also large
                    trim_heap()
                if number >= 0:
                    self.rounds[variant][number] = seconds
            order.append(order.pop(0))

    def ratio(self, variant: Variant, reference: Variant) -> dict[str, float]:
        """Median and quartiles of the ratio of two variants, over the rounds in which both ran."""
        ours, theirs = self.rounds[variant], self.rounds[reference]
        ratios = [ours[number] / theirs[number] for number in ours.keys() & theirs.keys()]
        low, middle, high = np.percentile(ratios, (25, 50, 75)).tolist()
        return {"ratio": middle, "ratio_low": low, "ratio_high": high, "rounds": len(ratios)}

    def row(self, variant: Variant, frozen: Variant) -> dict:
        """The reported times of one variant."""
        row = {f"step_{name}": value for name, value in self.ratio(variant, frozen).items()}
        rounds = row.pop("step_rounds")
        seconds = statistics.median(self.rounds[variant].values())
        return {**row, "step_seconds": seconds, "rounds": rounds}
