"""Logits and loss at the supervised tokens only: at the positions whose next token carries a label.

Shape suffixes: B samples, T tokens, N supervised tokens of the batch, H hidden size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from data import supervised_indices
from peft import Router


class SupervisedTokens:
    """The positions of a batch that predict a supervised token, in the order of the rows.

    Args:
        labels_BT: labels as in transformers: the label of a token is predicted one position earlier.
        indices_N: the positions in the flattened batch, as the `Collator` gives them; None finds them, which
            synchronises with the device.

    Attributes:
        targets_N: the label that each position predicts.
        rows_N: the row of each position.
    """

    def __init__(self, labels_BT: Tensor, indices_N: Tensor | None = None):
        self._indices_N = supervised_indices(labels_BT) if indices_N is None else indices_N.to(labels_BT.device)
        self._shape = labels_BT.shape
        self.targets_N = labels_BT.flatten().index_select(0, self._indices_N + 1)
        self.rows_N = self._indices_N // labels_BT.shape[1]

    @contextmanager
    def only(self, model: PreTrainedModel) -> Iterator[None]:
        """While open, the model's logits have shape (1, N, V): its output layer sees these positions alone.

        What the stock forward does to the logits afterwards (scaling, soft-capping) is done to these. An adapted
        output layer needs complete rows for its routing shares; its positions are selected afterwards.
        """
        head = model.get_output_embeddings()
        if any(isinstance(module, Router) for module in head.modules()):
            hook = head.register_forward_hook(lambda module, inputs, logits_BTV: self._take(logits_BTV))
        else:
            hook = head.register_forward_pre_hook(lambda module, inputs: self._take(inputs[0]))
        try:
            yield
        finally:
            hook.remove()

    def loss(self, model: PreTrainedModel, logits_1NV: Tensor, **kwargs) -> Tensor:
        """The stock loss over these positions; without any, a 0 that still has gradients (zeros), not 0 / 0."""
        if not len(self.targets_N):
            return logits_1NV.float().sum()
        return model.loss_function(
            logits=logits_1NV, labels=None, shift_labels=self.targets_N, vocab_size=logits_1NV.shape[-1], **kwargs
        )

    def likelihood(self, logits_1NV: Tensor) -> Tensor:
        """Summed negative log-likelihood of each row's labels and their number, shape (B, 2), float32."""
        nll_N = F.cross_entropy(logits_1NV[0].float(), self.targets_N.to(logits_1NV.device), reduction="none")
        return self._sum_by_row(torch.stack([nll_N, torch.ones_like(nll_N)], dim=1))

    def matches(self, logits_1NV: Tensor) -> Tensor:
        """True for a row whose labels are all the likeliest tokens at their places, shape (B,), bool."""
        wrong_N = (logits_1NV[0].argmax(dim=-1) != self.targets_N.to(logits_1NV.device)).int()
        return self._sum_by_row(wrong_N) == 0

    def _sum_by_row(self, values: Tensor) -> Tensor:
        """Values of the N positions added up over each row, shape (B, ...)."""
        sums = values.new_zeros(self._shape[0], *values.shape[1:])
        return sums.index_add_(0, self.rows_N.to(values.device), values)

    def _take(self, x_BTH: Tensor) -> Tensor:
        if x_BTH.shape[:2] != self._shape:
            raise ValueError(f"labels have shape {tuple(self._shape)}; this batch needs {tuple(x_BTH.shape[:2])}")
        return x_BTH.flatten(0, 1).index_select(0, self._indices_N.to(x_BTH.device)).unsqueeze(0)
