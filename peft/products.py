"""Matrix products that are added to a tensor in place, and where that is safe."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def makes_new_tensors(layer: Callable[[Tensor], Tensor]) -> bool:
    """True if nothing else holds the output of a layer, nor the gradient that it computes of its input.

    That is so for products, quantised or not, unless hooks see their tensors. Other layers could return their input, or
    pass on the gradient of their output. Compiled, it is False: the compiler decides what is done in place.
    """
    if torch.compiler.is_compiling() or not isinstance(layer, nn.Linear) or "forward" in vars(layer):
        return False
    is_product = type(layer).forward is nn.Linear.forward or type(layer).__module__.startswith("bitsandbytes.")
    hooks = layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks
    return is_product and not any(hooks) and not nn.modules.module._has_any_global_hook()


def product_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype if it is on, else that of x: a float32 adapter on a bf16 model computes in bf16, too."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def own(x: Tensor, owned: bool) -> Tensor:
    """x if it may be changed in place, else a copy."""
    return x if owned and x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)


def add_product(total: Tensor, left: Tensor, right: Tensor, scale: float = 1, mask: Tensor | None = None) -> Tensor:
    """total += scale * mask * (left right), in place, the product in the dtype of `left`. Returns total."""
    right = right.to(left.dtype)
    if mask is not None:
        return total.addcmul_(left @ right, mask, value=scale)
    if total.dtype != left.dtype:
        return total.add_(left @ right, alpha=scale)
    as_rows(total).addmm_(as_rows(left), right, alpha=scale)
    return total


def scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * (left right) of two matrices, in one operation."""
    return torch.addmm(left.new_empty(1), left, right, beta=0, alpha=scale)


def as_rows(x: Tensor) -> Tensor:
    """x as a matrix, whatever its leading dimensions."""
    return x.reshape(-1, x.shape[-1])


def stacked(parts: list[Tensor], dim: int = 0) -> Tensor:
    """The parts as one tensor; one alone as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
