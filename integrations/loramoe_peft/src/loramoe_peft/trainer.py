"""What the trainers of transformers and TRL know of the balance term."""

from collections.abc import Callable

import torch
from transformers import TrainerCallback

from .balance import Balance

COLUMN = "task_type"


class BalanceCallback(TrainerCallback):
    """Makes the term count as a mean over the micro-batches of a step, and logs it as `balance_loss`, unweighted.

    Every Trainer has one once this package is imported; it does nothing if its model is another one.
    """

    _balance: Balance | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._balance = Balance.of(model)
        if args.fp16 and self._balance is not None:
            raise ValueError("fp16 scales the loss, but not the balance term: train in bf16 or float32")

    def on_step_begin(self, args, state, control, **kwargs):
        if self._balance is not None:
            self._balance.scale = 1 / args.gradient_accumulation_steps

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._balance is not None and "loss" in logs and (term := self._balance.mean_term()) is not None:
            logs["balance_loss"] = state.log_history[-1]["balance_loss"] = term


class TaskTypeCollator:
    """A collator that hands the task types on: `task_types`, (B,), from the rows' `task_type`, -1 if that is missing.

    Args:
        collator: makes the rest of the batch.
    """

    def __init__(self, collator: Callable[[list[dict]], dict]):
        self.collator = collator

    def __call__(self, rows: list[dict]) -> dict:
        task_types = [-1 if (found := row.get(COLUMN)) is None else found for row in rows]
        batch = self.collator([{name: value for name, value in row.items() if name != COLUMN} for row in rows])
        return {**batch, "task_types": torch.tensor(task_types)}


class LoraMoeTrainerMixin:
    """Put before a trainer of transformers or TRL: `class Trainer(LoraMoeTrainerMixin, SFTTrainer)`.

    The column `task_type` of the data reaches the balance term.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.data_collator = TaskTypeCollator(self.data_collator)

    def compute_loss(self, model, inputs, *args, **kwargs):
        task_types = inputs.pop("task_types", None)
        if (balance := Balance.of(self.model)) is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        balance.scale = 1 / getattr(self, "current_gradient_accumulation_steps", 1)  # a Trainer that trains has it
        balance.task_types = task_types
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            balance.task_types = None

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if COLUMN not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, COLUMN]
