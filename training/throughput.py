"""Tokens per second, peak device memory and model FLOPs utilisation, for the log lines."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_pt_utils import nested_gather

from peft import TrainedCopy
from peft.model import true_size
from transformers_patch.auto import base_of

# Dense bf16 TFLOP/s from the data sheets, by words of the name that CUDA gives the device; the first match counts.
PEAK_TFLOPS = {
    "H200 NVL": 835,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "B200": 2250,
    "A100": 312,
    "L40S": 362,
    "A10": 125,
    "RTX 4090": 165,
}
GIB = 2**30
# The names that configurations of mixtures of expert MLPs give to the number of experts.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def peak_flops(device_name: str) -> float | None:
    """FLOP/s that the data sheet promises of a GPU; None for one that is not in the table, or for a part of one."""
    if re.search(r"\b(Laptop|MIG|4090 D)\b", device_name):
        return None
    found = (tflops for words, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{words}\b", device_name))
    return next((1e12 * tflops for tflops in found), None)


class FlopsEstimate:
    """FLOPs that training needs for given tokens, recomputation not counted (PaLM, arXiv 2204.02311, appendix B).

    A weight that is trained takes 6 FLOPs for each token: 2 forward, 2 for the gradient of its input, 2 for its own. A
    frozen one needs no gradient and takes 4. Attention over a row of T tokens takes 12 T^2 times its width in
    each layer. The output layer counts at the supervised tokens alone.

    Args:
        model: the model that is trained, not a mixture of expert MLPs itself: of those only some weights take part.
    """

    def __init__(self, model: nn.Module):
        base = base_of(model)
        config = base.config
        head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
        outside = {*head.parameters(), *embedding.parameters()}
        replaced = {
            parameter
            for module in model.modules()
            if isinstance(module, TrainedCopy)
            for parameter in module.base_layer.parameters()
        }
        self._per_supervised_token = sum(_flops_per_token(each) for each in head.parameters() if each not in replaced)
        taking_part = (each for each in model.parameters() if each not in outside | replaced)
        self._per_token = sum(map(_flops_per_token, taking_part))
        heads = config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        self._per_squared_length = 12 * config.num_hidden_layers * width

    def flops(self, tokens: float, supervised_tokens: float, squared_lengths: float) -> float:
        """FLOPs of forward and backward pass.

        Args:
            squared_lengths: the sum of the rows' squared lengths in tokens.
        """
        return (
            self._per_token * tokens
            + self._per_supervised_token * supervised_tokens
            + self._per_squared_length * squared_lengths
        )


class Throughput:
    """Counts the tokens of training and the time that it takes, without evaluation and saving.

    Args:
        model: the model that is trained.
        device: where it is trained.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        self._counts = [0, 0, 0]  # tokens, supervised ones, squared lengths of rows
        self._start: float | None = None
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._peak = peak_flops(torch.cuda.get_device_name(device)) if self._on_gpu else None
        is_expert_mixture = any(getattr(model.config, name, None) for name in EXPERT_COUNTS)
        self._estimate = FlopsEstimate(model) if self._peak and not is_expert_mixture else None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time does not count."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            if self._start is not None:
                self._start += time.perf_counter() - begin

    def watch(self, lengths: list[int], supervised_tokens: int) -> None:
        """Take in the rows of a micro-batch, before it is computed; time counts from the first one on."""
        self._start = self._start or time.perf_counter()
        counts = sum(lengths), supervised_tokens, sum(length**2 for length in lengths)
        self._counts = [total + count for total, count in zip(self._counts, counts, strict=True)]

    def scalars(self, args: TrainingArguments) -> dict[str, float]:
        """The values of a log line since the last one. A collective: every process calls it at the same step.

        `tokens_per_second` counts the tokens of all processes, without padding; on GPUs `peak_memory_gib` is the most
        that tensors took on any of them since the run began, and `mfu` the share of the devices' peak FLOP/s.
        """
        memory = torch.cuda.max_memory_allocated(args.device) if self._on_gpu else 0
        local = torch.tensor([*self._counts, memory], dtype=torch.float64, device=self._device)
        gathered_W4 = nested_gather(local.unsqueeze(0), args.parallel_mode)
        tokens, supervised, squares = gathered_W4[:, :3].sum(dim=0).tolist()
        now = time.perf_counter()
        assert self._start is not None
        seconds, self._start = now - self._start, now
        self._counts = [0, 0, 0]
        values = {"tokens_per_second": tokens / seconds}
        if self._on_gpu:
            values["peak_memory_gib"] = gathered_W4[:, 3].max().item() / GIB
        if self._estimate and self._peak:
            done = self._estimate.flops(tokens, supervised, squares)
            values["mfu"] = done / (seconds * self._peak * args.world_size)
        return values


def _flops_per_token(parameter: nn.Parameter) -> int:
    return (6 if parameter.requires_grad else 4) * true_size(parameter)
