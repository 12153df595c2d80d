"""Kill a training run again and again, and compare its adapter with that of an undisturbed run.

Run as ``bash scripts/soak.sh`` from the repository root. Each life of the run is the same `train.py` command, ended by
SIGKILL at a random moment between its start and the time that the undisturbed run took, or at a random moment within
a checkpoint's saving, which shows from outside by the hidden folder that a checkpoint is written in. A run that reaches
its end is compared, and while kills are missing another one starts. It passes if every adapter is the same, byte for
byte, if no torn checkpoint ever takes a checkpoint's name, and if nothing is left behind in a finished folder.
"""

import argparse
import contextlib
import json
import os
import random
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
from scripts.tiny_model import make_tiny_model
from transformers_patch.training.checkpoint import ASIDE, find_checkpoint

ROWS = 40
LONGEST_WAIT = 600  # seconds for a checkpoint to be begun, or for a run to end
POLL = 0.0005  # seconds; a checkpoint of the tiny model takes some 10 ms


def main(argv: list[str] | None = None) -> None:
    """Soak as often as asked for and say how it ended.

    Raises:
        InputError: a flag is out of range, or the undisturbed run failed.
        SystemExit: with 1, where an adapter differs or a run could not go on.
    """
    args = parse_arguments(argv)
    with tempfile.TemporaryDirectory(prefix="loramoe-soak-", dir=args.folder) as folder:
        soak = Soak(args, Path(folder))
        try:
            soak.run()
        except HarmError as harm:
            sys.exit(f"FAILED after {soak.summary}: {harm}")
        print(f"PASSED: {soak.summary}: each adapter is bit-identical to the undisturbed run's", flush=True)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bash scripts/soak.sh", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="how often a run is killed at least (default 20)")
    parser.add_argument("--during_save", type=int, default=5, help="how many of these during a save (default 5)")
    parser.add_argument("--num_processes", type=int, default=1, help="ranks of each run, under torchrun (default 1)")
    parser.add_argument("--max_steps", type=int, default=400, help="optimizer steps of each run (default 400)")
    parser.add_argument("--save_steps", type=int, default=1, help="optimizer steps between checkpoints (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--model", type=Path, help="folder of the base model (default: a tiny random Llama)")
    parser.add_argument("--folder", type=Path, help="where the runs are put (default: the system's temporary folder)")
    args = parser.parse_args(argv)
    for name in ("kills", "num_processes", "max_steps", "save_steps"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} is {getattr(args, name)}, but has to be at least 1")
    if not 0 <= args.during_save <= args.kills:
        raise InputError(f"--during_save is {args.during_save}, but has to be between 0 and the kills, {args.kills}")
    for name in ("model", "folder"):
        if (place := getattr(args, name)) and not place.is_dir():
            raise InputError(f"--{name} {place}: no such folder")
    return args


class HarmError(Exception):
    """A kill has done harm; the message says which."""


@dataclass
class Life:
    """One process tree that trains into a run's folder.

    Args:
        process: the root of the tree.
        output: the run's folder.
        stale: identity of the folder of an unfinished checkpoint that an earlier life has left, if any.
    """

    process: subprocess.Popen
    output: Path
    stale: tuple[int, int] | None

    @property
    def is_saving(self) -> bool:
        return _identity(self.output / ASIDE) not in (None, self.stale)

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
        folder: an empty folder for the base model, the data and the runs.
    """

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder = args, folder
        self.random = random.Random(args.seed)
        self.kills = self.during_save = self.finished = 0
        self.model = args.model or folder / "base"
        if not args.model:
            make_tiny_model(self.model)
        rows = [
            {
                "instruction": f"Count {'on ' * (index % 5)}from {index}",
                "output": f"{index + 1}",
                "task_type": index % 2,
            }
            for index in range(ROWS)
        ]
        (folder / "rows.json").write_text(json.dumps(rows))

    def run(self) -> None:
        """Train undisturbed, then with kills until there are enough of them and the last run has ended."""
        undisturbed = self.folder / "undisturbed"
        start = time.monotonic()
        if self.live(undisturbed, lambda life: life.process.wait(LONGEST_WAIT) is None):
            raise InputError(f"the undisturbed run failed:\n{self.end_of_log()}")
        self.seconds = time.monotonic() - start
        print(f"undisturbed run: {self.args.max_steps} steps in {self.seconds:.1f} s", flush=True)
        while not self.finished or not self.enough:
            output = self.folder / f"run-{self.finished + 1}"
            while self.live(output, self.next_moment()):
                self.report_kill(output)
            self.compare(output, undisturbed)

    @property
    def summary(self) -> str:
        return f"{self.kills} kills, {self.during_save} of them during a save, {self.finished} runs to the end"

    @property
    def enough(self) -> bool:
        return self.kills >= self.args.kills and self.during_save >= self.args.during_save

    def next_moment(self) -> Callable[[Life], bool]:
        """What waits for the moment of the next kill, and says whether there is to be one."""
        if self.enough:
            return lambda life: life.process.wait(LONGEST_WAIT) is None
        saves_missing = self.args.during_save - self.during_save
        kills_missing = self.args.kills - self.kills
        if saves_missing >= kills_missing or self.random.random() < saves_missing / kills_missing:
            return self.moment_during_save
        return self.any_moment

    def any_moment(self, life: Life) -> bool:
        try:
            life.process.wait(self.random.uniform(0, self.seconds))
        except subprocess.TimeoutExpired:
            return True
        return False

    def moment_during_save(self, life: Life) -> bool:
        """A random moment of one of the first saves; how long a save takes is seen from the one before."""
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

    def live(self, output: Path, wait_for_moment: Callable[[Life], bool]) -> bool:
        """One life of a run. Returns whether it was killed; otherwise the run has reached its end.

        Raises:
            HarmError: it ended with another exit code than 0.
        """
        stale = _identity(output / ASIDE)
        self.start = time.monotonic()
        with (self.folder / "log").open("w") as log:
            process = subprocess.Popen(self.command(output), stdout=log, stderr=subprocess.STDOUT)
            life = Life(process, output, stale)
            try:
                killed = wait_for_moment(life) and process.poll() is None
            finally:
                kill_tree(process.pid)
                process.wait()
        self.was_saving = life.is_saving
        if not killed and process.returncode:
            raise HarmError(f"the run ended with exit code {process.returncode}:\n{self.end_of_log()}")
        return killed

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

    def report_kill(self, output: Path) -> None:
        """Count a kill and say when it was.

        Raises:
            HarmError: a checkpoint is torn.
        """
        self.kills += 1
        self.during_save += self.was_saving
        after = time.monotonic() - self.start
        checkpoint, torn = find_checkpoint(output)
        print(
            f"kill {self.kills:3} of {self.args.kills}: {after:5.1f} s after the start, "
            f"{'during a save' if self.was_saving else 'between saves'}; "
            f"last checkpoint: {checkpoint.name if checkpoint else 'none'}",
            flush=True,
        )
        if torn:
            raise HarmError("; ".join(torn))

    def compare(self, output: Path, undisturbed: Path) -> None:
        """Compare a finished run with the undisturbed one.

        Raises:
            HarmError: the adapters differ, or one folder holds what the other does not.
        """
        self.finished += 1
        surplus = {file.name for file in output.iterdir()} ^ {file.name for file in undisturbed.iterdir()}
        if surplus:
            raise HarmError(f"{output} and {undisturbed} differ in {', '.join(sorted(surplus))}")
        if (output / WEIGHTS_NAME).read_bytes() != (undisturbed / WEIGHTS_NAME).read_bytes():
            raise HarmError(f"{output / WEIGHTS_NAME} is not {undisturbed / WEIGHTS_NAME}")
        print(f"run {self.finished} has ended: the adapter is bit-identical", flush=True)

    def end_of_log(self) -> str:
        return (self.folder / "log").read_text()[-3000:]


def kill_tree(pid: int) -> None:
    """SIGKILL a process and all that descend from it. Each is stopped first, so that it starts no further one."""
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        os.kill(pid, signal.SIGSTOP)
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in children.read_text().split():
                kill_tree(int(child))
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
