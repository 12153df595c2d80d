"""Kill a training run again and again, and compare its adapter with that of an uninterrupted run.

Run `bash workbench/soak.sh` from the repository root. Each life of the run is the same `train.py` command, ended by
SIGKILL at a random moment during start-up, training or the saving of a checkpoint, which is visible from outside as the
hidden folder that it is written to. A run that reaches its end is compared, and another one starts until there were
enough kills. The test passes if all adapters are identical byte for byte, no incomplete checkpoint ever has a
checkpoint's name, and finished folders contain no leftovers.

With --launches it instead runs and ends training in every possible way: see `workbench/launches.py`.
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loading.command_line import at_least, range_problems, refuse, run_verb
from peft.saving import WEIGHTS_NAME
from training.checkpoint import TEMPORARY_NAME, find_checkpoint
from workbench.launches import Launches
from workbench.processes import torchrun
from workbench.tiny_model import make_tiny_model, tiny_run, write_rows

ROWS = 40
LONGEST_WAIT = 600  # seconds until a checkpoint is begun or a run ends
POLL = 0.0005  # seconds; a checkpoint of the tiny model takes about 10 ms


def main(argv: list[str] | None = None) -> None:
    """Run the test and print its result.

    Raises:
        InputError: a flag is out of range.
        SystemExit: with a message, so exit code 1, if a run was damaged or the uninterrupted run failed.
    """
    args = parse_arguments(argv)
    folder = Path(tempfile.mkdtemp(prefix="loramoe-soak-", dir=args.folder))
    model = prepare(args, folder)
    if args.launches:
        if not Launches(args.launches, args.seed, model, folder).run():
            sys.exit(f"FAILED; the folders are kept in {folder}")
        shutil.rmtree(folder)
        print("PASSED: every run ended as expected")
        return
    soak = Soak(args, model, folder)
    try:
        soak.run()
    except HarmError as harm:
        sys.exit(f"FAILED after {soak.count()}: {harm}\nThe folders are kept in {folder}")
    shutil.rmtree(folder)
    print(f"PASSED: {soak.count()}; each adapter is bit-identical to the uninterrupted run's")


def prepare(args: argparse.Namespace, folder: Path) -> Path:
    """Write the rows and the base model to a folder. Returns the model's folder.

    Another process makes the model, because a tokenizer starts threads and this process will be forked.
    """
    write_rows(folder / "rows.json", ROWS)
    if args.model:
        return args.model
    maker = multiprocessing.get_context("fork").Process(target=make_tiny_model, args=(folder / "base",))
    maker.start()
    maker.join()
    return folder / "base"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bash workbench/soak.sh", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="least number of kills (default 20)")
    parser.add_argument("--during_save", type=int, default=5, help="how many of these happen during a save (default 5)")
    parser.add_argument("--launches", type=int, default=0, help="end this many runs in every way, instead of kills")
    parser.add_argument("--num_processes", type=int, default=1, help="processes of a run, under torchrun (default 1)")
    parser.add_argument("--max_steps", type=int, default=200, help="optimizer steps of each run (default 200)")
    parser.add_argument("--save_steps", type=int, default=1, help="optimizer steps between checkpoints (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the moments (default 0)")
    parser.add_argument("--model", type=Path, help="folder of the base model (default: a tiny random Llama)")
    parser.add_argument("--folder", type=Path, help="where to put the runs (default: the system's temporary folder)")
    args = parser.parse_args(argv)
    problems = range_problems(
        args, [at_least(1, "kills", "num_processes", "max_steps", "save_steps"), at_least(0, "launches")]
    )
    if not 0 <= args.during_save <= args.kills:
        problems.append(f"--during_save is {args.during_save}, but has to be between 0 and the kills, {args.kills}")
    for name in ("model", "folder"):
        if (place := getattr(args, name)) and not place.is_dir():
            problems.append(f"--{name} {place}: no such folder")
    refuse(problems)
    return args


class HarmError(Exception):
    """A kill has damaged a run; the message says how."""


@dataclass
class Life:
    """A process tree that trains into a run's folder.

    Args:
        process: the root of the tree.
        output: the run's folder.
        stale: identity of the folder of an incomplete checkpoint that an earlier life left, if any.
        start: start time, by `time.monotonic()`.
    """

    process: subprocess.Popen
    output: Path
    stale: tuple[int, int] | None
    start: float

    @property
    def is_saving(self) -> bool:
        """True during a save; after the end of the process, true if it ended during one."""
        return _identity(self.output / TEMPORARY_NAME) not in (None, self.stale)

    def wait_until(self, saving: bool) -> bool:
        """Wait for a save to begin or to end. Returns False if the process ends first."""
        limit = time.monotonic() + LONGEST_WAIT
        while self.is_saving != saving:
            if self.process.poll() is not None or time.monotonic() > limit:
                return False
            time.sleep(POLL)
        return True


class Soak:
    """Runs, kills and their counts.

    Args:
        args: the command line.
        model: folder of the base model.
        folder: contains `rows.json`; the runs are put there.
    """

    def __init__(self, args: argparse.Namespace, model: Path, folder: Path):
        self.args, self.model, self.folder = args, model, folder
        self.random = random.Random(args.seed)
        self.kills = self.during_save = self.finished = 0
        self.start_up = self.training = 0.0  # seconds of the uninterrupted run, before its first save and after

    def count(self) -> str:
        return f"{self.kills} kills, {self.during_save} of them during a save, {self.finished} runs to the end"

    def run(self) -> None:
        """Train without interruption, then with kills until there are enough of them and the last run has ended.

        Raises:
            HarmError: a run could not resume, or differs from the uninterrupted one.
        """
        uninterrupted = self.folder / "uninterrupted"
        self.live(uninterrupted, self.measure)
        print(
            f"uninterrupted run: {self.start_up:.1f} s to the first save, {self.training:.1f} s to the end of step "
            f"{self.args.max_steps}",
            flush=True,
        )
        while not (self.enough and self.finished):
            output = self.folder / f"run-{self.finished + 1}"
            while life := self.live(output, self.next_moment()):
                self.report_kill(life)
            self.finished += 1
            compare(output, uninterrupted)
            print(f"run {self.finished} has ended: the adapter is bit-identical", flush=True)

    @property
    def enough(self) -> bool:
        return self.kills >= self.args.kills and self.during_save >= self.args.during_save

    def next_moment(self) -> Callable[[Life], bool]:
        """Choose a function that waits for the moment of the next kill; it returns False if the run ends first."""
        if self.enough:
            return to_the_end
        saves_missing = self.args.during_save - self.during_save
        kills_missing = max(self.args.kills - self.kills, 1)
        return self.moment_of_a_save if self.random.random() < saves_missing / kills_missing else self.any_moment

    def measure(self, life: Life) -> bool:
        life.wait_until(saving=True)
        self.start_up = time.monotonic() - life.start
        to_the_end(life)
        self.training = time.monotonic() - life.start - self.start_up
        return False

    def any_moment(self, life: Life) -> bool:
        """Wait for a random moment during start-up or the next fifth of the training."""
        length = self.start_up
        if self.random.random() < 0.5 and life.wait_until(saving=True):
            length = self.training / 5
        try:
            life.process.wait(self.random.uniform(0, length))
        except subprocess.TimeoutExpired:
            return True
        return False

    def moment_of_a_save(self, life: Life) -> bool:
        """Wait for a random moment of one of the next saves; the previous save tells how long one takes."""
        for _ in range(self.random.randint(1, 9)):
            if not life.wait_until(saving=True):
                return False
            begin = time.monotonic()
            if not life.wait_until(saving=False):
                return False
            length = time.monotonic() - begin
        if not life.wait_until(saving=True):
            return False
        time.sleep(self.random.uniform(0, length))
        return True

    def live(self, output: Path, wait_for_moment: Callable[[Life], bool]) -> Life | None:
        """Start a run or resume it. Returns its life if it was killed, or None if the run reached its end.

        Raises:
            HarmError: it failed with an exit code other than 0.
        """
        stale, log = _identity(output / TEMPORARY_NAME), self.folder / "log"
        with log.open("w") as stream:
            process = subprocess.Popen(self.command(output), stdout=stream, stderr=subprocess.STDOUT)
            life = Life(process, output, stale, time.monotonic())
            try:
                killed = wait_for_moment(life) and process.poll() is None
            finally:
                if process.poll() is None:
                    kill_tree(process.pid)
                    process.wait()
        if not killed and process.returncode:
            raise HarmError(f"{output} ended with exit code {process.returncode}:\n{log.read_text()[-3000:]}")
        return life if killed else None

    def command(self, output: Path) -> list[str]:
        """The command of a run, the same for each of its lives."""
        processes = self.args.num_processes
        flags = tiny_run(
            self.folder,
            self.model,
            output,
            data_cache_dir=self.folder / f"cache-{output.name}",
            learning_rate=1e-2,
            per_device_train_batch_size=4 // processes or 1,
            max_steps=self.args.max_steps,
            save_steps=self.args.save_steps,
        )
        return torchrun(processes, "train.py", *flags) if processes > 1 else [sys.executable, "train.py", *flags]

    def report_kill(self, life: Life) -> None:
        """Count a kill and print when it was.

        Raises:
            HarmError: a folder with the name of a checkpoint is incomplete.
        """
        seconds = time.monotonic() - life.start
        self.kills += 1
        self.during_save += life.is_saving
        checkpoint, incomplete = find_checkpoint(life.output)
        print(
            f"kill {self.kills:2} of {self.args.kills}: {seconds:5.1f} s after the start, "
            f"{'during' if life.is_saving else 'outside'} a save; "
            f"last checkpoint: {checkpoint.name if checkpoint else 'none'}",
            flush=True,
        )
        if incomplete:
            raise HarmError("; ".join(incomplete))


def to_the_end(life: Life) -> bool:
    life.process.wait(LONGEST_WAIT)
    return False


def compare(output: Path, uninterrupted: Path) -> None:
    """Compare a finished run with the uninterrupted one.

    Raises:
        HarmError: the adapters differ, or a file exists in only one of the folders.
    """
    surplus = {file.name for file in output.iterdir()} ^ {file.name for file in uninterrupted.iterdir()}
    if surplus:
        raise HarmError(f"{output} and {uninterrupted} differ in {', '.join(sorted(surplus))}")
    if (output / WEIGHTS_NAME).read_bytes() != (uninterrupted / WEIGHTS_NAME).read_bytes():
        raise HarmError(f"{output / WEIGHTS_NAME} differs from {uninterrupted / WEIGHTS_NAME}")


def kill_tree(pid: int) -> None:
    """Kill a process and its descendants with SIGKILL. Each is stopped first, so that it cannot start another."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended
            for child in children.read_text().split():
                kill_tree(int(child))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _identity(path: Path) -> tuple[int, int] | None:
    """Inode and time of a folder, which differ if it was made again; None if it does not exist."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_ctime_ns


if __name__ == "__main__":
    run_verb(main)
