"""Packs: samples that share a row of a batch, so that little of it is padding."""

from collections import defaultdict

import datasets
import numpy as np
from numpy.typing import ArrayLike
from torch.utils.data import Dataset

from data.dataset import row_lengths


def pack(lengths: ArrayLike, capacity: int, seed: int) -> list[list[int]]:
    """Put every sample into a pack of at most `capacity` tokens, with little room left over.

    Best fit, longest first: each sample goes into the pack that it fills most, or into a new one. Samples of the same
    length are taken in an order drawn with the seed. A million samples take about 2 seconds.

    Args:
        lengths: tokens of each sample.
        capacity: tokens of a pack.

    Returns:
        The numbers of the samples in each pack.

    Raises:
        ValueError: a sample is longer than a pack.
    """
    lengths = np.asarray(lengths)
    if lengths.max(initial=0) > capacity:
        raise ValueError(f"there is a sample of {lengths.max()} tokens, but a pack has {capacity}")
    order = np.random.default_rng(seed).permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    packs: list[list[int]] = []
    with_room: dict[int, list[int]] = defaultdict(list)  # numbers of the packs by their free tokens
    rooms = 0  # bit n: there is a pack with n free tokens
    for sample, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1  # the lowest bit
            number = with_room[room].pop()
            rooms ^= (not with_room[room]) << room
        else:
            room, number = capacity, len(packs)
            packs.append([])
        packs[number].append(sample)
        with_room[room - length].append(number)
        rooms |= 1 << (room - length)
    return packs


class PackedRows(Dataset):
    """The packs of an encoded data set. An item is the list of a pack's encoded rows.

    Args:
        rows: the encoded data set.
        capacity, seed: see `pack`.

    Attributes:
        lengths: tokens of each pack.
    """

    def __init__(self, rows: datasets.Dataset, capacity: int, seed: int):
        lengths = row_lengths(rows)
        packs = pack(lengths, capacity, seed)
        self._rows = rows
        # Two arrays, not a list of many, which each worker of a DataLoader would copy in time.
        self._members = np.concatenate(packs)
        self._starts = np.cumsum([0, *map(len, packs)])
        self.lengths = np.add.reduceat(lengths[self._members], self._starts[:-1])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> list[dict]:
        first, last = self._starts[number : number + 2]
        return self._rows.__getitems__(self._members[first:last].tolist())
