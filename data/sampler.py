"""The order of rows and their batches, the same for any number of processes and in a resumed run."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
from torch.utils.data import DataLoader, Sampler

Order = Literal["random", "group_by_length", "sequential"]
ORDERS: tuple[Order, ...] = ("random", "group_by_length", "sequential")

# Global batches that are sorted by length together. More would pad a little less and shuffle less.
BATCHES_SORTED_TOGETHER = 50


def epoch_order(lengths: np.ndarray, order: Order, global_batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Row numbers of one epoch; each `global_batch_size` of them in turn are the rows of one optimizer step.

    Depends on its arguments alone, not on any global random state.

    `group_by_length` shuffles the rows, sorts stretches of them by length, cuts these into global batches and shuffles
    the batches. The batch with the longest row comes first, so that too little memory is noticed at once; the
    incomplete one stays last.

    Args:
        lengths: tokens of each row.
    """
    if order == "sequential":
        return np.arange(len(lengths))
    generator = np.random.default_rng([seed, epoch])
    rows = generator.permutation(len(lengths))
    num_batches = len(rows) // global_batch_size
    if order == "random" or num_batches < 2:
        return rows
    full, rest = np.split(rows, [num_batches * global_batch_size])
    stretch = min(BATCHES_SORTED_TOGETHER, -(-num_batches // 2)) * global_batch_size
    pieces = [full[start : start + stretch] for start in range(0, len(full), stretch)]
    full = np.concatenate([piece[np.argsort(lengths[piece], kind="stable")] for piece in pieces])
    batches = generator.permutation(full.reshape(num_batches, global_batch_size))
    longest = lengths[batches].max(axis=1).argmax()
    batches[[0, longest]] = batches[[longest, 0]]
    return np.concatenate([batches.ravel(), rest])


class GlobalBatchSampler(Sampler[list[int]]):
    """The micro-batches of one process, as lists of row numbers.

    The rows of an epoch (`epoch_order`) are cut into global micro-batches, and each of these is divided evenly among
    the processes. So an optimizer step has the same rows however many processes and micro-batches share them. The last
    global micro-batch of an epoch may be smaller; a process then has fewer rows than others, or none.

    Args:
        lengths: tokens of each row.
        order: see `epoch_order`.
        seed: seed of the order.
        micro_batch_size: rows per process and micro-batch.
        accumulation_steps: micro-batches per optimizer step.
        num_processes: processes that share the rows.
        rank: this process's number.
        drop_last: leave out the last global micro-batch if it is smaller.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        order: Order,
        seed: int,
        micro_batch_size: int,
        accumulation_steps: int = 1,
        num_processes: int = 1,
        rank: int = 0,
        drop_last: bool = False,
    ):
        self.lengths, self.order, self.seed, self.epoch = np.asarray(lengths), order, seed, 0
        self.micro_batch_size, self.num_processes, self.rank = micro_batch_size, num_processes, rank
        self.global_micro_batch_size = micro_batch_size * num_processes
        self.global_batch_size = self.global_micro_batch_size * accumulation_steps
        surplus = len(self.lengths) % self.global_micro_batch_size if drop_last else 0
        self.rows_per_epoch = len(self.lengths) - surplus

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.rows_per_epoch // self.global_micro_batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        rows = self._epoch_rows()
        for start in range(0, len(rows), self.global_micro_batch_size):
            shared = rows[start : start + self.global_micro_batch_size]
            yield np.array_split(shared, self.num_processes)[self.rank].tolist()

    def padding_share(self) -> float:
        """Share of this epoch's tokens, over all processes, that are padding: each micro-batch is padded to its
        longest row."""
        lengths = self.lengths[self._epoch_rows()]
        if not len(lengths):
            return 0.0
        full = len(lengths) - len(lengths) % self.global_micro_batch_size
        last = np.array_split(np.arange(full, len(lengths)), self.num_processes)
        starts = [*range(0, full, self.micro_batch_size), *(part[0] for part in last if len(part))]
        sizes = np.diff([*starts, len(lengths)])
        return 1 - lengths.sum() / (np.maximum.reduceat(lengths, starts) * sizes).sum()

    def _epoch_rows(self) -> np.ndarray:
        rows = epoch_order(self.lengths, self.order, self.global_batch_size, self.seed, self.epoch)
        return rows[: self.rows_per_epoch]


class EpochDataLoader(DataLoader):
    """A DataLoader whose `set_epoch`, which trainers call, sets the epoch of its batch sampler."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
