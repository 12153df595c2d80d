"""Frontiers, by hand: what is kept at each loss, and the resamples of the seeds."""

import math

import numpy as np
import pytest

from workbench.experiments.frontier import Estimate, Frontier, estimate, is_contender


def frontier(points: list[tuple[float, float]], loss_range: tuple[float, float] = (1, 4)) -> Frontier:
    """Of one seed: loss and share kept of each setting."""
    loss, kept = np.array(points).T[:, :, None]
    return Frontier(loss, kept, loss_range)


def test_a_frontier_is_the_most_that_a_setting_with_as_low_a_loss_keeps():
    found = frontier([(1.5, 0.2), (2.0, 0.6), (3.0, 0.5), (3.5, 0.9), (5.0, 1.0)])
    at = [found.kept[np.searchsorted(found.losses, loss)] for loss in (1.4, 1.6, 2.5, 3.2, 3.6)]
    assert at == [0, 0.2, 0.6, 0.6, 0.9]


def test_the_area_is_a_share_of_the_largest_with_losses_on_a_logarithmic_axis():
    """From 1 to 4, a loss of 2 is in the middle."""
    assert frontier([(1, 1.0)]).area() == Estimate(pytest.approx(1), None, 1)
    assert frontier([(2, 0.8)]).area().mean == pytest.approx(0.4, abs=1e-3)
    assert frontier([(5, 1.0)]).area().mean == 0


def test_the_area_is_that_of_each_seed():
    found, expected = Frontier(np.array([[1.0, 2.0]]), np.array([[0.8, 0.6]]), (1, 4)).area(), estimate([0.8, 0.3])
    assert (found.mean, found.half, found.count) == (
        pytest.approx(expected.mean, abs=1e-3),
        pytest.approx(expected.half, rel=1e-2),
        2,
    )


def test_methods_are_compared_at_the_losses_that_both_reach():
    """The one that reaches lower losses is not better for that."""
    strong, gentle = frontier([(1.0, 0.3), (2.0, 0.8)]), frontier([(2.0, 0.9), (math.sqrt(8), 0.9)])
    assert gentle.kept_over(strong).mean == pytest.approx(0.1, abs=1e-3)
    assert strong.kept_over(gentle).mean == pytest.approx(-0.1, abs=1e-3)
    assert strong.kept_over(frontier([(5.0, 1.0)])) is None


def test_a_difference_is_taken_seed_by_seed():
    """Where a seed is better, it is better for both: the difference has no spread though the areas have."""
    loss, kept = np.array([[2.0, 2.0]]), np.array([[0.5, 0.9]])
    more = Frontier(loss, kept + 0.1, (1, 4)).kept_over(Frontier(loss, kept, (1, 4)))
    assert (more.mean, more.half) == (pytest.approx(0.1), pytest.approx(0, abs=1e-9))


def test_the_band_takes_every_resample_of_the_seeds_once_and_the_same_for_all_settings():
    """Two seeds have four: the first twice, each once in two orders, and the second twice."""
    found = Frontier(np.array([[1.0, 1.0], [2.0, 2.0]]), np.array([[0.2, 0.4], [0.8, 0.6]]), (1, 4))
    low, high = found.band()
    inner = np.quantile([0.2, 0.3, 0.3, 0.4], (0.025, 0.975))
    assert (low[0], high[0]) == pytest.approx(tuple(inner))
    assert (low[-1], high[-1]) == pytest.approx(tuple(inner + 0.4))


def test_a_setting_reaches_a_loss_by_its_mean_over_the_drawn_seeds():
    found = Frontier(np.array([[1.0, 3.0]]), np.array([[0.6, 0.6]]), (1, 4))
    reached = [found.losses[kept > 0][0] for kept in (found.kept, *found.kept_by_seed)]
    assert reached == pytest.approx([2, 1, 3], rel=2e-3)


def test_a_run_that_diverged_is_no_contender_and_takes_no_part():
    def run(kept: float | None, loss: float) -> dict:
        return {"knowledge_known": kept, "task_loss": loss}

    diverged, gentle, strong, dominated = run(None, math.inf), run(0.9, 3.0), run(0.3, 1.0), run(0.25, 2.0)
    runs = [diverged, gentle, strong, dominated]
    assert [is_contender(each, runs, 0.04, 4) for each in runs] == [False, True, True, False]
    assert is_contender(dominated, runs, 0.06, 4)
    assert not is_contender(gentle, runs, 0.04, 2.5)


def test_intervals_are_those_of_the_t_distribution():
    """t at 0.975: 12.706 with one degree of freedom, 4.303 with two."""
    assert estimate([]) is None
    assert estimate([None]) is None
    assert estimate([0.5]) == Estimate(0.5, None, 1)
    assert estimate([1.0, None, 2.0]) == Estimate(1.5, pytest.approx(12.7062 * math.sqrt(0.5) / math.sqrt(2)), 2)
    assert estimate([1.0, math.inf]) == Estimate(math.inf, None, 2)
    assert estimate([1.0, 2.0, 3.0]) == Estimate(2.0, pytest.approx(4.30265 / math.sqrt(3)), 3)
