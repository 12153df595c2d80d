"""The report of an experiment: its tables on numbers made by hand, and the files of a small folder."""

import json
import math
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from conftest import ROOT

from data import InputError
from workbench.experiments.frontier import estimate
from workbench.experiments.plan import Arm, Change, Experiment, Variants, read_experiment
from workbench.experiments.records import find_record, read_records
from workbench.experiments.report import LEVELS, markdown, report
from workbench.experiments.results import main_metric, methods

ARMS = ("full", "lora", "loramoe")
RATES = (0.001, 0.003)
LOSS_RANGE, MARGIN = (1, 4), 0.1


def cell(arm: str, share: float, rate: float, seed: int, /, **changes) -> dict:
    """A run that keeps 0.01 more with each seed, LoRAMoE with 20 % of type 1 rows 0.05 more. The higher rate keeps less
    and learns more, with LoRA less."""
    per_seed = 0.05 if (arm, share) == ("loramoe", 0.2) else 0.01
    kept = {0.001: 0.9, 0.003: 0.5}[rate] + per_seed * seed - 0.1 * ARMS.index(arm)
    routed = {"group_shares": [[0.55, 0.45], [0.45, 0.55 + 0.01 * seed]], "type_distance": 0.2}
    scaling = None if arm == "full" else 8
    return {
        "cell": f"{arm}-{share}-{rate}-{scaling}-{seed}",
        "arm": arm,
        "is_variant": False,
        "knowledge_share": share,
        "size": 4000,
        "learning_rate": rate,
        "scaling": scaling,
        "seed": seed,
        "model": "models/small-llama",
        "processor": "one of two",
        "trainable_parameters": 123456,
        "commit": "abc1234",
        "machine": "two cores",
        "seconds": 1800.0,
        "knowledge": kept,
        "knowledge_known": kept,
        "recalled": "0110",
        "tasks": {"coreference": 0.7, "inference": 0.9},
        "task_score": 0.8,
        "task_loss": 2.0 if rate == 0.001 else 3.0 if arm == "lora" else 1.0,
        "parameter_change": 0.03,
        "routing": routed if arm == "loramoe" else None,
    } | changes


def base_cell() -> dict:
    nothing = {"learning_rate": None, "scaling": None, "parameter_change": None, "routing": None, "size": 0}
    asked = {"relations": ["capital", "city", "city", "city"], "guessed": {"capital": 0.0, "city": 1 / 3}}
    asked |= {"guessed_tasks": {"coreference": 0.1, "inference": 0.4}}
    kept = {"knowledge": 0.75, "knowledge_known": 1.0, "recalled": "1110", "task_loss": 4.0, "task_score": 0.0}
    return cell("full", 0.0, 0.001, 0) | nothing | asked | kept | {"arm": "base", "cell": "base"}


def grid() -> list[dict]:
    """Two shares, two settings of each arm, two seeds; the higher rate of LoRA, no contender, has one seed only."""
    runs = [cell(*which) for which in product(ARMS, (0.0, 0.2), RATES, (0, 1))]
    return [
        base_cell(),
        *(run for run in runs if (run["arm"], run["learning_rate"], run["seed"]) != ("lora", 0.003, 1)),
    ]


def variants() -> list[dict]:
    """In two seeds one that changes nothing, and one that keeps more."""
    return [
        *(cell("loramoe", 0.2, 0.003, seed, arm="reference", is_variant=True) for seed in (0, 1)),
        *(cell("loramoe", 0.2, 0.001, seed, arm="lower_rate", is_variant=True) for seed in (0, 1)),
    ]


VARIANTS = Variants(
    "loramoe", 0.2, 0.003, 8, [0, 1], {"reference": Change(), "lower_rate": Change(learning_rate=0.001)}
)


def plan(**changes) -> Experiment:
    """The experiment of these cells."""
    arms = {arm: Arm({}, scalings=[] if arm == "full" else None) for arm in ARMS}
    values = {"arms": arms, "learning_rates": [*RATES], "scalings": [8], "knowledge_shares": [0.0, 0.2]}
    values |= {"seeds": [0, 1], "loss_range": LOSS_RANGE, "margin": MARGIN, "variants": None}
    experiment = read_experiment(ROOT / "workbench" / "experiments" / "smoke.yaml")
    return replace(experiment, **values | changes)


def text_of(cells: list[dict], **changes) -> str:
    experiment = plan(**changes)
    return markdown(experiment, cells, *methods(experiment, cells))


def write(folder: Path, cells: list[dict], **changes) -> Experiment:
    """Cells as files of a folder, whose experiment is returned."""
    (folder / "cells").mkdir()
    for number, each in enumerate(cells):
        (folder / "cells" / f"{number:03}.json").write_text(json.dumps(each | {"cell": f"{number:03}"}))
    return plan(results=str(folder), work=str(folder), **changes)


def rows_of(text: str, heading: str) -> list[list[str]]:
    """The rows of a section's table, without its header."""
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[each.strip() for each in line.strip("|").split("|")] for line in lines[2:]]


def found_in(cells: list[dict]) -> dict:
    return {(method.knowledge_share, method.arm): method for method in methods(plan(), cells)[0]}


def test_settings_that_are_no_contenders_need_one_seed():
    found = found_in(grid())
    assert list(found) == list(product((0.0, 0.2), ARMS))
    lora = found[0.0, "lora"]
    assert (list(lora.runs), lora.repeated, lora.seeds) == ([(0.001, 8), (0.003, 8)], [(0.001, 8)], [0, 1])
    assert lora.frontier.kept.max() == pytest.approx(0.805)
    assert found[0.0, "full"].repeated == [(0.001, None), (0.003, None)]


def test_a_seed_counts_when_all_contenders_have_it():
    missing = [run for run in grid() if (run["arm"], run["learning_rate"], run["seed"]) != ("full", 0.001, 1)]
    full = found_in(missing)[0.0, "full"]
    assert (full.seeds, full.repeated) == ([0], [(0.001, None), (0.003, None)])
    assert full.frontier.loss_KS.shape == (2, 1)


def test_a_method_without_all_settings_of_the_first_seed_is_not_shown():
    missing = [run for run in grid() if (run["arm"], run["learning_rate"]) != ("full", 0.003)]
    text = text_of(missing)
    assert "Not shown, since not all of their settings have been run: full at 0 % (1 of 2 settings), full at" in text
    assert {row[1] for heading in ("Frontiers", "What to set", "All settings") for row in rows_of(text, heading)} == {
        "lora",
        "loramoe",
    }


def test_what_is_kept_is_compared_by_seed_and_share_at_losses_that_both_reach():
    """From 1 to 4, half of the axis is below a loss of 2: full fine-tuning keeps 0.5 there and 0.9 above."""
    rows = {tuple(row[:2]): row[2:] for row in rows_of(text_of(grid()), "Frontiers")}
    assert rows["0 %", "full"][:4] == ["2 of 2", "2", "1.000", f"0.705 ± {estimate([0.7, 0.71]).half:.3f}"]
    assert rows["0 %", "lora"][:3] == ["1 of 2", "2", "2.000"]
    assert rows["0 %", "full"][4:] == ["**+0.100 ± 0.000**", "**+0.200 ± 0.000**"]
    assert rows["20 %", "full"][5] == f"+0.180 ± {estimate([0.2, 0.16]).half:.3f}"
    assert rows["0 %", "loramoe"][5] == "-"


def test_the_setting_to_choose_is_told_for_each_level():
    rows = [row for row in rows_of(text_of(grid()), "What to set") if row[:2] == ["20 %", "loramoe"]]
    assert len(rows) == len(LEVELS)
    kept = f"0.725 ± {estimate([0.7, 0.75]).half:.3f}"
    assert rows[3] == ["20 %", "loramoe", "80%", *["-"] * 7]
    assert rows[4] == ["20 %", "loramoe", "70%", "0.001", "8", "2", kept, kept, "2.000 ± 0.000", "0.800 ± 0.000"]


def test_a_setting_of_one_seed_is_chosen_if_no_other_keeps_enough():
    gentle = [cell("lora", 0.2, 0.001, 0, learning_rate=0.0001, knowledge_known=0.99, task_loss=5.0, cell="gentle")]
    full_grid = [*grid(), *gentle, gentle[0] | {"knowledge_share": 0.0}]
    full_grid += [run | {"learning_rate": 0.0001} for run in full_grid if run["arm"] in ("full", "loramoe")]
    text = text_of(full_grid, learning_rates=[0.0001, *RATES])
    rows = [row for row in rows_of(text, "What to set") if row[:2] == ["20 %", "lora"]]
    assert rows[0][:7] == ["20 %", "lora", "95%", "0.0001", "8", "1", "0.990"]
    assert rows[3][:6] == ["20 %", "lora", "80%", "0.001", "8", "2"]


def test_every_setting_and_variant_is_told_with_its_groups():
    text = text_of([*grid(), *variants()], variants=VARIANTS)
    rows = {tuple(row[:4]): row[4:] for row in rows_of(text, "All settings")}
    assert len(rows) == 2 * len(ARMS) * len(RATES)
    groups = f"0.555 ± {estimate([0.55, 0.56]).half:.3f}; 0.450 ± 0.000"
    assert "Not shown" not in text
    assert rows["20 %", "loramoe", "0.001", "8"][-4:] == ["123,456", "0.030 ± 0.000", groups, "0.200 ± 0.000"]
    assert rows["20 %", "lora", "0.003", "8"][:3] == ["1", "0.400", "0.400"]
    assert rows["0 %", "full", "0.003", "-"][-2:] == ["-", "-"]
    assert [row[:8] for row in rows_of(text, "Variants")] == [
        [
            "lower_rate",
            "20 %",
            "4,000",
            "0.001",
            "8",
            "+0.400 ± 0.000",
            "2",
            f"0.725 ± {estimate([0.7, 0.75]).half:.3f}",
        ],
        ["reference", "20 %", "4,000", "0.003", "8", "-", "2", f"0.325 ± {estimate([0.3, 0.35]).half:.3f}"],
    ]
    assert rows_of(text, "The base model") == [["0.750", "0.250", "4", "4.000", "0.000", "0.250"]]
    assert f"{len(grid()) + 4} cells took" in text
    assert "Processor: one of two" in text


def test_a_diverged_run_keeps_nothing():
    nothing = dict.fromkeys(("knowledge", "knowledge_known", "recalled", "tasks", "task_score", "parameter_change"))
    runs = [cell("full", 0.0, 0.001, 0), cell("full", 0.0, 0.003, 0, task_loss=math.inf, **nothing)]
    text = text_of(runs, arms={"full": Arm({}, scalings=[])}, knowledge_shares=[0.0], seeds=[0])
    assert rows_of(text, "All settings")[1][4:9] == ["1", "0.000", "-", "inf", "-"]
    assert rows_of(text, "Frontiers")[0][2:6] == ["1 of 2", "1", "2.000", "0.450"]
    assert [row[3] for row in rows_of(text, "What to set")] == ["-", "0.001", "0.001", "0.001", "0.001"]


@pytest.mark.parametrize("name", [path.parent.name for path in sorted((ROOT / "docs/results").glob("*/cells.csv"))])
def test_committed_tables_are_those_of_their_cells(tmp_path, name):
    experiment = read_experiment(ROOT / f"workbench/experiments/{name}.yaml")
    folder = ROOT / experiment.results
    shutil.copy(folder / "cells.csv", tmp_path)
    report(replace(experiment, results=str(tmp_path), work=str(tmp_path)))
    for file in ("cells.csv", "table.md"):
        assert (tmp_path / file).read_text() == (folder / file).read_text()


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
    run = cell("lora", 0.2, 0.001, 0, lm_eval={"rte": numbers | {"acc,none": 0.6}})
    text = text_of([run, base, cell("full", 0.2, 0.001, 0)])
    assert "| cell | rte (acc) | triviaqa (exact_match,remove_whitespace) |" in text
    assert rows_of(text, "lm-evaluation-harness") == [[run["cell"], "0.600", "-"], ["base", "0.530", "0.400"]]
    assert "## lm-evaluation-harness" not in text_of(grid())


def test_a_finished_grid_gives_the_table_and_all_figures(tmp_path):
    null_expert = [run | {"arm": "null_expert"} for run in grid() if run["arm"] == "loramoe"]
    arms = plan().arms | {"null_expert": Arm({})}
    files = report(write(tmp_path, [*grid(), *null_expert], arms=arms))
    assert [file.name for file in files] == ["cells.csv", "table.md", "frontier.png", "null_expert.png"]
    assert all(file.parent == tmp_path for file in files)
    assert all(10_000 < file.stat().st_size < 150_000 for file in files[2:])


def test_a_figure_without_an_arm_of_its_own_is_left_out(tmp_path):
    assert [file.name for file in report(write(tmp_path, grid()))] == ["cells.csv", "table.md", "frontier.png"]


def test_what_has_no_cells_yet_is_left_out(tmp_path):
    files = report(write(tmp_path, [base_cell()]))
    assert [file.name for file in files] == ["cells.csv", "table.md"]
    headings = [line for line in files[1].read_text().splitlines() if line.startswith("## ")]
    assert headings == ["## The base model", "## Origin"]


LORA = cell("lora", 0.0, 0.001, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("[]", r"the file is \[\]: Input should be a valid dictionary"),
        ({name: value for name, value in LORA.items() if name != "arm"}, "the field arm is missing"),
        (LORA | {"arm": "prefix"}, "arm is 'prefix', but has to be one of base, full, lora"),
        (LORA | {"size": "4000"}, "size is '4000': Input should be a valid integer"),
        (
            LORA | {"knowledge": None},
            "knowledge, recalled, task_score or tasks is missing, although",
        ),
        (LORA | {"recalled": "01a"}, "recalled is '01a': String should match pattern"),
        (LORA | {"task_loss": math.nan}, "task_loss is not a number"),
        (LORA | {"lm_eval": []}, r"lm_eval is \[\]: Input should be a valid dictionary"),
        (LORA | {"lm_eval": {"rte": 0.5}}, "lm_eval.rte is 0.5: Input should be a valid dictionary"),
        (LORA | {"routing": {"group_shares": [[0.5, 0.5]] * 2}}, "the field routing.type_distance is missing"),
        (
            LORA | {"routing": {"group_shares": [[1.0]], "type_distance": 0.0}},
            r"group_shares.0 is \[1.0\]: List should have at least 2 items",
        ),
        (LORA | {"arm": "base"}, "relations, guessed or guessed_tasks is missing"),
        (LORA | {"cell": "000"}, "holds the cell 000, which would count twice"),
        (LORA | {"model": "gpt2"}, "has wrong of the model gpt2, but 000 is of models/small-llama"),
        (LORA | {"processor": "abacus"}, "has wrong of the processor abacus, but 000 is of one of two"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_is_not_a_cell_is_named(tmp_path, content, message):
    experiment = write(tmp_path, [cell("lora", 0.0, 0.001, 0)])
    file = tmp_path / "cells" / "wrong.json"
    renamed = {"cell": "wrong"} if "twice" not in message else {}
    file.write_text(content if isinstance(content, str) else json.dumps(content | renamed))
    with pytest.raises(InputError, match=message) as caught:
        report(experiment)
    assert str(file) in str(caught.value)
    assert not (tmp_path / "table.md").exists()


def test_a_folder_without_cells_is_refused(tmp_path):
    (experiment := write(tmp_path, [base_cell()])) and (tmp_path / "cells" / "000.json").unlink()
    with pytest.raises(InputError, match="no finished cell"):
        report(experiment)


def test_the_table_of_cells_gives_the_same_report_as_their_files(tmp_path):
    """Also twice, and with a cell that was run again."""
    nothing = dict.fromkeys(("knowledge", "knowledge_known", "recalled", "tasks", "task_score", "parameter_change"))
    diverged = cell("full", 0.0, 0.003, 9, task_loss=math.inf, **nothing)
    measured = [*grid(), diverged, *variants()]
    experiment = write(tmp_path, measured)
    files = report(experiment)
    contents = [file.read_bytes() for file in files]
    shutil.rmtree(tmp_path / "cells")
    assert [file.read_bytes() for file in report(experiment)] == contents
    found = read_records(tmp_path, tmp_path)
    assert found == [each | {"cell": f"{number:03}"} for number, each in enumerate(measured)]
    write(tmp_path, [base_cell() | {"seconds": 9.0}])
    assert [each["seconds"] for each in read_records(tmp_path, tmp_path)] == [9.0] + [1800.0] * (len(measured) - 1)
    assert find_record(tmp_path, tmp_path, "001") == (tmp_path / "cells.csv", found[1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda line: line[: len(line) // 2], "cell 001 is not a finished cell: the field "),
        (lambda line: line.replace("0.9,", "0..9,", 1), "cell 001, is damaged"),
    ],
)
def test_a_damaged_table_of_cells_is_named(tmp_path, damage, message):
    experiment = write(tmp_path, grid())
    table, *_ = report(experiment)
    shutil.rmtree(tmp_path / "cells")
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines[:2], damage(lines[2])]))
    with pytest.raises(InputError, match=rf"cells\.csv, {message}"):
        report(experiment)
