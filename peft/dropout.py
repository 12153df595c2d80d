"""Dropout masks, drawn and applied in the way that is fast on a device."""

import torch
from torch import Tensor


def dropout_mask(x: Tensor, probability: float) -> tuple[Tensor, float]:
    """A mask of the elements of x that stay, of its shape and a byte for each, and the exact probability of staying."""
    return (byte_mask if x.device.type == "cpu" else bool_mask)(x, probability)


def bool_mask(x: Tensor, probability: float) -> tuple[Tensor, float]:
    """`dropout_mask` on a GPU."""
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - probability), 1 - probability


def byte_mask(x: Tensor, probability: float) -> tuple[Tensor, float]:
    """`dropout_mask` on a CPU, as uint8.

    Random 64-bit words are read as 16-bit lanes, one for each element, and compared with a threshold: several times
    faster there than drawing one number for each. The probability is thus rounded to a multiple of 1/65536.
    """
    dropped = min(round(probability * 2**16), 2**16 - 1)
    size = ((x.numel() + 3) // 4,)
    if torch.compiler.is_compiling():  # random_ cannot be traced; randint has other words for the same seed
        words = torch.randint(-(2**63), 2**63 - 1, size, dtype=torch.int64, device=x.device)
    else:
        words = torch.empty(size, dtype=torch.int64, device=x.device).random_(-(2**63), None)
    lanes = words.view(torch.int16)[: x.numel()].view(x.shape)
    return (lanes >= dropped - 2**15).view(torch.uint8), 1 - dropped / 2**16


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """mask * x; x itself without a mask."""
    if mask is None:
        return x
    # A GPU multiplies by a bool slowly, except in the kernel made for it; on a CPU, bytes are fast.
    return torch.ops.aten.native_dropout_backward(x, mask, 1.0) if mask.dtype is torch.bool else x * mask
