"""The checks of a node. `workbench.check_node` starts this, under torchrun for several processes:

    python -m workbench.node_checks FOLDER PROCESSES CHECK...

Each check that trains calls `train.main` with flags, as a user's run does. Each process appends a line of JSON to
FOLDER/outcomes-RANK for every check. It exits after a failure, since the other processes would wait for it forever.
"""

import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

import train
from loading.arguments import parse_arguments
from loading.base_model import build_model
from peft import LoraConfig, LoraLayer, TaskType, get_peft_model
from training.checkpoint import find_checkpoint
from training.ending import run_process
from workbench.processes import as_flags
from workbench.tiny_model import make_tiny_model, write_rows

ROWS_OF_A_PROCESS = 2
# Plain SGD with a huge rate: every tensor changes by its gradient times the rate, to float32 accuracy.
RATE = 1e4
# Relative L2 norm. Float32 sums in another order differ by 1e-7 to 1e-6; with TF32, which is off, by 1e-3.
TOLERANCE = 1e-4
HALF_TOLERANCE = 2e-2  # of one adapted Linear in bf16 or fp16
EXPERTS: dict[str, Any] = {"lora_nums": 4, "lora_alpha": 4, "lora_dropout": 0}
DEEPSPEED_FILES = {
    "ZeRO-2": "scripts/deepspeed/zero2.json",
    "ZeRO-3": "scripts/deepspeed/zero3.json",
    "ZeRO-3 offload": "scripts/deepspeed/zero3_offload.json",
}


class SkipError(Exception):
    """The check does not apply to this node; the message says why."""


class Node:
    """The processes on this node and the tiny model that they train.

    Args:
        folder: holds the model, the rows and every run; shared by all processes.
        processes: number of processes of distributed runs.
    """

    def __init__(self, folder: Path, processes: int):
        self.folder = folder
        self.processes = processes
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.on_gpu = torch.cuda.is_available()

    @property
    def half(self) -> str:
        """The half precision that `run_loramoe.sh` chooses here."""
        return "bf16" if not self.on_gpu or torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"

    def flags(self, run: str, **changes) -> list[str]:
        """Flags of `train.py` for a run with this name."""
        values = EXPERTS | {
            "model_name_or_path": self.folder / "model",
            "peft_path": self.folder / "adapter",
            "dataset_dir": self.folder / "rows.json",
            "data_cache_dir": self.folder / "cache",
            "output_dir": self.folder / run,
            "lora_rank": 2,
            "blc_weight": 1,
            "per_device_train_batch_size": ROWS_OF_A_PROCESS * self.processes // self.size,
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "max_steps": 3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "knowledge_probe": "none",
            "num_processes": self.size,
            "ddp_timeout": 120,
            "use_cpu": not self.on_gpu,
        }
        return as_flags(**values | changes)

    def train(self, run: str, **changes) -> Path:
        """Run `train.py` to its end on all processes. Returns the run's folder."""
        train.main(self.flags(run, **changes))
        self.wait()
        return self.folder / run

    def wait(self) -> None:
        if dist.is_initialized():
            dist.barrier()

    def write(self, check: str, state: str, detail: str) -> None:
        """Append an outcome to this process's file."""
        record = {"check": check, "state": state, "detail": detail, "time": time.time()}
        with (self.folder / f"outcomes-{self.rank}").open("a") as file:
            file.write(json.dumps(record) + "\n")


def make_material(folder: Path, rows: int) -> None:
    """Write a tiny random Llama, its tokenizer, an adapter without zeros, and rows."""
    model = make_tiny_model(folder / "model")
    adapted = get_peft_model(model, LoraConfig(task_type=TaskType.CAUSAL_LM, r=2, **EXPERTS))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder / "adapter")
    write_rows(folder / "rows.json", rows)


def check_one_process(node: Node) -> str:
    """Make the model and data of the other checks, and the run that they are compared with."""
    make_material(node.folder, ROWS_OF_A_PROCESS * node.processes)
    gradients, loss = one_step(node, "reference")
    zeros = [key for key, tensor in gradients.items() if not tensor.norm() > 0]
    if zeros:
        raise ValueError(f"no gradient reached {', '.join(zeros)}")
    return f"loss {loss:.4f}, gradients of {len(gradients)} tensors: reference for the others"


def check_devices(node: Node) -> str:
    packages = ("torch", "transformers", "deepspeed", "bitsandbytes")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    if not node.on_gpu:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        hardware = f"no GPU; {os.cpu_count()} CPU cores, {memory:.0f} GiB of memory"
    else:
        found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        kinds = Counter(f"{device.name} ({device.total_memory / 2**30:.0f} GiB)" for device in found)
        hardware = f"{', '.join(f'{count} x {kind}' for kind, count in kinds.items())}; {driver_version()}"
    return f"{hardware}; Python {platform.python_version()}, {versions}"


def driver_version() -> str:
    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    if not shutil.which("nvidia-smi"):
        return runtime
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    driver = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    return f"driver {driver}, {runtime}"


def check_all_reduce(node: Node) -> str:
    """Sum a megabyte of each process's number over the process group that a run would use."""
    device = parse_arguments(node.flags("all-reduce"))[2].device
    values = torch.full((2**18,), node.rank + 1.0, device=device)
    dist.all_reduce(values)
    expected = node.size * (node.size + 1) / 2
    if not (values == expected).all():
        raise ValueError(f"the sum is {values.min().item():g} to {values.max().item():g} instead of {expected:g}")
    return f"{dist.get_backend()}, processes: {node.size}"


def check_attention(node: Node) -> str:
    model_args, _, args = parse_arguments(node.flags("attention", **{node.half: True}))
    return f"{build_model(model_args, args).config._attn_implementation} for {node.half}"


def check_experts(node: Node) -> str:
    """Compare output and gradients of one adapted Linear with float64: 8 experts, and one with dropout."""
    device = parse_arguments(node.flags("experts"))[2].device
    half = torch.bfloat16 if node.half == "bf16" else torch.float16
    found = []
    for dtype, tolerance in ((torch.float32, TOLERANCE), (half, HALF_TOLERANCE)):
        errors = experts_errors(device, dtype, 8, 0.0) | experts_errors(device, dtype, 1, 0.1)
        worst = max(errors, key=errors.__getitem__)
        found.append(f"{errors[worst]:.0e} ({worst} in {str(dtype).removeprefix('torch.')})")
        if not errors[worst] <= tolerance:
            raise ValueError(f"differ from float64 by {found[-1]}; the limit is {tolerance:.0e}")
    return f"differ from float64 by {', '.join(found)}"


def experts_errors(device: torch.device, dtype: torch.dtype, experts: int, dropout: float) -> dict[str, float]:
    """Relative L2 distances of output and gradients to float64.

    With dropout there is one expert and the frozen weight is zero: the input's gradient then shows what was dropped.

    Raises:
        ValueError: another share of the input was dropped.
    """
    torch.manual_seed(1)
    layer = LoraLayer(torch.nn.Linear(512, 768, bias=False).requires_grad_(False))
    layer.add_adapter("default", LoraConfig(r=4, lora_alpha=8, lora_nums=experts, lora_dropout=dropout))
    layer.active_adapter = "default"
    layer.weight.data *= not dropout
    own = layer.experts["default"]
    torch.nn.init.normal_(own.lora_B, std=0.1)
    layer.to(device, dtype).train()
    x_BTI = torch.randn(2, 128, 512).to(device, dtype).requires_grad_()
    gradient_BTO = torch.randn(2, 128, 768).to(device, dtype)
    output_BTO = layer(x_BTI)
    output_BTO.backward(gradient_BTO)

    assert x_BTI.grad is not None
    kept_BTI = x_BTI.grad != 0 if dropout else torch.ones_like(x_BTI)
    share = kept_BTI.double().mean().item()
    if not abs(share - (1 - dropout)) <= 5 * math.sqrt(dropout * (1 - dropout) / x_BTI.numel()):
        raise ValueError(f"a dropout of {dropout} keeps {share:.4f} of the input")
    exact = {name: parameter.detach().double().requires_grad_() for name, parameter in own.named_parameters()}
    exact_BTI = x_BTI.detach().double().requires_grad_()
    hidden = kept_BTI * exact_BTI / (1 - dropout) @ exact["lora_A"].T
    if experts > 1:
        weights_BTE = torch.softmax(exact_BTI @ exact["router.weight"].T, dim=-1)
        hidden = hidden * weights_BTE.repeat_interleave(own.rank, dim=-1)
    expected_BTO = exact_BTI @ layer.weight.double().T + own.scaling * hidden @ exact["lora_B"].T
    expected_BTO.backward(gradient_BTO.double())
    pairs = {"output": (output_BTO, expected_BTO), "gradient of x": (x_BTI.grad, exact_BTI.grad)}
    pairs |= {f"gradient of {name}": (p.grad, exact[name].grad) for name, p in own.named_parameters()}
    return {name: relative_distance(ours.double(), theirs) for name, (ours, theirs) in pairs.items()}


def check_gradients(node: Node, run: str, **changes) -> str:
    """Compare the loss and all adapter gradients of a float32 step with those of one process on the CPU."""
    gradients, loss = one_step(node, run, **changes)
    expected, expected_loss = step_outcome(node, "reference")
    difference = abs(loss / expected_loss - 1)
    distances = {key: relative_distance(gradients[key], tensor) for key, tensor in expected.items()}
    worst = max(distances, key=distances.__getitem__)
    found = f"differs from one CPU process by {difference:.0e} (loss), {distances[worst]:.0e} (gradients)"
    if not (difference <= TOLERANCE and distances[worst] <= TOLERANCE):
        raise ValueError(f"{found}, most in {worst}; the limit is {TOLERANCE:.0e}")
    return found


def one_step(node: Node, run: str, **changes) -> tuple[dict[str, torch.Tensor], float]:
    step = {"optim": "sgd", "learning_rate": RATE, "lr_scheduler_type": "constant", "max_grad_norm": 0, "max_steps": 1}
    node.train(run, **step | changes)
    return step_outcome(node, run)


def step_outcome(node: Node, run: str) -> tuple[dict[str, torch.Tensor], float]:
    """Gradients and loss of a run of `one_step`."""
    start, end = adapter_weights(node.folder / "adapter"), adapter_weights(node.folder / run)
    return {key: (start[key] - end[key]) / RATE for key in start}, logged(node.folder / run, "loss")[0]


def train_adapter(node: Node, run: str, **changes) -> str:
    """Train some steps with AdamW, evaluate and generate: the adapter has to change and stay finite."""
    folder = node.train(run, validation_file=node.folder / "rows.json", **changes)
    start, end = adapter_weights(node.folder / "adapter"), adapter_weights(folder)
    bad = [key for key in start if not end[key].isfinite().all() or torch.equal(start[key], end[key])]
    if bad:
        raise ValueError(f"not finite, or unchanged by the training: {', '.join(bad)}")
    losses = logged(folder, "lm_loss")
    return f"LM loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps"


def check_half(node: Node, run: str, half: str | None = None, **changes) -> str:
    """Train in bf16 or fp16; by default in the one that `run_loramoe.sh` chooses."""
    half = half or node.half
    if half == "fp16" and not node.on_gpu:
        raise SkipError("fp16 needs a GPU")
    if half == "bf16" and node.half == "fp16":
        raise SkipError("this GPU has no bf16")
    # More steps than elsewhere, since fp16 skips the first ones until its loss scale fits.
    return f"{half}: {train_adapter(node, run, **{half: True}, max_steps=8, **changes)}"


def check_reload(node: Node) -> str:
    """Start a second run from the adapter of a first: its first evaluation has to repeat the last of the first run."""
    settings = {"validation_file": node.folder / "rows.json"}
    first = node.train("saved", **settings)
    second = node.train("reloaded", **settings, peft_path=first, learning_rate=0, max_steps=1)
    after, before = results(first)["eval_lm_loss_after"], results(second)["eval_lm_loss_before"]
    if not math.isclose(after, before, rel_tol=TOLERANCE):
        raise ValueError(f"held-out LM loss {after:.6f} before saving, {before:.6f} after loading")
    tensors, again = adapter_weights(first), adapter_weights(second)
    if not all(torch.equal(tensors[key], again[key]) for key in tensors):
        raise ValueError("the adapter changed while it was loaded and saved")
    return f"held-out LM loss {after:.4f} before saving, {before:.4f} after loading"


def check_resume(node: Node, run: str, **changes) -> str:
    """Remove the results of a finished run, with dropout, and resume it from its second checkpoint."""
    settings = {"save_strategy": "steps", "save_steps": 1, "lora_dropout": 0.1, **changes}
    folder = node.train(run, **settings)
    expected = adapter_weights(folder)
    node.wait()
    if node.rank == 0:
        shutil.rmtree(folder / "checkpoint-3")
        for name in ("all_results.json", "adapter_model.safetensors"):
            (folder / name).unlink()
    node.wait()
    checkpoint, incomplete = find_checkpoint(folder)
    if checkpoint is None or checkpoint.name != "checkpoint-2":
        raise ValueError(f"the run would resume from {checkpoint} instead of checkpoint-2 {' '.join(incomplete)}")
    node.wait()
    node.train(run, **settings)
    found = adapter_weights(folder)
    distance = max(relative_distance(found[key], expected[key]) for key in expected)
    if not distance <= TOLERANCE:
        raise ValueError(f"the resumed run's adapter differs from the uninterrupted one's by {distance:.0e}")
    return "bit-identical" if distance == 0 else f"the adapter differs from an uninterrupted run's by {distance:.0e}"


def relative_distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 distance; NaN becomes infinity, so that it is the largest of several distances."""
    return ((found - expected).norm() / expected.norm()).nan_to_num(nan=math.inf).item()


def adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {key: tensor.double() for key, tensor in tensors.items()}


def logged(folder: Path, name: str) -> list[float]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in log if name in entry]


def results(folder: Path) -> dict:
    return json.loads((folder / "all_results.json").read_text())


CHECKS: dict[str, Callable[[Node], str]] = {
    "one process on the CPU": check_one_process,
    "devices": check_devices,
    "all-reduce": check_all_reduce,
    "attention": check_attention,
    "experts": check_experts,
    "DDP": partial(check_gradients, run="ddp"),
    "activation checkpointing": partial(check_gradients, run="checkpointing", activation_checkpointing=True),
    "bf16": partial(check_half, run="bf16", half="bf16"),
    "fp16": partial(check_half, run="fp16", half="fp16"),
    "nf4": partial(check_half, run="nf4", load_in_kbits=4),
    "int8": partial(check_half, run="int8", load_in_kbits=8),
    "save and reload": check_reload,
    "resume": partial(check_resume, run="resume"),
}
for _name, _file in DEEPSPEED_FILES.items():
    CHECKS[_name] = partial(check_gradients, run=_name, deepspeed=_file)
    CHECKS[f"{_name}, half precision"] = partial(check_half, run=f"{_name} half", deepspeed=_file)
    CHECKS[f"{_name}, resume"] = partial(check_resume, run=f"{_name} resume", deepspeed=_file)


def main() -> None:
    folder, processes, *checks = sys.argv[1:]
    node = Node(Path(folder), int(processes))
    for check in checks:
        print(f"===== {check}", flush=True)
        try:
            node.write(check, "PASS", CHECKS[check](node))
        except SkipError as reason:
            node.write(check, "SKIPPED", str(reason))
        except Exception as error:
            node.write(check, "FAIL", f"{type(error).__name__}: {error}".splitlines()[0])
            raise


if __name__ == "__main__":
    run_process(main)
