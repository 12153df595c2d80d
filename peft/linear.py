"""Linears under their several names."""

from torch import nn


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
