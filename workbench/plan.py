"""Predict memory and time of a training run: `python -m workbench.plan --model Llama-3-8B --gpus 8`.

Activations, logits and FLOPs are counted on the real model without data (`footprint.py`). Weights, gradients, optimizer
and buffers follow from the numbers of parameters and from how DDP and DeepSpeed's ZeRO shard them. `--check` compares
the counts with real steps of a small model on this machine.
"""

import argparse
import json
import math
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers import PretrainedConfig

from data import InputError
from loading.arguments import FLAG_OF_FIELD, DataArguments
from loading.command_line import at_least, listed, range_problems, refuse, run_verb
from peft import LoraConfig, TaskType
from training.throughput import GIB, PEAK_TFLOPS
from transformers_patch.auto import damage_refused, default_targets
from workbench.architectures import ARCHITECTURES, find_architecture
from workbench.footprint import Footprint, Shape, count_step
from workbench.instruments import SavedBytes
from workbench.processes import run_alone
from workbench.variants import Variant, load_base, random_batch, resident_memory

# Dense bf16 TFLOP/s and GiB of memory, from the data sheets.
GPUS = {
    "A100-40G": (PEAK_TFLOPS["A100"], 40),
    "A100": (PEAK_TFLOPS["A100"], 80),
    "H100": (PEAK_TFLOPS["H100"], 80),
    "H200": (PEAK_TFLOPS["H200"], 141),
    "B200": (PEAK_TFLOPS["B200"], 180),
    "L40S": (PEAK_TFLOPS["L40S"], 48),
    "A10": (PEAK_TFLOPS["A10"], 24),
    "RTX4090": (PEAK_TFLOPS["RTX 4090"], 24),
}
# Fraction of a GPU's memory; the driver's context and fragmentation take the rest.
USABLE = 0.92

# In elements: the value of scripts/deepspeed/*.json, and a default of DeepSpeed that they do not change.
REDUCE_BUCKET = 50_000_000
MAX_LIVE_PARAMETERS = 1_000_000_000

# Bits per weight: nf4 with double quantisation has an 8-bit scale for every 64 weights and a 32-bit one for every 256
# of these scales. int8 has a 32-bit scale for every row, which is counted separately.
BITS = {4: 4 + 8 / 64 + 32 / (64 * 256), 8: 8}
CHECKED_SHAPES = ((4, 128), (1, 512))
MFU = 0.4


@dataclass(frozen=True)
class Setup:
    """How a run is sharded and stored.

    Args:
        gpus: total number of processes.
        zero: 0 is DDP; 1, 2 and 3 are DeepSpeed's stages.
        offload: what is in CPU memory: `none`, `optimizer` (and its gradients) or `all` (also the weights).
        bits: 16 leaves the frozen weights unchanged; 8 and 4 quantise them.
        itemsize: bytes per element of weights and computation.
    """

    gpus: int
    zero: int
    offload: str
    bits: int
    itemsize: int


def memory_per_gpu(counts: Footprint, setup: Setup) -> dict[str, int]:
    """Bytes by component. `logits` and `layers' backward` occur one after the other, so only the larger one counts."""
    trainable, shares = counts.trainable_parameters, setup.gpus
    adapter_itemsize = setup.itemsize if setup.zero else 4
    # DeepSpeed keeps a float32 copy of half-precision weights and makes one of the gradient for its step.
    copies = 8 if setup.zero and setup.itemsize < 4 else 0
    optimizer: float = trainable * (8 + copies)
    gradients: float = trainable * 4  # our DeepSpeed files also accumulate them in float32
    frozen: float = _frozen_bytes(counts, setup)
    buffers = trainable * 4 if setup.zero == 0 and shares > 1 else 0
    if setup.zero >= 1:
        optimizer /= shares
    if setup.zero >= 2:
        gradients /= shares
    if setup.zero:
        buffers = REDUCE_BUCKET * setup.itemsize
    if setup.zero == 3:
        everything = counts.frozen_parameters + trainable
        buffers += min(MAX_LIVE_PARAMETERS, everything) * setup.itemsize if shares > 1 or setup.offload == "all" else 0
        frozen /= shares  # the adapter's tensors are below the threshold for sharding
    if setup.bits < 16:
        buffers += counts.largest_linear * setup.itemsize  # one Linear at a time is dequantised
    return {
        "weights": 0 if setup.offload == "all" else math.ceil(frozen + trainable * adapter_itemsize),
        "gradients": math.ceil(gradients) if setup.offload == "none" else 0,
        "optimizer": math.ceil(optimizer) if setup.offload == "none" else 0,
        "activations": counts.activations,
        "logits": counts.logits,
        "layers' backward": counts.backward,
        "buffers": buffers,
    }


def host_memory(counts: Footprint, setup: Setup) -> int:
    """Bytes of CPU memory that offloading takes, over all processes."""
    if setup.offload == "none":
        return 0
    kept_on_gpu = memory_per_gpu(counts, setup)
    there = memory_per_gpu(counts, replace(setup, offload="none"))
    return setup.gpus * sum(there[name] - kept_on_gpu[name] for name in ("weights", "gradients", "optimizer"))


def peak(memory: dict[str, int]) -> int:
    """Peak bytes of `memory_per_gpu`."""
    return sum(memory.values()) - min(memory["logits"], memory["layers' backward"])


def _frozen_bytes(counts: Footprint, setup: Setup) -> int:
    if setup.bits == 16:
        return counts.frozen_parameters * setup.itemsize
    scales = counts.quantisable_rows * 4 if setup.bits == 8 else 0
    packed = counts.quantisable_parameters * BITS[setup.bits] / 8
    return math.ceil(packed) + scales + (counts.frozen_parameters - counts.quantisable_parameters) * setup.itemsize


def plan(config: PretrainedConfig, flags: argparse.Namespace) -> dict:
    """Compute everything that is printed, as plain JSON values.

    Raises:
        InputError: the adapter does not fit the model.
    """
    setup = Setup(flags.gpus, flags.zero, flags.offload, flags.load_in_kbits, 2 if flags.dtype == "bf16" else 4)
    shape = Shape(
        flags.batch,
        flags.length,
        labelled=max(1, round(flags.batch * flags.length * flags.labelled)),
        dtype=torch.bfloat16 if flags.dtype == "bf16" else torch.float32,
        casts_adapter=flags.zero > 0,
        checkpointing=flags.gradient_checkpointing,
        forms_logits=flags.zero == 3,
    )
    try:
        with damage_refused(f"config.json of {flags.model}"):
            counts = count_step(config, adapter_config(flags), shape)
    except ValueError as error:
        raise InputError(str(error)) from error
    tflops, capacity = GPUS[flags.gpu]
    tflops = flags.peak_tflops or tflops
    memory = memory_per_gpu(counts, setup)
    seconds = counts.flops / (tflops * 1e12 * flags.mfu)
    samples = flags.batch * flags.gpus
    return {
        "frozen_parameters": counts.frozen_parameters,
        "trainable_parameters": counts.trainable_parameters,
        "memory_per_gpu": memory,
        "peak_per_gpu": peak(memory),
        "capacity": capacity * GIB,
        "host_memory": host_memory(counts, setup),
        "saved_bytes": counts.saved,
        "flops_per_gpu_and_step": counts.flops,
        "tflops": tflops,
        "samples_per_step": samples,
        "seconds_per_step": seconds,
        "hours_per_million_samples": 1e6 / samples * seconds / 3600,
    }


def adapter_config(flags: argparse.Namespace) -> LoraConfig:
    """Build the adapter's configuration.

    Raises:
        ValueError: a value is out of range.
    """
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=flags.lora_rank,
        lora_nums=flags.lora_nums,
        lora_null_expert=flags.lora_null_expert,
        lora_dropout=flags.lora_dropout,
        blc_weight=0,  # beta; architectures other than Llama use classes of transformers, without the term
        target_modules=listed(flags.trainable),
    )


def report(result: dict, flags: argparse.Namespace) -> str:
    """Format the plan as text."""
    division = f"ZeRO-{flags.zero}" if flags.zero else "DDP" if flags.gpus > 1 else "no sharding"
    notes = [division]
    notes += [f"{flags.offload} offloaded"] if flags.offload != "none" else []
    notes += [f"{flags.load_in_kbits}-bit base model"] if flags.load_in_kbits < 16 else []
    notes += ["checkpointing"] if flags.gradient_checkpointing else []
    null = " and a null expert" if flags.lora_null_expert else ""
    width = max(map(len, result["memory_per_gpu"]))
    peak_bytes, capacity = result["peak_per_gpu"], result["capacity"]
    verdict = "fits" if peak_bytes <= USABLE * capacity else f"does not fit, since {1 - USABLE:.0%} stay free"
    lines = [
        f"{flags.model}: {result['frozen_parameters']:,} parameters frozen, {result['trainable_parameters']:,} trained "
        f"({flags.lora_nums} experts of rank {flags.lora_rank}{null} on {flags.trainable})",
        f"{flags.gpus} x {flags.gpu}, {flags.batch} x {flags.length} tokens per GPU, {flags.dtype}, {', '.join(notes)}",
        "",
        "memory per GPU, GiB",
        *(f"  {name:<{width}}  {size / GIB:8.2f}" for name, size in result["memory_per_gpu"].items()),
        f"  {'peak':<{width}}  {peak_bytes / GIB:8.2f}  of {capacity / GIB:.0f}: {verdict}",
        "  (logits and layers' backward follow each other: the larger counts)",
    ]
    if result["host_memory"]:
        lines.append(f"  CPU memory of all processes  {result['host_memory'] / GIB:.2f}")
    return "\n".join([*lines, "", *_time_lines(result, flags)])


def _time_lines(result: dict, flags: argparse.Namespace) -> list[str]:
    tflop = result["flops_per_gpu_and_step"] / 1e12
    return [
        f"per step: {tflop:.1f} TFLOP on each GPU, {result['samples_per_step']} samples",
        f"at {flags.mfu:.0%} of {result['tflops']:g} TFLOP/s: {result['seconds_per_step']:.2f} s per step, "
        f"{result['hours_per_million_samples']:.1f} h per million samples",
        "  (communication between GPUs, data loading and offloading come on top)",
    ]


def check(folder: str) -> tuple[list[list[str]], float, float]:
    """Compare the counts with real steps of a model on this machine, in float32, at two shapes.

    Returns:
        Rows of a table; the largest relative errors of saved bytes and of peak memory.
    """
    variant = Variant("loramoe", dropout=0.05)
    base = load_base(folder)
    model, config = variant.model(base), find_architecture(folder)
    lines = [["batch", "figure", "predicted, MiB", "measured, MiB", "error"]]
    errors: dict[str, list[float]] = {"saved": [], "peak": []}
    for batch, length in CHECKED_SHAPES:
        # The last token of an example predicts nothing.
        shape = Shape(batch, length, batch * (length - 1), torch.float32, casts_adapter=False, checkpointing=False)
        counts = count_step(config, variant.config(balances=False), shape)
        tensors = random_batch(base.config.vocab_size, batch, length) | {"return_logits": False}
        with SavedBytes(model) as saved:
            model(**tensors)
        resident = run_alone(resident_memory, partial(load_base, folder), variant, tensors)
        step_peak = resident["peak_resident"] - resident["resident_before_step"]
        for name, predicted, measured in (
            ("saved", counts.saved, saved.total),
            ("peak", counts.step_peak, step_peak),
        ):
            error = predicted / measured - 1
            errors[name].append(abs(error))
            sizes = [f"{size / 2**20:.1f}" for size in (predicted, measured)]
            lines.append([f"{batch} x {length}", FIGURES[name], *sizes, f"{error:+.1%}"])
    return lines, max(errors["saved"]), max(errors["peak"])


FIGURES = {"saved": "saved for backward", "peak": "peak of a step above the memory before it"}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        InputError: values are out of range or contradict each other; names all problems.
    """
    parser = argparse.ArgumentParser(
        prog="python -m workbench.plan",
        description="Predict memory per GPU, FLOPs and time of a training run.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, help=f"config.json, its folder, or one of {', '.join(ARCHITECTURES)}")
    add("--lora_nums", type=int, default=6, help="experts per adapted Linear")
    add("--lora_null_expert", action="store_true", help="one more router output, whose expert is zero")
    add("--lora_rank", type=int, default=4, help="rank of each expert")
    add("--lora_dropout", type=float, default=0.05, help="dropout of the experts' input; its mask takes memory")
    add("--trainable", default="auto", help="names of the adapted Linears; auto is the architecture's default")
    add("--batch", type=int, default=8, help="examples per GPU and micro-batch")
    add("--length", type=int, default=DataArguments.max_seq_length, help="tokens per example, padding included")
    add("--labelled", type=float, default=1.0, help="share of supervised tokens, in (0, 1]; the others need no logits")
    add("--dtype", choices=("bf16", "fp32"), default="bf16", help="precision of the computation; fp16 counts as bf16")
    add("--gpus", type=int, default=1, help="number of GPUs over all nodes")
    add("--zero", type=int, default=0, choices=(0, 1, 2, 3), help="ZeRO stage; 0 is DDP without DeepSpeed")
    add("--offload", default="none", choices=("none", "optimizer", "all"), help="what is kept in CPU memory")
    add("--load_in_kbits", type=int, default=16, choices=(4, 8, 16), help="4 (nf4) or 8 (int8) quantises the base")
    add("--gradient_checkpointing", action="store_true", help="recompute layers in the backward pass")
    add("--gpu", default="A100", choices=GPUS, help="GPU model, which sets TFLOP/s and memory")
    add("--peak_tflops", type=float, help="replaces the dense bf16 TFLOP/s of the data sheet")
    add("--mfu", type=float, default=MFU, help="model FLOPs utilisation: share of the peak TFLOP/s, in (0, 1]")
    add("--check", action="store_true", help="compare the counts with real steps of the model on this machine")
    add("--json", type=Path, help="also write the plan to this file")
    flags = parser.parse_args(argv)
    problems = range_problems(flags, [at_least(1, "batch", "length", "gpus")])
    problems += [
        f"--{name} is {getattr(flags, name)}, but has to be above 0 and at most 1"
        for name in ("labelled", "mfu")
        if not 0 < getattr(flags, name) <= 1
    ]
    if flags.peak_tflops is not None and not 0 < flags.peak_tflops < math.inf:
        problems.append(f"--peak_tflops is {flags.peak_tflops}, but has to be a number above 0")
    if flags.zero == 3 and flags.load_in_kbits < 16:
        problems.append(f"--load_in_kbits {flags.load_in_kbits} cannot be sharded by --zero 3; use --zero 2")
    if flags.offload == "optimizer" and flags.zero < 1:
        problems.append("--offload optimizer needs --zero 1, 2 or 3")
    if flags.offload == "all" and flags.zero < 3:
        problems.append("--offload all needs --zero 3")
    try:
        adapter_config(flags)
    except ValueError as error:
        pattern = r"\b(" + "|".join(FLAG_OF_FIELD) + r")\b"
        problems += re.sub(pattern, lambda match: FLAG_OF_FIELD[match[0]], str(error)).splitlines()
    refuse(problems)
    return flags


def main(argv: list[str] | None = None) -> None:
    """Print a plan or the check.

    Raises:
        InputError: see `parse` and `plan`.
    """
    flags = parse(argv)
    config = find_architecture(flags.model)
    if flags.trainable == "auto":
        flags.trainable = ",".join(default_targets(config.get_text_config().model_type))
    if flags.check:
        lines, *_ = check(flags.model)
        print("\n".join(f"{a:<8}  {b:<42}  {c:>14}  {d:>13}  {e:>6}" for a, b, c, d, e in lines))
        return
    result = plan(config, flags)
    if flags.json:
        try:
            flags.json.write_text(json.dumps(result, indent=1) + "\n")
        except OSError as error:
            raise InputError(f"--json {flags.json} cannot be written: {error.strerror}") from error
    print(report(result, flags))


if __name__ == "__main__":
    run_verb(main)
