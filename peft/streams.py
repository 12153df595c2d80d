"""What can be computed at the same time on a GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor


@contextmanager
def beside_what_follows(x: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
    """A context whose kernels run at the same time as those launched after it, until both are joined.

    It yields a function that returns its argument, the output of the latter: kernels launched after its call wait for
    those of both. Only in a CUDA graph, as in decoding: there a kernel waits only for what it depends on; outside, the
    host is the limit, and switching streams adds to its work.

    Args:
        x: what the kernels inside read.
    """
    if torch.is_grad_enabled() or not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        yield lambda output: output
        return
    main, second = torch.cuda.current_stream(x.device), _second_stream(x.device)
    second.wait_stream(main)
    with torch.cuda.stream(second):
        # Memory freed on one stream is used again by the other only after these have met, here or in the next call.
        yield partial(_joined, main, second)


def _joined(main: torch.cuda.Stream, second: torch.cuda.Stream, output: Tensor) -> Tensor:
    main.wait_stream(second)
    return output


@cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    """Always the same one, since cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream(device)
