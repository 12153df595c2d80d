"""The localized balancing constraint: one group of experts for each task type.

Shape suffixes: L adapted Linears, B samples, T tokens, E experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Task type of a row that is no sample: it only fills the batch of a process that has no row left, and counts nowhere.
FILLER_TASK_TYPE = -2


def sample_shares(weights_BTE: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """q[m, n]: the mean weight of expert n over the real tokens of sample m. Shape (B, E), float32.

    Args:
        weights_BTE: router weights.
        mask_BT: 1 for real tokens, 0 for padding; None where nothing is padded.
    """
    weights_BTE = weights_BTE.float()
    if mask_BT is None:
        return weights_BTE.mean(dim=1)
    mask_BT1 = mask_BT.unsqueeze(-1).to(weights_BTE.dtype)
    return (weights_BTE * mask_BT1).sum(dim=1) / mask_BT1.sum(dim=1).clamp(min=1)


def sample_sums(weights_BTE: Tensor) -> Tensor:
    """The authors' statistic in place of q: summed over all positions, padding included. Shape (B, E), float32."""
    return weights_BTE.float().sum(dim=1)


def balance_coefficients(task_types_B: Tensor, group_sizes: Sequence[int], delta: float) -> Tensor:
    """I[m, n] = 1 / (E * target share of expert n for the task type of sample m).

    The E experts fall into contiguous groups, group s serving task type s. An expert of the matching group has a target
    share proportional to 1 / (1 - delta), any other one to 1 / (1 + delta). The term is smallest where the shares are
    the target shares: I * q is then 1 / E for every sample and expert. For equal groups the coefficients are 1 - delta
    and 1 + delta up to a common factor, which the term ignores. A sample without a task type (-1) has I = 1.

    Args:
        group_sizes: experts in each group, summing to E; one group for all is I = 1 throughout.

    Returns:
        Tensor of shape (B, E), float32.
    """
    groups = torch.arange(len(group_sizes), device=task_types_B.device)
    group_of_expert_E = groups.repeat_interleave(torch.tensor(group_sizes, device=task_types_B.device))
    matches_BE = task_types_B.unsqueeze(1) == group_of_expert_E
    pull_BE = torch.where(matches_BE, 1 / (1 - delta), 1 / (1 + delta))
    return pull_BE.mean(dim=1, keepdim=True) / pull_BE


def localized_balance_term(shares_LBE: Tensor, coefficients_BE: Tensor) -> Tensor:
    """L_lbc = var(Z) / (mean(Z)^2 + 1e-10), Z = I * q, summed over the adapted Linears. A float32 scalar.

    Variance (unbiased) and mean run over all samples and experts of a Linear. This is the squared coefficient of
    variation that the authors' code computes and that they confirmed as meant; the paper prints variance over mean.
    Without any sample it is 0.
    """
    if not shares_LBE.shape[1]:
        return shares_LBE.float().sum()
    Z_LN = (coefficients_BE.to(shares_LBE.device) * shares_LBE.float()).flatten(start_dim=1)
    return (Z_LN.var(dim=1) / (Z_LN.mean(dim=1).square() + 1e-10)).sum()
