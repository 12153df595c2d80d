"""The method written straight from its equations, one expert and one sample at a time. Slow, and meant to be read."""

import torch
import torch.nn.functional as F
from torch import Tensor

from peft import LoraExperts, LoraLayer


def experts_loop(x: Tensor, experts: LoraExperts, mask: Tensor | float = 1) -> Tensor:
    """(alpha / r) * sum_n w_n B_n A_n (mask * x), with w = softmax(W_g x); x is (B, T, I), the result (B, T, O).

    `mask` holds 0 and 1 / kept.
    """
    rank = experts.rank
    weights = torch.ones(*x.shape[:-1], 1) if experts.router is None else router_weights(x, experts)
    total = 0
    for n in range(experts.num_experts):
        A_n = experts.lora_A if len(experts.lora_A) == rank else experts.lora_A[n * rank : (n + 1) * rank]
        B_n = experts.lora_B[:, n * rank : (n + 1) * rank]
        total = total + weights[..., n : n + 1] * ((x * mask) @ A_n.T @ B_n.T)
    return experts.scaling * total


def router_weights(x: Tensor, experts: LoraExperts) -> Tensor:
    """w = softmax(W_g x); with top_k, over the k largest logits of each token, and 0 elsewhere."""
    scores = (x @ experts.router.weight.T).exp()
    kept = scores.argsort(dim=-1, descending=True)[..., : experts.router.top_k]
    kept_scores = scores * torch.zeros_like(scores).scatter(-1, kept, 1.0)
    return kept_scores / kept_scores.sum(dim=-1, keepdim=True)


def layer_loop(x: Tensor, layer: LoraLayer, mask: Tensor | float = 1) -> Tensor:
    """o = W0 x + delta(x)."""
    return x @ layer.base_layer.weight.to(x.dtype).T + experts_loop(x, layer.experts["default"], mask)


def experts_autograd(experts: LoraExperts, x: Tensor, output: Tensor, mask: Tensor | None = None) -> Tensor:
    """output + (alpha / r) * B (repeat(w, r) * (A dropout(x))), left to autograd; `mask` holds 0 and 1 / kept."""
    if not torch.is_autocast_enabled("cpu"):
        x = x.to(experts.lora_A.dtype)
    hidden = F.linear(x if mask is None else (x * mask).to(x.dtype), experts.lora_A)
    if experts.router is not None:
        weights = torch.softmax(F.linear(x, experts.router.weight).float(), dim=-1)
        weights = weights[..., : experts.num_experts]
        hidden = hidden * weights.repeat_interleave(experts.rank, dim=-1).to(hidden.dtype)
    return output + experts.scaling * F.linear(hidden, experts.lora_B).to(output.dtype)


def coefficient(expert: int, kind: int, groups: list[int], delta: float) -> float:
    """I = 1 / (N * target share); an expert of group `kind` gets (1 + delta) / (1 - delta) times another's share."""
    group_of = [group for group, size in enumerate(groups) for _ in range(size)]
    wanted = [1 / (1 - delta) if kind >= 0 and group == kind else 1 / (1 + delta) for group in group_of]
    return sum(wanted) / (len(wanted) * wanted[expert])


def paper_coefficient(expert: int, kind: int, groups: list[int], delta: float) -> float:
    """As in the authors' code, for equal groups: 1 - delta on the group of the sample's type, else 1 + delta."""
    return 1 - delta if expert // groups[0] == kind else 1 + delta


def balance_loop(
    weights: list[Tensor],
    lengths: list[int],
    types: list[int],
    groups: list[int],
    delta: float,
    coefficient=coefficient,
) -> Tensor:
    """L_lbc summed over adapted Linears; `weights` holds one (B, T, E) tensor for each, padding on the right.

    `groups` holds the number of experts of each task type.
    """
    total = torch.zeros(())
    for weights_BTE in weights:
        Z = []
        for sample, (length, kind) in enumerate(zip(lengths, types, strict=True)):
            q = sum(weights_BTE[sample, t] for t in range(length)) / length
            Z += [coefficient(n, kind, groups, delta) * q[n] for n in range(weights_BTE.shape[-1])]
        Z = torch.stack(Z)
        mean = Z.sum() / len(Z)
        variance = ((Z - mean) ** 2).sum() / (len(Z) - 1)
        total = total + variance / (mean**2 + 1e-10)
    return total
