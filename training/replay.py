"""The divergence from the base model on replayed rows, which keeps a model near it: learning without forgetting (Li and
Hoiem, arXiv 1606.09282).

Shape suffixes: B rows, T tokens, N compared positions, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations import is_deepspeed_zero3_enabled

from data import IGNORED_LABEL
from peft import PeftModel
from transformers_patch.labels import SupervisedTokens
from transformers_patch.logits import kl_divergence

REPLAYED = 1  # the task type of world knowledge


def count_replayed(batch: dict) -> Tensor:
    """Number of positions that `divergence` compares: those of rows of type 1, prompts included, with a next token."""
    return batch["attention_mask"][batch["task_types"] == REPLAYED, 1:].sum()


def divergence(model: PeftModel, batch: dict) -> Tensor:
    """KL(base model || model) of the next token, in nats, summed over the positions that `count_replayed` counts.

    The rows of type 1 are run twice more: as for the loss, with dropout, and by the base model, without gradient.
    """
    replayed_B, rows, longest = batch["task_types"] == REPLAYED, slice(1), 1
    if replayed_B.any():
        rows, longest = replayed_B, int(batch["attention_mask"][replayed_B].sum(dim=1).max())
    elif not is_deepspeed_zero3_enabled():
        return torch.zeros((), device=replayed_B.device)
    # Under ZeRO-3 every rank has to run the model if one does: without rows of type 1, on a token with no next one.
    ids_BT, mask_BT = (batch[name][rows, :longest] for name in ("input_ids", "attention_mask"))
    positions = SupervisedTokens(ids_BT.masked_fill(mask_BT == 0, IGNORED_LABEL))

    def log_probs() -> Tensor:
        logits_1NV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
        return F.log_softmax(logits_1NV[0].float(), dim=-1)

    with positions.only(model, may_wait=False):
        ours_NV = log_probs()
        with torch.no_grad(), model.eval().disable_adapter():
            base_NV = log_probs()
    model.train()
    return kl_divergence(base_NV, ours_NV)
