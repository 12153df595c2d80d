"""Linears under their several names."""

from collections.abc import Callable

from torch import Tensor, nn


def linear_size(module: nn.Module) -> tuple[int, int] | None:
    """Input and output features of a Linear of any kind; None for any other module.

    `nx` and `nf` are those of transformers' Conv1D, the Linear of GPT-2, whose weight is stored transposed. The routers
    of some mixtures of experts (Llama 4, Phi-3.5-MoE) are Linears by class, but return more than one tensor.
    """
    if type(module).__name__.endswith("Router"):
        return None
    for names in (("in_features", "out_features"), ("nx", "nf")):
        if all(hasattr(module, name) for name in names):
            return tuple(getattr(module, name) for name in names)
    return None


def makes_new_tensors(layer: Callable[[Tensor], Tensor]) -> bool:
    """True if nothing else holds the output of a layer, nor the gradient that it computes of its input.

    That is so for products, quantised or not, unless hooks see their tensors. Other layers could return their input, or
    pass on the gradient of their output.
    """
    if not isinstance(layer, nn.Linear) or "forward" in vars(layer):
        return False
    is_product = type(layer).forward is nn.Linear.forward or type(layer).__module__.startswith("bitsandbytes.")
    hooks = layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks
    return is_product and not any(hooks)
