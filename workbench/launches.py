"""Run and end tiny runs of two processes in every possible way, and check that each ends as expected.

    bash workbench/soak.sh --launches 200

A run succeeds; or an error occurs on one rank, or SIGTERM arrives on one or all: while the model is built, in a
training step, in an evaluation, in a save; under DDP, ZeRO-2 and ZeRO-3. Faults are a hang (processes still alive
LONGEST_END seconds after the event), an abort (an unexpected signal or exit code) and a missing message, checkpoint or
result.

Imports take most of the time of such a run. So this process imports everything once, without starting a thread, and
forks the processes of a run, which execute `train.py` as a program, from its arguments to its last `os._exit` or to the
end of Python itself. Another fork stands in for torchrun: it hosts the store and, like torchrun, ends the remaining
ranks once one has failed. Every tenth run is started by torchrun, in new processes.
"""

import faulthandler
import json
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

from data import InputError
from training.checkpoint import find_checkpoint
from workbench.processes import torchrun
from workbench.tiny_model import tiny_run

PROCESSES = 2
LONGEST_END = 30  # seconds from the event to the end of all processes
LONGEST_RUN = 240  # seconds until the event
GRACE = 30  # seconds that torchrun gives the ranks that it ends
POLL = 0.02  # seconds
EVERY = 10  # one of this many runs is started by torchrun
SAID = "injected by the soak test"
REGIMES = {"DDP": None, "ZeRO-2": "scripts/deepspeed/zero2.json", "ZeRO-3": "scripts/deepspeed/zero3.json"}
TRAINER = "training.trainer:LoRAMoETrainer"
# The function before whose call the event happens, and the possible numbers of finished optimizer steps.
PLACES = {
    "model build": ("loading.base_model", "build_model", (0,)),
    "training step": (TRAINER, "training_step", (0, 1, 2, 3)),
    "evaluation": (TRAINER, "prediction_step", (0, 2, 4)),
    "save": (TRAINER, "_save_rng_state", (2, 4)),
}
ERRORS = {"error": RuntimeError, "bad input": InputError}
ENDS = [("well", "end")] * 3 + [(kind, place) for kind in (*ERRORS, "SIGTERM") for place in PLACES]


@dataclass(frozen=True)
class Launch:
    """A run and what happens to it.

    Args:
        regime: a key of REGIMES.
        kind: `well`, a key of ERRORS, or `SIGTERM`.
        place: a key of PLACES, or `end`.
        step: least number of finished optimizer steps when it happens.
        ranks: ranks on which it happens.
        by_torchrun: torchrun starts the run.
    """

    regime: str
    kind: str
    place: str
    step: int
    ranks: tuple[int, ...]
    by_torchrun: bool

    def __str__(self) -> str:
        where = f" in {self.place} after step {self.step} on rank {', '.join(map(str, self.ranks))}"
        by = ", by torchrun" if self.by_torchrun else ""
        return f"{self.regime}, {self.kind}{where if self.kind != 'well' else ''}{by}"


@dataclass
class Outcome:
    """The end of a run.

    Args:
        codes: exit codes, negative for signals: by rank, or torchrun's followed by those that it reports.
        seconds: from the event to the end of the last process; None without an event.
        hung: the run had to be killed.
        said: stdout and stderr of all processes.
    """

    codes: list[int]
    seconds: float | None
    hung: bool
    said: str


def plan(count: int, seed: int) -> list[Launch]:
    """Draw launches in which every end occurs in every regime about equally often."""
    chance = random.Random(seed)
    cases: list[tuple[str, str, str]] = []
    while len(cases) < count:
        some = [(regime, *end) for regime in REGIMES for end in ENDS]
        cases += chance.sample(some, len(some))
    launches = []
    for number, (regime, kind, place) in enumerate(cases[:count]):
        step = chance.choice(PLACES[place][2]) if place in PLACES else 0
        one = (chance.randrange(PROCESSES),)
        ranks = one if kind in ERRORS or chance.random() < 0.5 else tuple(range(PROCESSES))
        launches.append(Launch(regime, kind, place, step, ranks, by_torchrun=number % EVERY == 0))
    return launches


def faults(launch: Launch, outcome: Outcome, folder: Path) -> list[str]:
    """Describe each fault of a run; `folder` is the run's."""
    found = ["a hang"] * outcome.hung
    if outcome.seconds is None:
        found.append("the event never happened")
    allowed = {1, -signal.SIGTERM} if launch.kind in ERRORS else {0}
    if not outcome.hung and (wrong := [code for code in outcome.codes if code not in allowed]):
        found.append(f"exit codes {wrong}")
    if launch.kind in ERRORS and 1 not in outcome.codes:
        found.append("no process failed")
    message = {"well": "LoRAMoE run finished", "SIGTERM": "stopped by a signal"}.get(launch.kind, SAID)
    if message not in outcome.said:
        found.append(f"missing message '{message}'")
    if (folder / "all_results.json").exists() != (launch.kind == "well"):
        found.append("results are missing" if launch.kind == "well" else "unexpected results")
    checkpoint, incomplete = find_checkpoint(folder)
    saved = launch.kind == "SIGTERM" and (launch.place == "training step" or launch.step > 0)
    if incomplete or (saved and not checkpoint):
        found.append("a checkpoint is missing or incomplete")
    return found


class Launches:
    """Launches and their outcomes.

    Args:
        count: number of launches.
        seed: random seed of the order and the moments.
        model: folder of the base model.
        folder: contains `rows.json`; the runs are put there.
    """

    def __init__(self, count: int, seed: int, model: Path, folder: Path):
        self.launches, self.model, self.folder = plan(count, seed), model, folder
        self.outcomes: dict[Launch, list[tuple[Outcome, list[str]]]] = {}

    def run(self) -> bool:
        """Run all launches one after the other and print a table. Returns True if there was no fault."""
        load_program()
        start = time.monotonic()
        for number, launch in enumerate(self.launches, start=1):
            output = self.folder / f"launch-{number}"
            outcome = (by_torchrun if launch.by_torchrun else by_fork)(launch, self.flags(launch, output), output)
            found = faults(launch, outcome, output)
            self.outcomes.setdefault(launch, []).append((outcome, found))
            seconds = "no event" if outcome.seconds is None else f"{outcome.seconds:4.1f} s"
            print(f"{number:3} of {len(self.launches)}: {seconds}  {launch}", *found, sep="; ", flush=True)
            if found:
                print(f"  {output}.log ends with\n{outcome.said[-3000:]}", flush=True)
            else:
                shutil.rmtree(output, ignore_errors=True)
        print(*self.table(), f"{len(self.launches)} launches in {time.monotonic() - start:.0f} s", sep="\n")
        return not any(found for outcomes in self.outcomes.values() for _, found in outcomes)

    def flags(self, launch: Launch, output: Path) -> list[str]:
        config = REGIMES[launch.regime]
        return tiny_run(
            self.folder,
            self.model,
            output,
            validation_file=self.folder / "rows.json",
            data_cache_dir=self.folder / "cache",
            per_device_train_batch_size=2,
            max_steps=4,
            eval_strategy="steps",
            eval_steps=2,
            save_steps=2,
            **({"deepspeed": config} if config else {}),
        )

    def table(self) -> list[str]:
        """One line per end: launches, hangs, other faults and the longest time from the event to the end."""
        lines = [f"{'':24} launches  hangs  other faults  slowest end"]
        for kind, place in dict.fromkeys(ENDS):
            of_end = [
                pair
                for launch, pairs in self.outcomes.items()
                if (launch.kind, launch.place) == (kind, place)
                for pair in pairs
            ]
            hangs = sum(outcome.hung for outcome, _ in of_end)
            others = sum(bool(found) and not outcome.hung for outcome, found in of_end)
            slowest = max((outcome.seconds or 0 for outcome, _ in of_end), default=0)
            lines.append(f"{f'{kind}, {place}':24} {len(of_end):8} {hangs:6} {others:13} {slowest:10.1f} s")
        return lines


def load_program() -> None:
    """Import everything that a run imports.

    Raises:
        RuntimeError: a thread was started, so that forks of this process could deadlock.
    """
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    for name in ("train", "deepspeed", "matplotlib.figure", "torch.utils.tensorboard", "transformers.models.llama"):
        import_module(name)
    threads = [(thread / "comm").read_text().strip() for thread in Path("/proc/self/task").iterdir()]
    # The thread of Arrow's allocator is harmless, since it handles forks.
    if len([name for name in threads if name != "jemalloc_bg_thd"]) > 1:
        raise RuntimeError(f"the process to be forked has other threads: {', '.join(threads)}")


def live(launch: Launch, flags: list[str], event: Path) -> None:
    """Execute train.py as a program in this process, with the event of the launch."""
    faulthandler.enable()
    if launch.place in PLACES and int(os.environ["RANK"]) in launch.ranks:
        where, name, _ = PLACES[launch.place]
        module, _, kind = where.partition(":")
        owner = getattr(import_module(module), kind) if kind else import_module(module)
        setattr(owner, name, interrupted(getattr(owner, name), launch, event))
    sys.argv = ["train.py", *flags]
    runpy.run_path("train.py", run_name="__main__")


def interrupted(function: Callable, launch: Launch, event: Path) -> Callable:
    """Wrap a function so that the event happens before its first call after enough optimizer steps."""

    happened = False

    def with_event(first, *arguments, **keywords):
        nonlocal happened
        step = getattr(getattr(first, "state", None), "global_step", 0)
        if step >= launch.step and not happened:
            happened = True
            event.touch()
            if launch.kind in ERRORS:
                raise ERRORS[launch.kind](SAID)
            os.kill(os.getpid(), signal.SIGTERM)
        return function(first, *arguments, **keywords)

    return with_event


def by_torchrun(launch: Launch, flags: list[str], output: Path) -> Outcome:
    """Start the run as a user does."""
    given = json.dumps([asdict(launch), flags, str(event_file(launch, output))])
    command = torchrun(PROCESSES, "-m", "workbench.launches", given)
    with Path(f"{output}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        outcome = watch({process.pid: 0}, event_file(launch, output))
    outcome.said = Path(f"{output}.log").read_text(errors="replace")
    outcome.codes += [int(code) for code in re.findall(r"exitcode\s*: (-?\d+)", outcome.said)]
    return outcome


def by_fork(launch: Launch, flags: list[str], output: Path) -> Outcome:
    """Run in forks of this process, under another fork that stands in for torchrun."""
    log = Path(f"{output}.log")
    log.touch()
    reader, writer = os.pipe()
    if not (launcher := os.fork()):
        os.close(reader)
        _redirect(log)
        outcome = _as_torchrun(launch, flags, output)
        os.write(writer, json.dumps(asdict(outcome)).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        outcome = Outcome(**json.loads(pipe.read()))
    os.waitpid(launcher, 0)
    outcome.said = log.read_text(errors="replace")
    return outcome


def _as_torchrun(launch: Launch, flags: list[str], output: Path) -> Outcome:
    """Fork the ranks, host the store for their rendezvous and wait for their end."""
    import torch
    from torch.distributed import TCPStore

    torch.set_num_threads(1)  # as torchrun does
    reader, writer = os.pipe()
    ranks = {}
    for rank in range(PROCESSES):
        if not (pid := os.fork()):
            os.close(writer)
            port = os.read(reader, 8).decode().strip()
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "MASTER_PORT": port}
            os.environ |= {"WORLD_SIZE": str(PROCESSES), "LOCAL_WORLD_SIZE": str(PROCESSES)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
            live(launch, flags, event_file(launch, output))
            sys.exit()
        ranks[pid] = rank
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(writer, PROCESSES * f"{store.port:8}".encode())
    return watch(ranks, event_file(launch, output))


def watch(ranks: dict[int, int], event: Path) -> Outcome:
    """Wait for child processes, given with their ranks. Ends the remaining ones as torchrun does, and hanging ones."""
    codes: dict[int, int] = {}
    start, hung, killing = time.time(), False, None
    while len(codes) < len(ranks):
        for pid, rank in ranks.items():
            if rank not in codes and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                codes[rank] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        alive = [pid for pid, rank in ranks.items() if rank not in codes]
        if any(codes.values()) and killing is None:
            killing = time.time()
            _send(alive, signal.SIGTERM)
        happened = event.stat().st_mtime if event.exists() else None
        late = time.time() > (happened + LONGEST_END if happened else start + LONGEST_RUN)
        if alive and not hung and (late or (killing and time.time() > killing + GRACE)):
            hung = True
            _send(alive, signal.SIGABRT)  # faulthandler prints their stacks
            time.sleep(1)
            _send(alive, signal.SIGKILL)
        time.sleep(POLL)
    happened = event.stat().st_mtime if event.exists() else None
    return Outcome([codes[rank] for rank in sorted(codes)], happened and time.time() - happened, hung, "")


def event_file(launch: Launch, output: Path) -> Path:
    return output / "all_results.json" if launch.kind == "well" else Path(f"{output}.event")


def _send(pids: list[int], number: int) -> None:
    for pid in pids:
        os.kill(pid, number)


def _redirect(log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)


if __name__ == "__main__":
    values, program_flags, event_path = json.loads(sys.argv[1])
    live(Launch(**values | {"ranks": tuple(values["ranks"])}), program_flags, Path(event_path))
