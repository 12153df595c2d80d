"""The report of an experiment: comparisons on numbers made by hand, and the table and figures of a small folder."""

import json
import math
import shutil
from itertools import product
from pathlib import Path

import pytest

from data import InputError
from workbench.experiments.records import find_record, read_records
from workbench.experiments.report import markdown, report
from workbench.experiments.results import (
    Estimate,
    by_arm,
    estimate,
    largest_common,
    main_metric,
    matched_knowledge,
    matching_targets,
    outcome,
    paired_differences,
    paired_growth,
    runs_over_sizes,
)

TASKS = ("coreference", "inference", "closed_book_qa")
NO_TASKS = {"tasks": {"coreference": 0.0, "inference": 0.0}, "task_score": 0.0, "task_loss": 4.0}
BASE_POINT = {"step": 0, "rows": 0, "knowledge": 0.97, "knowledge_known": 1.0, "recalled": "1110", **NO_TASKS}
TARGETS = {"task_score": 0.8, "task_loss": 1.0}
FORGETTING = {"full": 0.3, "lora": 0.5, "loramoe_beta0": 0.2, "loramoe": 0.1}


def path_of(*points: tuple[float, float]) -> list[dict]:
    """Checkpoints of these task scores and amounts of knowledge."""
    return [BASE_POINT | {"task_score": score, "knowledge": knowledge} for score, knowledge in points]


def cell(arm: str, size: int, share: float, seed: int, /, **changes) -> dict:
    """A run that forgets more the more rows it sees, and by 0.01 less with each seed."""
    lost = FORGETTING[arm] * math.log10(size) / 6 - 0.01 * seed
    last = {"step": 100, "rows": size, "knowledge": 0.97 - lost, "knowledge_known": 1 - lost}
    last |= {"task_score": 0.8, "task_loss": 1.0, "recalled": "0110"}
    last["tasks"] = {"coreference": 0.7 + 0.02 * seed, "inference": 0.9 - 0.02 * seed}
    middle = BASE_POINT | {"step": 50, "rows": size // 2, "knowledge": 0.97 - lost / 2}
    middle |= {"task_score": 0.4, "task_loss": 2.0}
    middle["tasks"] = {"coreference": 0.2 + 0.02 * seed, "inference": 0.6 - 0.02 * seed}
    shares = [[0.45, 0.55], [0.55, 0.45]] if arm == "loramoe_beta0" else [[0.55, 0.45], [0.45, 0.55 + 0.01 * seed]]
    log = [{"step": step, "loss": 1.0, "routing_cv": step / (100 if arm == "loramoe" else 30)} for step in (10, 50, 90)]
    routed = {"experts_by_task": {task: [0.1, 0.4, 0.2, 0.3] for task in TASKS}, "group_shares": shares}
    routed["type_distance"] = 0.2
    return {
        "cell": f"{arm}-{size}-{share}-{seed}",
        "stage": "grid",
        "arm": arm,
        "size": size,
        "knowledge_share": share,
        "seed": seed,
        "learning_rate": 1e-3,
        "model": "models/small-llama",
        "trainable_parameters": 123456,
        "commit": "abc1234",
        "machine": "two cores",
        "seconds": 1800.0,
        "checkpoints": [BASE_POINT, middle, BASE_POINT | last],
        "parameter_change": 0.03,
        "routing": routed if arm.startswith("loramoe") else None,
        "log": log if arm.startswith("loramoe") else [{"step": 10, "loss": 1.0}],
    } | changes


def base_cell() -> dict:
    nothing = {"learning_rate": None, "parameter_change": None, "routing": None, "log": []}
    asked = {"relations": ["capital", "city", "city", "city"], "guessed": {"capital": 0.0, "city": 1 / 3}}
    asked |= {"guessed_tasks": {"coreference": 0.1, "inference": 0.4}}
    return cell("full", 1, 0.0, 0) | nothing | asked | {"arm": "base", "size": 0, "checkpoints": [BASE_POINT]}


def grid() -> list[dict]:
    """Two shares, two sizes, two seeds; the last seed of the largest size is not finished, nor its full fine-tuning."""
    runs = [cell(*which) for which in product(FORGETTING, (4000, 16000), (0.0, 0.2), (0, 1))]
    unfinished = [run for run in runs if run["size"] == 16000 and (run["seed"] == 1 or run["arm"] == "full")]
    return [base_cell(), *(run for run in runs if run not in unfinished)]


def tuning() -> list[dict]:
    losses = {1e-4: 2.0, 1e-3: 1.5, 1e-2: math.nan}
    return [
        cell("lora", 4000, 0.0, 9, stage="tuning", learning_rate=rate, checkpoints=[BASE_POINT | {"task_loss": loss}])
        for rate, loss in losses.items()
    ]


def ablations() -> list[dict]:
    return [cell("loramoe", 4000, 0.2, 0, stage="ablation", arm=f"experts-{number}") for number in (16, 4)]


def write(folder: Path, cells: list[dict]) -> Path:
    (folder / "cells").mkdir()
    for number, each in enumerate(cells):
        (folder / "cells" / f"{number:03}.json").write_text(json.dumps(each | {"cell": f"{number:03}"}))
    return folder


@pytest.mark.parametrize(
    ("target", "expected"),
    [(0.1, None), (0.2, 0.8), (0.3, 0.7), (0.4, 0.6), (0.5, None)],
    ids=["before the first checkpoint", "at a checkpoint", "between checkpoints", "at the best checkpoint", "never"],
)
def test_knowledge_is_taken_at_the_first_crossing_of_the_target(target, expected):
    """The score falls below 0.2 again and crosses 0.3 twice: only the first crossing counts."""
    checkpoints = path_of((0.0, 0.9), (0.2, 0.8), (0.4, 0.6), (0.1, 0.5), (0.35, 0.1))
    expected = expected if expected is None else pytest.approx(expected)
    assert matched_knowledge(checkpoints, "task_score", target) == expected
    losses = [point | {"task_loss": 4 - 2 * point["task_score"]} for point in checkpoints]
    assert matched_knowledge(losses, "task_loss", 4 - 2 * target) == expected
    assert matched_knowledge(checkpoints, "task_score", None) is None


def test_the_ends_of_runs_are_one_run_over_sizes():
    """At the sizes that both arms have with both seeds."""
    runs = [cell(arm, size, 0.2, seed) for arm in ("lora", "full") for size in (64, 16, 4) for seed in (0, 1)]
    found = runs_over_sizes([base_cell(), *runs[2:], cell("lora", 4, 0.0, 0)])
    assert found.keys() == {(0.2, 16)}
    assert [(run["arm"], run["seed"]) for run in found[0.2, 16]] == [("lora", 0), ("lora", 1), ("full", 0), ("full", 1)]
    ends = {run["size"]: run["checkpoints"][-1] for run in runs if (run["arm"], run["seed"]) == ("full", 1)}
    assert found[0.2, 16][-1]["checkpoints"] == [BASE_POINT, ends[4], ends[16]]


def test_growth_is_taken_by_seed():
    runs = [base_cell(), *(cell("lora", size, 0.2, seed) for size in (16, 4) for seed in (0, 1))][:-1]
    knowledge = {(run["size"], run["seed"]): outcome(run, {})["knowledge"] for run in runs}
    assert paired_growth(runs, (0, 4), "knowledge") == [knowledge[4, 0] - 0.97]
    assert paired_growth(runs, (0, 16), "knowledge") == [knowledge[16, seed] - 0.97 for seed in (0, 1)]
    assert paired_growth(runs, (4, 16), "knowledge") == [knowledge[16, 0] - knowledge[4, 0]]


def test_the_targets_are_what_every_run_reaches_at_its_best():
    def run(arm: str, *points: tuple[float, float]) -> dict:
        measured = [BASE_POINT | {"task_score": score, "task_loss": loss} for score, loss in points]
        return {"arm": arm, "checkpoints": [BASE_POINT, *measured]}

    runs = [run("base"), run("lora", (0.6, 3.0), (0.5, 2.5)), run("full", (0.9, 2.6))]
    assert matching_targets(runs) == {"task_score": 0.6, "task_loss": 2.6}
    assert matching_targets([*runs, run("lora", (0.0, 3.5))]) == {"task_loss": 3.5}
    assert matching_targets([*runs, run("lora", (0.1, 4.5))]) == {"task_score": 0.1}
    assert matching_targets(runs[:1]) == {}


def test_intervals_are_those_of_the_t_distribution():
    """t at 0.975: 12.706 with one degree of freedom, 4.303 with two."""
    assert estimate([]) is None
    assert estimate([None]) is None
    assert estimate([0.5]) == Estimate(0.5, None, 1)
    assert estimate([1.0, None, 2.0]) == Estimate(1.5, pytest.approx(12.7062 * math.sqrt(0.5) / math.sqrt(2)), 2)
    assert estimate([1.0, 2.0, 3.0]) == Estimate(2.0, pytest.approx(4.30265 / math.sqrt(3)), 3)


def test_differences_are_taken_by_seed_where_both_arms_have_it():
    runs = [cell("loramoe", 4000, 0.0, seed) for seed in (0, 1, 2)]
    runs += [cell("lora", 4000, 0.0, seed) for seed in (2, 0, 3)]
    found = paired_differences(runs, ("loramoe", "lora"), "knowledge", TARGETS)
    knowledge = {(run["arm"], run["seed"]): outcome(run, TARGETS)["knowledge"] for run in runs}
    assert found == [knowledge["loramoe", seed] - knowledge["lora", seed] for seed in (0, 2)]
    assert paired_differences(runs, ("loramoe", "lora"), "matched_task_score", {"task_score": 0.9}) == [None, None]
    assert paired_differences(runs, ("loramoe", "full"), "knowledge", TARGETS) == []


def test_runs_are_compared_at_the_largest_size_that_all_arms_have():
    found = largest_common(grid()[1:], FORGETTING)
    assert {place: sorted(by_arm(runs)) for place, runs in found.items()} == {
        (0.0, 4000): sorted(FORGETTING),
        (0.2, 4000): sorted(FORGETTING),
    }
    assert largest_common(grid(), ["lora", "loramoe"]).keys() == {(0.0, 16000), (0.2, 16000)}
    assert largest_common(grid(), ["lora", "none"]) == {}


def rows_of(text: str, heading: str) -> list[list[str]]:
    """The rows of a section's table, without its header."""
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[each.strip() for each in line.strip("|").split("|")] for line in lines[2:]]


def test_the_table_holds_every_arm_with_its_interval():
    rows = rows_of(markdown(grid()), "World knowledge and task scores")
    assert rows[0][:3] == ["0 %", "0", "base"]
    assert len(rows) == 1 + 2 * (4 + 3)
    (lora,) = (row for row in rows if row[:3] == ["20 %", "4,000", "lora"])
    expected = estimate(outcome(cell("lora", 4000, 0.2, seed), TARGETS)["knowledge"] for seed in (0, 1))
    knowledge = f"{expected.mean:.3f} ± {expected.half:.3f}"
    assert lora[3:7] == ["2", "0.001", "123,456", knowledge]
    assert lora[8:14] == ["0.800 ± 0.000", "0.800", knowledge, "1.000 ± 0.000", "1.000", knowledge]
    assert lora[14:] == ["0.030 ± 0.000"]
    (alone,) = (row for row in rows if row[:3] == ["20 %", "16,000", "lora"])
    assert alone[3] == "1"
    assert "±" not in "".join(alone)


def test_differences_that_hold_no_zero_are_bold():
    rows = rows_of(markdown(grid()), "Differences between arms")
    assert len(rows) == 2 * (4 + 2)
    (row,) = (row for row in rows if row[:3] == ["0 %", "4,000", "loramoe - loramoe_beta0"])
    gain = 0.1 * math.log10(4000) / 6
    assert row[3:] == ["2", *[f"**+{gain:.3f} ± 0.000**"] * 4, *["+0.000 ± 0.000"] * 2]


def test_knowledge_is_reported_by_relation_with_the_score_of_guessing():
    rows = rows_of(markdown(grid()), "Knowledge by relation")
    trained = len(FORGETTING)
    assert rows[0] == ["0 %", "4,000", "capital", "1", "0.000", "1.000", *["0.000 ± 0.000"] * trained]
    assert rows[1] == ["0 %", "4,000", "city", "3", "0.333", "0.667", *["0.667 ± 0.000"] * trained]
    assert rows[2][:6] == ["0 %", "4,000", "all", "4", "0.250", "0.750"]


def test_growth_and_matching_over_sizes_are_told():
    runs = [cell(arm, size, 0.2, seed) for arm in ("lora", "loramoe") for size in (1000, 4000) for seed in (0, 1)]
    text = markdown([base_cell(), *runs])
    lost = FORGETTING["lora"] * (math.log10(4000) - 3) / 6
    growth = rows_of(text, "Growing numbers of rows")
    assert [row[:4] for row in growth[:2]] == [["20 %", "lora", step, "2"] for step in ("0 to 1,000", "1,000 to 4,000")]
    assert growth[1][4:] == [*[f"**-{lost:.3f} ± 0.000**"] * 2, "+0.000 ± 0.000", "+0.000 ± 0.000"]
    over = rows_of(text, "Matched over numbers of rows")
    assert [row[2] for row in over] == ["lora", "loramoe", "loramoe - lora"]
    assert over[0][:6] == ["20 %", "4,000", "lora", "2", "0.800", "1.000"]


def test_what_comes_back_along_a_training_is_told():
    """The base knows three facts of four; the first checkpoint has one of them, the end that one and another."""
    digits = ("1110", "0010", "0111")
    points = [BASE_POINT | {"recalled": each, "rows": 2000 * n} for n, each in enumerate(digits)]
    for point in points[1:]:
        point["knowledge"] = point["recalled"].count("1") / 4
    (row,) = rows_of(markdown([base_cell(), cell("lora", 4000, 0.2, 0, checkpoints=points)]), "Along the trainings")
    assert row == ["20 %", "4,000", "lora", "1", "2,000", "0.250", "0.750", "+0.500", "0.667", "0.500"]


def test_each_task_is_followed_from_the_base_model_to_the_end():
    """At 4,000 rows, the largest size with full fine-tuning, and its two seeds."""
    text = markdown([*grid(), *tuning(), *ablations()])
    assert [row[:5] for row in rows_of(text, "The tasks one by one")] == [
        [share, "4,000", task, guess, "0.000"]
        for share in ("0 %", "20 %")
        for task, guess in (("coreference", "0.100"), ("inference", "0.400"))
    ]
    half = estimate([0.70, 0.72]).half
    assert rows_of(text, "The tasks one by one")[0][5:] == ["0.210", f"0.710 ± {half:.3f}"] * len(FORGETTING)
    header = next(line for line in text.splitlines() if "trained |" in line)
    stages = [f"{arm}, {stage}" for arm in by_arm(grid()[1:]) for stage in ("first", "trained")]
    assert header == f"| type 1 rows | rows | task | guessed | base | {' | '.join(stages)} |"


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ({"acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.6}, "acc_norm,none"),
        ({"f1,none": 0.6, "em,none": 0.5, "em_stderr,none": 0.1}, "f1,none"),
        ({"exact_match,strict": 0.4, "exact_match,flexible": 0.5, "acc,none": 0.6}, "exact_match,strict"),
        ({"sample_len": 10, "word_perplexity,none": 9.0, "word_perplexity_stderr,none": "N/A"}, "word_perplexity,none"),
        ({"alias": "group", "acc": 0.5}, "acc"),
        ({"alias": "group", "sample_len": 10}, None),
    ],
    ids=["preferred", "other", "first filter", "none of the preferred", "without a filter", "no number"],
)
def test_one_number_of_the_harness_stands_for_a_task(numbers, expected):
    assert main_metric(numbers) == expected


def test_the_harness_has_a_column_for_each_task():
    """Cells without its numbers have no row, tasks without a number no column."""
    numbers = {"name": "rte", "sample_len": 277, "acc,none": 0.53, "acc_stderr,none": 0.03}
    recalled = {"exact_match,remove_whitespace": 0.4, "exact_match_stderr,remove_whitespace": "N/A"}
    base = base_cell() | {"lm_eval": {"rte": numbers, "triviaqa": recalled, "group": {"alias": "group"}}}
    runs = [
        cell("lora", 4000, 0.2, seed, lm_eval={"rte": numbers | {"acc,none": accuracy}})
        for seed, accuracy in enumerate((0.6, 0.8))
    ]
    changed = [run | {"lm_eval": {"rte": numbers}} for run in ablations()[:1]]
    tried = [trial | {"lm_eval": {"rte": numbers}} for trial in tuning()]
    text = markdown([*runs, *tried, *changed, base, cell("full", 4000, 0.2, 0)])
    assert "| type 1 rows | rows | arm | seeds | rte (acc) | triviaqa (exact_match,remove_whitespace) |" in text
    assert rows_of(text, "lm-evaluation-harness") == [
        ["0 %", "0", "base", "1", "0.530", "0.400"],
        ["20 %", "4,000", "lora", "2", f"0.700 ± {estimate([0.6, 0.8]).half:.3f}", "-"],
        ["20 %", "4,000", "experts-16", "1", "0.530", "-"],
    ]
    assert "## lm-evaluation-harness" not in markdown(grid())


def test_expert_groups_trials_ablations_and_origin_are_told():
    text = markdown([*grid(), *tuning(), *ablations()])
    groups = {tuple(row[:3]): row[3:] for row in rows_of(text, "Expert groups")}
    assert groups["0 %", "16,000", "loramoe"] == ["1", "0.550", "0.450", "+0.100", "0.200"]
    assert groups["0 %", "16,000", "loramoe_beta0"] == ["1", "0.450", "0.550", "-0.100", "0.200"]
    assert groups["20 %", "4,000", "experts-4"][-1] == "0.200"
    trials = rows_of(text, "Learning rates")
    assert trials == [
        ["lora", "0.0001", "2.000", "0.970", ""],
        ["lora", "0.001", "1.500", "0.970", "chosen"],
        ["lora", "0.01", "nan", "0.970", ""],
    ]
    assert [row[2] for row in rows_of(text, "Ablations")] == [*FORGETTING, "experts-4", "experts-16"]
    differences = rows_of(text, "Differences from ablations")
    assert [row[2:5] for row in differences] == [[f"loramoe - experts-{number}", "1", "+0.000"] for number in (4, 16)]
    assert f"{len(grid()) + 5} cells took" in text
    assert "Commits: abc1234" in text


def test_a_value_that_some_runs_lack_is_said():
    runs = [cell("lora", 4000, 0.0, seed) for seed in (0, 1)]
    runs[0]["checkpoints"][-1]["knowledge_known"] = None
    (row,) = rows_of(markdown(runs), "World knowledge and task scores")
    assert row[7].endswith("(1 of 2 runs)")


def test_a_base_model_that_knows_no_fact_is_reported():
    """Shares of the known facts are empty, and all other fields as usual."""
    nothing = {"knowledge_known": None, "recalled": "0000"}
    text = markdown([each | {"checkpoints": [point | nothing for point in each["checkpoints"]]} for each in grid()])
    assert {row[7] for row in rows_of(text, "World knowledge and task scores")} == {"-"}
    assert {row[5] for row in rows_of(text, "Differences between arms")} == {"-"}
    growth = rows_of(text, "Growing numbers of rows")
    assert growth[0][:6] == ["0 %", "full", "0 to 4,000", "2", growth[0][4], "-"]
    assert growth[0][4].startswith("**-0.175")
    assert {tuple(row[-2:]) for row in rows_of(text, "Along the trainings")} == {("-", "-")}


def test_a_finished_grid_gives_the_table_and_all_figures(tmp_path):
    files = report(tmp_path, write(tmp_path, [*grid(), *tuning()]))
    assert [file.name for file in files] == [
        "cells.csv",
        "table.md",
        "knowledge.png",
        "tasks.png",
        "trade_off.png",
        "trade_off_by_loss.png",
        "rates.png",
        "experts.png",
        "balance.png",
    ]
    assert all(file.parent == tmp_path for file in files)
    assert all(10_000 < file.stat().st_size < 150_000 for file in files[2:])


def test_what_has_no_cells_yet_is_left_out(tmp_path):
    files = report(tmp_path, write(tmp_path, [base_cell(), *tuning()]))
    assert [file.name for file in files] == ["cells.csv", "table.md", "rates.png"]
    headings = [line for line in files[1].read_text().splitlines() if line.startswith("## ")]
    assert headings == ["## World knowledge and task scores", "## Learning rates", "## Origin"]


def without(field: str) -> dict:
    return {name: value for name, value in cell("lora", 4000, 0.0, 1).items() if name != field}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("[]", r"the file is \[\]: Input should be a valid dictionary"),
        (without("arm"), "the field arm is missing"),
        (cell("lora", 4000, 0.0, 1, arm="prefix"), "arm is 'prefix', but has to be one of base, full, lora"),
        (cell("lora", 4000, 0.0, 1, stage="final"), "stage is 'final': Input should be 'grid'"),
        (cell("lora", 4000, 0.0, 1, size="4000"), "size is '4000': Input should be a valid integer"),
        (cell("lora", 4000, 0.0, 1, checkpoints=[]), r"checkpoints is \[\]: List should have at least 1 item"),
        (cell("lora", 4000, 0.0, 1, checkpoints=[{"knowledge": 1}]), "field checkpoints.0.knowledge_known is missing"),
        (cell("lora", 4000, 0.0, 1, checkpoints=[BASE_POINT]), "the start of the training alone"),
        (cell("lora", 4000, 0.0, 1, lm_eval=[]), r"lm_eval is \[\]: Input should be a valid dictionary"),
        (cell("lora", 4000, 0.0, 1, lm_eval={"rte": 0.5}), "lm_eval.rte is 0.5: Input should be a valid dictionary"),
        (cell("lora", 4000, 0.0, 1, routing={"group_shares": []}), "the field routing.experts_by_task is missing"),
        (
            cell("lora", 4000, 0.0, 1, routing={"experts_by_task": {}, "group_shares": [[1.0]]}),
            r"group_shares.0 is \[1.0\]: List should have at least 2 items",
        ),
        (
            cell("lora", 4000, 0.0, 1, checkpoints=[BASE_POINT, BASE_POINT | {"knowledge": None}]),
            "only a trial may lack",
        ),
        (cell("lora", 4000, 0.0, 1, arm="base"), "relations, guessed or guessed_tasks is missing"),
        (cell("lora", 4000, 0.0, 1, cell="000"), "holds the cell 000, which would count twice"),
        (cell("lora", 4000, 0.0, 1, model="gpt2"), "has wrong of the model gpt2, but 000 is of models/small-llama"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_is_not_a_cell_is_named(tmp_path, content, message):
    write(tmp_path, [cell("lora", 4000, 0.0, 0)])
    file = tmp_path / "cells" / "wrong.json"
    renamed = {"cell": "wrong"} if "twice" not in message else {}
    file.write_text(content if isinstance(content, str) else json.dumps(content | renamed))
    with pytest.raises(InputError, match=message) as caught:
        report(tmp_path, tmp_path)
    assert str(file) in str(caught.value)
    assert not (tmp_path / "table.md").exists()


def test_a_folder_without_cells_is_refused(tmp_path):
    with pytest.raises(InputError, match="no finished cell"):
        report(tmp_path, tmp_path)


def test_the_table_of_cells_gives_the_same_report_as_their_files(tmp_path):
    """Also twice, and with a cell that was run again."""
    lacking = cell("lora", 4000, 0.0, 9, stage="tuning", learning_rate=1.0, checkpoints=[dict(BASE_POINT)])
    del lacking["checkpoints"][0]["recalled"]
    diverged = BASE_POINT | {"knowledge": None, "task_score": None, "task_loss": math.inf}
    measured = [*grid(), lacking, cell("lora", 4000, 0.0, 9, stage="tuning", checkpoints=[diverged]), *ablations()]
    work = write(tmp_path, measured)
    files = report(tmp_path, work)
    contents = [file.read_bytes() for file in files]
    shutil.rmtree(work / "cells")
    assert [file.read_bytes() for file in report(tmp_path, work)] == contents
    found = read_records(tmp_path, work)
    assert [each | {"log": []} for each in found] == [
        each | {"cell": f"{number:03}", "log": []} for number, each in enumerate(measured)
    ]
    write(work, [base_cell() | {"seconds": 9.0}])
    assert [each["seconds"] for each in read_records(tmp_path, work)] == [9.0] + [1800.0] * (len(measured) - 1)
    assert find_record(tmp_path, work, "001") == (tmp_path / "cells.csv", found[1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda line: line[: len(line) // 2], "cell 001 is not a finished cell: the field model is missing"),
        (lambda line: line.replace("[0.97,", "[,"), "cell 001, is damaged"),
    ],
)
def test_a_damaged_table_of_cells_is_named(tmp_path, damage, message):
    table, *_ = report(tmp_path, write(tmp_path, grid()))
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines[:2], damage(lines[2])]))
    with pytest.raises(InputError, match=rf"cells\.csv, {message}"):
        report(tmp_path, tmp_path / "nothing")
