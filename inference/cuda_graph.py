"""Decoding by CUDA graph: all kernels of one token are launched at once.

One by one, the launches of a token take the host several times as long as the device needs for computing it.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import ModelOutput

from data import first_line
from transformers_patch.auto import base_of

SWITCH = "LORAMOE_CUDA_GRAPHS"
# Capturing costs about as much as computing two tokens one kernel at a time.
FEWEST_TOKENS = 8
# Attention kernels copy a mask whose rows are not aligned, in every layer.
ALIGNMENT = 64

_not_captured: WeakSet[nn.Module] = WeakSet()


@contextmanager
def graphed_decoding(model: nn.Module, settings: GenerationConfig, prompt_length: int) -> Iterator[None]:
    """A context in which `model.generate` decodes by CUDA graph, if this model can and the answers may be long enough.

    The environment variable LORAMOE_CUDA_GRAPHS=0 turns it off.

    Args:
        settings: of the call; they are changed.
        prompt_length: of the batch, in tokens, padding included.
    """
    base = base_of(model)
    if os.environ.get(SWITCH) == "0" or settings.max_new_tokens < FEWEST_TOKENS or not can_be_captured(base):
        yield
        return
    steps = DecodingSteps(base)
    settings.cache_implementation = "static"
    settings.max_cache_len = -(-(prompt_length + settings.max_new_tokens) // ALIGNMENT) * ALIGNMENT
    # With a static cache on a GPU, `generate` decodes with the callable that it gets from this method.
    vars(base)["get_compiled_call"] = lambda compile_config: steps
    try:
        yield
    finally:
        del vars(base)["get_compiled_call"]
        # Or the next cache is at least as long, and what is computed with it differs in the last bits.
        vars(base).pop("_previous_max_cache_length", None)


def can_be_captured(model: nn.Module) -> bool:
    """True if a base model launches the same kernels for every token, without waiting for one.

    Left out are models that are quantised, sharded or spread over several devices, mixtures of experts (other kernels
    for other tokens), caches with a window (lengths kept on the host), rotary embeddings that depend on the longest
    position, and attention without a mask of fixed shape.
    """
    rope = getattr(model.config, "rope_parameters", None) or {}
    return (
        _is_on_one_gpu(model)
        and model not in _not_captured
        and model._can_compile_fullgraph
        and not hasattr(model.config, "num_experts_per_tok")
        and getattr(model, "hf_quantizer", None) is None
        and not is_deepspeed_zero3_enabled()
        and not torch.is_autocast_enabled("cuda")
        and model.config._attn_implementation in ("sdpa", "eager")
        and rope.get("rope_type") not in ("dynamic", "longrope")
        and all(type(layer) is StaticLayer for layer in StaticCache(model.config, max_cache_len=1).layers)
    )


class DecodingSteps:
    """Takes the place of a model's forward in the decoding steps of one `generate` call with a static cache.

    The first step is computed as always, which also warms up what must not be set up while capturing. The second is
    captured. It and all others are replayed on the tensors that it was given, into which their inputs are copied. To
    capture is not to compute, and the cache keeps its length on the device, so that a step advances it once. The
    output is always the same tensor: `generate` copies the logits before the next step.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.is_warm = False
        self.inputs: dict = {}
        self.replay: Callable[[], ModelOutput] | None = None

    def __call__(self, **inputs) -> ModelOutput:
        if not self.is_warm:
            self.is_warm = True
            return self.model(**inputs)
        if self.replay is None:
            self.inputs = inputs
            self.replay = self._capture()
        for kept, given in zip(_tensors(self.inputs), _tensors(inputs), strict=True):
            kept.copy_(given)
        return self.replay()

    def _capture(self) -> Callable[[], ModelOutput]:
        compute = partial(self.model, **self.inputs)
        try:
            return capture(compute, self.model.device)
        except RuntimeError as error:
            _not_captured.add(self.model)
            print(
                f"This model cannot be decoded by CUDA graph, so answers take longer ({first_line(error)}); "
                f"{SWITCH}=0 does not try it",
                file=sys.stderr,
            )
            return compute


def capture(compute: Callable[[], ModelOutput], device: torch.device) -> Callable[[], ModelOutput]:
    """Record the kernels of a computation without running them; the result runs them all and returns its output.

    Raises:
        RuntimeError: it waits for the device, or does something else that cannot be recorded.
    """
    graph, generator = torch.cuda.CUDAGraph(), torch.cuda.default_generators[device.index]
    state = generator.clone_state()
    try:
        # What other threads do, such as those of NCCL, does not disturb it.
        with torch.cuda.graph(graph, stream=_capture_stream(device), capture_error_mode="thread_local"):
            output = compute()
    except RuntimeError:
        generator.graphsafe_set_state(state)  # the generator believes that it is still being captured, and cannot draw
        raise

    def replay() -> ModelOutput:
        graph.replay()
        return output

    return replay


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Always the same one, since cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream(device)


def _is_on_one_gpu(model: nn.Module) -> bool:
    devices = {parameter.device for parameter in model.parameters()}
    return len(devices) == 1 and devices.pop().type == "cuda"


def _tensors(inputs: dict) -> Iterator[Tensor]:
    """The tensors of a forward's arguments; a model with layers of several kinds gets a dictionary of masks."""
    for value in inputs.values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value)
