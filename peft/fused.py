"""The path of the fused kernels: when it is taken, and its backward pass.

The environment variable LORAMOE_KERNELS chooses `torch` (`peft/functions.py`) or `triton`. Without it, the kernels run
on GPUs on which they were seen right and faster. What they cannot do is left to torch.

Shape suffixes: E experts (with the null expert), R rank of one expert, S stacked rank of the trained ones, H rows of A,
I input features.
"""

import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .functions import gated_sum
from .products import own, product_dtype

if TYPE_CHECKING:
    from .layer import LoraExperts

HALVES = (torch.bfloat16, torch.float16)
LEAST_TOKENS = 64  # below, as in decoding, plain products read as little and launch as fast
CAPABILITIES = ((8, 0), (9, 0), (10, 0))  # A100, H100, B200: others have too little shared memory
PROVEN = ((9, 0),)  # docs/PERFORMANCE.md, "On a GPU"
MOST_EXPERTS, MOST_FEATURES = 32, 128  # a program holds its sums in registers


class Shape(NamedTuple):
    """What the kernels know of an adapter when they are compiled."""

    in_features: int
    experts: int  # with the null expert; 1: no router
    trained_experts: int
    rank: int
    shares_A: bool
    top_k: int  # 0: all
    dropped: int  # of 65536 elements

    @property
    def rows_of_a(self) -> int:
        return self.rank * (1 if self.shares_A else self.trained_experts)

    @property
    def stacked_rank(self) -> int:
        return self.trained_experts * self.rank

    def constants(self) -> dict[str, int]:
        """The compile-time arguments that all kernels take."""
        E, S, H = self.experts, self.stacked_rank, self.rows_of_a
        padded = {f"{name}P": max(16, 1 << (size - 1).bit_length()) for name, size in {"E": E, "S": S, "H": H}.items()}
        return {"I": self.in_features, "E": E, "R": self.rank, "S": S, "H": H, **padded}


def fused_shape(experts: "LoraExperts", x: Tensor) -> Shape | None:
    """The shape for which kernels are to compute the features of x, None where torch is to.

    Raises:
        ValueError: LORAMOE_KERNELS is neither torch nor triton.
    """
    proven = "triton" if x.device.type == "cuda" and _are_proven(x.device) else "torch"
    choice = os.environ.get("LORAMOE_KERNELS") or proven
    if choice not in ("torch", "triton"):
        raise ValueError(f"LORAMOE_KERNELS is torch or triton, not {choice!r}")
    if choice == "torch":
        return None
    router, probability = experts.router, experts.dropout if experts.training else 0
    shape = Shape(
        x.shape[-1],
        1 if router is None else router.out_features,
        experts.num_experts,
        experts.rank,
        len(experts.lora_A) < experts.lora_B.shape[1],
        0 if router is None else router.top_k or 0,
        min(round(probability * 2**16), 2**16 - 1),
    )
    weights: list[Tensor] = [experts.lora_A] if router is None else [experts.lora_A, router.weight]
    return shape if supports(x, product_dtype(x), weights, shape) else None


def supports(x: Tensor, dtype: torch.dtype, weights: list[Tensor], shape: Shape) -> bool:
    """True if the kernels can compute an adapter's features of x, with products in `dtype`.

    On a GPU the products are those of tensor cores, in half precision. Rows have to begin at multiples of 16 bytes.
    """
    return (
        (dtype in HALVES or (dtype is torch.float32 and x.device.type == "cpu"))
        and {x.dtype, *(weight.dtype for weight in weights)} <= {dtype, torch.float32}
        and shape.in_features % 8 == 0
        and x.numel() >= LEAST_TOKENS * shape.in_features
        and shape.experts <= MOST_EXPERTS
        and shape.stacked_rank <= MOST_FEATURES
        and not torch.compiler.is_compiling()
        and _can_run(x.device)
    )


def fused_linear(
    experts: "LoraExperts", x: Tensor, base_layer: Callable[[Tensor], Tensor], shape: Shape, owned: bool
) -> Tensor:
    """base_layer(x) + delta(x), as `LoraExperts.forward` computes it, without second derivatives.

    Args:
        x: of shape (..., I), for which `fused_shape` has given `shape`.
        owned: nothing else holds the base layer's output, nor its gradient of x.
    """
    gated = x

    def routed(x_: Tensor, W_EI: Tensor | None) -> Tensor | None:
        nonlocal x, gated
        x, weights, gated = routed_features(x_, W_EI, experts.lora_A, shape, experts.scaling, owned)
        return weights

    routed(x, None) if experts.router is None else experts.router(x, routed)
    return gated_sum(base_layer(x), gated, None, experts.lora_B, 1, owned)


def routed_features(
    x: Tensor, W_EI: Tensor | None, A_HI: Tensor, shape: Shape, scale: float, owned: bool = False
) -> tuple[Tensor, Tensor | None, Tensor]:
    """All that reads x: x itself, for the base layer; the router's weights w; scale * repeat(w, R) * (A dropout(x)).

    The gradient of the x that is returned comes here first, where the contributions of router and A are added to it.

    Args:
        scale: the adapter's scaling; dropout's factor comes on top.
        owned: nothing else holds that gradient.
    """
    scale /= 1 - shape.dropped / 2**16
    passed, weights, gated = _RoutedFeatures.apply(x, W_EI, A_HI, shape, scale, product_dtype(x), owned)
    return x if passed is None else passed, weights, gated


class _RoutedFeatures(torch.autograd.Function):
    """Keeps x, the mask's bits, thin tensors, and the parameters themselves: ZeRO-3 frees their storage and gathers it
    again for the backward pass."""

    @staticmethod
    def forward(ctx, x, W_EI, A_HI, shape, scale, dtype, owned):
        needs_x, *need_weights = ctx.needs_input_grad[:3]
        passed, x = x if needs_x else None, x.contiguous()
        weights, hidden, gated, bits = _kernels().features(x, W_EI, A_HI, shape, scale, dtype)
        ctx.save_for_backward(x if any(need_weights) else None, W_EI, A_HI, weights, hidden, bits)
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.scale, ctx.owned = shape, scale, owned
        return passed, weights, gated

    @staticmethod
    @once_differentiable
    def backward(ctx, dx, dweights, dgated):
        x, W_EI, A_HI, weights, hidden, bits = ctx.saved_tensors
        shape, leading = ctx.shape, hidden.shape[:-1]
        dgated = hidden.new_zeros(*leading, shape.stacked_rank) if dgated is None else dgated.contiguous()
        if weights is None:
            dlogits, dhidden = None, ctx.scale * dgated
        else:
            dweights = None if dweights is None else dweights.contiguous()
            dlogits, dhidden = _kernels().thin_gradients(dgated, dweights, weights, hidden, shape, ctx.scale)
        dW = dA = None
        if ctx.needs_input_grad[0]:
            dx = hidden.new_zeros(*leading, shape.in_features) if dx is None else own(dx, ctx.owned)
            _kernels().add_to_input(dx, W_EI, A_HI, dlogits, dhidden, bits, shape)
        if x is not None:
            dW, dA = _kernels().weight_gradients(x, dlogits, dhidden, bits, shape)
            dW, dA = None if dW is None else dW.to(W_EI.dtype), dA.to(A_HI.dtype)
        return dx, dW, dA, None, None, None, None


@cache
def _kernels() -> ModuleType:
    try:
        from . import kernels
    except ImportError as error:
        raise ImportError("LORAMOE_KERNELS=triton needs the package triton, which torch brings for CUDA") from error
    return kernels


@cache
def _can_run(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) in CAPABILITIES
    return device.type == "cpu" and _kernels().INTERPRETED


@cache
def _are_proven(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) in PROVEN and find_spec("triton") is not None
