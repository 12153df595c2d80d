"""Kill a training run again and again, and compare its adapter with that of an undisturbed run.

Run as ``bash workbench/soak.sh`` from the repository root. Each life of the run is the same `train.py` command, ended
by SIGKILL at a random moment of its start or its training, or at a random moment within a checkpoint's saving, which
shows from outside by the hidden folder that a checkpoint is written in. A run that reaches its end is compared, and
while kills are missing another one starts. It passes if every adapter is the same, byte for byte, if no torn checkpoint
ever takes a checkpoint's name, and if nothing is left behind in a finished folder.

With --launches it starts and ends runs instead, in every way that one can end: see `workbench/launches.py`.
"""

import argparse
import contextlib
import json
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

from data import InputError
from peft.saving import WEIGHTS_NAME
from training.checkpoint import TEMPORARY_NAME, find_checkpoint
from workbench.launches import Launches
from workbench.tiny_model import make_tiny_model

ROWS = 40
LONGEST_WAIT = 600  # seconds for a checkpoint to be begun, or for a run to end
POLL = 0.0005  # seconds; a checkpoint of the tiny model takes some 10 ms


def main(argv: list[str] | None = None) -> None:
    """Soak as often as asked for and say how it ended.

    Raises:
        InputError: a flag is out of range.
        SystemExit: with a message, so with exit code 1, where harm was done or the undisturbed run failed.
    """
    args = parse_arguments(argv)
    folder = Path(tempfile.mkdtemp(prefix="loramoe-soak-", dir=args.folder))
    model = prepare(args, folder)
    if args.launches:
        if not Launches(args.launches, args.seed, model, folder).run():
            sys.exit(f"FAILED; the folders are kept in {folder}")
        shutil.rmtree(folder)
        print("PASSED: every run has ended as it has to")
        return
    soak = Soak(args, model, folder)
    try:
        soak.run()
    except HarmError as harm:
        sys.exit(f"FAILED after {soak.count()}: {harm}\nThe folders are kept in {folder}")
    shutil.rmtree(folder)
    print(f"PASSED: {soak.count()}; each adapter is bit-identical to the undisturbed run's")


def prepare(args: argparse.Namespace, folder: Path) -> Path:
    """Put the rows and the base model into a folder; returns the model's.

    Another process makes the model: a tokenizer starts threads, and this process is to be forked.
    """
    (folder / "rows.json").write_text(json.dumps(example_rows()))
    if args.model:
        return args.model
    maker = multiprocessing.get_context("fork").Process(target=make_tiny_model, args=(folder / "base",))
    maker.start()
    maker.join()
    return folder / "base"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bash workbench/soak.sh", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="how often a run is killed at least (default 20)")
    parser.add_argument("--during_save", type=int, default=5, help="how many of these during a save (default 5)")
    parser.add_argument("--launches", type=int, default=0, help="number of runs to end in every way, instead of kills")
    parser.add_argument("--num_processes", type=int, default=1, help="ranks of each run, under torchrun (default 1)")
    parser.add_argument("--max_steps", type=int, default=200, help="optimizer steps of each run (default 200)")
    parser.add_argument("--save_steps", type=int, default=1, help="optimizer steps between checkpoints (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--model", type=Path, help="folder of the base model (default: a tiny random Llama)")
    parser.add_argument("--folder", type=Path, help="where the runs are put (default: the system's temporary folder)")
    args = parser.parse_args(argv)
    for name in ("kills", "num_processes", "max_steps", "save_steps"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} is {getattr(args, name)}, but has to be at least 1")
    if args.launches < 0:
        raise InputError(f"--launches is {args.launches}, but has to be at least 0")
    if not 0 <= args.during_save <= args.kills:
        raise InputError(f"--during_save is {args.during_save}, but has to be between 0 and the kills, {args.kills}")
    for name in ("model", "folder"):
        if (place := getattr(args, name)) and not place.is_dir():
            raise InputError(f"--{name} {place}: no such folder")
    return args


class HarmError(Exception):
    """What a kill has done to a run."""


@dataclass
class Life:
    """One process tree that trains into a run's folder.

    Args:
        process: the root of the tree.
        output: the run's folder.
        stale: identity of the folder of an unfinished checkpoint that an earlier life has left, if any.
        start: when it began, by `time.monotonic()`.
    """

    process: subprocess.Popen
    output: Path
    stale: tuple[int, int] | None
    start: float

    @property
    def is_saving(self) -> bool:
        """Whether a save is under way; after the end of the process, whether it ended in one."""
        return _identity(self.output / TEMPORARY_NAME) not in (None, self.stale)

    def wait_until(self, saving: bool) -> bool:
        """Wait for a save to begin or to end; False where the process ends before."""
        limit = time.monotonic() + LONGEST_WAIT
        while self.is_saving != saving:
            if self.process.poll() is not None or time.monotonic() > limit:
                return False
            time.sleep(POLL)
        return True


class Soak:
    """Runs, kills, and what they have come to.

    Args:
        args: the command line.
        model: folder of the base model.
        folder: it holds `rows.json`; the runs are put there.
    """

    def __init__(self, args: argparse.Namespace, model: Path, folder: Path):
        self.args, self.model, self.folder = args, model, folder
        self.random = random.Random(args.seed)
        self.kills = self.during_save = self.finished = 0
        self.start_up = self.training = 0.0  # seconds of the undisturbed run, before its first save and after

    def count(self) -> str:
        return f"{self.kills} kills, {self.during_save} of them during a save, {self.finished} runs to the end"

    def run(self) -> None:
        """Train undisturbed, then with kills until there are enough of them and the last run has ended.

        Raises:
            HarmError: a run could not go on, or is not what the undisturbed one is.
        """
        undisturbed = self.folder / "undisturbed"
        self.live(undisturbed, self.measure)
        print(
            f"undisturbed run: {self.start_up:.1f} s to the first save, {self.training:.1f} s to the end of step "
            f"{self.args.max_steps}",
            flush=True,
        )
        while not (self.enough and self.finished):
            output = self.folder / f"run-{self.finished + 1}"
            while life := self.live(output, self.next_moment()):
                self.report_kill(life)
            self.finished += 1
            compare(output, undisturbed)
            print(f"run {self.finished} has ended: the adapter is bit-identical", flush=True)

    @property
    def enough(self) -> bool:
        return self.kills >= self.args.kills and self.during_save >= self.args.during_save

    def next_moment(self) -> Callable[[Life], bool]:
        """What waits for the moment of the next kill, and says whether there is to be one."""
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
        """A random moment of the start, or of the fifth of the training that comes next."""
        length = self.start_up
        if self.random.random() < 0.5 and life.wait_until(saving=True):
            length = self.training / 5
        try:
            life.process.wait(self.random.uniform(0, length))
        except subprocess.TimeoutExpired:
            return True
        return False

    def moment_of_a_save(self, life: Life) -> bool:
        """A random moment of one of the next saves; how long a save takes is seen from the one before."""
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
        """One life of a run. Returns it if it was killed; otherwise the run has reached its end.

        Raises:
            HarmError: it ended with another exit code than 0.
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
        """The same for each life of a run: dropout on, float32 on a CPU."""
        flags = {
            "model_name_or_path": self.model,
            "dataset_dir": self.folder / "rows.json",
            "output_dir": output,
            "data_cache_dir": self.folder / f"cache-{output.name}",
            "use_cpu": "true",
            "lora_nums": 4,
            "lora_dropout": 0.2,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4 // self.args.num_processes or 1,
            "max_steps": self.args.max_steps,
            "save_steps": self.args.save_steps,
            "disable_tqdm": "true",
        }
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.args.num_processes)]
        program = [*(launcher if self.args.num_processes > 1 else []), "train.py"]
        return [
            sys.executable,
            *program,
            *(text for name, value in flags.items() for text in (f"--{name}", str(value))),
        ]

    def report_kill(self, life: Life) -> None:
        """Count a kill and say when it was.

        Raises:
            HarmError: what bears the name of a checkpoint is torn.
        """
        seconds = time.monotonic() - life.start
        self.kills += 1
        self.during_save += life.is_saving
        checkpoint, torn = find_checkpoint(life.output)
        print(
            f"kill {self.kills:2} of {self.args.kills}: {seconds:5.1f} s after the start, "
            f"{'during' if life.is_saving else 'outside'} a save; "
            f"last checkpoint: {checkpoint.name if checkpoint else 'none'}",
            flush=True,
        )
        if torn:
            raise HarmError("; ".join(torn))


def to_the_end(life: Life) -> bool:
    life.process.wait(LONGEST_WAIT)
    return False


def compare(output: Path, undisturbed: Path) -> None:
    """Compare a finished run with the undisturbed one.

    Raises:
        HarmError: the adapters differ, or one folder holds what the other does not.
    """
    surplus = {file.name for file in output.iterdir()} ^ {file.name for file in undisturbed.iterdir()}
    if surplus:
        raise HarmError(f"{output} and {undisturbed} differ in {', '.join(sorted(surplus))}")
    if (output / WEIGHTS_NAME).read_bytes() != (undisturbed / WEIGHTS_NAME).read_bytes():
        raise HarmError(f"{output / WEIGHTS_NAME} is not {undisturbed / WEIGHTS_NAME}")


def example_rows() -> list[dict]:
    """Rows of different lengths and both task types."""
    return [
        {"instruction": f"Count {'on ' * (index % 5)}from {index}", "output": f"{index + 1}", "task_type": index % 2}
        for index in range(ROWS)
    ]


def kill_tree(pid: int) -> None:
    """SIGKILL a process and all that descend from it. Each is stopped first, so that it starts no further one."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that ends
            for child in children.read_text().split():
                kill_tree(int(child))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a folder from another one that was later made in its place; None where there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_ctime_ns


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
