"""How a training process ends: exit code, message, and nothing that waits for other processes."""

import os
import signal
import subprocess
import sys

import pytest
import torch.distributed as dist
from conftest import ROOT
from test_launch import free_port

from data import InputError
from training import ending


@pytest.fixture
def end_of(monkeypatch, capfd):
    """Runs a main and returns its exit code, what it left on standard error, and whether the group was closed."""

    class ExitError(BaseException):
        pass

    def leave(status):
        raise ExitError(status)

    closed: list[bool] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(ending.threading, "_shutdown", lambda: None)
    monkeypatch.setattr(ending.atexit, "_run_exitfuncs", lambda: None)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: closed.append(True))

    def run(error: BaseException | None) -> tuple[int, str, bool]:
        def main():
            if error:
                raise error

        closed.clear()
        try:
            ending.run_process(main)
        except ExitError as end:
            return end.args[0], capfd.readouterr().err, bool(closed)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    return run


def test_only_success_closes_the_process_group(end_of):
    """Under NCCL, closing it waits for ranks that wait for this one."""
    assert end_of(None) == (0, "", True)
    code, said, closed = end_of(MemoryError("full"))
    assert (code, closed) == (1, False)
    assert said.startswith("Traceback")
    assert said.endswith("MemoryError: full\n")
    assert end_of(InputError("no such file")) == (1, "error: no such file\n", False)
    code, said, closed = end_of(KeyboardInterrupt())
    assert (code, closed) == (1, False)
    assert said == "error: interrupted; the same command goes on from the last checkpoint, if there is one\n"


def test_help_ends_as_usual():
    with pytest.raises(SystemExit):
        ending.run_process(lambda: exec("raise SystemExit"))


def test_a_message_is_said_once_on_each_node_by_whichever_process_has_it(end_of, monkeypatch):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(ending, "PATIENCE", ending.PATIENCE / 4)

    def rank(number: int, local: int, node: int, message: str) -> str:
        values = {"RANK": number, "LOCAL_RANK": local, "GROUP_RANK": node, "WORLD_SIZE": 4, "MASTER_PORT": store.port}
        for name, value in (values | {"MASTER_ADDR": "127.0.0.1"}).items():
            monkeypatch.setenv(name, str(value))
        return end_of(InputError(message))[1]

    assert rank(0, 0, 0, "bad rows") == "error: bad rows\n"
    assert rank(1, 1, 0, "bad rows") == ""
    assert rank(2, 0, 1, "bad rows") == "error on rank 2: bad rows\n"
    assert rank(3, 1, 1, "no such file") == "error on rank 3: no such file\n"
    monkeypatch.setattr(dist, "TCPStore", lambda *args, **kwargs: (_ for _ in ()).throw(dist.DistNetworkError("gone")))
    assert rank(1, 1, 0, "bad rows") == "error on rank 1: bad rows\n"


# Rank 1 leaves while one of gloo's threads, kept by `backend` as DeepSpeed's engine keeps them, is to free a tensor,
# for which it needs the interpreter. That is held by the first exit handler, the last to run, as other native code may.
LEAVING = """
import atexit, ctypes, os, sys, time
rank = int(os.environ["RANK"])
if rank == 1:
    atexit.register(ctypes.PyDLL(None).usleep, 1_500_000)
import torch
import torch.distributed as dist
from training import ending

def main():
    global backend
    dist.init_process_group("gloo")
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))
    dist.all_reduce(torch.ones(1))
    time.sleep((1 - rank) / 2)
    work = dist.all_reduce(torch.ones(1000, 1000), async_op=True)
    if rank == 0:
        work.wait()
        time.sleep(3)
    del work

class Slow:
    def __del__(self):
        time.sleep(0.5)

sys.modules["slow to be freed"] = Slow()
ending.run_process(main) if len(sys.argv) == 1 else main()
"""


def test_a_thread_that_needs_the_interpreter_at_the_end_aborts_nothing():
    """With Python's finalisation, before 3.14, rank 1 ends by SIGABRT here."""
    variables = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "PYTHONPATH": str(ROOT),
    }
    ranks = [
        subprocess.Popen([sys.executable, "-c", LEAVING], env=variables | {"RANK": str(rank)}) for rank in range(2)
    ]
    assert [process.wait(120) for process in ranks] == [0, 0]
