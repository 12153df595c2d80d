"""Try and measure everything on one GPU in under 10 minutes, and write one report: `bash workbench/gpu_report.sh`.

The output folder gets `report.md`, the measurements as lines of JSON and the kernels of some steps in `results`, and a
log of each stage in `logs`. A stage that fails or runs out of time does not stop the others. The parts of a chain run
one after the other, chains of a group at the same time; nothing runs beside a measurement.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch

from data import InputError
from loading.command_line import at_least, range_problems, refuse, run_verb
from loading.provenance import ROOT
from scripts.fetch_base_model import DEFAULT_OUTPUT, is_complete
from workbench.architectures import ARCHITECTURES
from workbench.check_node import last_error
from workbench.gpu_tables import GIB, markdown

SECONDS = 570
LENGTH = 1024  # tokens of a row of the large run
SHARE_OF_CHECKS = 0.42  # of the time
SECONDS_TO_END = 10  # from SIGTERM to SIGKILL
LEAST_SECONDS = 10  # with fewer, no stage begins
BYTES_OF_LARGE_MODEL = 16 * 2**30


@dataclass(frozen=True)
class Stage:
    """A program and its time limit.

    Args:
        name: also that of its log.
        command: arguments; `python` as the first stands for this interpreter.
        seconds: limit.
        shown: pattern of the lines of its log that the report shows.
        variables: additional environment variables.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    shown: str
    variables: dict[str, str] = field(default_factory=dict)


Chain = list[Stage]


class Report:
    """Runs stages and notes how they end.

    Args:
        folder: gets results and logs.
        variables: environment variables of all stages.
    """

    def __init__(self, folder: Path, **variables: str):
        self.variables = variables
        self.folder, self.results, self.logs = folder, folder / "results", folder / "logs"
        for each in (self.results, self.logs):
            each.mkdir(parents=True, exist_ok=True)
        self._running: set[subprocess.Popen] = set()
        self._stopped = False

    def run(self, group: Iterable[Chain], end: float) -> None:
        """Run chains at the same time, as many as half the CPU cores, until `end` of `time.monotonic`."""
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as threads:
            try:
                list(threads.map(lambda chain: self._run_chain(chain, end), group))
            except BaseException:  # Ctrl-C, SIGTERM
                self._stopped = True
                for program in self._running.copy():
                    _end(program)
                raise

    def _run_chain(self, chain: Chain, end: float) -> None:
        for stage in chain:
            left = end - time.monotonic()
            if self._stopped or left < LEAST_SECONDS:
                self.note(stage, "LEFT OUT", 0, "no time was left")
            else:
                self._run_stage(stage, min(left, stage.seconds))

    def _run_stage(self, stage: Stage, seconds: float) -> None:
        """Run a program in its own session for at most some seconds."""
        start = time.monotonic()
        command = [sys.executable if part == "python" else part for part in stage.command]
        log = self.logs / f"{stage.name.replace(' ', '_')}.log"
        (self.results / f"{stage.name}.jsonl").unlink(missing_ok=True)  # of an earlier run
        with log.open("w") as stream:
            program = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | self.variables | stage.variables,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
            self._running.add(program)
            try:
                code: int | None = program.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
            _end(program)
            self._running.discard(program)
        text = log.read_text(errors="replace")
        if code is None:
            self.note(stage, "TIME OUT", time.monotonic() - start, f"stopped after {seconds:.0f} s")
        elif code:
            self.note(stage, "FAIL", time.monotonic() - start, last_error(text))
        else:
            shown = re.findall(f"^.*(?:{stage.shown}).*$", text, re.MULTILINE)
            self.note(stage, "PASS", time.monotonic() - start, "\n".join(shown))

    def note(self, stage: Stage, state: str, seconds: float, detail: str) -> None:
        row = {"section": "stage", "name": stage.name, "state": state, "seconds": seconds, "detail": detail[-4000:]}
        self.add("stages", row)
        last = detail.splitlines()[-1] if detail else ""
        print(f"{state:8}  {stage.name:24}  {seconds:4.0f} s  {last}"[:160], flush=True)

    def add(self, name: str, row: dict) -> None:
        with (self.results / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def write(self) -> Path:
        """Write the report of all rows. Returns its file."""
        order = {name: number for number, name in enumerate(("measure", "peers"))}
        files = sorted(self.results.glob("*.jsonl"), key=lambda file: order.get(file.stem, len(order)))
        rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        report = self.folder / "report.md"
        report.write_text(markdown(rows))
        return report


def _end(program: subprocess.Popen) -> None:
    """End what is left of a program's session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(program.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            program.wait(SECONDS_TO_END)
        os.killpg(program.pid, signal.SIGKILL)
    program.wait()


class Plan:
    """The stages.

    Args:
        flags: the command line.
        folder: the output folder.
        work: a temporary folder.
    """

    def __init__(self, flags: argparse.Namespace, folder: Path, work: Path):
        self.flags, self.folder, self.work = flags, folder, work
        self.small = DEFAULT_OUTPUT if is_complete(DEFAULT_OUTPUT) and not flags.quick else work / "small"
        in_memory = Path("/dev/shm")
        has_room = in_memory.exists() and shutil.disk_usage(in_memory).free > BYTES_OF_LARGE_MODEL
        self.large = Path(tempfile.mkdtemp(prefix="gpu_report-", dir=in_memory if has_room else work))

    def groups(self) -> list[tuple[float, list[Chain]]]:
        """Groups in order, each with the share of the time at which it has to end.

        Raises:
            InputError: a wanted stage does not exist.
        """
        found = [(0.1, [self.model()]), (SHARE_OF_CHECKS, self.checks())]
        found += [(1.0, [self.measuring()]), (1.0, [self.large_run()])]
        if not self.flags.stages:
            return found
        wanted = self.flags.stages.split(",")
        names = [stage.name for _, group in found for chain in group for stage in chain]
        if unknown := set(wanted) - {*names, "small random model"}:
            raise InputError(f"--stages: unknown: {', '.join(sorted(unknown))}; choose from {', '.join(names)}")
        return [(1.0, [[stage for stage in chain if stage.name in wanted] for chain in group]) for _, group in found]

    def model(self) -> Chain:
        """A random model in place of the small base model, if that is not here."""
        if self.small == DEFAULT_OUTPUT:
            return []
        shape = () if self.flags.quick else ("--model=SmolLM2-135M",)
        return [Stage("small random model", module("random_model", *shape, f"--output={self.small}"), 60, NOTHING)]

    def checks(self) -> list[Chain]:
        """What works. Nothing of this is timed, so the planner can run at the same time, on the CPU."""
        log, adapter = self.folder / "logs" / "check_node_full.log", f"--adapter={self.folder / 'runs' / 'main'}"
        workers = ("--numprocesses=3",) if find_spec("xdist") else ()
        tests = ("python", "-m", "pytest", "-m", "gpu", "-q", "-rA", "-p", "no:cacheprovider", *workers)
        prompt = ("--prompt=Question: What is the capital of Kenya?", "--compare_base")
        evaluation = ("--base", "--metrics=lm_loss", f"--output={self.folder / 'evaluation.json'}")
        return [
            [Stage("check_node", module("check_node", f"--log={log}"), 240, "^PASS|^FAIL|^SKIP|passed")],
            [
                self.job("main", 240, "^held-out|^world"),
                Stage("generate", ("python", "-m", "scripts.generate", adapter, *prompt), 90, ANSWERS),
                Stage("evaluate", ("python", "-m", "scripts.evaluate", adapter, *evaluation), 90, "^adapter|^base"),
            ],
            [Stage("pytest -m gpu", tests, 200, "^PASSED|^FAILED|^ERROR|passed|failed|skipped|error")],
            *([self.job(name, 150, "^{'loss'", *FEW_STEPS, **variables)] for name, variables in SHORT_JOBS.items()),
            [self.job("null expert and KL", 150, "^{'loss'", *FEW_STEPS, "--lora_null_expert=true", "--kl_weight=0.1")],
            [self.benchmark("planner", 240, "planner", **NO_GPU)],
            [Stage("plan of the large run", self.plan_of_large_run(), 240, "peak|per step", NO_GPU)],
        ]

    def measuring(self) -> Chain:
        """The peers, then steps and decoding, of which a lack of time takes the last rows alone."""
        left = self.flags.seconds * (1 if self.flags.stages else 1 - SHARE_OF_CHECKS)
        kernels = [f"--kernels={self.flags.kernels}"] if self.flags.kernels else []
        return [
            self.benchmark("peers", 100, "peers", f"--seconds={left / 7:.0f}"),
            self.benchmark("measure", 300, "ceilings,grid,decode", f"--seconds={left / 2:.0f}", *kernels),
        ]

    def large_run(self) -> Chain:
        """train.py at the shapes of the large model, as users start it."""
        shape = () if self.flags.quick else (f"--model={self.flags.model}",)
        variables = {"pretrained_model": self.large, "dataset_dir": self.large / "rows.json", "lora_nums": 8}
        variables |= {"per_device_train_batch_size": 2 if self.flags.quick else 4, "knowledge_probe": "none"}
        steps = 2 if self.flags.quick else 30
        flags = (f"--max_steps={steps}", "--logging_steps=5", "--save_strategy=no", "--num_train_epochs=9")
        return [
            Stage("large random model", module("random_model", *shape, f"--output={self.large}"), 90, NOTHING),
            self.job("large", 150, "^{'loss'", *flags, **variables),
        ]

    def plan_of_large_run(self) -> tuple[str, ...]:
        settings = ("--lora_nums=8", "--zero=2", "--gpu=H100", f"--json={self.folder / 'plan.json'}")
        return module("plan", "--model", self.flags.model, "--batch=4", f"--length={LENGTH}", *settings)

    def job(self, name: str, seconds: float, shown: str, *flags: str, **variables: object) -> Stage:
        """The main job, as users call it, on the small base model."""
        values = {"pretrained_model": self.small, "output_dir": self.folder / "runs", "exp_name": name} | variables
        values |= {"LORAMOE_PYTHON": sys.executable}
        flags = ("--restart=true", f"--data_cache_dir={self.work / 'cache'}", *flags)
        command = ("bash", "run_loramoe.sh", *flags, *(QUICK_JOB if self.flags.quick else ()))
        return Stage(name, command, seconds, shown, {key: str(value) for key, value in values.items()})

    def benchmark(self, name: str, seconds: float, sections: str, *flags: str, **variables: str) -> Stage:
        shape = ("--quick",) if self.flags.quick else (f"--model={self.flags.model}", "--rounds=7")
        lines = f"--lines={self.folder / 'results' / name}.jsonl"
        command = module("benchmark", "--random", *shape, f"--sections={sections}", lines, *flags)
        return Stage(name, command, seconds, "rounds: |left out", variables)


NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
ANSWERS = r"^(?!Loading|\[transformers\])."
NOTHING = "(?!)"  # a pattern that matches nowhere
QUICK_JOB = ("--max_steps=2", "--max_seq_length=64")
FEW_STEPS = ("--max_steps=3", "--logging_steps=1", "--knowledge_probe=none")
SHORT_JOBS: dict[str, dict[str, object]] = {
    "nf4": {"load_in_kbits": 4, "validation_file": ""},
    "int8": {"load_in_kbits": 8, "validation_file": ""},
    "offload": {"deepspeed_config_file": "scripts/deepspeed/zero3_offload.json", "validation_file": ""},
    "checkpointing": {"deepspeed_config_file": "", "gradient_checkpointing": "true", "validation_file": ""},
    "packing": {"packing": "true"},
    "packing nf4": {"packing": "true", "load_in_kbits": 4},
    "packing int8": {"packing": "true", "load_in_kbits": 8},
}


def module(name: str, *flags: str) -> tuple[str, ...]:
    """The command of a program of the workbench."""
    return ("python", "-m", f"workbench.{name}", *flags)


def training_row(folder: Path) -> dict | None:
    """Speed and memory of the large run by its last log line, and what the planner says of it; None without a run."""
    state, plan = folder / "runs" / "large" / "trainer_state.json", folder / "plan.json"
    if not state.exists():
        return None
    found = [entry for entry in json.loads(state.read_text())["log_history"] if "tokens_per_second" in entry]
    names = ("tokens_per_second", "peak_memory_gib", "mfu")
    row = {"section": "train"} | {name: found[-1][name] for name in names if name in found[-1]}
    if plan.exists():
        planned = json.loads(plan.read_text())
        tokens = planned["samples_per_step"] * LENGTH / planned["seconds_per_step"]
        row |= {"planned_tokens_per_second": tokens, "planned_peak_memory_gib": planned["peak_per_gpu"] / GIB}
    return row


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        InputError: a number is out of range.
    """
    parser = argparse.ArgumentParser(
        prog="bash workbench/gpu_report.sh", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("outputs/gpu_report"), help="folder (default: %(default)s)")
    add("--seconds", type=int, default=SECONDS, help="after which nothing runs (default: %(default)s)")
    add("--model", choices=ARCHITECTURES, default="Llama-2-7B", help="shapes to measure at (default: %(default)s)")
    add("--kernels", help="values of LORAMOE_KERNELS to compare: torch,triton")
    add("--stages", help="names of the stages to run, separated by commas; results of others in the folder are kept")
    add("--quick", action="store_true", help="rehearse with tiny shapes, also on a CPU")
    add("--rewrite", action="store_true", help="only write report.md again from the results in the folder")
    flags = parser.parse_args(argv)
    refuse(range_problems(flags, [at_least(30, "seconds")]))
    return flags


def main(argv: list[str] | None = None) -> None:
    """Run the stages and write the report.

    Raises:
        InputError: there is no GPU, or see `parse`.
    """
    flags = parse(argv)
    start = time.monotonic()
    if flags.rewrite:
        print(Report(flags.output).write())
        return
    if not torch.cuda.device_count() and not flags.quick:
        raise InputError("torch sees no GPU here; --quick rehearses the report on a CPU, with tiny shapes")
    folder = flags.output.resolve()
    one_gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    report = Report(folder, CUDA_VISIBLE_DEVICES=one_gpu, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    with tempfile.TemporaryDirectory(prefix="gpu_report-") as work:
        plan = Plan(flags, folder, Path(work))
        try:
            for share, group in plan.groups():
                report.run(group, start + share * flags.seconds)
        finally:
            shutil.rmtree(plan.large)
    if row := training_row(folder):
        report.add("large", row)
    print(report.write())


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    run_verb(main)
