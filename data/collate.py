"""Batches: padding, mask and labels."""

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED_LABEL = -100
# Task type of a row that is no sample and counts nowhere: a process that has no row left at the end of an epoch still
# has to take part in the step. `peft` knows it under the same value.
FILLER_TASK_TYPE = -2


@dataclass
class Collator:
    """Pads encoded rows to the longest of the batch, on the right.

    Mask and labels come from lengths, never from comparing ids with the padding id: where the padding id is also the
    end-of-sequence id, as it often is, that would hide real tokens.

    Args:
        pad_token_id: what padding is filled with; its value has no influence on any loss.
    """

    pad_token_id: int

    def __call__(self, rows: list[dict]) -> dict[str, Tensor | list[str]]:
        """The batch: `input_ids`, `attention_mask`, `labels` of shape (B, T), `task_types` of shape (B,), all int64;
        and `sources`, the rows' files and numbers, for messages. Without any row, one filler row."""
        if not rows:
            rows = [{"input_ids": [self.pad_token_id], "prompt_length": 1, "task_type": FILLER_TASK_TYPE}]
        longest = max(len(row["input_ids"]) for row in rows)
        shape = (len(rows), longest)
        input_ids = torch.full(shape, self.pad_token_id)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORED_LABEL)
        for index, row in enumerate(rows):
            ids = torch.as_tensor(row["input_ids"])
            input_ids[index, : len(ids)] = ids
            attention_mask[index, : len(ids)] = 1
            labels[index, row["prompt_length"] : len(ids)] = ids[row["prompt_length"] :]
        task_types = torch.tensor([row["task_type"] for row in rows])
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "task_types": task_types,
            "sources": [row["source"] for row in rows if "source" in row],
        }
