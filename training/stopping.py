"""Ending a run early, on all ranks at the same step: after SIGTERM, or at a loss or gradient that is not finite."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, Self

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import DefaultFlowCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from data import InputError
from training.checkpoint import find_checkpoint

MOST_ROWS_SHOWN = 10
# Optimizer steps in a row that may be skipped. The search for fp16's loss scale halves it from 2^16 and takes a few.
MOST_SKIPPED_STEPS = 20
# Keys in a checkpoint's state: how many skipped steps came last, and the evaluation that is still due after its step.
SKIPPED_STEPS, DUE = "skipped_steps", "due"


class StoppedError(Exception):
    """A run ends early because of SIGTERM; what there was to save is saved."""


class StopSignals(TrainerCallback):
    """Stops all ranks if any has to, at an optimizer step or evaluation batch; each costs one small all-reduce.

    SIGTERM, which schedulers send before a job's end, makes the run save a checkpoint and end training normally. No
    evaluation comes first; the checkpoint says which one was due, and a run that resumes from it makes up for it.

    Attributes:
        stopped: whether training ended because of SIGTERM.
        gradient_norm: that of the step, before clipping and over all ranks; None if it is not known.

    Raises:
        InputError: at the end of a step whose loss or gradient was not finite; nothing is saved then. If the
            optimizer skipped the step, as DeepSpeed and the loss scaler of fp16 do, only at the end of
            MOST_SKIPPED_STEPS of them in a row, or of a run of which no step was applied.
        StoppedError: at a batch of an evaluation. Within training, `LoRAMoETrainer` catches it.
    """

    def __init__(self):
        self.stopped = False
        self.gradient_norm: Tensor | float | None = None
        self._terminated = False
        self._scale = 0.0  # of fp16's loss scaler, at the start of the step
        self._losses: list[tuple[Tensor, list[str]]] = []

    @contextmanager
    def handled(self) -> Iterator[Self]:
        """A context in which SIGTERM is remembered until all ranks can stop; then its former handler is restored."""
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

    def stop(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """Save after this step and end training."""
        self.stopped = True
        args.save_only_model = False  # a run resumes from this checkpoint
        control.should_evaluate = False
        control.should_save = True
        control.should_training_stop = True

    def watch(self, loss: Tensor, sources: list[str]) -> None:
        """Remember the loss of a micro-batch and where its rows come from, until the end of the step."""
        self._losses.append((loss.detach(), sources))

    def on_prediction_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.raise_if_terminated(args.device)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer, **kwargs):
        self._scale = _loss_scale(optimizer)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer, **kwargs):
        bad = ~torch.isfinite(torch.stack([loss for loss, _ in self._losses]))
        # accelerate misses what a fused optimizer skips inside its own step; the scale shrinks then, and only then.
        skipped = torch.tensor(optimizer.step_was_skipped or _loss_scale(optimizer) < self._scale, device=bad.device)
        norm = 0.0 if self.gradient_norm is None else self.gradient_norm
        bad_gradient = ~skipped & ~torch.isfinite(torch.as_tensor(norm, device=bad.device))
        flags = torch.stack([bad.any(), bad_gradient, skipped, torch.tensor(self._terminated, device=bad.device)]).int()
        if dist.is_initialized():
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        loss_not_finite, gradient_not_finite, step_skipped, terminated = flags.tolist()
        if loss_not_finite or gradient_not_finite:
            rows = [source for (_, sources), is_bad in zip(self._losses, bad.tolist(), strict=True)
                    if is_bad or not loss_not_finite for source in sources]  # fmt: skip
            what = "loss" if loss_not_finite else "gradient"
            raise InputError(_not_finite_message(what, args, state.global_step, _of_all_ranks(rows)))
        skipped_steps = state.stateful_callbacks.get(SKIPPED_STEPS, 0) + 1 if step_skipped else 0
        if skipped_steps >= MOST_SKIPPED_STEPS or 0 < skipped_steps == state.global_step == state.max_steps:
            self.raise_skipped(args, state.global_step, skipped_steps)
        state.stateful_callbacks[SKIPPED_STEPS] = skipped_steps
        self._losses.clear()
        _note_due(args, state, control)
        if state.global_step >= state.max_steps:
            args.save_only_model = False  # what comes after training can be interrupted, too
        if terminated:
            self.stop(args, state, control)

    def raise_skipped(self, args: TrainingArguments, step: int, skipped_steps: int) -> NoReturn:
        """Raises InputError about the last of `skipped_steps` steps in a row; a collective."""
        rows = _of_all_ranks([source for _, sources in self._losses for source in sources])
        raise InputError(_not_finite_message("gradient", args, step, rows, skipped_steps))

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self.stopped:  # everything is saved
            control.should_evaluate = control.should_save = False

    def _terminate(self, number, frame):
        self._terminated = True


def _loss_scale(optimizer) -> float:
    scaler = getattr(optimizer, "scaler", None)
    return scaler.get_scale() if scaler is not None else 0.0


def _note_due(args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
    """Record the evaluation due after this step, including that of an epoch's end, and whether a save follows it.

    `LoRAMoETrainer` drops the record once the evaluation is made.
    """
    at_epoch_end = TrainerControl()
    if state.epoch == int(state.epoch) or state.global_step >= state.max_steps:
        DefaultFlowCallback().on_epoch_end(args, state, at_epoch_end)
    if control.should_evaluate or at_epoch_end.should_evaluate:
        # Of the step's own save and evaluation, the evaluation comes first; the epoch's comes after both.
        save = (control.should_evaluate and control.should_save) or at_epoch_end.should_save
        state.stateful_callbacks[DUE] = {"save": save}


def _of_all_ranks(rows: list[str]) -> list[str]:
    if not dist.is_initialized():
        return rows
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, rows)
    return [row for part in gathered for row in part]


def _not_finite_message(what: str, args: TrainingArguments, step: int, rows: list[str], skipped_steps: int = 1) -> str:
    checkpoint, _ = find_checkpoint(Path(args.output_dir))
    before = f", nor are those of the {skipped_steps - 1} steps before it" if skipped_steps > 1 else ""
    more = f" and {len(rows) - MOST_ROWS_SHOWN} more" if len(rows) > MOST_ROWS_SHOWN else ""
    return (
        f"the {what} of step {step} is not finite{before}; its rows were {', '.join(rows[:MOST_ROWS_SHOWN])}"
        f"{more}. Nothing was saved then; the last good checkpoint is {checkpoint or 'none'}. Look at these rows"
        + (", lower the learning rate, or use bf16 in place of fp16" if args.fp16 else ", or lower the learning rate")
    )
