"""The products of the experts, with backward passes that keep no more than they need.

Plain autograd gives the same values and gradients (`tests/reference.py` states them so), but keeps casts, dropped
inputs and gated products. Here the input is kept as it is, so that all Linears with one input share one tensor, a
dropout mask takes one byte for each element, and what is cheap is computed again.

Shape suffixes: T tokens (however many leading dimensions there are), E experts, R rank of one expert, I / O input and
output features, H the few features of a thin product.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def dropout_mask(x: Tensor, probability: float) -> tuple[Tensor, float]:
    """A mask of the elements of x that stay, a uint8 tensor of its shape, and the exact probability of staying.

    Random 64-bit words are read as 16-bit lanes, one for each element, and compared with a threshold: several times
    faster on a CPU than drawing one number for each. The probability is thus rounded to a multiple of 1/65536.
    """
    dropped = min(round(probability * 2**16), 2**16 - 1)
    size = ((x.numel() + 3) // 4,)
    if torch.compiler.is_compiling():  # random_ cannot be traced; randint has other words for the same seed
        words = torch.randint(-(2**63), 2**63 - 1, size, dtype=torch.int64, device=x.device)
    else:
        words = torch.empty(size, dtype=torch.int64, device=x.device).random_(-(2**63), None)
    lanes = words.view(torch.int16)[: x.numel()].view(x.shape)
    return (lanes >= dropped - 2**15).view(torch.uint8), 1 - dropped / 2**16


def thin_product(x_TI: Tensor, weight_HI: Tensor, mask_TI: Tensor | None = None) -> Tensor:
    """(mask * x) W^T for a W of few rows, in autocast's dtype if it is on, else in that of x. Shape (T, H).

    W may have another dtype: a float32 adapter on a bf16 model computes in bf16, as it does under autocast.
    """
    kind, dtype = x_TI.device.type, x_TI.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    # A Function costs as much as the product itself for a single token, and keeps nothing without gradients.
    call = _ThinProduct.apply if torch.is_grad_enabled() else _thin_product
    return call(x_TI, weight_HI, mask_TI, dtype)


def gated_sum(output_TO: Tensor, hidden: Tensor, weights_TE: Tensor | None, lora_B: Tensor, scale: float) -> Tensor:
    """output + scale * (repeat(w, R) * hidden) B^T: hidden (T, E*R), w (T, E) or None for 1, B (O, E*R). Shape (T, O).

    The sum is the only tensor of full size that is made, unless the output's dtype is not that of `hidden`.
    """
    call = _GatedSum.apply if torch.is_grad_enabled() else _gated_sum
    return call(output_TO, hidden, weights_TE, lora_B, scale)


class _ThinProduct(torch.autograd.Function):
    """Keeps x and the mask as they are, and the parameter itself rather than a view of it: ZeRO-3 frees its storage
    and gathers it again for the backward pass."""

    @staticmethod
    def forward(ctx, x_TI: Tensor, weight_HI: Tensor, mask_TI: Tensor | None, dtype: torch.dtype) -> Tensor:
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        ctx.dtype = dtype
        ctx.save_for_backward(x_TI if needs_weight else None, weight_HI if needs_x else None, mask_TI)
        return _thin_product(x_TI, weight_HI, mask_TI, dtype)

    @staticmethod
    def backward(ctx, gradient_TH: Tensor):
        x_TI, weight_HI, mask_TI = ctx.saved_tensors
        x_gradient_TI = weight_gradient_HI = None
        if weight_HI is not None:
            x_gradient_TI = gradient_TH @ weight_HI.to(ctx.dtype)
            if mask_TI is not None:
                x_gradient_TI *= mask_TI
        if x_TI is not None:
            dropped_TI = _masked(x_TI, mask_TI).to(ctx.dtype)
            weight_gradient_HI = _rows(gradient_TH).T @ _rows(dropped_TI)
        return x_gradient_TI, weight_gradient_HI, None, None


class _GatedSum(torch.autograd.Function):
    """Keeps hidden, w and B; the gated features are computed again."""

    @staticmethod
    def forward(
        ctx, output_TO: Tensor, hidden: Tensor, weights_TE: Tensor | None, lora_B: Tensor, scale: float
    ) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(hidden, weights_TE, lora_B)
        return _gated_sum(output_TO, hidden, weights_TE, lora_B, scale)

    @staticmethod
    def backward(ctx, gradient_TO: Tensor):
        hidden, weights_TE, lora_B = ctx.saved_tensors
        rows_TO = _rows(gradient_TO).to(hidden.dtype)
        gated_gradient = (ctx.scale * (rows_TO @ lora_B.to(hidden.dtype))).view(*hidden.shape[:-1], lora_B.shape[1])
        weights_gradient_TE = B_gradient = None
        if ctx.needs_input_grad[3]:
            B_gradient = rows_TO.T @ (ctx.scale * _rows(_gated(hidden, weights_TE, lora_B)))
        hidden_gradient = _gated(gated_gradient, weights_TE, lora_B)
        if weights_TE is not None:
            per_expert = (weights_TE.shape[-1], -1)
            products_TER = gated_gradient.unflatten(-1, per_expert) * _per_expert(hidden, weights_TE, lora_B)
            weights_gradient_TE = products_TER.sum(dim=-1)
            if hidden.shape != hidden_gradient.shape:
                hidden_gradient = hidden_gradient.unflatten(-1, per_expert).sum(dim=-2)
        return gradient_TO, hidden_gradient, weights_gradient_TE, B_gradient, None


def _thin_product(x_TI: Tensor, weight_HI: Tensor, mask_TI: Tensor | None, dtype: torch.dtype) -> Tensor:
    return F.linear(_masked(x_TI, mask_TI).to(dtype), weight_HI.to(dtype))


def _gated_sum(output_TO: Tensor, hidden: Tensor, weights_TE: Tensor | None, lora_B: Tensor, scale: float) -> Tensor:
    gated, B = _rows(_gated(hidden, weights_TE, lora_B)), lora_B.to(hidden.dtype)
    if output_TO.dtype == hidden.dtype:
        # Not a view: if a Function returns one, model code cannot change it in place.
        total_TO = output_TO.clone(memory_format=torch.contiguous_format)
        _rows(total_TO).addmm_(gated, B.T, alpha=scale)
        return total_TO
    return output_TO + (scale * gated @ B.T).to(output_TO.dtype).view(output_TO.shape)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


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
