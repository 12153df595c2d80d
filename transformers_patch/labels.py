"""Logits and loss at the supervised tokens only: at the positions whose next token carries a label.

Shape suffixes: B rows, S samples, T tokens, N supervised tokens of the batch, H hidden size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from data import supervised_indices
from peft import Router
from transformers_patch.logits import UnformedLogits, can_wait, in_chunks, put_off


class SupervisedTokens:
    """The positions of a batch that predict a supervised token, in the order of the rows.

    Args:
        labels_BT: labels as in transformers: the label of a token is predicted one position earlier.
        indices_N: the positions in the flattened batch, as the `Collator` gives them; None finds them, which
            synchronises with the device.
        sample_ids_BT: the number of each token's sample, if several share a row; None if each row is one.
        num_samples: S, with `sample_ids_BT`.

    Attributes:
        targets_N: the label that each position predicts.
        samples_N: the sample of each position.
    """

    def __init__(
        self,
        labels_BT: Tensor,
        indices_N: Tensor | None = None,
        sample_ids_BT: Tensor | None = None,
        num_samples: int = 0,
    ):
        self._indices_N = supervised_indices(labels_BT) if indices_N is None else indices_N.to(labels_BT.device)
        self._shape = labels_BT.shape
        self.targets_N = labels_BT.flatten().index_select(0, self._indices_N + 1)
        if sample_ids_BT is None:
            self.samples_N, self._num_samples = self._indices_N // labels_BT.shape[1], len(labels_BT)
        else:
            self.samples_N, self._num_samples = sample_ids_BT.flatten()[self._indices_N], num_samples

    @contextmanager
    def only(self, model: PreTrainedModel, may_wait: bool = True) -> Iterator[None]:
        """While open, the model's logits have shape (1, N, V): its output layer sees these positions alone.

        What the stock forward does to the logits afterwards (scaling, soft-capping) is done to these. If it does
        nothing and the output layer can wait, they are `UnformedLogits`, unless `may_wait` is false. An adapted output
        layer needs complete rows for its routing shares; its positions are selected afterwards.
        """
        head = model.get_output_embeddings()
        if any(isinstance(module, Router) for module in head.modules()):
            hook = head.register_forward_hook(lambda module, inputs, logits_BTV: self._take(logits_BTV))
        else:
            hook = head.register_forward_pre_hook(lambda module, inputs: self._take(inputs[0]))
        try:
            with put_off(head) if may_wait and can_wait(head) else nullcontext():
                yield
        finally:
            hook.remove()

    def loss(self, model: PreTrainedModel, logits_1NV: Tensor, **kwargs) -> Tensor:
        """The stock loss over these positions; without any, a 0 that still has gradients (zeros), not 0 / 0."""
        if not len(self.targets_N):
            return logits_1NV.float().sum()
        targets_N = self.targets_N.to(logits_1NV.device)
        if isinstance(logits_1NV, UnformedLogits) and model.loss_function is ForCausalLMLoss:
            divisor = kwargs.get("num_items_in_batch")
            return logits_1NV.cross_entropy(targets_N, len(targets_N) if divisor is None else divisor)
        return model.loss_function(
            logits=logits_1NV, labels=None, shift_labels=targets_N, vocab_size=logits_1NV.shape[-1], **kwargs
        )

    def scores(self, logits_1NV: Tensor) -> Tensor:
        """Of each sample, shape (S, 3), float32: summed negative log-likelihood of its labels, their number, and how
        many of them are not the likeliest token at their place."""
        targets_N = self.targets_N.to(logits_1NV.device)
        scores_N3 = torch.ones(len(targets_N), 3, device=logits_1NV.device)
        for logits_CV, targets_C, scores_C3 in in_chunks(logits_1NV, targets_N, scores_N3):
            scores_C3[:, 0] = F.cross_entropy(logits_CV, targets_C, reduction="none")
            scores_C3[:, 2] = logits_CV.argmax(dim=-1) != targets_C
        scores_S3 = scores_N3.new_zeros(self._num_samples, 3)
        return scores_S3.index_add_(0, self.samples_N.to(scores_N3.device), scores_N3)

    def _take(self, x_BTH: Tensor) -> Tensor:
        if x_BTH.shape[:2] != self._shape:
            raise ValueError(f"labels have shape {tuple(self._shape)}; this batch needs {tuple(x_BTH.shape[:2])}")
        return x_BTH.flatten(0, 1).index_select(0, self._indices_N.to(x_BTH.device)).unsqueeze(0)
