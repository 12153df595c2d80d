"""The multi-expert block: a frozen Linear plus E LoRA experts, weighed per token by a router.

Shape suffixes: B samples, T tokens, E experts, R rank of one expert, I / O input and output features.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .config import LoraConfig
from .dropout import dropout_mask
from .functions import gated, gated_sum, input_products
from .fused import fused_linear, fused_shape
from .linear import linear_size
from .products import makes_new_tensors
from .router import Router
from .streams import beside_what_follows


class LoraExperts(nn.Module):
    """The experts that one adapter adds to one Linear (LoRAMoE, arXiv 2312.09979, section 3):

        delta(x) = (alpha / r) * sum_n w_n B_n A_n dropout(x)        w = softmax(W_g x)

    The experts are stacked, A as (E*R, I) and B as (O, E*R), so that the sum over experts becomes part of one
    matrix product: delta(x) = (alpha / r) * B (repeat(w, r) * (A dropout(x))). Two thin products serve all experts,
    and one dropout mask is shared by them. With `lora_shared_A`, A is (R, I) and all experts use the same features.
    With one expert there is nothing to route: no router exists and this is plain LoRA. `lora_null_expert` adds a last
    weight to w, which nothing multiplies: the router then also serves a single expert. `lora_rslora`: alpha / sqrt(r).
    A and router start kaiming-uniform, B at zero, so a fresh adapter changes nothing.
    """

    def __init__(self, in_features: int, out_features: int, config: LoraConfig, device: torch.device | None = None):
        super().__init__()
        self.num_experts, self.rank, weights = config.lora_nums, config.r, config.routed_experts
        self.scaling = config.scaling
        stacked_rank = self.num_experts * self.rank
        rows_of_A = self.rank if config.lora_shared_A else stacked_rank
        self.lora_A = nn.Parameter(torch.empty(rows_of_A, in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(out_features, stacked_rank, device=device, dtype=torch.float32))
        self.router = Router(in_features, weights, config.lora_top_k, device) if weights > 1 else None
        self.dropout = config.lora_dropout
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x_BTI: Tensor, base_layer: Callable[[Tensor], Tensor]) -> Tensor:
        """The adapted Linear, base_layer(x) + delta(x): shape (B, T, O), in the dtype of the base layer's output."""
        owned = makes_new_tensors(base_layer)
        if (shape := fused_shape(self, x_BTI)) is not None:
            return fused_linear(self, x_BTI, base_layer, shape, owned)
        mask_BTI, scale, hidden = None, self.scaling, x_BTI
        if self.training and self.dropout:
            mask_BTI, kept = dropout_mask(x_BTI, self.dropout)
            scale /= kept

        def routed(x: Tensor, router_EI: Tensor | None) -> Tensor | None:
            nonlocal x_BTI, hidden
            x_BTI, logits_BTE, hidden = input_products(x, router_EI, self.lora_A, mask_BTI, owned)
            return None if self.router is None or logits_BTE is None else self.router.softmax(logits_BTE)

        E = self.num_experts  # the weight of a null expert comes after theirs
        with beside_what_follows(x_BTI) as joined:
            weights_BTE = routed(x_BTI, None) if self.router is None else self.router(x_BTI, routed)[..., :E]
            if not torch.is_grad_enabled():
                hidden, weights_BTE = gated(hidden, weights_BTE, self.lora_B), None
        return gated_sum(joined(base_layer(x_BTI)), hidden, weights_BTE, self.lora_B, scale, owned)

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}"


class LoraLayer(nn.Module):
    """Wraps a Linear and adds the experts of the active adapter to its output: o = W0 x + delta(x).

    It takes and returns plain tensors, so it can replace the Linear anywhere, quantised Linears included.
    `base_layer`, which maps (..., I) to (..., O), is called as a module and its weight is never touched: ZeRO-3 gathers
    a module's own parameters when that module is called, and packed weights have no meaningful shape.
    """

    active_adapter: str | None = None

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = linear_size(base_layer)  # type: ignore[misc]
        self.experts = nn.ModuleDict()

    def add_adapter(self, name: str, config: LoraConfig) -> None:
        """Create the experts of adapter `name`, on the device of the wrapped layer and in its mode (train or eval)."""
        device = self.base_layer.weight.device
        experts = LoraExperts(self.in_features, self.out_features, config, device=device)
        self.experts[name] = experts.train(self.base_layer.training)

    @property
    def weight(self) -> Tensor:
        """The frozen weight: model code asks Linears for its dtype or device."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x_BTI: Tensor) -> Tensor:
        if self.active_adapter is None:
            return self.base_layer(x_BTI)
        return self.experts[self.active_adapter](x_BTI, self.base_layer)
