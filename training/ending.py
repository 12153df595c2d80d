"""The end of a training process: its message, its exit code, and what is closed on the way."""

import atexit
import contextlib
import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from data import InputError

PATIENCE = timedelta(seconds=2)  # for this node's first process to print what another one is about to print


def run_process(main: Callable[[], None]) -> None:
    """Run a program's `main` and end this process: with exit code 0, or after a message or a traceback with 1.

    The process group is closed on success only. Under NCCL, closing it waits for the other ranks, and after an error on
    one rank these wait for it in a collective: nobody would see the error. So a rank that fails says why and exits at
    once, and the launcher ends the others.

    Either way the process ends by `os._exit`, since gloo's threads can outlive the group: DeepSpeed's engine keeps
    theirs. A thread that frees a tensor then needs the interpreter, and if Python's finalisation has begun by then,
    Python before 3.14 unwinds the thread through C++ frames that forbid it: "terminate called without an active
    exception", after a run that went well.
    """
    status = 1
    try:
        main()
        _close_process_group()
        # As Python's finalisation does first: wait for threads, call what libraries have registered.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        status = 0
    except SystemExit:
        raise
    except BaseException as error:
        _ignore_signals()
        _report(error)
    _flush()
    os._exit(status)


def _close_process_group() -> None:
    """Leave the process group; what still refers to it goes first, since gloo's threads must not outlive it."""
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


def _ignore_signals() -> None:
    """Let the launcher, which ends the ranks that remain, and a second Ctrl-C not cut the message off."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _report(error: BaseException) -> None:
    if isinstance(error, InputError):
        message = str(error)
    elif isinstance(error, KeyboardInterrupt):
        message = "interrupted; the same command goes on from the last checkpoint, if there is one"
    else:
        _say("".join(traceback.format_exception(error)))
        return
    rank = os.environ.get("RANK", "0")
    if not _is_said(message):
        _say(f"error{'' if rank == '0' else f' on rank {rank}'}: {message}\n")


def _is_said(message: str) -> bool:
    """True if this node's first process prints the same message; it tells the others through the rendezvous store.

    A message is printed once on each node, since the error may be on this node alone; and by any process, since it may
    be on that one alone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return False
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    key = f"said on node {os.environ.get('GROUP_RANK')}: {message}"
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=PATIENCE, wait_for_workers=False)
        if is_first:
            store.set(key, "")
            return False
        limit = time.monotonic() + PATIENCE.total_seconds()
        while not (said := store.check([key])) and time.monotonic() < limit:
            time.sleep(0.05)
    except (dist.DistError, KeyError, ValueError):  # no store any more
        return False
    return said


def _say(text: str) -> None:
    """Write to standard error in one piece: the other ranks write there, too."""
    with contextlib.suppress(OSError, ValueError):  # nobody reads any more, or it is closed
        sys.stderr.write(text)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
