"""Ending a run early, on all ranks at the same step: after SIGTERM, or at a loss or gradient that is not finite."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from data import InputError
from transformers_patch.training.checkpoint import find_checkpoint

MOST_ROWS_SHOWN = 10


class StoppedError(Exception):
    """A run ends early because of SIGTERM; what there was to save is saved."""


class StopSignals(TrainerCallback):
    """Asks once per optimizer step whether any rank has to stop; one small all-reduce.

    SIGTERM, as schedulers send it ahead of the end, makes the run save a checkpoint and end training normally.

    Attributes:
        stopped: whether training ended because of SIGTERM.
        gradient_norm: that of the step, before clipping and over all ranks; None where it is not known.

    Raises:
        InputError: at the end of a step whose loss or gradient was not finite; nothing is saved then. In fp16 and
            under DeepSpeed a gradient that overflows is no fault: the step is left out.
        StoppedError: before a batch of the evaluations ahead of training and behind it.
    """

    def __init__(self):
        self.stopped = False
        self.gradient_norm: Tensor | float | None = None
        self._terminated = False
        self._is_training = False
        self._losses: list[tuple[Tensor, list[str]]] = []

    @contextmanager
    def handled(self) -> Iterator[Self]:
        """A context in which SIGTERM is remembered until all ranks can stop; then it is its former handler's again."""
        previous = signal.signal(signal.SIGTERM, self._terminate)
        try:
            yield self
        finally:
            signal.signal(signal.SIGTERM, previous)

    def raise_if_terminated(self, device: torch.device) -> None:
        """Raises StoppedError on all ranks if any of them got SIGTERM; a collective."""
        terminated = torch.tensor(self._terminated, device=device).int()
        if dist.is_initialized():
            dist.all_reduce(terminated, dist.ReduceOp.MAX)
        if terminated:
            raise StoppedError(
                "stopped by a signal; the same command goes on from the last checkpoint, if there is one"
            )

    def watch(self, loss: Tensor, sources: list[str]) -> None:
        """Remember the loss of a micro-batch and where its rows come from, until the end of the step."""
        self._losses.append((loss.detach(), sources))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._is_training = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._is_training = False

    def on_prediction_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if not self._is_training:
            self.raise_if_terminated(args.device)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        bad = ~torch.isfinite(torch.stack([loss for loss, _ in self._losses]))
        leaves_out = args.fp16 or args.deepspeed
        norm = 0.0 if leaves_out or self.gradient_norm is None else self.gradient_norm
        bad_gradient = ~torch.isfinite(torch.as_tensor(norm, device=bad.device))
        flags = torch.stack([bad.any(), bad_gradient, torch.tensor(self._terminated, device=bad.device)]).int()
        if dist.is_initialized():
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        loss_not_finite, gradient_not_finite, terminated = flags.tolist()
        if loss_not_finite or gradient_not_finite:
            rows = [source for (_, sources), is_bad in zip(self._losses, bad.tolist(), strict=True)
                    if is_bad or not loss_not_finite for source in sources]  # fmt: skip
            what = "loss" if loss_not_finite else "gradient"
            raise InputError(_not_finite_message(what, args, state, _of_all_ranks(rows)))
        self._losses.clear()
        if terminated:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True

    def _terminate(self, number, frame):
        self._terminated = True


def _of_all_ranks(rows: list[str]) -> list[str]:
    if not dist.is_initialized():
        return rows
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, rows)
    return [row for part in gathered for row in part]


def _not_finite_message(what: str, args: TrainingArguments, state: TrainerState, rows: list[str]) -> str:
    checkpoint, _ = find_checkpoint(Path(args.output_dir))
    more = f" and {len(rows) - MOST_ROWS_SHOWN} more" if len(rows) > MOST_ROWS_SHOWN else ""
    return (
        f"the {what} of step {state.global_step} is not finite; its rows were {', '.join(rows[:MOST_ROWS_SHOWN])}"
        f"{more}. Nothing was saved then; the last good checkpoint is {checkpoint or 'none'}. Look at these rows"
        + (", lower the learning rate, or use bf16 in place of fp16" if args.fp16 else ", or lower the learning rate")
    )
