"""Batches: padding, mask and labels."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
        examples = rows
        rows = rows or [{"input_ids": [self.pad_token_id], "spans": [], "task_type": -1}]
        shape = (len(rows), max(len(row["input_ids"]) for row in rows))
        input_ids = torch.full(shape, self.pad_token_id)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORED_LABEL)
        for index, row in enumerate(rows):
            ids = torch.as_tensor(row["input_ids"])
            input_ids[index, : len(ids)] = ids
            attention_mask[index, : len(ids)] = 1
            for start, end in zip(row["spans"][::2], row["spans"][1::2], strict=True):
                labels[index, start:end] = ids[start:end]
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "task_types": torch.tensor([row["task_type"] for row in rows]),
            "row_weights": torch.full(shape[:1], int(bool(examples))),
            "supervised_indices": supervised_indices(labels),
            "lengths": [len(row["input_ids"]) for row in examples],
            "sources": [row["source"] for row in examples],
        }


def supervised_indices(labels_BT: Tensor) -> Tensor:
    """Positions in the flattened batch whose next token is supervised, in the order of the rows, shape (N,)."""
    supervised_BT = F.pad(labels_BT[:, 1:] != IGNORED_LABEL, (0, 1))
    return supervised_BT.flatten().nonzero().squeeze(1)
