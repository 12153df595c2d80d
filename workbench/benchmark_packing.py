"""Section `packing` of the benchmark: training on packs against rows that are grouped by length."""

import json
import random
import statistics
import sys
import tempfile
from contextlib import redirect_stdout
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from data import GlobalBatchSampler, InputError, row_lengths
from loading.arguments import parse_arguments
from loading.base_model import load_tokenizer
from train import build_trainer, load_rows
from training.stopping import StopSignals
from training.trainer import LoRAMoETrainer
from workbench.instruments import step
from workbench.processes import as_flags

if TYPE_CHECKING:
    from workbench.benchmark import Benchmark

TRAINING_ROWS = "data/tiny_data/train"
MIXED_ROWS = 10_000


class Batches(NamedTuple):
    """How rows become micro-batches: `size` rows, or packs of up to `capacity` tokens."""

    size: int
    capacity: int | None = None

    @property
    def label(self) -> str:
        packs = "pack" if self.size == 1 else "packs"
        return f"{self.size} {packs} of {self.capacity}" if self.capacity else f"{self.size} rows, grouped by length"


# Batches of about as many tokens.
TINY = Batches(8), Batches(2, 256), Batches(1, 512), Batches(1, 1024)
MIXED = Batches(5), Batches(2, 1024)


def packing(benchmark: "Benchmark") -> dict:
    """Real tokens per second of a step (forward and backward pass) and the padding of an epoch, on packs and on rows
    that are grouped by length: of the tiny data, and of rows of about 20 to 800 tokens."""
    if benchmark.folder is None or benchmark.random:
        raise InputError("--sections packing needs a base model with a tokenizer; name one with --model")
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        mixed = Path(folder, "mixed.jsonl")
        write_rows(mixed, MIXED_ROWS)
        make = partial(make_trainer, str(benchmark.folder), folder)
        rows = _compare(benchmark, "tiny data", {kind: make(kind) for kind in TINY}, benchmark.rounds)
        make = partial(make, dataset_dir=mixed, prompt_template="plain")
        trainers = {kind: make(kind) for kind in MIXED}
        rows += _compare(benchmark, "20 to 800 tokens", trainers, benchmark.fewer_rounds)
    return {"packing": rows}


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


def _compare(benchmark: "Benchmark", name: str, trainers: dict[Batches, LoRAMoETrainer], rounds: int) -> list[dict]:
    """A row for each kind of batches, which take turns; the first is what the others are compared with."""
    first, *_ = trainers
    model = trainers[first].model.train()
    # The first batch has the longest row.
    loaders = {kind: islice(cycle(trainer.get_train_dataloader()), 1, None) for kind, trainer in trainers.items()}
    speeds: dict[Batches, list[float]] = {kind: [] for kind in trainers}
    order = list(trainers)
    for number in range(-1, rounds):
        for kind in order:
            batch = next(loaders[kind])
            tokens = sum(batch.pop("lengths"))
            del batch["sources"]
            seconds = step(model, batch | {"return_logits": False})
            if number >= 0:
                speeds[kind].append(tokens / seconds)
        order.append(order.pop(0))
        benchmark.say(f"{name}, round {number + 1} of {rounds}")
    unordered = GlobalBatchSampler(row_lengths(trainers[first].train_dataset), "random", 0, first.size).padding_share()
    return [
        {"rows": name, "batches": f"{first.size} rows in random order", "padding": unordered},
        *(
            {
                "rows": name,
                "batches": kind.label,
                "tokens_per_second": statistics.median(speeds[kind]),
                **spread([mine / other for mine, other in zip(speeds[kind], speeds[first], strict=True)]),
                "padding": trainer.padding_share(),
            }
            for kind, trainer in trainers.items()
        ),
    ]


def spread(ratios: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = np.percentile(ratios, (25, 50, 75)).tolist()
    return {"ratio": middle, "ratio_low": low, "ratio_high": high}


def write_rows(file: Path, count: int) -> None:
    """Write rows of about 20 to 800 tokens, if common words are single tokens."""
    chance = random.Random(0)
    words = ("time", "person", "year", "way", "day", "thing", "man", "world", "life", "hand", "part", "child", "eye")
    with file.open("w") as stream:
        for number in range(count):
            text = " ".join(chance.choices(words, k=chance.randint(20, 800) - 12))
            stream.write(json.dumps({"instruction": "Write words", "output": text, "task_type": number % 2}) + "\n")
