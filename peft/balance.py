"""The localized balancing constraint: one group of experts for each task type.

Shape suffixes: L adapted Linears, B samples, T tokens, E experts, K task types.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .ranks import sum_over_ranks


def sample_shares(weights_BTE: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """q[m, n]: the mean weight of expert n over the real tokens of sample m. Shape (B, E), float32.

    Args:
        weights_BTE: router weights; of shape (L, B, T, E), they give (L, B, E).
        mask_BT: 1 for real tokens, 0 for padding; None if nothing is padded.
    """
    weights_BTE = weights_BTE.float()
    if mask_BT is None:
        return weights_BTE.mean(dim=-2)
    mask_BT1 = mask_BT.unsqueeze(-1).to(weights_BTE)
    # Not an einsum, which autocast would compute in half precision.
    return (weights_BTE * mask_BT1).sum(dim=-2) / mask_BT1.sum(dim=-2).clamp(min=1)


def balance_coefficients(group_sizes: Sequence[int], blc_alpha: float) -> Tensor:
    """I[s, n] = 1 / (E * target share of expert n for task type s); the last row, which -1 indexes, is for no type.

    The E experts fall into contiguous groups, group s serving task type s. An expert of the matching group has a target
    share proportional to 1 / (1 - blc_alpha), any other one to 1 / (1 + blc_alpha). The term is smallest if the shares
    are the target shares: I * q is then 1 / E for every sample and expert. For equal groups the coefficients are
    1 - blc_alpha and 1 + blc_alpha up to a common factor, which the term ignores. A sample without a task type has
    I = 1. `blc_alpha` is delta of the paper.

    Args:
        group_sizes: experts in each of the K groups, summing to E; one group for all is I = 1 throughout.

    Returns:
        Tensor of shape (K + 1, E), float32: `balance_coefficients(...)[task_types_B]` has the samples' rows.
    """
    group_of_expert = [group for group, size in enumerate(group_sizes) for _ in range(size)]
    pull = {True: 1 / (1 - blc_alpha), False: 1 / (1 + blc_alpha)}  # for an expert of the matching group, and another
    rows = [[pull[group == task_type] for group in group_of_expert] for task_type in (*range(len(group_sizes)), -1)]
    pull_KE = torch.tensor(rows, dtype=torch.float32, device="cpu")
    return pull_KE.mean(dim=1, keepdim=True) / pull_KE


def localized_balance_term(
    shares_LBE: Tensor, coefficients_BE: Tensor, row_weights_B: Tensor | None = None, over_ranks: bool = False
) -> Tensor:
    """L_lbc = var(Z) / (mean(Z)^2 + 1e-10), Z = I * q, summed over the adapted Linears. A float32 scalar.

    Variance (unbiased) and mean run over all samples and experts of a Linear. This is the squared coefficient of
    variation that the authors' code computes and that they confirmed as meant; the paper prints variance over mean.
    Without any sample it is 0.

    It is computed from sums, so that ranks exchange 2 L + 1 numbers, however many samples each has. They are sums of
    Z - 1 / E, which is small if the term is: in float32, those of Z and Z^2 would cancel to rounding errors there.

    Args:
        row_weights_B: 1 for a sample, 0 for a padding example; None if all are samples.
        over_ranks: over the samples of all ranks of the default process group, if there is one. A collective.
    """
    L, B, E = shares_LBE.shape
    weights_B1 = shares_LBE.new_ones(B, 1) if row_weights_B is None else row_weights_B.to(shares_LBE).unsqueeze(1)
    D_LBE = (coefficients_BE * shares_LBE.float() - 1 / E) * weights_B1
    sums = torch.cat([D_LBE.sum(dim=(1, 2)), D_LBE.square().sum(dim=(1, 2)), E * weights_B1.sum(dim=0)])
    if over_ranks:
        sums = sum_over_ranks(sums)
    sum_L, squares_L, count = sums[:L], sums[L:-1], sums[-1].clamp(min=2)
    mean_L = sum_L / count
    var_L = (squares_L - mean_L * sum_L) / (count - 1)
    return (var_L / ((mean_L + 1 / E).square() + 1e-10)).sum()
