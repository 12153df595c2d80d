"""What is measured with: bytes kept for backward, bytes alive, FLOPs, resident memory.

Works on real and on fake tensors, and imports torch alone, so that code of other environments can be measured with the
same instruments.
"""

import ctypes
import gc
import re
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    FlopCounterMode,
    addmm_flop,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

M_MMAP_THRESHOLD = -3  # a name of glibc's malloc.h
MMAP_THRESHOLD = 64 * 1024  # bytes; larger blocks are no part of the heap


# torch has formulas for the attention kernels of GPUs only, and for products that are added into a new tensor only.
# Arguments are shapes.
@register_flop_formula(torch.ops.aten.addmm_)
def product_in_place_flops(total, left, right, out_shape=None, **kwargs) -> int:
    """FLOPs of a product that is added to a tensor in place."""
    return addmm_flop(total, left, right)


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
def attention_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
    """FLOPs of softmax(Q K^T) V."""
    return sdpa_flop_count(query, key, value)


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward)
def attention_backward_flops(gradient, query, key, value, *args, out_shape=None, **kwargs) -> int:
    """FLOPs of its backward pass, in which the product of Q and K is computed again."""
    return sdpa_backward_flop_count(gradient, query, key, value)


class SavedBytes:
    """Context manager that counts what autograd keeps for the backward pass of the operations inside it.

    A storage counts once and in full, whatever number of tensors shares it, as it occupies memory once. Storages are
    told apart by identity, since those of fake tensors have no address.

    Args:
        model: its parameters and buffers do not count: they are there without any backward pass.

    Attributes:
        total: bytes, once the context is closed. Until then it keeps alive what it counts.
    """

    def __init__(self, model: nn.Module):
        # Storages are held on to, so that no later one can have the same identity.
        tensors = (*model.parameters(), *model.buffers())
        self._excluded = {storage._cdata: storage for storage in map(Tensor.untyped_storage, tensors)}
        self._kept: dict[int, torch.UntypedStorage] = {}
        self.total = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor)

    def __enter__(self) -> "SavedBytes":
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._hooks.__exit__(*exception)
        self.total = sum(storage.nbytes() for storage in self._kept.values())
        self._kept.clear()

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._excluded:
            self._kept[storage._cdata] = storage
        # A node that keeps its own output would own itself, and never be freed, were this the tensor with its history.
        return tensor.detach()


class LiveBytes(TorchDispatchMode):
    """Context manager that follows the bytes of all storages that operations inside it make, until these are freed.

    Work space inside a kernel does not count, nor do tensors that were there before.

    Attributes:
        now: bytes alive.
        peak: most bytes that were alive at once, since the last `reset_peak`.
    """

    def __init__(self):
        super().__init__()
        self._references: dict[int, weakref.ref] = {}
        self.now = self.peak = 0

    def reset_peak(self) -> None:
        self.peak = self.now

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = _storages((args, kwargs))
        result = func(*args, **kwargs)
        for identity, storage in _storages(result).items():
            # What shares an input's storage is a view, or the input itself, changed in place.
            if identity not in given and identity not in self._references:
                self._follow(identity, storage)
        return result

    def _follow(self, identity: int, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()

        def forget(reference):
            del self._references[identity]
            self.now -= size

        self._references[identity] = weakref.ref(storage, forget)
        self.now += size
        self.peak = max(self.peak, self.now)


def count_flops(run: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and attentions in `run`, a multiply-add being two."""
    counter = FlopCounterMode(display=False)
    with counter:
        run()
    return counter.get_total_flops()


def return_freed_memory() -> None:
    """From now on, what tensors free goes back to the system at once. To be called before any step; glibc only.

    Otherwise gaps in the C heap, which depend on all that happened before, would count as memory of the step: a third
    more in some. It costs time, so that time is measured without it.
    """
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)


def trim_heap() -> None:
    """Give back to the system, once, what the C heap holds free: what one variant needed is there for the next one."""
    ctypes.CDLL(None).malloc_trim(0)


def peak_memory(run: Callable[[], object]) -> tuple[int, int]:
    """Resident bytes of this process before `run`, and the most while it runs. Linux only."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    level = _status("VmRSS")
    run()
    return level, _status("VmHWM")


def _storages(tree: object) -> dict[int, torch.UntypedStorage]:
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return {storage._cdata: storage for storage in map(Tensor.untyped_storage, tensors)}


def _status(name: str) -> int:
    kilobytes = re.findall(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]
    return int(kilobytes) * 1024
