"""Processes that run one function and nothing else, so that their memory is that function's."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

# They start from a process that has imported everything, and has done nothing else.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["workbench.variants"])


def run_alone(function: Callable, *args):
    """The result of a module's function that runs in a new process."""
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as process:
        return process.submit(function, *args).result()
