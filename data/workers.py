"""Work on blocks of rows, in this process or shared by several.

Not the processes of `datasets.map`: those outlive a parent that is killed, and need all rows in a data set first.
"""

import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from data.errors import InputError
from data.files import COMPRESSIONS

MOST_WORKERS = 8
# A process with less to do would take longer to start than to work.
BYTES_WORTH_A_WORKER = 2**23
# A compressed file holds about so many times its size.
INFLATION = 4
# One that a process works on and one that waits.
BLOCKS_PER_WORKER = 2

Block = TypeVar("Block")
Result = TypeVar("Result")


def worker_count(files: list[Path], most: int | None) -> int:
    """Number of processes for these files: as many as pay, at most `most` (None: one for each core, up to 8)."""
    size = sum(file.stat().st_size * (INFLATION if file.suffix.lower() in COMPRESSIONS else 1) for file in files)
    return min(most or min(os.cpu_count() or 1, MOST_WORKERS), 1 + size // BYTES_WORTH_A_WORKER)


def map_blocks(function: Callable[[Block], Result], blocks: Iterable[Block], num_proc: int) -> Iterator[Result]:
    """Results of a function in the order of the blocks, of which only a few are in memory at a time.

    Args:
        num_proc: processes that share the blocks; 1 means this one. They end with this one, however it ends.

    Raises:
        InputError: a process was killed, or a block cannot be sent to one.
    """
    if num_proc == 1:
        yield from map(function, blocks)
        return
    pool = ProcessPoolExecutor(num_proc, initializer=_start_worker, initargs=(function,))
    pending: deque[Future] = deque()
    try:
        for block in blocks:
            # What cannot be pickled would fail in a thread of the pool, which can then wait for ever.
            pending.append(pool.submit(_work, pickle.dumps(block)))
            if len(pending) > BLOCKS_PER_WORKER * num_proc:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise InputError(
            "a process that works on the rows was killed, perhaps for lack of memory; use fewer of them "
            "(--preprocessing_num_workers)"
        ) from None
    except RecursionError:
        raise InputError(
            "a row is nested too deeply to be sent to another process; use --preprocessing_num_workers 1"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_function: Callable  # of a worker


def _start_worker(function: Callable) -> None:
    global _function
    _function = function
    # Each core has a process already.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ctrl-C reaches all processes of the terminal, and the main one handles it; SIGTERM ends the one that gets it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Exit when the parent is killed, instead of waiting for blocks for ever."""
    multiprocessing.parent_process().join()  # type: ignore[union-attr]
    os._exit(1)


def _work(block: bytes) -> Any:
    return _function(pickle.loads(block))
