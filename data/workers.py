"""Work on blocks of rows, in this process or shared by several."""

import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

from data.errors import InputError

MOST_WORKERS = 8
# For less, a process of its own would take longer to start than to work.
BYTES_WORTH_A_WORKER = 2**23
# Blocks under way for each process: one that it works on and one that waits.
BLOCKS_AHEAD = 2

Block = TypeVar("Block")
Result = TypeVar("Result")


def worker_count(files: list[Path], most: int | None) -> int:
    """How many processes share these files: no more than pays, nor than `most` (None: one for each core, up to 8)."""
    size = sum(file.stat().st_size for file in files)
    return min(most or min(os.cpu_count(), MOST_WORKERS), 1 + size // BYTES_WORTH_A_WORKER)


def map_blocks(function: Callable[[Block], Result], blocks: Iterable[Block], num_proc: int) -> Iterator[Result]:
    """Results of a function in the order of the blocks, of which only a few are held at a time.

    Args:
        num_proc: processes that share the blocks; 1 means this one. They end with this one, however it ends.

    Raises:
        InputError: a process was ended from outside, or a block cannot be handed to one.
    """
    if num_proc == 1:
        yield from map(function, blocks)
        return
    pool = ProcessPoolExecutor(num_proc, initializer=_start_worker, initargs=(function,))
    pending = deque()
    try:
        for block in blocks:
            # What cannot be pickled would fail in a thread of the pool, which can then wait for ever.
            pending.append(pool.submit(_work, pickle.dumps(block)))
            if len(pending) > BLOCKS_AHEAD * num_proc:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise InputError(
            "a process that works on the rows was ended from outside, perhaps for lack of memory; use fewer of "
            "them (--preprocessing_num_workers)"
        ) from None
    except RecursionError:
        raise InputError(
            "a row is nested too deeply to be handed to another process; use --preprocessing_num_workers 1"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(function: Callable) -> None:
    global _function
    _function = function
    # There is a process for each core already.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ctrl-C reaches every process of the terminal, and the main one answers it; SIGTERM ends whoever gets it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A process whose parent was killed would wait for blocks for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(block: bytes) -> Result:
    return _function(pickle.loads(block))
