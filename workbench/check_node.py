"""Check a node before its first long run: `bash workbench/check_node.sh`.

Every way of training is tried on a tiny model, with one process per GPU, or two on a CPU. Each check prints one line:
PASS, FAIL (with the first line of the error) or SKIPPED (with the reason). The last line counts them. The exit code is
1 if a check failed. `workbench/node_checks.py` has the checks.

Imports take most of the time, so a launch runs many checks in turn. A check that fails, crashes or hangs ends its
launch, and another launch runs the remaining checks.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from loading.provenance import ROOT
from workbench.processes import torchrun

SECONDS_OF_A_LAUNCH = 240
# torchrun gives its workers 30 seconds to exit before it kills them.
SECONDS_TO_END = 45


@dataclass(frozen=True)
class Launch:
    """Checks that share their processes.

    Args:
        checks: names of the checks, keys of `workbench.node_checks.CHECKS`, in order.
        distributed: one process per device, under torchrun; otherwise a single process without a GPU.
    """

    checks: tuple[str, ...]
    distributed: bool = True


@dataclass(frozen=True)
class Outcome:
    """The outcome of a check: state is PASS, FAIL or SKIPPED; detail has the finding or the reason."""

    check: str
    state: str
    detail: str

    def __str__(self) -> str:
        return f"{self.state:7}  {self.check:30}  {self.detail}"


PLAN = (
    Launch(("one process on the CPU",), distributed=False),
    Launch((
        "devices", "all-reduce", "attention", "experts", "DDP", "activation checkpointing", "bf16", "fp16", "nf4",
        "int8", "save and reload", "resume",
    )),
    Launch((
        "ZeRO-2", "ZeRO-2, half precision", "ZeRO-2, resume",
        "ZeRO-3", "ZeRO-3, half precision", "ZeRO-3, resume",
        "ZeRO-3 offload", "ZeRO-3 offload, half precision", "ZeRO-3 offload, resume",
    )),
)  # fmt: skip
# If one of these fails, every later check would fail for the same reason.
FOUNDATIONS = ("one process on the CPU", "all-reduce")


def main() -> int:
    """Run all checks. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="bash workbench/check_node.sh", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--log",
        type=Path,
        default=Path("outputs/check_node.log"),
        help="file for the full log if a check fails (default: %(default)s)",
    )
    log = parser.parse_args().log
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    start = time.monotonic()
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="check_node-") as folder:
        try:
            for outcome in make_checks(Path(folder), PLAN, number_of_processes()):
                shown = f" (full log: {log})" if outcome.state == "FAIL" else ""
                print(f"{outcome}{shown}", flush=True)
                outcomes.append(outcome)
        finally:
            if any(outcome.state == "FAIL" for outcome in outcomes):
                log.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(folder) / "log", log)
    print(summary(outcomes, time.monotonic() - start))
    return int(any(outcome.state == "FAIL" for outcome in outcomes))


def number_of_processes() -> int:
    """One per visible GPU; two on a CPU, so that gradients are synchronised there, too."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 2


def summary(outcomes: list[Outcome], seconds: float) -> str:
    counts = Counter(outcome.state for outcome in outcomes)
    return f"{counts['PASS']} passed, {counts['FAIL']} failed, {counts['SKIPPED']} skipped in {seconds:.0f} s"


def make_checks(folder: Path, plan: tuple[Launch, ...], processes: int) -> Iterator[Outcome]:
    """Run the checks of a plan in order; yields their outcomes after each launch."""
    missing = None
    for launch in plan:
        left = list(launch.checks)
        while left:
            if missing:
                done = [Outcome(check, "SKIPPED", f"needs {missing!r}, which failed") for check in left]
            else:
                done = make_launch(folder, left, processes, launch.distributed)
            yield from done
            left = left[len(done) :]
            if done[-1].state == "FAIL" and done[-1].check in FOUNDATIONS:
                missing = done[-1].check


def make_launch(folder: Path, checks: list[str], processes: int, distributed: bool) -> list[Outcome]:
    """Start processes that run the checks in turn. Returns the outcomes up to the first failure, or all of them."""
    for file in folder.glob("outcomes-*"):
        file.unlink()
    size = processes if distributed else 1
    program = ("-m", "workbench.node_checks", str(folder), str(processes), *checks)
    command = torchrun(size, *program) if distributed else [sys.executable, *program]
    variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    variables["TMPDIR"] = str(folder)  # torchrun leaves a folder there
    if not distributed:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    if not (distributed and torch.cuda.is_available()):
        variables["DS_ACCELERATOR"] = "cpu"
    with (folder / "log").open("a+") as log:
        print(f"===== {', '.join(checks)}", file=log, flush=True)
        begin = log.tell()
        code = run_program(command, os.environ | variables, log)
        log.seek(begin)
        reason = f"still running after {SECONDS_OF_A_LAUNCH} s" if code is None else last_error(log.read())
    outcomes = collect_outcomes(folder, checks, size, reason)
    if code != 0 and outcomes[-1].state != "FAIL":
        outcomes[-1] = Outcome(outcomes[-1].check, "FAIL", f"passed, but then: {reason}")
    return outcomes


def run_program(command: list[str], variables: dict[str, str], log) -> int | None:
    """Run a program with its output in the log. Returns its exit code, or None if it took too long and was stopped."""
    program = subprocess.Popen(command, cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        return program.wait(SECONDS_OF_A_LAUNCH)
    except subprocess.TimeoutExpired:
        return None
    finally:
        program.terminate()  # does nothing if the program has exited
        try:
            program.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            program.kill()
            program.wait()


def last_error(log: str) -> str:
    """The last error in the log of a process that ended without reporting it."""
    found = re.findall(r"^.*?((?:\w+\.)*\w*Error: .*|Signal \d+ \(\w+\) .*)$", log, re.MULTILINE)
    return found[-1] if found else "the process ended without a message"


def collect_outcomes(folder: Path, checks: list[str], processes: int, reason: str) -> list[Outcome]:
    """Merge the outcomes that the processes wrote, up to the first check that failed or has no outcome.

    Args:
        reason: why the processes ended, for a check without an outcome from every process.
    """
    records = [json.loads(line) for file in folder.glob("outcomes-*") for line in file.read_text().splitlines()]
    outcomes = []
    for check in checks:
        own = sorted((record for record in records if record["check"] == check), key=lambda record: record["time"])
        failed = [record for record in own if record["state"] == "FAIL"]
        if failed:
            # The other processes fail later, because this one is gone.
            outcomes.append(Outcome(check, "FAIL", failed[0]["detail"]))
        elif len(own) < processes:
            outcomes.append(Outcome(check, "FAIL", reason))
        else:
            outcomes.append(Outcome(check, own[0]["state"], own[0]["detail"]))
        if outcomes[-1].state == "FAIL":
            break
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
