"""Batches: padding, mask and labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.packing import pack
from data.segments import span_pairs

IGNORED_LABEL = -100


@dataclass
class Collator:
    """Pads encoded rows to the longest of the batch, on the right, and notes what a model would have to wait for its
    device to find out.

    Mask and labels come from lengths, never from comparing ids with the padding id: where the padding id is also the
    end-of-sequence id, as it often is, that would hide real tokens.

    Args:
        pad_token_id: what padding is filled with; its value has no influence on any loss.
    """

    pad_token_id: int

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        """The batch of some encoded rows.

        Without any, it is one padding example, which counts nowhere: a process that has no row left at the end of an
        epoch still has to take part in the step.

        Returns:
            Tensors, all int64: `input_ids`, `attention_mask` and `labels` of shape (B, T); `task_types` and
            `row_weights` (1 for an example, 0 for a padding example) of shape (B,); `supervised_indices` of shape (N,),
            the positions in the flattened batch whose next token is supervised.
            Lists of the examples, for the trainer: `lengths` in tokens; `sources`, their files and numbers.
        """
        examples, rows = rows, rows or [_padding_example(self.pad_token_id)]
        input_ids, labels, _, sample_ids = _lay_out(rows, [[number] for number in range(len(rows))], self.pad_token_id)
        return {
            "input_ids": input_ids,
            "attention_mask": (sample_ids >= 0).long(),
            "labels": labels,
            **_by_sample(rows, examples),
            "supervised_indices": supervised_indices(labels),
        }


@dataclass
class PackingCollator:
    """Puts encoded rows, here samples, end to end, and notes which sample each token belongs to.

    A batch has no attention mask. Its positions restart with each sample, from which transformers finds where samples
    begin and builds a mask that keeps them apart. FlashAttention takes no mask, but such samples in a single row.

    Args:
        pad_token_id: as for the `Collator`.
        one_row: put all samples into one row without padding, for FlashAttention; else there is a row for each pack,
            padded on the right.
    """

    pad_token_id: int
    one_row: bool = False

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        """The batch of some samples, in this order, in rows as long as the longest sample."""
        lengths = [len(row["input_ids"]) for row in rows]
        return self._batch(rows, pack(lengths, max(lengths), seed=0), rows)

    def from_packs(self, packs: list[list[dict]]) -> dict[str, Any]:
        """The batch of some packs. Without any, it is one padding example, as the `Collator`'s.

        Returns:
            As the `Collator`, but instead of `attention_mask`: `position_ids` and `sample_ids` of shape (B, T), the
            number of each token's sample in the batch, -1 for padding. `task_types` and `row_weights` are those of the
            S samples, of shape (S,). With `one_row`, also `cu_seq_lens_q` and `cu_seq_lens_k`, int32 of shape (S + 1,),
            and `max_length_q` and `max_length_k`, by which FlashAttention finds the samples without waiting for the
            device.
        """
        examples = [row for members in packs for row in members]
        number = count()
        numbers = [[next(number) for _ in members] for members in packs]
        return self._batch(examples or [_padding_example(self.pad_token_id)], numbers or [[0]], examples)

    def _batch(self, rows: list[dict], packs: Sequence[Sequence[int]], examples: list[dict]) -> dict[str, Any]:
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        packs = [range(len(rows))] if self.one_row else packs
        input_ids, labels, position_ids, sample_ids = _lay_out(rows, packs, self.pad_token_id)
        batch = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "sample_ids": sample_ids,
            "labels": labels,
            **_by_sample(rows, examples),
            "supervised_indices": supervised_indices(labels),
        }
        if self.one_row:
            starts, longest = F.pad(lengths.cumsum(0), (1, 0)).int(), int(lengths.max())
            batch |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
            batch |= {"max_length_q": longest, "max_length_k": longest}
        return batch


def supervised_indices(labels_BT: Tensor) -> Tensor:
    """Positions in the flattened batch whose next token is supervised, in the order of the rows, shape (N,)."""
    supervised_BT = F.pad(labels_BT[:, 1:] != IGNORED_LABEL, (0, 1))
    return supervised_BT.flatten().nonzero().squeeze(1)


def _padding_example(pad_token_id: int) -> dict[str, Any]:
    return {"input_ids": [pad_token_id], "spans": [], "task_type": -1}


def _lay_out(rows: list[dict], packs: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, ...]:
    """Ids, labels, positions and sample numbers of shape (B, T), with a row for each pack of numbers of `rows`.

    The first token of a sample is not supervised: it may come after a token of another one. Positions restart with each
    sample; each token of the padding is at position 0, apart from all others.
    """
    ids = [torch.as_tensor(row["input_ids"]) for row in rows]
    shape = len(packs), max(sum(len(ids[number]) for number in members) for members in packs)
    input_ids = torch.full(shape, pad_token_id)
    labels, sample_ids = torch.full(shape, IGNORED_LABEL), torch.full(shape, -1)
    position_ids = torch.zeros(shape, dtype=torch.long)
    for index, members in enumerate(packs):
        start = 0
        for number in members:
            end, spans = start + len(ids[number]), rows[number]["spans"]
            input_ids[index, start:end] = ids[number]
            for first, last in span_pairs(spans):
                first = max(first, 1)
                labels[index, start + first : start + last] = ids[number][first:last]
            sample_ids[index, start:end] = number
            position_ids[index, start:end] = torch.arange(end - start)
            start = end
    return input_ids, labels, position_ids, sample_ids


def _by_sample(rows: list[dict], examples: list[dict]) -> dict[str, Any]:
    """The fields that have an entry for each sample; `examples` are the rows without a padding example."""
    return {
        "task_types": torch.tensor([row["task_type"] for row in rows]),
        "row_weights": torch.full((len(rows),), int(bool(examples))),
        "lengths": [len(row["input_ids"]) for row in examples],
        "sources": [row["source"] for row in examples],
    }
