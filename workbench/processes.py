"""Starting processes: a single function whose memory is measured, or a program with flags, also under torchrun."""

import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

# They are forked from a process that has only imported everything.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["workbench.variants"])


def run_alone(function: Callable, *args):
    """Run a module-level function in a new process and return its result."""
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as process:
        return process.submit(function, *args).result()


def as_flags(**values) -> list[str]:
    """Command-line arguments for flags with these values."""
    return [f"--{name}={value}" for name, value in values.items()]


def torchrun(processes: int, *program: str) -> list[str]:
    """The command that runs a program (a script or `-m` and a module, with arguments) in several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *launcher, *program]
