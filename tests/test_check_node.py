"""The self-check of a node: outcomes, crashes and hangs with a stand-in for Python, and a full run on the CPU."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_launch import environment

from workbench import check_node
from workbench.check_node import PLAN, Launch, Outcome, collect_outcomes, last_error, make_checks, summary

# Stands in for Python under torchrun with two processes: the name of a check says how it ends.
STUB = """#!/usr/bin/env bash
while [[ $1 != workbench.node_checks ]]; do shift; done
folder=$2; shift 3
write() {
    printf '{"check": "%s", "state": "%s", "detail": "%s", "time": 1}\\n' "$1" "$2" "$3" >>"$folder/outcomes-$4"
}
for check in "$@"; do
    case $check in
        skip) for rank in 0 1; do write skip SKIPPED "not here" $rank; done ;;
        fail) write fail FAIL "ValueError: wrong" 1; exit 1 ;;
        crash) write crash PASS "" 0; kill -SEGV $$ ;;
        import) echo "ModuleNotFoundError: No module named 'x'"; exit 1 ;;
        hang) exec sleep 100 ;;
        *) for rank in 0 1; do write "$check" PASS fine $rank; done ;;
    esac
done
[[ $check != "bad end" ]] || { echo "RuntimeError: group"; exit 1; }
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Makes the checks of these launches with the stand-in; returns their outcomes."""
    (tmp_path / "python").write_text(STUB)
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(check_node, "SECONDS_OF_A_LAUNCH", 3)

    def run(*launches: tuple[str, ...]) -> list[Outcome]:
        return list(make_checks(tmp_path, tuple(Launch(checks) for checks in launches), processes=2))

    return run


def test_what_comes_after_a_failure_is_made_all_the_same(stub):
    outcomes = stub(("first", "fail", "skip", "crash", "import"), ("hang", "last"))
    assert [(outcome.check, outcome.state) for outcome in outcomes] == [
        ("first", "PASS"), ("fail", "FAIL"), ("skip", "SKIPPED"), ("crash", "FAIL"), ("import", "FAIL"),
        ("hang", "FAIL"), ("last", "PASS"),
    ]  # fmt: skip
    details = {outcome.check: outcome.detail for outcome in outcomes}
    assert details["fail"] == "ValueError: wrong"
    assert details["skip"] == "not here"
    assert details["crash"] == "the process ended without a message"
    assert details["import"] == "ModuleNotFoundError: No module named 'x'"
    assert details["hang"] == "still running after 3 s"


def test_processes_that_do_not_end_cleanly_fail_the_last_check(stub):
    assert stub(("first", "bad end")) == [
        Outcome("first", "PASS", "fine"),
        Outcome("bad end", "FAIL", "passed, but then: RuntimeError: group"),
    ]


def test_nothing_is_tried_without_its_foundation(stub, monkeypatch):
    monkeypatch.setattr(check_node, "FOUNDATIONS", ("fail",))
    outcomes = stub(("first", "fail", "second"), ("third",))
    assert [outcome.state for outcome in outcomes] == ["PASS", "FAIL", "SKIPPED", "SKIPPED"]
    assert outcomes[3].detail == "needs 'fail', which failed"


def test_the_first_process_that_failed_says_why(tmp_path):
    records = (
        [("a", "PASS", "", 1), ("b", "FAIL", "connection closed by peer", 9)],
        [
            ("a", "PASS", "", 2),
            ("b", "FAIL", "the cause", 8),
        ],
    )
    for rank, lines in enumerate(records):
        named = [dict(zip(("check", "state", "detail", "time"), line, strict=True)) for line in lines]
        (tmp_path / f"outcomes-{rank}").write_text("".join(json.dumps(record) + "\n" for record in named))
    outcomes = collect_outcomes(tmp_path, ["a", "b", "c"], 2, "unused")
    assert outcomes == [Outcome("a", "PASS", ""), Outcome("b", "FAIL", "the cause")]


def test_the_reason_is_found_in_a_log():
    log = "[rank1]: torch.OutOfMemoryError: CUDA out of memory.\n  traceback : Signal 11 (SIGSEGV) received by PID 7\n"
    assert last_error(log) == "Signal 11 (SIGSEGV) received by PID 7"
    assert last_error(log.splitlines()[0]) == "torch.OutOfMemoryError: CUDA out of memory."


@pytest.mark.parametrize("state", ["FAIL", "PASS"])
def test_lines_log_and_exit_code(tmp_path, monkeypatch, capsys, state):
    def outcomes(folder: Path, plan, processes):
        (folder / "log").write_text("everything")
        yield Outcome("one", state, "detail")
        yield Outcome("two", "SKIPPED", "why")

    log = tmp_path / "new" / "check.log"
    monkeypatch.setattr(check_node, "make_checks", outcomes)
    monkeypatch.setattr(sys, "argv", ["check_node", "--log", str(log)])
    assert check_node.main() == (1 if state == "FAIL" else 0)
    one, two, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"{state} +one +detail" + (rf" \(full log: {log}\)" if state == "FAIL" else ""), one)
    assert re.fullmatch(r"SKIPPED +two +why", two)
    counts = "0 passed, 1 failed" if state == "FAIL" else "1 passed, 0 failed"
    assert last.startswith(f"{counts}, 1 skipped in ")
    assert log.exists() == (state == "FAIL")


def test_the_summary_counts():
    states = ["PASS", "PASS", "FAIL", "SKIPPED"]
    assert summary([Outcome("x", state, "") for state in states], 61.4) == "2 passed, 1 failed, 1 skipped in 61 s"


# A worker with its own checks: one that passes, one that does not apply, one that fails, one that is not reached.
WORKER = """
from workbench import node_checks

def passes(node):
    return node.half

def does_not_apply(node):
    raise node_checks.SkipError("why not")

def fails(node):
    raise ValueError("first line\\nsecond line")

node_checks.CHECKS = {"a": passes, "b": does_not_apply, "c": fails, "d": passes}
node_checks.main()
"""


def test_the_plan_names_the_checks_and_a_worker_writes_their_outcomes(tmp_path):
    from workbench.node_checks import CHECKS

    planned = [check for launch in PLAN for check in launch.checks]
    assert sorted(planned) == sorted(CHECKS)
    assert set(check_node.FOUNDATIONS) <= set(planned)
    command = [sys.executable, "-c", WORKER, str(tmp_path), "1", "a", "b", "c", "d"]
    outcome = subprocess.run(
        command, cwd=ROOT, env=environment(CUDA_VISIBLE_DEVICES=""), capture_output=True, text=True
    )
    assert outcome.returncode == 1
    assert "second line" in outcome.stderr
    assert collect_outcomes(tmp_path, ["a", "b", "c", "d"], 1, "") == [
        Outcome("a", "PASS", "bf16"),
        Outcome("b", "SKIPPED", "why not"),
        Outcome("c", "FAIL", "ValueError: first line"),
    ]


@pytest.mark.slow
def test_the_whole_check_passes_here_and_leaves_nothing_behind(tmp_path):
    temporary, log = tmp_path / "tmp", tmp_path / "check.log"
    temporary.mkdir()
    variables = environment(TMPDIR=temporary)
    del variables["DS_ACCELERATOR"]
    outcome = subprocess.run(
        ["bash", "workbench/check_node.sh", "--log", log], cwd=ROOT, env=variables, capture_output=True, text=True
    )
    print(outcome.stdout)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    *lines, last = outcome.stdout.splitlines()
    assert [line[9:39].strip() for line in lines] == [check for launch in PLAN for check in launch.checks]
    skipped = [line for line in lines if line.startswith("SKIPPED")]
    if not torch.cuda.is_available():
        assert [line[9:13] for line in skipped] == ["fp16"]
    assert last.startswith(f"{len(lines) - len(skipped)} passed, 0 failed, {len(skipped)} skipped in ")
    assert not log.exists()
    assert not list(temporary.iterdir())
