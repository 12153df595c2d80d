"""The instruments count exactly what a graph made by hand needs."""

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from workbench.instruments import LiveBytes, SavedBytes, count_flops, peak_memory


def bytes_of_a_small_graph() -> tuple[int, int, int]:
    """Saved bytes, bytes alive and peak of y = W x, z = exp(y), sum(z * z) with x (4, 8) and W (16, 8) in float32."""
    linear = nn.Linear(8, 16, bias=False)
    x = torch.ones(4, 8, requires_grad=True)
    saved, live = SavedBytes(linear), LiveBytes()
    with live, saved:
        z = linear(x).exp()
        loss = (z * z.view(4, 16)).sum()
    assert loss.ndim == 0
    return saved.total, live.now, live.peak


def test_saved_bytes_are_those_of_the_distinct_storages_that_are_no_parameters():
    """x for the gradient of W, and z, though exp and both factors keep it."""
    x, z = 4 * 8 * 4, 4 * 16 * 4
    assert bytes_of_a_small_graph()[0] == x + z


def test_live_bytes_fall_when_tensors_are_freed():
    """y goes as soon as z is there; z * z goes as soon as its sum, the loss, is there."""
    z, loss = 4 * 16 * 4, 4
    assert bytes_of_a_small_graph()[1:] == (z + loss, 2 * z + loss)


def test_fake_tensors_count_as_real_ones():
    real = bytes_of_a_small_graph()
    with FakeTensorMode():
        assert bytes_of_a_small_graph() == real


def test_live_bytes_leave_out_views_changes_in_place_and_what_was_there_before():
    before = torch.ones(1000)
    with LiveBytes() as live:
        before.view(10, 100).mul_(2)
        assert live.now == 0
        doubled = before * 2
        doubled.view(10, 100).add_(1)
        assert live.now == 4000
        live.reset_peak()
        del doubled
        assert (live.now, live.peak) == (0, 4000)


def test_flops_of_products_and_of_attention_are_two_for_each_multiply_add():
    linear = nn.Linear(8, 16, bias=False)
    x = torch.ones(4, 8, requires_grad=True)
    assert count_flops(lambda: linear(x).sum().backward()) == 3 * 2 * 4 * 8 * 16
    assert count_flops(lambda: torch.zeros(4, 16).addmm_(x.detach(), linear.weight.T.detach())) == 2 * 4 * 8 * 16
    q, k, v = (torch.ones(2, 3, 5, 8, requires_grad=True) for _ in range(3))
    forward = 2 * 2 * (2 * 3) * 5 * 5 * 8
    assert count_flops(lambda: F.scaled_dot_product_attention(q, k, v)) == forward
    # The backward pass has four products, and computes that of Q and K again.
    assert count_flops(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward()) == forward * 3.5


def test_peak_memory_sees_what_is_freed_again():
    level, peak = peak_memory(lambda: torch.ones(64 * 2**20, dtype=torch.uint8).max())
    assert 60 < (peak - level) / 2**20 < 80
