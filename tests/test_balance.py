"""The localized balancing constraint."""

import pytest
import torch
from reference import balance_loop, paper_coefficient

from peft import LoraConfig, balance_coefficients, localized_balance_term, sample_shares


def test_value_worked_by_hand():
    """Two samples, of type 0 and 1, on two experts; delta 0.1.

    The target shares are 0.55 and 0.45, so I = 1 / (2 * 0.55) = 0.9 / 0.99 and 1 / (2 * 0.45) = 1.1 / 0.99. The common
    factor cancels: with 0.9 and 1.1 and q = [[0.6, 0.4], [0.5, 0.5]], Z = 0.54, 0.44, 0.55, 0.45.
    mean = 0.495; squared deviations 0.002025, 0.003025, 0.003025, 0.002025, sum 0.0101, variance 0.0101 / 3.
    """
    shares = torch.tensor([[[0.6, 0.4], [0.5, 0.5]]])
    coefficients = balance_coefficients(group_sizes=[1, 1], blc_alpha=0.1)[:2]
    torch.testing.assert_close(coefficients, torch.tensor([[0.9, 1.1], [1.1, 0.9]]) / 0.99)
    term = localized_balance_term(shares, coefficients)
    torch.testing.assert_close(term, torch.tensor(0.0101 / 3 / 0.495**2))


def test_it_is_summed_over_linears():
    shares = torch.tensor([[[0.6, 0.4], [0.5, 0.5]], [[0.9, 0.1], [0.2, 0.8]]])
    coefficients = balance_coefficients([1, 1], 0.1)[:2]
    apart = [localized_balance_term(shares[layer : layer + 1], coefficients) for layer in range(2)]
    torch.testing.assert_close(localized_balance_term(shares, coefficients), apart[0] + apart[1])


def test_unlabelled_samples_and_indivisible_groups_have_coefficient_one():
    coefficients = balance_coefficients([2, 2], 0.1)[[-1, 1]]
    expected = torch.tensor([[0.99, 0.99, 0.99, 0.99], [1.1, 1.1, 0.9, 0.9]]) / 0.99
    torch.testing.assert_close(coefficients, expected)
    indivisible = LoraConfig(lora_nums=3, num_task_types=2, blc_weight=0)
    torch.testing.assert_close(balance_coefficients(indivisible.group_sizes, 0.1), torch.ones(2, 3))


def test_minimised_alone_it_gives_the_matching_group_55_percent():
    """A free router of shape 2 samples x 4 experts settles at (1 + delta) / 2 for the group of the sample's type."""
    logits = torch.zeros(2, 4, requires_grad=True)
    coefficients = balance_coefficients([2, 2], 0.1)[:2]
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        term = localized_balance_term(torch.softmax(logits, dim=-1)[None], coefficients)
        term.backward()
        return term

    optimizer.step(closure)
    group_shares = torch.softmax(logits, dim=-1).detach().unflatten(1, (2, 2)).sum(dim=-1)
    torch.testing.assert_close(group_shares, torch.tensor([[0.55, 0.45], [0.45, 0.55]]), rtol=0, atol=1e-3)
    assert closure() < 1e-6


@pytest.mark.parametrize("groups", [[2, 4], [1, 1, 4], [3, 2, 1]])
@pytest.mark.parametrize("delta", [0.1, 0.6])
def test_every_row_has_the_same_minimum_at_its_target_shares(groups, delta):
    """With shares equal to the targets, Z is 1 / E everywhere, so the term is 0, whatever types meet in the batch."""
    types = torch.tensor([-1, *range(len(groups))])
    pulls = [[1.0] * len(groups)] + [
        [(1 + delta) / (1 - delta) if s == t else 1.0 for s in range(len(groups))] for t in range(len(groups))
    ]
    targets = torch.tensor(
        [[pull for pull, size in zip(row, groups, strict=True) for _ in range(size)] for row in pulls]
    )
    targets /= targets.sum(dim=1, keepdim=True)
    Z = balance_coefficients(groups, delta)[types] * targets
    torch.testing.assert_close(Z, torch.full_like(Z, 1 / 6))
    assert localized_balance_term(targets[None], balance_coefficients(groups, delta)[types]) < 1e-10


@pytest.mark.parametrize("delta", [0.1, 0.5])
def test_equal_groups_keep_the_equations_of_the_paper(delta):
    """I = 1 - delta and 1 + delta: another constant factor, the same value and the same gradients."""
    torch.manual_seed(0)
    types, lengths = [0, 1, 1], [7, 7, 7]
    logits = torch.randn(3, 7, 6, requires_grad=True)
    weights = torch.softmax(logits, dim=-1)
    ours = localized_balance_term(sample_shares(weights)[None], balance_coefficients([3, 3], delta)[types])
    paper = balance_loop([weights], lengths, types, [3, 3], delta, coefficient=paper_coefficient)
    torch.testing.assert_close(ours, paper, rtol=1e-5, atol=1e-7)
    ours_gradient, paper_gradient = (torch.autograd.grad(term, logits, retain_graph=True)[0] for term in (ours, paper))
    assert paper_gradient.abs().max() > 0
    torch.testing.assert_close(ours_gradient, paper_gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("groups", "delta"), [([2, 2], 0.1), ([2, 2, 2], 0.5), ([3, 3], 0.0), ([1, 5], 0.1), ([1, 2, 3], 0.5)]
)
def test_values_and_gradients_equal_the_loop(groups, delta):
    torch.manual_seed(0)
    lengths, types, experts = [7, 3, 5], [0, 1, -1], sum(groups)
    logits = [torch.randn(3, 7, experts, requires_grad=True) for _ in range(2)]
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    weights = [torch.softmax(layer, dim=-1) for layer in logits]
    shares = torch.stack([sample_shares(layer, mask) for layer in weights])
    ours = localized_balance_term(shares, balance_coefficients(groups, delta)[types])
    loop = balance_loop(weights, lengths, types, groups, delta)
    torch.testing.assert_close(ours, loop, rtol=1e-5, atol=1e-6)
    ours_gradients = torch.autograd.grad(ours, logits, retain_graph=True)
    loop_gradients = torch.autograd.grad(loop, logits)
    assert all(gradient.abs().max() > 0 for gradient in loop_gradients)
    torch.testing.assert_close(ours_gradients, loop_gradients, rtol=1e-5, atol=1e-6)


def test_padding_does_not_count():
    weights = torch.softmax(torch.randn(1, 4, 3), dim=-1)
    padded = torch.cat([weights, torch.full((1, 2, 3), 7.0)], dim=1)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    torch.testing.assert_close(sample_shares(padded, mask), sample_shares(weights))


def test_shares_are_float32_whatever_comes_in():
    weights = torch.softmax(torch.randn(2, 4, 3), dim=-1).to(torch.bfloat16)
    assert sample_shares(weights, torch.ones(2, 4)).dtype is torch.float32


@pytest.fixture
def bf16_by_default():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def test_coefficients_do_not_depend_on_the_defaults_of_torch(bf16_by_default):
    with torch.device("meta"):
        found_KE = balance_coefficients([1, 1], 0.1)
    pull = torch.tensor([[1 / 0.9, 1 / 1.1], [1 / 1.1, 1 / 0.9], [1 / 1.1, 1 / 1.1]], dtype=torch.float32)
    torch.testing.assert_close(found_KE, pull.mean(dim=1, keepdim=True) / pull, rtol=0, atol=0)


def test_without_any_sample_it_is_zero():
    shares = torch.rand(2, 0, 4, requires_grad=True)
    terms = [
        localized_balance_term(shares, torch.ones(0, 4)),
        localized_balance_term(torch.rand(2, 3, 4, requires_grad=True), torch.ones(3, 4), torch.zeros(3)),
    ]
    for term in terms:
        assert term == 0
        assert term.requires_grad


def test_the_authors_statistic_worked_by_hand():
    """Two samples, two experts, three positions, the last of sample 1 being padding, which counts.

    sums = [[1.8, 1.2], [0.6, 2.4]]; types 0 and 1, so I = [[0.9, 1.1], [1.1, 0.9]] and Z = 1.62, 1.32, 0.66, 2.16.
    mean = 1.44; squared deviations 0.0324, 0.0144, 0.6084, 0.5184, sum 1.1736. The means give the same term.
    """
    weights = torch.tensor([[[0.6, 0.4]] * 3, [[0.1, 0.9], [0.3, 0.7], [0.2, 0.8]]])
    means = sample_shares(weights)
    torch.testing.assert_close(3 * means, torch.tensor([[1.8, 1.2], [0.6, 2.4]]))
    term = localized_balance_term(means[None], balance_coefficients([1, 1], 0.1)[:2])
    torch.testing.assert_close(term, torch.tensor(1.1736 / 3 / 1.44**2))


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("delta", [0.0, 0.1])
def test_the_sums_lose_nothing_to_cancellation(spread, delta):
    """96 Linears whose shares are near the targets, where the term is small, against float64."""
    torch.manual_seed(0)
    types, coefficients = torch.tensor([0, 1, -1, 1, 0]), balance_coefficients([3, 3], delta)
    shares = torch.softmax(spread * torch.randn(96, 5, 6), dim=-1) / coefficients[types]
    row_weights = torch.tensor([1, 1, 1, 0, 1])
    ours = shares.clone().requires_grad_()
    exact = shares[:, row_weights.bool()].double().requires_grad_()
    Z = (coefficients[types][row_weights.bool()] * exact).flatten(start_dim=1)
    expected = (Z.var(dim=1) / (Z.mean(dim=1).square() + 1e-10)).sum()
    term = localized_balance_term(ours, coefficients[types], row_weights)
    torch.testing.assert_close(term.double(), expected, rtol=2e-6 / spread**0.5, atol=0)
    term.backward()
    expected.backward()
    assert not ours.grad[:, 3].any()
    difference = ours.grad[:, row_weights.bool()].double() - exact.grad
    assert difference.norm() <= 2e-6 / spread * exact.grad.norm()
