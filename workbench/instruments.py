"""Instruments: bytes kept for backward, live bytes, bytes moved, FLOPs, time, memory and kernels.

The counters work on real and fake tensors. This file imports only torch, so that other environments can use it, too.
"""

import ctypes
import gc
import re
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    FlopCounterMode,
    addmm_flop,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

# Operations that launch nothing, and those that write their first argument without reading it.
WITHOUT_KERNEL = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "device", "empty", "empty_like", "expand",
    "lift_fresh", "new_empty", "permute", "promote_types", "select", "slice", "split", "split_with_sizes", "squeeze",
    "t", "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip
WITHOUT_READING = {"bernoulli_", "copy_", "fill_", "random_", "zero_"}
M_MMAP_THRESHOLD = -3  # from glibc's malloc.h
MMAP_THRESHOLD = 64 * 1024  # bytes; larger blocks are allocated outside the heap


# torch lacks formulas for the attention kernels of CPUs and for products that are added in place. Arguments are shapes.
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
    """FLOPs of its backward pass, which recomputes the product of Q and K."""
    return sdpa_backward_flop_count(gradient, query, key, value)


class SavedBytes:
    """Context manager that counts the bytes that autograd keeps for the backward pass of the operations inside it.

    A storage counts once and in full, however many tensors share it. Storages are distinguished by
    identity, since those of fake tensors have no address.

    Args:
        model: its parameters and buffers are not counted.

    Attributes:
        total: bytes, set when the context closes. Until then the counted storages are kept alive.
    """

    def __init__(self, model: nn.Module):
        # Holding the storages ensures that no later one gets the same identity.
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
        # A node that keeps its own output would own itself and never be freed if the tensor kept its history.
        return tensor.detach()


class LiveBytes(TorchDispatchMode):
    """Context manager that tracks the bytes of all storages allocated inside it until they are freed.

    Workspace inside kernels and tensors that existed before are not counted.

    Attributes:
        now: live bytes.
        peak: largest number of live bytes since the last `reset_peak`.
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
            # A result that shares an input's storage is a view or the input itself, changed in place.
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


class Traffic(TorchDispatchMode):
    """Context manager that counts what the operations inside it launch, and the bytes that they read and write.

    Each operation counts as one kernel that reads its arguments and writes its results once.

    Attributes:
        launches: kernels by the operation's name.
        moved: bytes by the number of elements of the tensor.
    """

    def __init__(self):
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.moved: Counter[int] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name not in WITHOUT_KERNEL:
            self.launches[name] += 1
            for tensor in tree_leaves((args[name in WITHOUT_READING :], kwargs, result)):
                if isinstance(tensor, Tensor):
                    self.moved[tensor.numel()] += tensor.numel() * tensor.element_size()
        return result


def count_flops(run: Callable[[], object]) -> int:
    """FLOPs of the matrix products and attentions in `run`; a multiply-add counts as two."""
    counter = FlopCounterMode(display=False)
    with counter:
        run()
    return counter.get_total_flops()


def return_freed_memory() -> None:
    """Make the C library return freed tensor memory to the system at once. Call it before any step; glibc only.

    Otherwise gaps in the C heap, which depend on everything that ran before, count as memory of the step: up to a third
    more. It costs time, so times are measured without it.
    """
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)


def trim_heap() -> None:
    """Return the free memory of the C heap to the system, once, so that the next variant can use it."""
    ctypes.CDLL(None).malloc_trim(0)


def synchronise(device: torch.device) -> None:
    """Wait for the kernels of a GPU; a CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """The seconds of `run`, to the end of its kernels."""
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def step(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """Run a forward and backward pass and discard the gradients. Returns the seconds."""
    seconds = timed(lambda: model(**batch).loss.backward(), batch["input_ids"].device)
    model.zero_grad(set_to_none=True)
    return seconds


def step_counts(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, int]:
    """Bytes kept for the backward pass of a step and its FLOPs."""
    with SavedBytes(model) as saved:
        model(**batch)
    return {"saved_bytes": saved.total, "flops": count_flops(lambda: step(model, batch))}


def step_memory(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, int]:
    """Bytes of the second step: on a CPU those resident before it and their peak, on a GPU the peak of its tensors and
    of the model's, whatever else is there."""
    step(model, batch)
    device = batch["input_ids"].device
    if device.type == "cpu":
        level, peak = peak_memory(lambda: step(model, batch))
        return {"resident_before_step": level, "peak_resident": peak}
    level = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step(model, batch)
    own = sum(storage.nbytes() for storage in _storages((*model.parameters(), *model.buffers())).values())
    return {"peak_allocated": own + torch.cuda.max_memory_allocated(device) - level}


def step_kernels(model: nn.Module, batch: dict[str, Tensor]) -> tuple[dict[str, float], str]:
    """Launches of a step on a GPU and the seconds of their kernels (0 on a CPU); also the profiler's table."""
    on_gpu = batch["input_ids"].device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        step(model, batch)
    all_events = (event for event in profiler.events() if not event.is_user_annotation)
    events = [event for event in all_events if event.device_type == torch.autograd.DeviceType.CUDA]
    copies = sum(event.name.startswith(("Memcpy", "Memset")) for event in events)
    busy = sum(event.time_range.elapsed_us() for event in events) / 1e6
    table = profiler.key_averages().table(sort_by="self_device_time_total", row_limit=40, max_name_column_width=90)
    return {"launches": len(events) - copies, "copies": copies, "busy_seconds": busy}, table


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """A context in which new models have this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def peak_memory(run: Callable[[], object]) -> tuple[int, int]:
    """Resident bytes of this process before `run` and their peak while it runs. Linux only."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    level = _status("VmRSS")
    run()
    return level, _status("VmHWM")


def _storages(tree: object) -> dict[int, torch.UntypedStorage]:
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return {storage._cdata: storage for storage in map(Tensor.untyped_storage, tensors)}


def _status(name: str) -> int:
    kilobytes = re.findall(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]
    return int(kilobytes) * 1024
