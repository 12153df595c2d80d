"""`run_loramoe.sh` and `scripts/launch.py` with a stand-in for train.py: signals, output and exit codes."""

import fcntl
import os
import signal
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_launch import environment, stand_in_repository

from scripts import launch

# Begins every stand-in: both steps write what they do into files; the first makes the folder of the run.
BEGINNING = """import os, signal, subprocess, sys, time
from pathlib import Path
preparing = "--prepare_only" in sys.argv
Path("outputs/default").mkdir(parents=True, exist_ok=True)
def touch(name): Path(name).touch()
"""
PREPARES_FOR_LONG = """
try:
    touch("started")
    time.sleep(60)
except KeyboardInterrupt:
    touch("cleaned up")
    sys.exit(1)
"""
# It is deaf at first, as train.py is while it imports.
TRAINS_UNTIL_SIGTERM = """
if not preparing:
    touch("started")
    time.sleep(1.5)
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    while not stopped and not Path("finish").exists():
        time.sleep(0.01)
    touch("saved" if stopped else "outputs/default/all_results.json")
"""


@pytest.fixture
def started(tmp_path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts run_loramoe.sh with a program as train.py, and waits for the file `started`, if the program makes one."""
    scripts = []

    def start(program: str, **options) -> subprocess.Popen:
        stand_in_repository(tmp_path, train=BEGINNING + program)
        options = {"stdout": subprocess.PIPE, "start_new_session": True, "env": environment()} | options
        scripts.append(subprocess.Popen(["bash", "run_loramoe.sh"], cwd=tmp_path, **options))
        while 'touch("started")' in program and not (tmp_path / "started").exists():
            assert scripts[-1].poll() is None
            time.sleep(0.01)
        return scripts[-1]

    yield start
    (tmp_path / "finish").touch()
    for script in scripts:
        with script:  # closes its output
            script.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_a_signal_before_training_interrupts_the_step_and_waits_for_it(started, tmp_path, send, number):
    script = started(PREPARES_FOR_LONG, preexec_fn=partial(signal.signal, number, signal.SIG_DFL))
    send(script.pid, number)
    assert script.wait(timeout=10) == 128 + signal.SIGTERM
    assert (tmp_path / "cleaned up").exists()


def test_sigterm_interrupts_a_step_of_a_background_job(started, tmp_path):
    """A shell without job control has its background jobs ignore SIGINT."""
    script = started(PREPARES_FOR_LONG, preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_IGN))
    script.terminate()
    assert script.wait(timeout=10) == 128 + signal.SIGTERM
    assert (tmp_path / "cleaned up").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_that_comes_early_reaches_the_trainer_in_the_end(started, tmp_path, number):
    script = started(TRAINS_UNTIL_SIGTERM, preexec_fn=partial(signal.signal, number, signal.SIG_DFL))
    os.killpg(script.pid, number)
    assert script.wait(timeout=10) == 128 + signal.SIGTERM
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("key", [b"\x03", b"\x1c", None], ids=["Ctrl-C", "Ctrl-backslash", "closed"])
def test_the_terminal_stops_a_run(started, tmp_path, key):
    terminal, theirs = os.openpty()

    def control() -> None:
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        fcntl.ioctl(0, termios.TIOCSCTTY)

    program = TRAINS_UNTIL_SIGTERM + "print('the end')\n"
    script = started(program, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=control)
    os.close(theirs)
    if key:
        os.write(terminal, key)
    else:
        os.close(terminal)
    assert script.wait(timeout=10) == 128 + signal.SIGTERM
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "outputs" / "default" / "train.log").read_text() == "the end\n"
    if key:
        assert os.read(terminal, 1000).endswith(b"the end\r\n")
        os.close(terminal)


def test_a_run_that_finishes_after_the_signal_ends_with_0(started, tmp_path):
    script = started(TRAINS_UNTIL_SIGTERM)
    (tmp_path / "outputs" / "default" / "all_results.json").touch()
    script.terminate()
    assert script.wait(timeout=10) == 0


def test_a_signal_that_the_caller_ignores_stops_nothing(started, tmp_path):
    """As under nohup."""
    script = started(TRAINS_UNTIL_SIGTERM, preexec_fn=partial(signal.signal, signal.SIGHUP, signal.SIG_IGN))
    script.send_signal(signal.SIGHUP)
    time.sleep(2)
    (tmp_path / "finish").touch()
    assert script.wait(timeout=10) == 0
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("disposition", [signal.SIG_DFL, signal.SIG_IGN])
@pytest.mark.parametrize(
    ("end", "code"), [("sys.exit(7)", 7), ("os.kill(os.getpid(), signal.SIGKILL)", 128 + signal.SIGKILL)]
)
@pytest.mark.parametrize("step", ["preparing", "not preparing"])
def test_the_exit_code_is_that_of_the_step(started, step, end, code, disposition):
    """Whatever the caller does with SIGCHLD."""
    script = started(f"if {step}: {end}", preexec_fn=partial(signal.signal, signal.SIGCHLD, disposition))
    assert script.wait(timeout=10) == code


def test_output_comes_at_once_and_unchanged(started, tmp_path):
    """A progress bar writes no line ends; the bytes need not be text."""
    script = started("if not preparing: os.write(2, b'\\r 10%\\xff'); time.sleep(1); os.write(1, b'\\r 20%')")
    said = b""
    while not said.endswith(b"%\xff"):
        said += os.read(script.stdout.fileno(), 100)
    assert script.poll() is None
    assert script.stdout.read() == b"\r 20%"
    assert (tmp_path / "outputs" / "default" / "train.log").read_bytes() == b"\r 10%\xff\r 20%"


def test_a_run_goes_on_if_nobody_reads_its_output(started, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    script = started("if not preparing: print('one'); time.sleep(0.1); print('two')", stdout=writer)
    os.close(writer)
    assert script.wait(timeout=10) == 0
    assert (tmp_path / "outputs" / "default" / "train.log").read_text() == "one\ntwo\n"


def test_a_process_that_outlives_the_trainer_delays_the_end_for_seconds_only(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "SECONDS_FOR_OUTPUT", 0.2)
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text("import subprocess, sys; subprocess.Popen(['sleep', '5']); sys.exit(7)")
    begin = time.monotonic()
    assert launch.train(SimpleNamespace(output_dir="."), [], launcher=[]) == 7
    assert time.monotonic() - begin < 4


def test_the_children_of_a_process_are_found():
    with subprocess.Popen(["sleep", "60"]) as child:
        assert child.pid in launch.children(os.getpid())
        child.kill()
    assert child.pid not in launch.children(os.getpid())
