"""The computations of the experts, with backward passes that keep and move no more than they need.

Plain autograd gives the same values and gradients (`tests/reference.py` states them so), but keeps casts, dropped
inputs and gated products, and makes a new tensor of full size for every sum. Here all Linears with one input keep that
one tensor, a dropout mask takes a byte for each element, what is cheap is computed again, and sums are made in place if
nothing else holds the tensor: `owned` says so of the base layer's output and of the gradient of its input.

Shape suffixes: T tokens (however many leading dimensions there are), E experts, R rank of one expert, I / O input and
output features, H the few features of a thin product.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import masked
from .products import add_product, as_rows, own, product_dtype, scaled_product, stacked


def input_products(
    x_TI: Tensor, router_EI: Tensor | None, lora_A: Tensor, mask_TI: Tensor | None = None, owned: bool = False
) -> tuple[Tensor, Tensor | None, Tensor]:
    """All that reads x: x itself, for the base layer; the logits W_g x, if there is a router; hidden = A (mask * x).

    The gradient of the x returned comes here first, where those of router and A are added to it.
    """
    dtype = product_dtype(x_TI)
    if torch.is_grad_enabled():
        passed_TI, logits_TE, hidden = _InputProducts.apply(x_TI, router_EI, lora_A, mask_TI, dtype, owned)
        return x_TI if passed_TI is None else passed_TI, logits_TE, hidden
    # A Function would cost as much as the products themselves for a single token, and so would stacking the weights.
    logits_TE = None if router_EI is None else F.linear(x_TI.to(dtype), router_EI.to(dtype))
    return x_TI, logits_TE, F.linear(masked(x_TI, mask_TI).to(dtype), lora_A.to(dtype))


def gated_sum(
    output_TO: Tensor, hidden: Tensor, weights_TE: Tensor | None, lora_B: Tensor, scale: float, owned: bool = False
) -> Tensor:
    """output + scale * (repeat(w, R) * hidden) B^T: hidden (T, E*R), w (T, E) or None for 1, B (O, E*R)."""
    if torch.is_grad_enabled():
        return _GatedSum.apply(output_TO, hidden, weights_TE, lora_B, scale, owned)
    return add_product(own(output_TO, owned), gated(hidden, weights_TE, lora_B), lora_B.T, scale)


class _InputProducts(torch.autograd.Function):
    """Keeps x and the mask as they are, and the parameters themselves rather than views of them: ZeRO-3 frees their
    storage and gathers it again for the backward pass."""

    @staticmethod
    def forward(ctx, x_TI, router_EI, lora_A, mask_TI, dtype, owned):
        needs_x, *need_weights = ctx.needs_input_grad[:3]
        ctx.dtype, ctx.owned = dtype, owned
        ctx.save_for_backward(x_TI if any(need_weights) else None, router_EI, lora_A, mask_TI)
        outputs: list[Tensor | None] = [x_TI if needs_x else None, None]
        for weights, mask in _by_input(router_EI, lora_A, mask_TI):
            product = F.linear(masked(x_TI, mask).to(dtype), stacked(weights).to(dtype))
            outputs += [part.contiguous() for part in product.split([len(weight) for weight in weights], dim=-1)]
        return outputs[0], *outputs[-2:]

    @staticmethod
    def backward(ctx, x_gradient_TI, logits_gradient_TE, hidden_gradient):
        x_TI, router_EI, lora_A, mask_TI = ctx.saved_tensors
        gradient_of = {router_EI: logits_gradient_TE, lora_A: hidden_gradient}
        if x_gradient_TI is not None:
            x_gradient_TI = own(x_gradient_TI, ctx.owned and not torch.is_grad_enabled())
        weight_gradients: list[Tensor | None] = [None, None]
        for weights, mask in _by_input(router_EI, lora_A, mask_TI):
            gradient_TH = stacked([gradient_of[weight] for weight in weights], dim=-1)
            if x_gradient_TI is not None:
                add_product(x_gradient_TI, gradient_TH, stacked(weights), mask=mask)
            if x_TI is not None:
                rows_HI = as_rows(gradient_TH).T @ as_rows(masked(x_TI, mask).to(ctx.dtype))
                weight_gradients += rows_HI.split([len(weight) for weight in weights])
        return x_gradient_TI, *weight_gradients[-2:], None, None, None


class _GatedSum(torch.autograd.Function):
    """Keeps hidden, w and B; the gated features are computed again."""

    @staticmethod
    def forward(ctx, output_TO, hidden, weights_TE, lora_B, scale, owned):
        ctx.scale = scale
        ctx.save_for_backward(hidden, weights_TE, lora_B)
        # If a view is changed in place, autograd copies its gradient.
        total_TO = own(output_TO, owned and not output_TO._is_view())
        if total_TO is output_TO:
            ctx.mark_dirty(output_TO)
        return add_product(total_TO, gated(hidden, weights_TE, lora_B), lora_B.T, scale)

    @staticmethod
    def backward(ctx, gradient_TO):
        hidden, weights_TE, lora_B = ctx.saved_tensors
        rows_TO = as_rows(gradient_TO).to(hidden.dtype)
        gated_gradient = scaled_product(rows_TO, lora_B.to(hidden.dtype), ctx.scale)
        hidden_gradient = gated_gradient = gated_gradient.view(*hidden.shape[:-1], lora_B.shape[1])
        weights_gradient_TE = B_gradient = None
        if ctx.needs_input_grad[3]:
            B_gradient = scaled_product(rows_TO.T, as_rows(gated(hidden, weights_TE, lora_B)), ctx.scale)
        if weights_TE is not None:
            hidden_TER = _per_expert(hidden, weights_TE, lora_B)
            gated_gradient_TER = _per_expert(gated_gradient, weights_TE, lora_B)
            weights_gradient_TE = (gated_gradient_TER * hidden_TER).sum(dim=-1, dtype=weights_TE.dtype)
            hidden_gradient_TER = (gated_gradient_TER * weights_TE.unsqueeze(-1)).sum_to_size(hidden_TER.shape)
            hidden_gradient = hidden_gradient_TER.view(hidden.shape).to(hidden.dtype)
        return gradient_TO, hidden_gradient, weights_gradient_TE, B_gradient, None, None


def _by_input(router_EI: Tensor | None, lora_A: Tensor, mask_TI: Tensor | None):
    """The weights of each product and its mask: the router reads x, A reads mask * x; without a mask, one does both."""
    if router_EI is None:
        return [([lora_A], mask_TI)]
    return [([router_EI, lora_A], None)] if mask_TI is None else [([router_EI], None), ([lora_A], mask_TI)]


def gated(hidden: Tensor, weights_TE: Tensor | None, lora_B: Tensor) -> Tensor:
    """repeat(w, R) * hidden: the R features of each expert times its weight."""
    if weights_TE is None:
        return hidden
    return (_per_expert(hidden, weights_TE, lora_B) * weights_TE.unsqueeze(-1)).flatten(-2).to(hidden.dtype)


def _per_expert(hidden: Tensor, weights_TE: Tensor, lora_B: Tensor) -> Tensor:
    """hidden as (T, E, R), or (T, 1, R) if the experts share it."""
    return hidden.unflatten(-1, (-1, lora_B.shape[1] // weights_TE.shape[-1]))
