"""The router: how much each expert counts for each token."""

import torch
from torch import Tensor, nn

from peft.functions import thin_product


class Router(nn.Linear):
    """Dense softmax router of one adapted Linear, w = softmax(W_g x) (LoRAMoE, arXiv 2312.09979, section 3).

    Every expert takes part for every token; nothing is dropped. The softmax is computed in float32 at least, whatever
    the dtype of the model, since the balance term is built on these weights.

    Args:
        in_features: width I of the adapted Linear's input.
        num_experts: number of experts E; the weight W_g has shape (E, I), kaiming-uniform at the start.
    """

    def __init__(self, in_features: int, num_experts: int, device: torch.device | None = None):
        super().__init__(in_features, num_experts, bias=False, device=device, dtype=torch.float32)

    def forward(self, x_BTI: Tensor) -> Tensor:
        """Weights of shape (B, T, E), float32, each token's summing to 1."""
        logits_BTE = thin_product(x_BTI, self.weight)
        return torch.softmax(logits_BTE, dim=-1, dtype=torch.promote_types(logits_BTE.dtype, torch.float32))
