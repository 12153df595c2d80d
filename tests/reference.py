"""The method written straight from its equations, one expert and one sample at a time. Slow, and meant to be read."""

import torch
import torch.nn.functional as F
from torch import Tensor

from peft import LoraExperts, LoraLayer


def experts_loop(x: Tensor, experts: LoraExperts) -> Tensor:
    """(alpha / r) * sum_n w_n B_n A_n x, with w = softmax(W_g x); x is (B, T, I), the result (B, T, O)."""
    rank = experts.rank
    if experts.router is None:
        weights = torch.ones(*x.shape[:-1], 1)
    else:
        weights = torch.softmax(x @ experts.router.weight.T, dim=-1)
    total = 0
    for n in range(experts.num_experts):
        A_n = experts.lora_A[n * rank : (n + 1) * rank]
        B_n = experts.lora_B[:, n * rank : (n + 1) * rank]
        total = total + weights[..., n : n + 1] * (x @ A_n.T @ B_n.T)
    return experts.scaling * total


def layer_loop(x: Tensor, layer: LoraLayer) -> Tensor:
    """o = W0 x + delta(x)."""
    return x @ layer.base_layer.weight.T + experts_loop(x, layer.experts["default"])


def experts_autograd(experts: LoraExperts, x: Tensor, output: Tensor, mask: Tensor | None = None) -> Tensor:
    """output + (alpha / r) * B (repeat(w, r) * (A dropout(x))), left to autograd; `mask` holds 0 and 1 / kept."""
    if not torch.is_autocast_enabled("cpu"):
        x = x.to(experts.lora_A.dtype)
    hidden = F.linear(x if mask is None else (x * mask).to(x.dtype), experts.lora_A)
    if experts.router is not None:
        weights = torch.softmax(F.linear(x, experts.router.weight).float(), dim=-1)
        hidden = hidden * weights.repeat_interleave(experts.rank, dim=-1).to(hidden.dtype)
    return output + experts.scaling * F.linear(hidden, experts.lora_B).to(output.dtype)


def balance_loop(weights: list[Tensor], lengths: list[int], types: list[int], groups: int, delta: float) -> Tensor:
    """L_lbc summed over adapted Linears; `weights` holds one (B, T, E) tensor for each, padding on the right."""
    total = torch.zeros(())
    for weights_BTE in weights:
        experts = weights_BTE.shape[-1]
        Z = []
        for sample, (length, kind) in enumerate(zip(lengths, types, strict=True)):
            q = sum(weights_BTE[sample, t] for t in range(length)) / length
            for n in range(experts):
                sign = 0 if kind < 0 else -1 if n // (experts // groups) == kind else 1
                Z.append((1 + sign * delta) * q[n])
        Z = torch.stack(Z)
        mean = Z.sum() / len(Z)
        variance = ((Z - mean) ** 2).sum() / (len(Z) - 1)
        total = total + variance / (mean**2 + 1e-10)
    return total
