"""Scores of given answers under a model: one teacher-forced forward pass, without decoding."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from data import Collator
from inference.generation import in_batches
from transformers_patch.labels import SupervisedTokens


@dataclass(frozen=True)
class AnswerScore:
    """The score of one expected answer under a model.

    Args:
        nll: summed negative log-likelihood of its tokens, including the end token.
        tokens: their number.
        matches: each of them is the most likely one at its position. By induction over the positions, this holds
            exactly if greedy decoding gives this answer token for token.
    """

    nll: float
    tokens: int
    matches: bool


def score_answers(
    model: nn.Module, rows: list[dict], pad_token_id: int, batch_size: int, progress: Callable
) -> list[AnswerScore]:
    """Score the answers of encoded rows (`input_ids`, `spans`).

    Args:
        progress: wraps the iteration over batches, to show its progress.
    """
    collate = Collator(pad_token_id)

    def score(batch_rows: list[dict]) -> list[AnswerScore]:
        batch = collate([{"task_type": -1, "source": "", **row} for row in batch_rows])
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        positions = SupervisedTokens(batch["labels"], batch["supervised_indices"])
        with torch.no_grad(), positions.only(model):
            logits_1NV = model(**inputs).logits
        scores = positions.scores(logits_1NV).tolist()
        return [AnswerScore(nll, int(tokens), matches=not wrong) for nll, tokens, wrong in scores]

    return in_batches(score, rows, [len(row["input_ids"]) for row in rows], batch_size, progress)


def most_likely_options(
    model: nn.Module,
    prompts: list[list[int]],
    options: list[list[list[int]]],
    pad_token_id: int,
    batch_size: int,
    progress: Callable,
) -> list[int]:
    """For each prompt, the index of the option (token ids, end token included) with the highest likelihood."""
    rows = [
        {"input_ids": [*prompt, *option], "spans": [len(prompt), len(prompt) + len(option)]}
        for prompt, choices in zip(prompts, options, strict=True)
        for option in choices
    ]
    scores = iter(score_answers(model, rows, pad_token_id, batch_size, progress))
    losses = [[next(scores).nll for _ in choices] for choices in options]
    return [min(range(len(each)), key=each.__getitem__) for each in losses]
