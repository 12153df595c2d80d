"""Killing a run does no damage: the short form of `workbench/soak.sh`."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data import InputError
from workbench import soak


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_killed_ends_the_same(tmp_path, capsys, processes):
    short = ["--kills", "3", "--during_save", "2", "--max_steps", "60", "--num_processes", str(processes)]
    soak.main([*short, "--folder", str(tmp_path)])
    shown = capsys.readouterr().out
    assert re.search(r"^PASSED: \d+ kills, ", shown, re.MULTILINE)
    assert shown.count("during a save; last checkpoint") >= 2
    assert not list(tmp_path.iterdir())


def test_harm_is_told_and_its_folders_are_kept(tmp_path, monkeypatch):
    """A run that exits at once with a nonzero code stands for any damage."""
    monkeypatch.setattr(soak.Soak, "command", lambda *arguments: [sys.executable, "-c", "raise SystemExit('broken')"])
    with pytest.raises(SystemExit, match=r"FAILED after 0 kills(.|\n)*exit code 1:\nbroken"):
        soak.main(["--folder", str(tmp_path)])
    assert len(list(tmp_path.iterdir())) == 1


def test_the_whole_process_tree_is_killed():
    """A process whose child has its own session, as torchrun's workers do."""
    program = (
        "import subprocess; print(subprocess.Popen(['sleep', '60'], start_new_session=True).pid, flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        child = Path(f"/proc/{int(parent.stdout.readline())}/stat")
        soak.kill_tree(parent.pid)
        assert parent.wait(10) == -signal.SIGKILL
        limit = time.monotonic() + 10
        while child.exists() and ") Z " not in child.read_text() and time.monotonic() < limit:
            time.sleep(0.01)
        assert not child.exists() or ") Z " in child.read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kills", "0"], "--kills is 0, but has to be at least 1"),
        (["--kills", "3", "--during_save", "4"], "--during_save is 4, but has to be between 0 and the kills, 3"),
        (["--model", "models/none"], "--model models/none: no such folder"),
    ],
)
def test_bad_flags_are_named(flags, message):
    with pytest.raises(InputError, match=message):
        soak.main(flags)
