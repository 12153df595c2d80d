"""Measure the cost of the method: `python -m workbench.benchmark`.

Variants take turns within each round, so that other load on the machine affects all of them equally. A ratio is the
median over rounds of the ratio to the frozen backbone's time in the same round. All variants use the same weights and
batches, in float32, or in bf16 with `--random`. A step is a forward and a backward pass, without an optimizer. It runs
on a GPU if torch sees one.
"""

import argparse
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, set_seed

from data import InputError, supervised_indices
from inference.cuda_graph import graphed_decoding
from inference.trained import cast_experts
from loading.command_line import at_least, range_problems, refuse, run_verb
from loading.provenance import provenance
from workbench import grid
from workbench.benchmark_packing import make_trainer, packing
from workbench.benchmark_report import draw, markdown
from workbench.instruments import step, step_counts, step_memory, timed, trim_heap
from workbench.peers import Peer, PeerError
from workbench.peers import resident_memory as peer_resident_memory
from workbench.processes import run_alone
from workbench.rounds import Times
from workbench.variants import (
    PlainLayer,
    PlainLlama,
    Variant,
    compute_as,
    load_base,
    random_base,
    random_batch,
    resident_memory,
)

DEFAULT_MODEL, LARGE_MODEL = "models/SmolLM2-135M-Instruct", "Llama-2-7B"
DROPOUTS = (0.0, 0.05)
PEERS = ("peft_lora", "xlora")
RATIO = ("ratio", "ratio_low", "ratio_high")


class Benchmark:
    """The measurements, one method per section.

    Args:
        folder: the base model; None stands for a tiny random one.
        rounds: rounds of the main table; the other tables use half as many.
        batch: examples per batch.
        length: tokens per example.
        experts: numbers of experts to compare.
        random: `folder` is the name of an architecture, whose weights are random and in bf16.
        kernels: values of LORAMOE_KERNELS that the grid and decoding compare; by default the environment's.
        seconds: after which the grid and the peers start no further round, and decoding with a batch after an eighth.
        lines: file to which each row of some sections is appended as JSON as soon as it is measured.
        origin: see `provenance`.
    """

    def __init__(
        self,
        folder: str | None,
        rounds: int,
        batch: int,
        length: int,
        experts: list[int],
        random: bool = False,
        kernels: tuple[str, ...] = ("",),
        seconds: float = math.inf,
        lines: Path | None = None,
        origin: dict | None = None,
    ):
        self.folder, self.rounds, self.batch, self.length, self.experts = folder, rounds, batch, length, experts
        self.random, self.kernels, self.seconds = random, kernels, seconds
        self.lines, self.origin = lines, origin or {}
        self.rows: list[dict] = []
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.load = partial(random_base, folder, self.device) if random else partial(load_base, folder)
        self.fewer_rounds = max(1, rounds // 2)

    @cached_property
    def base(self) -> PreTrainedModel:
        return self.load().to(self.device)

    def add(self, row: dict) -> None:
        """Take in a row of the grid; its `section` says of what kind it is."""
        self.rows.append(row)
        self.append(row)

    def append(self, row: dict) -> None:
        if self.lines:
            with self.lines.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def keep(self, name: str, text: str) -> None:
        """Write a text into a file next to that of the rows."""
        if self.lines:
            self.lines.with_name(re.sub(r"[ ,]+", "_", name) + ".txt").write_text(text)

    def say(self, message: str) -> None:
        say(message)

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
            batch = self.batch_of(self.batch, self.length)
            runs = self.runs(mine, batch)
            runs |= {variant: partial(peer.step, variant, batch) for variant, peer in peers.items()}
            measured = {variant: self._measure(variant, batch) for variant in mine}
            measured |= {
                variant: peer.measure(variant, batch) | peer_resident_memory(variant, str(self.folder), batch)
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
        """Greedy generation as `scripts.generate` does it, by CUDA graph on a GPU: tokens per second."""
        rows = []
        batches, prompt_tokens, new_tokens = ((1, 32), 128, 64) if self.device.type == "cuda" else ((1, 8), 32, 32)
        variants = [Variant("frozen"), *(replace(each, kernels=kernels) for kernels in self.kernels for each in _PAIR)]
        models = {variant: variant.model(self.base).eval() for variant in variants}
        for model in models.values():
            cast_experts(model)
        for batch in batches:
            prompt = random_batch(self.base.config.vocab_size, batch, prompt_tokens)["input_ids"].to(self.device)
            runs = {v: v.running(partial(generate, models[v], prompt, new_tokens)) for v in variants}
            times = Times(runs, self.rounds, time.monotonic() + self.seconds / 8)
            for variant in variants:
                row = times.row(variant, variants[0])
                # The ratio of speeds is the inverse of the ratio of times.
                ratio = times.ratio(variants[0], variant)["ratio"]
                speed = batch * new_tokens / row["step_seconds"]
                figures = {"tokens_per_second": speed, "speed_ratio": ratio}
                tokens = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
                rows.append({"variant": variant.label, "batch": batch, **tokens, **figures})
                self.append({"section": "decode", **rows[-1]})
        return {"decode": rows}

    def training(self) -> dict:
        """One epoch on the tiny data, with and without our optimizations, and both loss curves."""
        if self.folder is None or self.random:
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

    def batch_of(self, batch: int, length: int) -> dict[str, Tensor]:
        """A random batch on the device, with what the collator tells a model so that it need not wait for that."""
        tensors = random_batch(self.base.config.vocab_size, batch, length)
        tensors |= {"supervised_indices": supervised_indices(tensors["labels"])}
        tensors |= {"row_weights": torch.ones_like(tensors["task_types"])}
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}

    def runs(self, variants: Iterable[Variant], batch: dict[str, Tensor]) -> dict[Variant, Callable[[], float]]:
        """A step of each variant."""
        return {variant: variant.running(partial(step, variant.model(self.base), batch)) for variant in variants}

    def _peers(self, dropout: float) -> dict[Variant, Peer]:
        """The peers that can run here; prints why the others cannot."""
        if self.folder is None or self.random:
            say("no peers")
            return {}
        found = {}
        for name in PEERS:
            variant = Variant(name, dropout=dropout)
            try:
                peer = Peer(self.folder)
                peer.build(variant)
                found[variant] = peer
            except PeerError as error:
                say(f"{name} is left out: {error}")
        return found

    def _measure(self, variant: Variant, batch: dict[str, Tensor]) -> dict:
        """Memory and FLOPs of one step. Resident memory is measured in a separate process."""
        model = variant.model(self.base)
        trim_heap()
        counts = step_counts(model, batch)
        if self.device.type == "cuda":
            return counts | step_memory(model, batch)
        return counts | run_alone(resident_memory, self.load, variant, batch)

    def _row(self, variant: Variant, frozen: Variant, times: Times, measured: dict, dropout: float) -> dict:
        mine, limit = measured[variant], measured[frozen]
        return {
            "variant": variant.label,
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
            batch = self.batch_of(*shape)
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


_PAIR = [Variant("lora", experts=1, rank=32), Variant("loramoe")]
SECTIONS: dict[str, Callable[[Benchmark], dict]] = {
    "steps": Benchmark.steps,
    "experts": Benchmark.experts_table,
    "lengths": Benchmark.lengths,
    "batches": Benchmark.batches,
    "decode": Benchmark.decode,
    "training": Benchmark.training,
    "packing": packing,
    "ceilings": grid.ceilings,
    "grid": grid.grid,
    "peers": grid.peers,
    "planner": grid.planner,
}
# The first takes its time, the others are for large models on a GPU.
ON_REQUEST = ("packing", "ceilings", "grid", "peers", "planner")


def generate(model: nn.Module, prompt_BT: Tensor, new_tokens: int) -> float:
    """Generate `new_tokens` tokens for each prompt. Returns the seconds."""
    settings = GenerationConfig(max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    inputs = {"input_ids": prompt_BT, "attention_mask": torch.ones_like(prompt_BT)}

    def run() -> None:
        with graphed_decoding(model, settings, prompt_BT.shape[1]):
            model.generate(**inputs, generation_config=settings)

    return timed(run, prompt_BT.device)


def train_epoch(folder: str, order: str, is_plain: bool, dropout: float) -> tuple[float, list[float]]:
    """Train one epoch on the tiny data. Returns samples per second and the loss of every step."""
    with tempfile.TemporaryDirectory() as output, redirect_stdout(sys.stderr):
        trainer = make_trainer(folder, output, lora_dropout=dropout, train_sampling_strategy=order)
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
    parser.add_argument("--model", help=f"folder of the base model; default {DEFAULT_MODEL}, with --quick a tiny Llama")
    parser.add_argument("--random", action="store_true", help=f"random bf16 weights of --model, default {LARGE_MODEL}")
    parser.add_argument("--sections", help=f"list from {','.join(SECTIONS)}; default: all before packing")
    parser.add_argument("--kernels", default="", help="values of LORAMOE_KERNELS that grid and decode compare")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which grid and peers start no round")
    parser.add_argument("--rounds", type=int, help="rounds of the main table, half as many for others; default 10")
    parser.add_argument("--batch", type=int, help="examples per batch; default 4")
    parser.add_argument("--length", type=int, help="tokens per example; default 128, with --random 1024")
    parser.add_argument("--quick", action="store_true", help="check in under 2 minutes that everything runs; no peers")
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    parser.add_argument("--lines", type=Path, help="append rows to this file as they are measured; grid, peers, ...")
    parser.add_argument("--markdown", type=Path, help="print the tables of a --json file instead of measuring")
    parser.add_argument("--plot", type=Path, help="draw docs/pictures/ from a --json file instead of measuring")
    flags = parser.parse_args(argv)
    defaults = {"rounds": 10, "batch": 4, "length": 1024 if flags.random else 128}
    defaults = {"rounds": 3, "batch": 2, "length": 16} if flags.quick else defaults
    for name, value in defaults.items():
        given = getattr(flags, name)
        setattr(flags, name, value if given is None else given)
    refuse(range_problems(flags, [at_least(1, "rounds", "batch", "length")]))
    flags.model = flags.model or (None if flags.quick else LARGE_MODEL if flags.random else DEFAULT_MODEL)
    left_out = {*ON_REQUEST, *(["training"] if flags.random or not flags.model else [])}
    possible = [name for name in SECTIONS if name not in left_out]
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
    results = provenance("workbench.benchmark", argv)
    benchmark = Benchmark(
        flags.model,
        flags.rounds,
        flags.batch,
        flags.length,
        experts,
        random=flags.random,
        kernels=tuple(flags.kernels.split(",")),
        seconds=flags.seconds,
        lines=flags.lines,
        origin=results.copy(),
    )
    results |= {"model": flags.model, "batch": flags.batch, "length": flags.length, "sections": flags.sections}
    for name in flags.sections:
        say(f"section {name}, after {time.monotonic() - start:.0f} s")
        results |= SECTIONS[name](benchmark)
    results |= {"grid": benchmark.rows} if benchmark.rows else {}
    results["seconds"] = time.monotonic() - start
    if flags.json:
        flags.json.parent.mkdir(parents=True, exist_ok=True)
        flags.json.write_text(json.dumps(results, indent=1) + "\n")
    print(markdown(results))


if __name__ == "__main__":
    run_verb(main)
