"""The router: how much each expert counts for each token."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Router(nn.Linear):
    """Softmax router of one adapted Linear, w = softmax(W_g x) (LoRAMoE, arXiv 2312.09979, section 3).

    Dense by default: every expert takes part for every token. With `top_k`, the softmax runs over the k largest logits
    of a token and the other experts have weight 0, so the weights still sum to 1. Gradients reach W_g through the
    weights that are kept; the choice itself has none, and an expert that no token chose has a gradient of zeros. The
    softmax is computed in float32 at least, whatever the dtype of the model, since the balance term is built on these
    weights.

    Args:
        in_features: width I of the adapted Linear's input.
        num_experts: number of experts E; the weight W_g has shape (E, I), kaiming-uniform at the start.
        top_k: experts that take part for a token; None for all.
    """

    def __init__(
        self, in_features: int, num_experts: int, top_k: int | None = None, device: torch.device | None = None
    ):
        super().__init__(in_features, num_experts, bias=False, device=device, dtype=torch.float32)
        self.top_k = top_k

    def forward(self, x_BTI: Tensor, routed: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """Weights of shape (B, T, E), float32, each token's summing to 1. `routed`, if given, computes them of x, W_g:
        from here, since ZeRO-3 gathers a module's parameters when that module is called."""
        return self.softmax(F.linear(x_BTI, self.weight)) if routed is None else routed(x_BTI, self.weight)

    def softmax(self, logits_BTE: Tensor) -> Tensor:
        """The weights from the logits W_g x."""
        if self.top_k is not None:
            kept_BTK = logits_BTE.topk(self.top_k, dim=-1).indices
            dropped_BTE = torch.ones_like(logits_BTE, dtype=torch.bool).scatter(-1, kept_BTK, False)
            logits_BTE = logits_BTE.masked_fill(dropped_BTE, float("-inf"))
        return torch.softmax(logits_BTE, dim=-1, dtype=torch.promote_types(logits_BTE.dtype, torch.float32))
