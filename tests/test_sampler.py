"""The rows that share a batch, whatever the number of processes and micro-batches."""

import numpy as np
import pytest
import torch

from data import ORDERS, Collator, GlobalBatchSampler

LENGTHS = np.random.default_rng(5).integers(5, 60, size=101)
LAYOUTS = [
    (1, 16, 1),
    (1, 4, 4),
    (2, 8, 1),
    (2, 2, 4),
    (4, 4, 1),
    (4, 1, 4),
]  # processes, rows, micro-batches: 16 a step


def all_ranks(order, processes, rows, micro_batches, epoch=0, seed=3, lengths=LENGTHS) -> list[list[list[int]]]:
    """Batches of one epoch, by micro-batch and rank."""
    samplers = [
        GlobalBatchSampler(lengths, order, seed, rows, micro_batches, processes, rank) for rank in range(processes)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    batches = [list(sampler) for sampler in samplers]
    assert {len(part) for part in batches} == {len(samplers[0])}
    return [list(group) for group in zip(*batches, strict=True)]


def steps(groups: list[list[list[int]]], micro_batches: int) -> list[list[int]]:
    """Row numbers of each optimizer step, over its micro-batches and ranks."""
    return [
        [row for group in groups[start : start + micro_batches] for part in group for row in part]
        for start in range(0, len(groups), micro_batches)
    ]


@pytest.mark.parametrize("order", ORDERS)
def test_a_step_has_the_same_rows_in_every_layout(order):
    expected = steps(all_ranks(order, *LAYOUTS[0]), 1)
    assert sorted(row for step in expected for row in step) == list(range(101))
    for layout in LAYOUTS[1:]:
        assert steps(all_ranks(order, *layout), layout[2]) == expected


@pytest.mark.parametrize("order", ["random", "group_by_length"])
def test_the_order_depends_on_seed_and_epoch_and_nothing_else(order):
    first = all_ranks(order, 2, 4, 1)
    torch.manual_seed(99)
    np.random.seed(99)
    assert all_ranks(order, 2, 4, 1) == first
    assert all_ranks(order, 2, 4, 1, epoch=1) != first
    assert all_ranks(order, 2, 4, 1, seed=4) != first


@pytest.mark.parametrize("rows", [97, 98, 99, 101, 1])
def test_the_last_rows_are_shared_evenly_and_none_is_repeated(rows):
    groups = all_ranks("group_by_length", 4, 2, 1, lengths=LENGTHS[:rows])
    assert sorted(row for group in groups for part in group for row in part) == list(range(rows))
    assert all(len(part) == 2 for group in groups[:-1] for part in group)
    sizes = [len(part) for part in groups[-1]]
    assert sum(sizes) == rows - 8 * (len(groups) - 1)
    assert max(sizes) - min(sizes) <= 1


def test_the_last_rows_can_be_left_out():
    sampler = GlobalBatchSampler(LENGTHS, "random", 0, 8, drop_last=True)
    assert len(list(sampler)) == len(sampler) == 12
    assert {len(batch) for batch in sampler} == {8}


def test_grouping_by_length_pads_less_and_begins_with_the_longest_row():
    grouped, random = (GlobalBatchSampler(LENGTHS, order, 0, 8) for order in ("group_by_length", "random"))
    assert grouped.padding_share() < random.padding_share() / 2
    first, *_, last = list(grouped)
    assert LENGTHS[first].max() == np.delete(LENGTHS, last).max()
    assert len(last) == 5


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("processes", "rows"), [(1, 8), (3, 4), (4, 8)])
def test_the_padding_share_is_that_of_the_batches(order, processes, rows):
    padded = sum(
        max(LENGTHS[part]) * len(part) for group in all_ranks(order, processes, rows, 2) for part in group if part
    )
    sampler = GlobalBatchSampler(LENGTHS, order, 3, rows, 2, processes)
    assert sampler.padding_share() == pytest.approx(1 - LENGTHS.sum() / padded)


def test_a_process_without_rows_gets_a_padding_example_that_counts_nowhere():
    batch = Collator(pad_token_id=7)([])
    assert batch["input_ids"].tolist() == [[7]]
    assert batch["labels"].tolist() == [[-100]]
    assert batch["task_types"].tolist() == [-1]
    assert batch["row_weights"].tolist() == [0]
    assert batch["supervised_indices"].tolist() == batch["lengths"] == batch["sources"] == []
