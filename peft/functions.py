"""The products of the experts, with backward passes that keep and move no more than they need.

Plain autograd gives the same values and gradients (`tests/reference.py` states them so), but keeps casts, dropped
inputs and gated products, and makes a new tensor of full size for every sum. Here the input is kept as it is, so that
all Linears with one input share one tensor; a dropout mask takes one byte for each element; what is cheap is computed
again; and sums are made in place where nothing else holds the tensor (`owned`).

Shape suffixes: T tokens (however many leading dimensions there are), E experts, R rank of one expert, I / O input and
output features, H the few features of a thin product.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from peft.dropout import masked


def input_products(
    x_TI: Tensor, router_EI: Tensor | None, lora_A: Tensor, mask_TI: Tensor | None = None, owned: bool = False
) -> tuple[Tensor, Tensor | None, Tensor]:
    """All that reads x: x itself, for the base layer; the logits W_g x, if there is a router; hidden = A (mask * x).

    The gradient of the x that is returned comes here first, where the contributions of router and A are added to it.

    Args:
        owned: nothing else holds that gradient.
    """
    dtype = product_dtype(x_TI)
    if not torch.is_grad_enabled():  # a Function costs as much as the products themselves for a single token
        return x_TI, *_thin_products(x_TI, router_EI, lora_A, mask_TI, dtype)
    passed_TI, logits_TE, hidden = _InputProducts.apply(x_TI, router_EI, lora_A, mask_TI, dtype, owned)
    return x_TI if passed_TI is None else passed_TI, logits_TE, hidden


def product_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype if it is on, else that of x, also for a float32 adapter on a bf16 model."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def gated_sum(
    output_TO: Tensor, hidden: Tensor, weights_TE: Tensor | None, lora_B: Tensor, scale: float, owned: bool = False
) -> Tensor:
    """output + scale * (repeat(w, R) * hidden) B^T: hidden (T, E*R), w (T, E) or None for 1, B (O, E*R). Shape (T, O).

    Args:
        owned: nothing else holds `output`.
    """
    if torch.is_grad_enabled():
        return _GatedSum.apply(output_TO, hidden, weights_TE, lora_B, scale, owned)
    return _add_gated(_own(output_TO, owned), hidden, weights_TE, lora_B, scale)


class _InputProducts(torch.autograd.Function):
    """Keeps x and the mask as they are, and the parameters themselves rather than views of them: ZeRO-3 frees their
    storage and gathers it again for the backward pass."""

    @staticmethod
    def forward(ctx, x_TI, router_EI, lora_A, mask_TI, dtype, owned):
        needs_x, *need_weights = ctx.needs_input_grad[:3]
        ctx.dtype, ctx.owned = dtype, owned
        ctx.save_for_backward(x_TI if any(need_weights) else None, router_EI, lora_A, mask_TI)
        if router_EI is None or mask_TI is not None:
            products = _thin_products(x_TI, router_EI, lora_A, mask_TI, dtype)
        else:  # both read the same x
            product = F.linear(x_TI.to(dtype), torch.cat([router_EI, lora_A]).to(dtype))
            products = torch.split_with_sizes_copy(product, [len(router_EI), len(lora_A)], dim=-1)
        return x_TI if needs_x else None, *products

    @staticmethod
    def backward(ctx, x_gradient_TI, logits_gradient_TE, hidden_gradient):
        x_TI, router_EI, lora_A, mask_TI = ctx.saved_tensors
        # The products: gradients and weights, to be stacked where both read the same x, and the mask.
        products = [([hidden_gradient], [lora_A], mask_TI)]
        if router_EI is not None and mask_TI is None:
            products = [([logits_gradient_TE, hidden_gradient], [router_EI, lora_A], None)]
        elif router_EI is not None:
            products.insert(0, ([logits_gradient_TE], [router_EI], None))
        if x_gradient_TI is not None:
            x_gradient_TI = _own(x_gradient_TI, ctx.owned and not torch.is_grad_enabled())
        weight_gradients: list[Tensor | None] = [None, None]
        for gradients, weights, mask in products:
            gradient_TH, weight_HI = _stacked(gradients, dim=-1), _stacked(weights, dim=0)
            if x_gradient_TI is not None:
                _add_product(x_gradient_TI, gradient_TH, weight_HI.to(ctx.dtype), mask=mask)
            if x_TI is not None:
                stacked_HI = _rows(gradient_TH).T @ _rows(masked(x_TI, mask).to(ctx.dtype))
                weight_gradients += stacked_HI.split([len(weight) for weight in weights])
        return x_gradient_TI, *weight_gradients[-2:], None, None, None


class _GatedSum(torch.autograd.Function):
    """Keeps hidden, w and B; the gated features are computed again."""

    @staticmethod
    def forward(ctx, output_TO, hidden, weights_TE, lora_B, scale, owned):
        ctx.scale = scale
        ctx.save_for_backward(hidden, weights_TE, lora_B)
        # If a view is changed in place, autograd copies its gradient.
        total_TO = _own(output_TO, owned and not output_TO._is_view())
        if total_TO is output_TO:
            ctx.mark_dirty(output_TO)
        return _add_gated(total_TO, hidden, weights_TE, lora_B, scale)

    @staticmethod
    def backward(ctx, gradient_TO):
        hidden, weights_TE, lora_B = ctx.saved_tensors
        rows_TO = _rows(gradient_TO).to(hidden.dtype)
        gated_gradient = _scaled_product(rows_TO, lora_B.to(hidden.dtype), ctx.scale)
        gated_gradient = gated_gradient.view(*hidden.shape[:-1], lora_B.shape[1])
        weights_gradient_TE = B_gradient = None
        if ctx.needs_input_grad[3]:
            B_gradient = _scaled_product(rows_TO.T, _rows(_gated(hidden, weights_TE, lora_B)), ctx.scale)
        hidden_gradient = _gated(gated_gradient, weights_TE, lora_B)
        if weights_TE is not None:
            per_expert = (weights_TE.shape[-1], -1)
            products_TER = gated_gradient.unflatten(-1, per_expert) * _per_expert(hidden, weights_TE, lora_B)
            weights_gradient_TE = products_TER.sum(dim=-1)
            if hidden.shape != hidden_gradient.shape:
                hidden_gradient = hidden_gradient.unflatten(-1, per_expert).sum(dim=-2)
        return gradient_TO, hidden_gradient, weights_gradient_TE, B_gradient, None, None


def _thin_products(x_TI, router_EI, lora_A, mask_TI, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """W_g x and A (mask * x)."""
    logits_TE = None if router_EI is None else F.linear(x_TI.to(dtype), router_EI.to(dtype))
    return logits_TE, F.linear(masked(x_TI, mask_TI).to(dtype), lora_A.to(dtype))


def _own(x: Tensor, owned: bool) -> Tensor:
    """x if it may be changed in place, else a copy."""
    return x if owned and x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)


def _add_product(total: Tensor, left: Tensor, right: Tensor, scale: float = 1, mask: Tensor | None = None) -> Tensor:
    """total += scale * mask * (left right), in place. Returns total."""
    if mask is not None:
        return total.addcmul_(left @ right, mask, value=scale)
    if total.dtype != left.dtype:
        return total.add_(left @ right, alpha=scale)
    _rows(total).addmm_(_rows(left), right, alpha=scale)
    return total


def _add_gated(total_TO: Tensor, hidden: Tensor, weights_TE: Tensor | None, lora_B: Tensor, scale: float) -> Tensor:
    return _add_product(total_TO, _gated(hidden, weights_TE, lora_B), lora_B.to(hidden.dtype).T, scale)


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    return torch.addmm(left.new_empty(1), left, right, beta=0, alpha=scale)


def _stacked(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _gated(hidden: Tensor, weights_TE: Tensor | None, lora_B: Tensor) -> Tensor:
    """repeat(w, R) * hidden: the R features of each expert times its weight."""
    if weights_TE is None:
        return hidden
    hidden_TER = _per_expert(hidden, weights_TE, lora_B)
    return (hidden_TER * weights_TE.unsqueeze(-1)).flatten(-2).to(hidden.dtype)


def _per_expert(hidden: Tensor, weights_TE: Tensor, lora_B: Tensor) -> Tensor:
    """hidden as (T, E, R), or (T, 1, R) if the experts share it."""
    return hidden.unflatten(-1, (-1, lora_B.shape[1] // weights_TE.shape[-1]))


def _rows(x: Tensor) -> Tensor:
    """As a matrix, whatever the leading dimensions."""
    return x.reshape(-1, x.shape[-1])
