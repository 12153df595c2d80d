"""The localized balancing constraint: one group of experts for each task type.

Shape suffixes: L adapted Linears, B samples, T tokens, E experts.
"""

import torch
import torch.distributed as dist
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


def balance_coefficients(task_types_B: Tensor, num_experts: int, num_task_types: int, delta: float) -> Tensor:
    """I[m, n] = 1 - delta where expert n belongs to the task type of sample m, 1 + delta where it does not.

    The E experts fall into K = `num_task_types` equal contiguous groups, group s serving task type s. The term is
    smallest where the shares are proportional to 1 / I, so 1 - delta on the matching group draws the sample to it.
    A sample without a task type (-1) has I = 1. So has every sample where K does not divide E: there are no groups
    then, and the term is the plain squared coefficient of variation (`LoraConfig` allows that only where the term
    carries no weight).

    Returns:
        Tensor of shape (B, E), float32.
    """
    if num_experts % num_task_types:
        return torch.ones(len(task_types_B), num_experts, device=task_types_B.device)
    group_of_expert_E = torch.arange(num_experts, device=task_types_B.device) // (num_experts // num_task_types)
    matches_BE = task_types_B.unsqueeze(1) == group_of_expert_E
    coefficients_BE = torch.where(matches_BE, 1.0 - delta, 1.0 + delta)
    return torch.where(task_types_B.unsqueeze(1) < 0, 1.0, coefficients_BE)


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


def gather_samples(shares_LBE: Tensor, task_types_B: Tensor) -> tuple[Tensor, Tensor]:
    """The shares and task types of all ranks' samples, in rank order; differentiable in the shares.

    With it, a micro-batch that is split over several processes has the balance term that it has on one. Ranks may
    hold different numbers of samples. Collective: every rank of the default process group has to call it.
    """
    local_count = torch.tensor([shares_LBE.shape[1]], device=shares_LBE.device)
    counts = [torch.zeros_like(local_count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, local_count)
    counts = [int(count) for count in counts]
    missing = max(counts) - shares_LBE.shape[1]
    shares_WLBE = _AllGather.apply(torch.nn.functional.pad(shares_LBE, (0, 0, 0, missing)))
    types_WB = _AllGather.apply(torch.nn.functional.pad(task_types_B, (0, missing)))
    gathered_LBE = torch.cat([shares[:, :count] for shares, count in zip(shares_WLBE, counts, strict=True)], dim=1)
    return gathered_LBE, torch.cat([types[:count] for types, count in zip(types_WB, counts, strict=True)])


class _AllGather(torch.autograd.Function):
    """Stack equal-shaped tensors of all ranks along a new first dimension.

    Every rank computes the same function of the result, so each receives the same gradient, and the sum over ranks
    that the backward of an all-gather stands for is the world size times the local slice. No communication is needed
    for it. Data parallelism averages gradients over ranks, which makes the product the gradient of the global term.
    """

    @staticmethod
    def forward(ctx, local: Tensor) -> Tensor:
        gathered = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, local.contiguous())
        return torch.stack(gathered)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient[dist.get_rank()] * dist.get_world_size()
