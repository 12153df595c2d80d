"""Sections of the benchmark for a GPU and a large model: ceilings, a grid of steps, PyPI's `peft`, the planner.

A row is written as soon as it is measured; a variant that does not fit the memory gets a row with the error.
"""

import datetime
import gc
import importlib.metadata
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from workbench.footprint import Shape, count_step
from workbench.instruments import step, step_kernels, step_memory, timed
from workbench.node_checks import driver_version
from workbench.peers import Peer, PeerError
from workbench.rounds import Times
from workbench.variants import Variant, base_config, random_batch

if TYPE_CHECKING:
    from workbench.benchmark import Benchmark

DROPOUTS = (0.05, 0.0)
PACKAGES = ("torch", "triton", "transformers", "deepspeed", "bitsandbytes", "flash_attn", "peft")
Row = dict
# By number of the setting.
PROFILED = (
    {
        Variant("frozen"),
        Variant("loramoe", dropout=0.05),
        Variant("loramoe"),
        Variant("lora", 1, 32, 0.05),
        Variant("peft_lora", 1, 32, 0.05),
        Variant("plain", dropout=0.05),
    },
    {Variant("loop", dropout=0.05)},
)


@dataclass(frozen=True)
class Setting:
    """Examples in a batch, tokens of each, and whether layers are recomputed in the backward pass."""

    batch: int
    length: int
    checkpointing: bool

    def __str__(self) -> str:
        return f"{self.batch} x {self.length}, {'with' if self.checkpointing else 'without'} checkpointing"


class Limit:
    """The end of a section, `seconds` from now."""

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self._end

    def of_setting(self, number: int, count: int) -> float:
        """The end of a setting, which gets its share of the time that is left; the first, with more variants, twice."""
        now = time.monotonic()
        shares = (2 if number == 0 else 1) / (count - number + (number == 0))
        return now + shares * (self._end - now)


def settings(batch: int, length: int) -> list[Setting]:
    """The batch as it is and as half as many examples of twice the length, without and with checkpointing."""
    shapes = ((batch, length), (max(1, batch // 2), 2 * length))
    return [Setting(*shape, checkpointing) for shape in shapes for checkpointing in (False, True)]


def ours(setting: Setting, kernels: Iterable[str], is_first: bool) -> list[Variant]:
    """The variants of a setting; the first has more of them."""
    adapted = [
        Variant(name, experts, rank, dropout)
        for dropout in DROPOUTS
        for name, experts, rank in (("lora", 1, 32), ("loramoe", 8, 4), ("loramoe", 6, 4))
    ]
    if is_first:
        adapted += [Variant("loramoe", 8, 8, 0.05), Variant("loramoe", 64, 1, 0.05)]
    found = [Variant("frozen"), *(replace(each, kernels=switch) for switch in kernels for each in adapted)]
    found += [Variant("plain", dropout=dropout) for dropout in DROPOUTS if is_first]
    found += [Variant("loop", dropout=dropout) for dropout in DROPOUTS]
    return [replace(variant, checkpointing=setting.checkpointing) for variant in found]


def theirs(setting: Setting) -> list[Variant]:
    return [
        Variant("frozen", checkpointing=setting.checkpointing),
        *(Variant("peft_lora", 1, 32, dropout, setting.checkpointing) for dropout in DROPOUTS),
    ]


def ceilings(benchmark: "Benchmark") -> dict:
    """The machine, and the ceilings of its memory and of its matrix products."""
    device = benchmark.device
    versions = {name: next((d.version for d in importlib.metadata.distributions(name=name)), None) for name in PACKAGES}
    today = datetime.date.today().isoformat()
    row = {"section": "device", "date": today, **benchmark.origin, "packages": versions}
    is_gpu = device.type == "cuda"
    if is_gpu:
        found = torch.cuda.get_device_properties(device)
        row |= {"gpu": found.name, "gpu_bytes": found.total_memory, "driver": driver_version()}
    benchmark.add(row)
    width = 8192 if is_gpu else 256
    left, right = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.zeros(2**31 if is_gpu else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _seconds(lambda: target.copy_(source), device)
    product = _seconds(lambda: left @ right, device)
    values = {
        "copy, TB/s read and written": 2 * source.nbytes / copy / 1e12,
        f"bf16 product of two {width} x {width} matrices, TFLOP/s": 2 * width**3 / product / 1e12,
    }
    for name, value in values.items():
        benchmark.add({"section": "ceiling", "name": name, "value": value})
    return {}


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one of 10 calls in a row; the median of 7 attempts after 2 that warm up."""

    def ten() -> None:
        for _ in range(10):
            run()

    return float(np.median([timed(ten, device) for _ in range(9)][2:])) / 10


class Built(NamedTuple):
    """A variant and what can be asked of it: the seconds of a step, its peak memory, its kernels."""

    step: Callable[[], float]
    memory: Callable[[], Row]
    kernels: Callable[[], Row]


def grid(benchmark: "Benchmark") -> dict:
    """Steps of this repository's variants, in every setting."""
    limit, places = Limit(benchmark.seconds), settings(benchmark.batch, benchmark.length)
    for number, setting in enumerate(places):
        if limit.is_over:
            benchmark.add({"section": "left out", "name": f"steps of {setting}"})
            continue
        batch = benchmark.batch_of(setting.batch, setting.length)

        def build(variant: Variant, batch: dict[str, Tensor] = batch) -> Built:
            model = variant.model(benchmark.base)
            model.config.use_cache = False  # as the Trainer has it

            def kernels() -> Row:
                counts, table = step_kernels(model, batch)
                benchmark.keep(
                    f"kernels of {variant.label} {variant.experts} x {variant.rank} {variant.dropout}", table
                )
                return counts

            memory = partial(step_memory, model, batch)
            running = variant.running
            return Built(running(partial(step, model, batch)), running(memory), running(kernels))

        variants = ours(setting, benchmark.kernels, is_first=number == 0)
        measure(benchmark, setting, variants, build, limit.of_setting(number, len(places)), number)
    return {}


def peers(benchmark: "Benchmark") -> dict:
    """Steps of PyPI's LoRA and of its own frozen base model, in a process of their own, in every setting."""
    config = base_config(benchmark.folder)
    limit, places = Limit(benchmark.seconds), settings(benchmark.batch, benchmark.length)
    try:
        random = config.to_dict() | {"use_cache": False}
        peer = Peer(random if benchmark.random or benchmark.folder is None else benchmark.folder)
    except PeerError as error:
        benchmark.say(f"PyPI's peft is left out: {error}")
        return {}
    try:
        for number, setting in enumerate(places):
            if limit.is_over:
                benchmark.add({"section": "left out", "name": f"PyPI's peft, steps of {setting}"})
                continue
            batch = random_batch(config.vocab_size, setting.batch, setting.length)

            def build(variant: Variant, batch: dict[str, Tensor] = batch) -> Built:
                package = {"peft": peer.build(variant)["version"]}
                ask = variant, batch
                return Built(partial(peer.step, *ask), lambda: package | peer.memory(*ask), partial(peer.kernels, *ask))

            measure(benchmark, setting, theirs(setting), build, limit.of_setting(number, len(places)), number)
            peer.drop()
    finally:
        peer.close()
    return {}


def measure(
    benchmark: "Benchmark",
    setting: Setting,
    variants: list[Variant],
    build: Callable[[Variant], Built],
    end: float,
    number: int,
) -> None:
    """Add a row for each of some variants that take turns. The ratios refer to the first. A variant that fails, out of
    memory above all, is left out of the rounds.

    Args:
        end: see `Times`.
        number: of the setting, from 0.
    """
    _free()
    runs, rows = {}, {}
    for variant in variants:
        fields = asdict(variant)
        row = {"section": "step", "variant": fields.pop("name"), **fields, **asdict(setting)}
        try:
            built = build(variant)
            row |= built.memory()
            row |= built.kernels() if _is_profiled(variant, number) else {}
            runs[variant], rows[variant] = built.step, row
        except (ImportError, RuntimeError, ValueError) as error:
            benchmark.add(row | {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]})
            _free()
    if variants[0] not in runs:
        return
    times = Times(runs, benchmark.rounds, end, is_warm=True)
    for variant, row in rows.items():
        row |= times.row(variant, variants[0])
        benchmark.add(row | {"tokens_per_second": setting.batch * setting.length / row["step_seconds"]})
    benchmark.say(f"{len(rows)} variants, {len(times.rounds[variants[0]])} rounds: {setting}")


def _is_profiled(variant: Variant, number: int) -> bool:
    """Whether kernels are counted, which takes seconds: of few variants, of the loop where it may fit the memory."""
    plain = replace(variant, kernels="", checkpointing=False)
    return plain in PROFILED[number] if number < len(PROFILED) else False


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def planner(benchmark: "Benchmark") -> dict:
    """The planner's prediction of a step of 8 experts of rank 4 with dropout, without an optimizer."""
    config = base_config(benchmark.folder)
    for setting in settings(benchmark.batch, benchmark.length):
        labelled = setting.batch * (setting.length - 1)
        shape = Shape(setting.batch, setting.length, labelled, torch.bfloat16, True, setting.checkpointing)
        counts = count_step(config, Variant("loramoe", dropout=0.05).config(balances=False), shape)
        weights = 2 * (counts.frozen_parameters + counts.trainable_parameters)
        row = {"peak": weights + counts.step_peak, "flops": counts.flops}
        benchmark.add({"section": "plan", **asdict(setting), **row})
    return {}
