"""Measure the cost of the method: `python -m workbench.benchmark`.

Variants take turns within each round, so that other load on the machine affects all of them equally. A ratio is the
median over rounds of the ratio to the frozen backbone's time in the same round. All variants use the same weights and
batches, in float32. A step is a forward and a backward pass, without an optimizer.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, set_seed

from data import InputError
from loading.arguments import parse_arguments
from loading.base_model import load_tokenizer
from loading.command_line import at_least, range_problems, refuse, run_verb
from loading.provenance import provenance
from train import build_trainer, load_rows
from training.stopping import StopSignals
from workbench.benchmark_report import draw, markdown
from workbench.instruments import step, step_counts, trim_heap
from workbench.peers import PYTHON, Peer, PeerError
from workbench.peers import resident_memory as peer_resident_memory
from workbench.processes import as_flags, run_alone
from workbench.variants import (
    PlainLayer,
    PlainLlama,
    Variant,
    compute_as,
    load_base,
    random_batch,
    resident_memory,
)

DEFAULT_MODEL = "models/SmolLM2-135M-Instruct"
TRAINING_ROWS = "data/tiny_data/train"
DROPOUTS = (0.0, 0.05)
PEERS = ("peft_lora", "xlora")
# Much slower than the others, so they run in every third round only.
SLOW = ("loop", "xlora")
RATIO = ("ratio", "ratio_low", "ratio_high")


class Times:
    """Seconds by variant and round.

    Args:
        runs: for every variant, a function that runs it once and returns the seconds.
        rounds: number of rounds; each variant runs once per round.
    """

    def __init__(self, runs: dict[Variant, Callable[[], float]], rounds: int):
        self.rounds: dict[Variant, dict[int, float]] = {variant: {} for variant in runs}
        order = list(runs)
        for number in range(-1, rounds):  # the first round warms up
            for variant in order:
                if variant.name in SLOW and number >= 0 and number % 3:
                    continue
                seconds = runs[variant]()
                if variant.name in SLOW:  # these are also large
                    trim_heap()
                if number >= 0:
                    self.rounds[variant][number] = seconds
            order.append(order.pop(0))

    def ratio(self, variant: Variant, reference: Variant) -> dict[str, float]:
        """Median and quartiles of the ratio of two variants, over the rounds in which both ran."""
        ours, theirs = self.rounds[variant], self.rounds[reference]
        ratios = [ours[number] / theirs[number] for number in ours.keys() & theirs.keys()]
        low, middle, high = np.percentile(ratios, (25, 50, 75)).tolist()
        return {"ratio": middle, "ratio_low": low, "ratio_high": high, "rounds": len(ratios)}

    def row(self, variant: Variant, frozen: Variant) -> dict:
        """The reported times of one variant."""
        row = {f"step_{name}": value for name, value in self.ratio(variant, frozen).items()}
        rounds = row.pop("step_rounds")
        seconds = statistics.median(self.rounds[variant].values())
        return {**row, "step_seconds": seconds, "rounds": rounds}


class Benchmark:
    """The measurements, one method per section.

    Args:
        folder: the base model; None stands for a tiny random one.
        rounds: rounds of the main table; the other tables use half as many.
        batch: examples per batch.
        length: tokens per example.
        experts: numbers of experts to compare.
    """

    def __init__(self, folder: str | None, rounds: int, batch: int, length: int, experts: list[int]):
        self.folder, self.rounds, self.batch, self.length, self.experts = folder, rounds, batch, length, experts
        self.base = load_base(folder)
        self.fewer_rounds = max(1, rounds // 2)

    def steps(self) -> dict:
        """The main table: every variant at both dropouts."""
        rows, comparisons = [], []
        for dropout in DROPOUTS:
            mine = [
                Variant("frozen"),
                Variant("lora", experts=1, rank=32, dropout=dropout),
                *(Variant(name, dropout=dropout) for name in ("loramoe", "top2", "shared_a", "plain", "loop")),
            ]
            peers = self._peers(dropout)
            batch = self._batch(self.batch, self.length)
            runs = self._runs(mine, batch) | {variant: partial(peer.step, batch) for variant, peer in peers.items()}
            measured = {variant: self._measure(variant, batch) for variant in mine}
            measured |= {
                variant: peer.measure(batch) | peer_resident_memory(variant, str(self.folder), batch)
                for variant, peer in peers.items()
            }
            times = Times(runs, self.rounds)
            for peer in peers.values():
                peer.close()
            rows += [self._row(variant, mine[0], times, measured, dropout) for variant in runs]
            ours = Variant("loramoe", dropout=dropout)
            comparisons += [
                {"variant": variant.name, "to": "loramoe", "dropout": dropout, **times.ratio(variant, ours)}
                for variant in runs
                if variant.name not in ("frozen", "loramoe")
            ]
        return {"rows": rows, "comparisons": comparisons}

    def experts_table(self) -> dict:
        """Time against the number of experts, at a total rank of 64 and at rank 4 per expert."""
        mine = {Variant("loramoe", n, max(1, 64 // n)) for n in self.experts}
        mine |= {Variant("loramoe", n, 4) for n in self.experts}
        ours = sorted(mine, key=lambda variant: (variant.rank == 4, variant.experts, variant.rank))
        loops = [Variant("loop", variant.experts, variant.rank) for variant in ours]
        rows = self._scaling(ours, [(self.batch, self.length)])
        # The loop keeps a full output for each expert, so only a batch of one example fits in memory.
        rows += self._scaling([*ours, *loops], [(1, self.length)])
        return {"experts": rows}

    def lengths(self) -> dict:
        return {"lengths": self._scaling(_PAIR, [(1, self.length * factor) for factor in (1, 2, 4, 8)])}

    def batches(self) -> dict:
        return {"batches": self._scaling(_PAIR, [(batch, self.length) for batch in (1, 2, 4, 8)])}

    def decode(self) -> dict:
        """Greedy generation with a KV cache, tokens per second."""
        rows = []
        variants = [Variant("frozen"), *_PAIR]
        models = {variant: variant.model(self.base).eval() for variant in variants}
        for batch in (1, 8):
            prompt = random_batch(self.base.config.vocab_size, batch, 32)["input_ids"]
            times = Times({v: partial(generate, models[v], prompt) for v in variants}, self.rounds)
            for variant in variants:
                row = times.row(variant, variants[0])
                # The ratio of speeds is the inverse of the ratio of times.
                ratio = times.ratio(variants[0], variant)["ratio"]
                speed = batch * NEW_TOKENS / row["step_seconds"]
                rows.append({"variant": variant.name, "batch": batch, "tokens_per_second": speed, "speed_ratio": ratio})
        return {"decode": rows}

    def training(self) -> dict:
        """One epoch on the tiny data, with and without our optimizations, and both loss curves."""
        if self.folder is None:
            raise InputError("--sections training needs a base model with a tokenizer; name one with --model")
        on = partial(train_epoch, self.folder, order="group_by_length", is_plain=False)
        plain = partial(train_epoch, self.folder, order="random", is_plain=True)
        speeds = [(on(dropout=0.05)[0], plain(dropout=0.05)[0]) for _ in range(max(1, self.fewer_rounds // 2))]
        names = ("samples_per_second", "plain_samples_per_second")
        medians = dict(zip(names, np.median(speeds, axis=0).tolist(), strict=True))
        ratios = [fast / slow for fast, slow in speeds]
        spread = {"ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)}
        curves = {
            "loramoe": train_epoch(self.folder, order="random", is_plain=False, dropout=0.0)[1],
            "plain": train_epoch(self.folder, order="random", is_plain=True, dropout=0.0)[1],
        }
        return {"training": {**medians, **spread, "rounds": len(ratios)}, "step_losses": curves}

    def _batch(self, batch: int, length: int) -> dict[str, Tensor]:
        return random_batch(self.base.config.vocab_size, batch, length)

    def _runs(self, variants: list[Variant], batch: dict[str, Tensor]) -> dict[Variant, Callable[[], float]]:
        return {variant: partial(step, variant.model(self.base), batch) for variant in variants}

    def _peers(self, dropout: float) -> dict[Variant, Peer]:
        """The peers that can run here; prints why the others cannot."""
        if self.folder is None or not PYTHON.exists():
            say("no peers" if self.folder is None else "no peers; to set them up: bash workbench/benchmark_peers.sh")
            return {}
        found = {}
        for name in PEERS:
            variant = Variant(name, dropout=dropout)
            try:
                found[variant] = Peer(variant, self.folder)
            except PeerError as error:
                say(f"{name} is left out: {error}")
        return found

    def _measure(self, variant: Variant, batch: dict[str, Tensor]) -> dict:
        """Memory and FLOPs of one step. Resident memory is measured in a separate process."""
        model = variant.model(self.base)
        trim_heap()
        return step_counts(model, batch) | run_alone(resident_memory, self.folder, variant, batch)

    def _row(self, variant: Variant, frozen: Variant, times: Times, measured: dict, dropout: float) -> dict:
        mine, limit = measured[variant], measured[frozen]
        return {
            "variant": variant.name,
            "dropout": dropout,
            **times.row(variant, frozen),
            "saved_bytes_ratio": mine["saved_bytes"] / limit["saved_bytes"],
            "flops_ratio": mine["flops"] / limit["flops"],
            **mine,
        }

    def _scaling(self, variants: list[Variant], shapes: list[tuple[int, int]]) -> list[dict]:
        """Rows of a scaling table, relative to the frozen backbone and to the first variant, at each shape."""
        rows = []
        frozen = Variant("frozen")
        for shape in shapes:
            batch = self._batch(*shape)
            models = {variant: variant.model(self.base) for variant in (frozen, *variants)}
            times = Times({v: partial(step, model, batch) for v, model in models.items()}, self.fewer_rounds)
            measured = {variant: step_counts(model, batch) for variant, model in models.items()}
            for variant in models:
                size = {"experts": variant.experts, "rank": variant.rank, "batch": shape[0], "length": shape[1]}
                to_first = times.ratio(variant, variants[0])
                row = self._row(variant, frozen, times, measured, variant.dropout)
                rows.append(size | row | {f"first_{name}": to_first[name] for name in RATIO})
            say(f"measured {len(models)} variants at batch {shape[0]} x {shape[1]}")
        return rows


NEW_TOKENS = 32
_PAIR = [Variant("lora", experts=1, rank=32), Variant("loramoe")]
SECTIONS: dict[str, Callable[[Benchmark], dict]] = {
    "steps": Benchmark.steps,
    "experts": Benchmark.experts_table,
    "lengths": Benchmark.lengths,
    "batches": Benchmark.batches,
    "decode": Benchmark.decode,
    "training": Benchmark.training,
}


def generate(model: nn.Module, prompt_BT: Tensor) -> float:
    """Generate `NEW_TOKENS` tokens for each prompt. Returns the seconds."""
    settings = GenerationConfig(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    start = time.perf_counter()
    model.generate(input_ids=prompt_BT, attention_mask=torch.ones_like(prompt_BT), generation_config=settings)
    return time.perf_counter() - start


def train_epoch(folder: str, order: str, is_plain: bool, dropout: float) -> tuple[float, list[float]]:
    """Train one epoch on the tiny data. Returns samples per second and the loss of every step."""
    with tempfile.TemporaryDirectory() as output, redirect_stdout(sys.stderr):
        flags = {
            "model_name_or_path": folder,
            "dataset_dir": TRAINING_ROWS,
            "data_cache_dir": f"{output}/data",
            "output_dir": f"{output}/run",
            "per_device_train_batch_size": 8,
            "lora_nums": 8,
            "lora_rank": 4,
            "lora_dropout": dropout,
            "train_sampling_strategy": order,
            "seed": 0,
            "use_cpu": "true",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": "true",
        }
        model_args, data_args, args = parse_arguments(as_flags(**flags))
        tokenizer = load_tokenizer(folder)
        rows, _, _ = load_rows(tokenizer, model_args, data_args, args)
        trainer = build_trainer(model_args, args, tokenizer, rows, None, None, StopSignals())
        if is_plain:
            compute_as(trainer.model, PlainLayer, dropout)
            trainer.model.get_base_model().__class__ = PlainLlama
        speed = trainer.train().metrics["train_samples_per_second"]
        return speed, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def say(message: str) -> None:
    print(f"[benchmark] {message}", file=sys.stderr, flush=True)


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line and fill in the defaults that depend on --quick.

    Raises:
        InputError: a section is unknown, or a number is too small.
    """
    parser = argparse.ArgumentParser(
        prog="python -m workbench.benchmark",
        description="Compare time, memory and FLOPs of LoRAMoE with the frozen backbone, LoRA, a loop over the experts "
        "and, after bash workbench/benchmark_peers.sh, PyPI's peft. Prints tables.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", help=f"base model folder; default {DEFAULT_MODEL}, with --quick a tiny random Llama")
    parser.add_argument("--sections", help=f"comma-separated list from {','.join(SECTIONS)}; default: all that can run")
    parser.add_argument("--rounds", type=int, help="rounds of the main table, half as many for others; default 10")
    parser.add_argument("--batch", type=int, help="examples per batch; default 4")
    parser.add_argument("--length", type=int, help="tokens per example; default 128")
    parser.add_argument("--quick", action="store_true", help="check in under 2 minutes that everything runs; no peers")
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    parser.add_argument("--markdown", type=Path, help="print the tables of a --json file instead of measuring")
    parser.add_argument("--plot", type=Path, help="draw docs/pictures/ from a --json file instead of measuring")
    flags = parser.parse_args(argv)
    defaults = {"rounds": 3, "batch": 2, "length": 16} if flags.quick else {"rounds": 10, "batch": 4, "length": 128}
    for name, value in defaults.items():
        given = getattr(flags, name)
        setattr(flags, name, value if given is None else given)
    refuse(range_problems(flags, [at_least(1, "rounds", "batch", "length")]))
    flags.model = flags.model or (None if flags.quick else DEFAULT_MODEL)
    possible = [name for name in SECTIONS if name != "training" or flags.model]
    flags.sections = possible if flags.sections is None else flags.sections.split(",")
    if unknown := set(flags.sections) - SECTIONS.keys():
        raise InputError(f"--sections: unknown: {', '.join(sorted(unknown))}; choose from {', '.join(SECTIONS)}")
    return flags


def read_results(file: Path) -> dict:
    """Read a file written by `--json`.

    Raises:
        InputError: it cannot be read or is a different kind of file.
    """
    try:
        results = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error
    if not isinstance(results, dict) or "sections" not in results:
        raise InputError(f"{file} was not written by `python -m workbench.benchmark --json`")
    return results


def main(argv: list[str] | None = None) -> None:
    """Measure, or show earlier measurements.

    Raises:
        InputError: see `parse`, `read_results` and `load_base`.
    """
    argv = sys.argv[1:] if argv is None else argv
    flags = parse(argv)
    if flags.markdown:
        print(markdown(read_results(flags.markdown)))
    if flags.plot:
        print("\n".join(map(str, draw(read_results(flags.plot)))))
    if flags.markdown or flags.plot:
        return
    if flags.quick:
        # With such a small model, several threads mostly wait for each other, especially on a busy machine.
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"  # for child processes
    set_seed(0)
    start = time.monotonic()
    experts = [2, 4] if flags.quick else [8, 16, 32, 64]
    benchmark = Benchmark(flags.model, flags.rounds, flags.batch, flags.length, experts)
    results = provenance("workbench.benchmark", argv)
    results |= {"model": flags.model, "batch": flags.batch, "length": flags.length, "sections": flags.sections}
    for name in flags.sections:
        say(f"section {name}, after {time.monotonic() - start:.0f} s")
        results |= SECTIONS[name](benchmark)
    results["seconds"] = time.monotonic() - start
    if flags.json:
        flags.json.parent.mkdir(parents=True, exist_ok=True)
        flags.json.write_text(json.dumps(results, indent=1) + "\n")
    print(markdown(results))


if __name__ == "__main__":
    run_verb(main)
