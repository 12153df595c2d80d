"""Logits that are formed some rows at a time, since those of a whole batch are by far its largest tensor.

Shape suffixes: N rows, C rows of a chunk, H hidden size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map

from peft.products import product_dtype

# Logits of a chunk: 128 MiB in float32. Copies (log-softmax, half precision) take up to twice that at the same time.
CHUNK = 2**25


class UnformedLogits(Tensor):
    """What a frozen output layer returns in place of its logits, (1, N, V); operations get the logits themselves.

    So a forward that caps or scales its logits works as ever, and one that only hands them on forms none.

    Args:
        rows_NH: what the output layer was given, in the dtype in which it multiplies.
        head: the output layer, for which `can_wait` holds.
        dtype: of the logits.
    """

    rows_NH: Tensor
    head: nn.Linear

    @staticmethod
    def __new__(cls, rows_NH: Tensor, head: nn.Linear, dtype: torch.dtype):
        shape = (1, len(rows_NH), head.out_features)
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=rows_NH.device)

    def __init__(self, rows_NH: Tensor, head: nn.Linear, dtype: torch.dtype):
        self.rows_NH, self.head = rows_NH, head

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ == "__get__":  # shape, dtype, device
            return super().__torch_function__(func, types, args, kwargs)
        if func is Tensor.contiguous:
            return args[0]
        if func is Tensor.float:
            return cls(args[0].rows_NH, args[0].head, torch.float32)
        args, kwargs = tree_map(lambda value: value.formed() if isinstance(value, cls) else value, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        raise TypeError(f"{func} was called on logits that are not formed")  # from C++, past __torch_function__

    def formed(self) -> Tensor:
        """All of the logits, (1, N, V)."""
        return F.linear(self.rows_NH, *self._parameters()).unsqueeze(0).to(self.dtype)

    def chunks(self) -> Iterator[Tensor]:
        """The logits of successive rows, (C, V)."""
        parameters = self._parameters()
        for rows_CH in _chunks(self.rows_NH, self.head.out_features):
            yield F.linear(rows_CH, *parameters)

    def cross_entropy(self, targets_N: Tensor, divisor: Tensor | float) -> Tensor:
        """Summed negative log-likelihood of the targets over `divisor`; float32, and without second derivatives."""
        divisor = self.rows_NH.new_ones((), dtype=torch.float32) * divisor
        if torch.is_grad_enabled() and self.rows_NH.requires_grad:
            return _CrossEntropy.apply(self.rows_NH, *self._parameters(), targets_N, divisor)
        parts = in_chunks(self, targets_N)
        sums = [F.cross_entropy(logits_CV, targets_C, reduction="sum") for logits_CV, targets_C in parts]
        return torch.stack(sums).sum() / divisor

    def _parameters(self) -> tuple[Tensor, Tensor | None]:
        weight_VH, bias_V, dtype = self.head.weight, self.head.bias, self.rows_NH.dtype
        return weight_VH.to(dtype), None if bias_V is None else bias_V.to(dtype)


def can_wait(head: nn.Module) -> bool:
    """True if the output layer is a plain Linear whose product can be put off: its gradients are nobody's concern."""
    return (
        type(head) is nn.Linear
        and not any(parameter.requires_grad for parameter in head.parameters())
        and not (head._backward_pre_hooks or head._backward_hooks)
        and not hasattr(head.weight, "ds_id")  # ZeRO-3 frees the weight once the output layer has been called
        and "forward" not in vars(head)  # accelerate's, on several devices
        and not torch.compiler.is_compiling()
    )


@contextmanager
def put_off(head: nn.Linear) -> Iterator[None]:
    """While open, an output layer for which `can_wait` holds returns `UnformedLogits`. Its hooks see them, too."""

    def forward(rows_1NH: Tensor) -> UnformedLogits:
        dtype = product_dtype(rows_1NH)
        return UnformedLogits(rows_1NH[0].to(dtype), head, dtype)

    head.__dict__["forward"] = forward
    try:
        yield
    finally:
        del head.__dict__["forward"]


def kl_divergence(base_NV: Tensor, model_NV: Tensor) -> Tensor:
    """KL(base || model) in nats, summed over N positions; exactly 0 if both are the same.

    A token that the base model excludes (a logit of minus infinity) adds nothing, whatever its logit is now.

    Args:
        base_NV: log-probabilities.
        model_NV: likewise; it gets the gradient.
    """
    terms_NV = base_NV.exp() * (base_NV - model_NV)
    return torch.where(base_NV.isneginf(), 0, terms_NV).sum()


def in_chunks(logits_1NV: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The logits of successive rows in float32, (C, V), and the parts of other tensors for the same rows."""
    vocabulary = logits_1NV.shape[-1]
    chunks = logits_1NV.chunks() if isinstance(logits_1NV, UnformedLogits) else iter(_chunks(logits_1NV[0], vocabulary))
    for logits_CV, *rest in zip(chunks, *(_chunks(each, vocabulary) for each in others), strict=True):
        yield logits_CV.float(), *rest


def _chunks(rows: Tensor, vocabulary: int) -> tuple[Tensor, ...]:
    """Rows in parts of nearly equal sizes, of which none has more than `CHUNK` logits."""
    return rows.chunk(-(-len(rows) // max(1, CHUNK // vocabulary)) or 1)


class _CrossEntropy(torch.autograd.Function):
    """Keeps the gradient of the rows, computed along with the loss: a frozen output layer needs no other one."""

    @staticmethod
    def forward(ctx, rows_NH, weight_VH, bias_V, targets_N, divisor):
        # Probabilities over a large divisor would underflow in float16. The power of 2 in it waits for the backward
        # pass, where it rounds nothing.
        mantissa, exponent = torch.frexp(divisor)
        factor = 1 / mantissa
        nll = torch.zeros_like(divisor)
        gradient_NH = torch.empty_like(rows_NH)
        parts = (_chunks(each, len(weight_VH)) for each in (rows_NH, targets_N, gradient_NH))
        for rows_CH, targets_C, gradient_CH in zip(*parts, strict=True):
            log_p_CV = F.linear(rows_CH, weight_VH, bias_V).log_softmax(dim=-1, dtype=torch.float32)
            nll += F.nll_loss(log_p_CV, targets_C, reduction="sum")
            slope_CV = log_p_CV.exp_().mul_(factor)
            slope_CV.scatter_add_(1, targets_C[:, None], -factor.expand(len(targets_C), 1))
            torch.mm(slope_CV.to(rows_NH.dtype), weight_VH, out=gradient_CH)
        ctx.save_for_backward(gradient_NH, exponent)
        return nll / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        gradient_NH, exponent = ctx.saved_tensors
        return gradient_NH * upstream.ldexp(-exponent), None, None, None, None
