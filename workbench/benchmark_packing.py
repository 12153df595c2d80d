"""Section `packing` of the benchmark: training on packs against rows that are grouped by length."""

import json
import random
import statistics
import sys
import tempfile
from contextlib import redirect_stdout
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from data import GlobalBatchSampler, InputError, row_lengths
from loading.arguments import parse_arguments
from loading.base_model import load_tokenizer
from train import build_trainer, load_rows
from training.stopping import StopSignals
from training.trainer import LoRAMoETrainer
from workbench.processes import as_flags

if TYPE_CHECKING:
    from workbench.benchmark import Benchmark

TRAINING_ROWS = "data/tiny_data/train"
MIXED_ROWS, MIXED_STEPS = 10_000, 6


class Batches(NamedTuple):
    """How rows become micro-batches: `size` rows, or packs of up to `capacity` tokens."""

    size: int
    capacity: int | None = None

    @property
    def label(self) -> str:
        return f"{self.size} packs of {self.capacity}" if self.capacity else f"{self.size} rows, grouped by length"


# Batches of about as many tokens.
TINY = Batches(8), Batches(2, 256), Batches(1, 512), Batches(1, 1024)
MIXED = Batches(8), Batches(3, 1024)


def packing(benchmark: "Benchmark") -> dict:
    """Real tokens per second and padding, on packs and on rows that are grouped by length.

    One epoch of the tiny data, and some steps of rows of about 20 to 800 tokens, other ones in each round.
    """
    if benchmark.folder is None or benchmark.random:
        raise InputError("--sections packing needs a base model with a tokenizer; name one with --model")
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        mixed = Path(folder, "mixed.jsonl")
        write_rows(mixed, MIXED_ROWS)
        make = partial(make_trainer, str(benchmark.folder), folder)
        tiny = _compare(benchmark, "tiny data", TINY, make)
        return {"packing": tiny + _compare(
            benchmark, "20 to 800 tokens", MIXED,
            partial(make, dataset_dir=mixed, prompt_template="plain", max_steps=MIXED_STEPS),
        )}  # fmt: skip


def make_trainer(folder: str, output: str, batches: Batches = TINY[0], **changes) -> LoRAMoETrainer:
    """A trainer for one epoch of 8 experts of rank 4 on the CPU, which writes no checkpoint."""
    flags = {
        "model_name_or_path": folder,
        "dataset_dir": TRAINING_ROWS,
        "data_cache_dir": f"{output}/data",
        "output_dir": f"{output}/run",
        "per_device_train_batch_size": batches.size,
        "max_seq_length": batches.capacity or 1024,
        "lora_nums": 8,
        "lora_rank": 4,
        "seed": 0,
        "use_cpu": "true",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": "true",
    }
    model_args, data_args, args = parse_arguments(as_flags(**flags | changes))
    tokenizer = load_tokenizer(folder)
    rows, _, _ = load_rows(tokenizer, model_args, data_args, args)
    return build_trainer(model_args, args, tokenizer, rows, None, None, StopSignals(), batches.capacity)


def _compare(benchmark: "Benchmark", name: str, kinds: tuple[Batches, ...], make) -> list[dict]:
    """A row for each kind of batches; the first is what the others are compared with."""
    speeds: dict[Batches, list[float]] = {kind: [] for kind in kinds}
    padding = {}
    order = list(kinds)
    for number in range(max(1, benchmark.fewer_rounds)):
        for kind in order:
            trainer = make(batches=kind, seed=number)
            sampler = trainer.train_sampler()
            steps = max(trainer.args.max_steps, 0) or None
            tokens = sum(int(sampler.lengths[batch].sum()) for batch in islice(sampler, steps))
            padding[kind] = trainer.padding_share()
            speeds[kind].append(tokens / trainer.train().metrics["train_runtime"])
            benchmark.say(f"{name}, {kind.label}: {speeds[kind][-1]:.0f} tokens/s")
        order.append(order.pop(0))
    lengths = row_lengths(trainer.train_dataset)
    unordered = GlobalBatchSampler(lengths, "random", 0, kinds[0].size).padding_share()
    rows = []
    for kind in kinds:
        ratios = [mine / first for mine, first in zip(speeds[kind], speeds[kinds[0]], strict=True)]
        spread = {"ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)}
        speed = statistics.median(speeds[kind])
        rows.append(
            {"rows": name, "batches": kind.label, "tokens_per_second": speed, **spread, "padding": padding[kind]}
        )
    return [*rows, {"rows": name, "batches": f"{kinds[0].size} rows in random order", "padding": unordered}]


def write_rows(file: Path, count: int) -> None:
    """Write rows of about 20 to 800 tokens, if common words are single tokens."""
    chance = random.Random(0)
    words = ("time", "person", "year", "way", "day", "thing", "man", "world", "life", "hand", "part", "child", "eye")
    with file.open("w") as stream:
        for number in range(count):
            text = " ".join(chance.choices(words, k=chance.randint(20, 800) - 12))
            stream.write(json.dumps({"instruction": "Write words", "output": text, "task_type": number % 2}) + "\n")
