"""The report of a GPU: stages that fail or hang, its tables, and a rehearsal on the CPU."""

import json
import sys
import time
from collections import Counter

import pytest
import torch
from test_launch import call

from data import InputError
from workbench.benchmark import main as benchmark
from workbench.gpu_report import Report, Stage, main
from workbench.gpu_tables import markdown
from workbench.variants import Variant

STEP = {
    "section": "step", "variant": "loramoe", "experts": 8, "rank": 4, "dropout": 0.05, "kernels": "", "batch": 4,
    "length": 1024, "checkpointing": False, "step_ratio": 1.1, "step_ratio_low": 1.0, "step_ratio_high": 1.3,
    "step_seconds": 0.25, "rounds": 7, "tokens_per_second": 16384.0, "peak_allocated": 44 * 2**30, "launches": 5000,
    "copies": 12, "busy_seconds": 0.2,
}  # fmt: skip


@pytest.fixture
def report(tmp_path) -> Report:
    return Report(tmp_path / "report")


def python(name: str, code: str, seconds: float = 30) -> Stage:
    return Stage(name, ("python", "-c", code), seconds, "seen")


def stages(report: Report) -> dict[str, dict]:
    rows = [json.loads(line) for line in (report.results / "stages.jsonl").read_text().splitlines()]
    return {row["name"]: row for row in rows if row["section"] == "stage"}


def test_a_stage_that_fails_hangs_or_comes_too_late_stops_no_other(report):
    report.run(
        [
            [
                python("bad", "raise ValueError('why')"),
                python("good", "print('seen 1'); print('not'); print('seen 2')"),
            ],
            [python("slow", "import time; time.sleep(60)", seconds=1)],
        ],
        time.monotonic() + 30,
    )
    report.run([[python("late", "")]], time.monotonic() + 1)
    found = {name: (row["state"], row["detail"]) for name, row in stages(report).items()}
    assert found == {
        "bad": ("FAIL", "ValueError: why"),
        "good": ("PASS", "seen 1\nseen 2"),
        "slow": ("TIME OUT", "stopped after 1 s"),
        "late": ("LEFT OUT", "no time was left"),
    }
    text = report.write().read_text()
    assert "| slow | TIME OUT | 1 | stopped after 1 s |" in text
    assert "seen 1\nseen 2" in text


def test_a_stage_that_is_stopped_leaves_no_process_behind(report, tmp_path):
    child = f"import time; time.sleep(3); open({str(tmp_path / 'late')!r}, 'w')"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    report.run([[python("parent", code, seconds=1)]], time.monotonic() + 30)
    time.sleep(3)
    assert not (tmp_path / "late").exists()


def test_the_figures_say_which_limit_was_reached():
    peft = STEP | {"variant": "peft_lora", "experts": 1, "rank": 32, "step_seconds": 0.2, "peak_allocated": 55 * 2**30}
    out_of_memory = STEP | {"variant": "loop", "error": "OutOfMemoryError: CUDA out of memory."}
    recomputed = STEP | {"checkpointing": True, "step_seconds": 0.4}
    wide, thin = STEP | {"rank": 8}, STEP | {"experts": 64, "rank": 1, "step_seconds": 0.3}
    rows = [STEP, peft, out_of_memory, recomputed, recomputed | {"variant": "loop", "step_seconds": 1.4}, wide, thin]
    decode = {"section": "decode", "variant": "loramoe", "batch": 1, "prompt_tokens": 128, "new_tokens": 64}
    decode |= {"tokens_per_second": 20.0, "speed_ratio": 0.97}
    plan = {"batch": 4, "length": 1024, "checkpointing": False, "peak": 42 * 2**30, "flops": 1e14}
    device = {"gpu": "NVIDIA H100 80GB HBM3", "gpu_bytes": 8e10, "driver": "driver 580", "date": "2026-11-27"}
    device |= {"packages": {}, "versions": {"python": "3.12"}, "machine": "a machine", "commit": "1234567"}
    rows += [decode, {"section": "plan", **plan}, {"section": "device", **device}]
    text = markdown(rows)
    lines = [line.split(" | ", 1)[1] for line in text.splitlines() if line.startswith("| ") and line.count("|") == 6]
    assert lines[2:10] == [
        "1.2 | 1.08 | 1.100 | reached |",
        "1.0 | 0.85 | 1.250 | **missed** |",
        "3 | 5 | 3.500 | reached |",
        "1.0 | 0.85 | 0.800 | aim |",
        "1.1 | 1.02 | 1.200 | **missed** |",
        "0.8 | 0.95 | 0.970 | aim |",
        "0.1 | 0.05 | 0.045 | aim |",
        "0.25 | 0.1 | 0.011 | aim |",
    ]
    assert "| `loop` | 8 x 4 | 0.05 | OutOfMemoryError: CUDA out of memory. |" in text


def test_the_grid_has_a_row_for_every_variant_and_the_planner_one_for_every_setting(tmp_path, monkeypatch):
    """In bf16, with two values of LORAMOE_KERNELS, one variant of which does not fit the memory."""
    monkeypatch.delenv("LORAMOE_KERNELS", raising=False)
    loop = Variant("loop", dropout=0.05, checkpointing=True)
    build = Variant.model
    monkeypatch.setattr(Variant, "model", lambda self, base: torch.empty(2**60) if self == loop else build(self, base))
    lines = tmp_path / "lines.jsonl"
    flags = ["--quick", "--random", "--rounds", "1", "--kernels", "torch,triton", "--lines", str(lines)]
    benchmark([*flags, "--sections", "ceilings,grid,planner"])
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    steps = [row for row in rows if row["section"] == "step"]
    settings = {(row["batch"], row["length"], row["checkpointing"]) for row in steps}
    assert settings == {(2, 16, False), (2, 16, True), (1, 32, False), (1, 32, True)}
    names = Counter((row["variant"], row["kernels"]) for row in steps)
    assert names["frozen", ""] == 4
    assert names["loop", ""] == 8
    assert names["loramoe", "torch"] == names["loramoe", "triton"] == 4 * 4 + 2
    assert all(row["step_ratio"] > 0 and row["tokens_per_second"] > 0 for row in steps if "error" not in row)
    assert {row["variant"] for row in steps if "error" in row} == {"loop"}
    assert [row["section"] for row in rows].count("plan") == 4
    text = markdown(rows)
    assert "64 experts of rank 1 / 8 of rank 8, triton" in text
    assert "2 x 16, with checkpointing:" in text


def test_a_stage_of_the_rehearsal_ends_in_the_report(tmp_path):
    main(["--quick", "--stages", "planner", "--output", str(tmp_path)])
    assert (tmp_path / "logs" / "planner.log").exists()
    file = tmp_path / "report.md"
    text = file.read_text()
    file.unlink()
    main(["--rewrite", "--output", str(tmp_path)])
    assert file.read_text() == text
    assert "| planner | PASS |" in text
    assert "## The planner" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_one_message(tmp_path):
    outcome = call([sys.executable, "-m", "workbench.gpu_report", "--output", str(tmp_path)])
    assert outcome.returncode == 1
    assert outcome.stderr == "error: torch sees no GPU here; --quick rehearses the report on a CPU, with tiny shapes\n"
    assert not list(tmp_path.iterdir())


def test_an_unknown_stage_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"unknown: grid; choose from .*check_node, main, generate, .*, large"):
        main(["--quick", "--stages", "grid,peers", "--output", str(tmp_path)])


@pytest.mark.slow
def test_the_rehearsal_passes_every_stage(tmp_path):
    main(["--quick", "--output", str(tmp_path), "--seconds", "1200"])
    rows = [json.loads(line) for line in (tmp_path / "results" / "stages.jsonl").read_text().splitlines()]
    states = {row["name"]: row["state"] for row in rows if row["section"] == "stage"}
    assert len(states) == 16
    assert set(states.values()) == {"PASS"}
