"""The samples of all processes together, differentiable, so that splitting a micro-batch changes no balance term.

Shape suffixes: L adapted Linears, B samples, E experts, W processes.
"""

import torch
import torch.distributed as dist
from torch import Tensor


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
