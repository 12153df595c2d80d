"""Every run ends as expected: the short form of `bash workbench/soak.sh --launches`, and its faults."""

import json
import os
import signal
import subprocess
import sys

import pytest

from data import InputError
from workbench import launches, soak
from workbench.launches import Launch, Outcome

ERROR = Launch("DDP", "error", "save", 2, (1,), by_torchrun=False)
SIGTERM = Launch("DDP", "SIGTERM", "training step", 1, (0,), by_torchrun=False)
WELL = Launch("DDP", "well", "end", 0, (0,), by_torchrun=True)
ENDED = {
    "an error": (ERROR, Outcome([1, -15], 1.0, False, launches.SAID), []),
    "well": (WELL, Outcome([0], 1.0, False, "LoRAMoE run finished"), []),
    "an abort of the rank without the error": (ERROR, Outcome([-6, 1], 1.0, False, launches.SAID), ["exit codes [-6]"]),
    "an abort after a run that went well": (WELL, Outcome([1, -6], 1.0, False, "LoRAMoE run finished"),
                                            ["exit codes [1, -6]"]),
    "an error that was swallowed": (ERROR, Outcome([0, 0], 1.0, False, ""),
                                    ["exit codes [0, 0]", "no process failed", f"missing message '{launches.SAID}'"]),
    "a hang": (ERROR, Outcome([1, -9], 31.0, True, launches.SAID), ["a hang"]),
    "no event": (WELL, Outcome([0], None, False, "LoRAMoE run finished"), ["the event never happened"]),
    "no checkpoint": (SIGTERM, Outcome([0, 0], 1.0, False, "stopped by a signal"),
                      ["a checkpoint is missing or incomplete"]),
}  # fmt: skip


@pytest.mark.parametrize(("launch", "outcome", "found"), ENDED.values(), ids=ENDED)
def test_what_counts_as_a_fault(tmp_path, launch, outcome, found):
    if launch.kind == "well":
        (tmp_path / "all_results.json").write_text(json.dumps({}))
    assert launches.faults(launch, outcome, tmp_path) == found


def test_every_end_comes_in_every_regime():
    every = launches.plan(3 * len(launches.ENDS), seed=0)
    assert {(launch.regime, launch.kind, launch.place) for launch in every} == {
        (regime, *end) for regime in launches.REGIMES for end in launches.ENDS
    }
    assert {launch.ranks for launch in every if launch.kind == "SIGTERM"} == {(0,), (1,), (0, 1)}
    assert sum(launch.by_torchrun for launch in every) == pytest.approx(len(every) / launches.EVERY, abs=1)


def test_processes_that_stay_are_found_and_ended(tmp_path, monkeypatch):
    """One ends at once with an exit code, the other one sleeps and does not mind SIGTERM."""
    monkeypatch.setattr(launches, "LONGEST_END", 1)
    event = tmp_path / "event"
    sleep = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    sleeper = subprocess.Popen([sys.executable, "-c", sleep], stdout=subprocess.PIPE)
    sleeper.stdout.readline()
    failing = subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"])
    event.touch()
    outcome = launches.watch({failing.pid: 0, sleeper.pid: 1}, event)
    assert outcome.hung
    assert outcome.codes == [1, -signal.SIGABRT]
    sleeper.stdout.close()
    for process in (failing, sleeper):
        process.returncode = 0  # waited for already
    assert not os.path.exists(f"/proc/{sleeper.pid}")


@pytest.mark.slow
def test_runs_end_without_hangs_and_aborts(tmp_path):
    """In a separate process, since pytest's has threads and must not be forked."""
    command = [sys.executable, "-m", "workbench.soak", "--launches", "22", "--folder", str(tmp_path)]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert outcome.returncode == 0, outcome.stdout[-6000:] + outcome.stderr[-2000:]
    assert outcome.stdout.endswith("PASSED: every run ended as expected\n")
    assert not list(tmp_path.iterdir())


def test_bad_counts_are_named():
    with pytest.raises(InputError, match="--launches is -1, but has to be at least 0"):
        soak.main(["--launches", "-1"])
