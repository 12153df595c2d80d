"""The experiments: their cells, the rows that these train on, and that an interrupted one continues at its cell."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, filled_model, tiny_model
from filelock import FileLock
from transformers import GPT2Config, LlamaConfig

from data import InputError
from data.facts import fact_row, load_facts
from data.rows import row_problem
from data.tasks import MOST_ROWS, TASKS, make_rows
from inference.routing import Routing
from loading.arguments import ModelArguments, parse_arguments
from loading.command_line import parse_flags
from scripts import prepare_data
from scripts.prepare_data import write_rows
from training.run_folder import RunFolder
from transformers_patch import AutoModelForCausalLM
from workbench import experiment as verb
from workbench.experiments import mixture as mixture_module
from workbench.experiments.cell import guessed, recalls, run_cell, train_flags, type_distance
from workbench.experiments.mixture import check_rows, mixture, probe_rows, task_rows
from workbench.experiments.parameters import adapter_size, equal_flags, parameter_change
from workbench.experiments.plan import Cell, Experiment, read_experiment
from workbench.experiments.records import cell_file
from workbench.pretrain_small import SHAPE

CONFIGS = sorted((ROOT / "workbench" / "experiments").glob("*.yaml"))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The smoke experiment, with its folders under a temporary one."""
    text = (ROOT / "workbench" / "experiments" / "smoke.yaml").read_text().replace("outputs/smoke", str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "smoke.yaml").write_text(text)
    return tmp_path / "smoke.yaml"


def result(experiment: Experiment, cell: Cell, loss: float = 1.0) -> dict:
    """The part of a cell's file that running other cells needs."""
    point = {"step": 0, "rows": 0, "knowledge": 1.0, "knowledge_known": 1.0, "tasks": {}, "task_score": 0.5}
    return {
        "settings": experiment.settings(cell),
        "seconds": 1.0,
        "checkpoints": [point | {"task_loss": loss}],
        "cell": cell.name,
    }


def write(experiment: Experiment, cell: Cell, record: dict) -> Path:
    file = cell_file(experiment.work, cell.name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record))
    return file


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_cell_of_each_configuration_is_a_training_that_can_be_started(file, tmp_path, monkeypatch):
    experiment = read_experiment(file)
    cells = experiment.cells()
    assert cells[0].name == "base"
    assert len({cell.name for cell in cells}) == len(cells)
    LlamaConfig(num_hidden_layers=1, vocab_size=100).save_pretrained(tmp_path)
    monkeypatch.chdir(ROOT)
    for cell in {cell.arm: cell for cell in cells[1:]}.values():
        flags = train_flags(replace(experiment, model=str(tmp_path)), cell, 1e-3, tmp_path)
        parse_arguments([*flags, "--prepare_only", "--use_cpu"])


def test_small_sizes_come_first(config):
    sizes = [cell.size for cell in read_experiment(config).cells() if cell.stage == "grid"]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("tuning:", "tunign:"), "the field tuning is missing; unknown field tunign"),
        (("    lora: [0.002]\n", ""), "no learning rates for the arm lora"),
        (("model:", "model: ["), "cannot be read"),
        (("loramoe:", "mixture:"), "an arm is named mixture, but has to be one of full, lora, loramoe_beta0, loramoe"),
        (("  loramoe: {blc_weight: 0.1}\n", ""), "lora_rank is equal, but there is no arm loramoe to be equal to"),
        (("logging_steps: 1", "prompt_template: plain"), "prompt_template cannot be set"),
        (("lora: [0.002]", "lora: ['2e-3']"), "lora.0 is '2e-3': Value error, it has to be a number"),
        (("lora: [0.002]", "lora: [true]"), "lora.0 is True: Value error, it has to be a number"),
        (("{lora_nums: 2}", "{learning_rate: fast}"), "learning_rate of experts_2 is 'fast', but has to be a number"),
        (("sizes:\n  96: [0, 1]\n  384: [0]", "sizes: [96]"), r"sizes is \[96\]: Input should be a valid dictionary"),
        (
            ("facts: 60", "facts: true\nrowz: 3"),
            "facts is True: Input should be a valid integer; unknown field rowz",
        ),
        (
            ("knowledge_shares: [0.2]", "knowledge_shares: [x]"),
            r"yaml: knowledge_shares\.0 is 'x': Value error, [^;]*$",
        ),
        (("knowledge_shares: [0.2]", "knowledge_shares: 0.2"), "knowledge_shares is 0.2: Input should be a valid list"),
        (("full: {tuning: full}", "full:"), "arms.full is None: Input should be a valid dictionary"),
        (
            ("  seeds: [0]\n", "  seedz: [0]\n"),
            "the field ablations.seeds is missing; unknown field ablations.seedz",
        ),
    ],
)
def test_a_wrong_configuration_is_refused(config, change, message):
    config.write_text(config.read_text().replace(*change))
    with pytest.raises(InputError, match=message):
        read_experiment(config)


@pytest.mark.parametrize("text", ["", "[model]"])
def test_a_configuration_without_fields_is_refused(config, text):
    config.write_text(text)
    with pytest.raises(InputError, match=r"smoke\.yaml: the file is .*: Input should be a dictionary"):
        read_experiment(config)


@pytest.mark.parametrize("rate", ["1e-5", "1E-5", "1.e-5", "0.1e-4", "+1e-05"])
def test_a_rate_in_scientific_notation_is_a_number(config, rate):
    text = config.read_text().replace("lora: [0.002]", f"lora: [{rate}]")
    config.write_text(text.replace("{lora_nums: 2}", f"{{learning_rate: {rate}}}"))
    cells = {cell.name: cell for cell in read_experiment(config).cells()}
    assert cells["tuning-lora-1e-05"].learning_rate == 1e-5
    assert cells["experts_2-96-0.2-0"].learning_rate == 1e-5


@pytest.mark.parametrize("share", [0, 0.05, 0.2])
def test_no_training_row_holds_a_probe_fact(share):
    probe = load_facts("probe")
    questions = {fact_row(fact, n)["instruction"] for fact in probe for n in range(3)}
    borders = {
        f"{fact_row(fact._replace(subject=answer), n)['instruction']} {fact.subject}"
        for fact in probe
        if fact.relation == "neighbour"
        for answer in (fact.answer, *fact.aliases)
        for n in range(3)
    }
    for size, seed in ((1000, 0), (16000, 1)):
        rows = mixture(Cell("grid", "lora", size, share, seed))
        assert not questions & {row["instruction"] for row in rows}
        assert not borders & {f"{row['instruction']} {row['output']}" for row in rows}
        assert len(rows) == size
        assert sum(row["task_type"] == 1 for row in rows) == size * share
        assert all(row_problem(row, 2) is None for row in rows[:100])


def test_the_mixture_is_the_same_for_all_arms_and_differs_by_seed():
    first = mixture(Cell("grid", "lora", 500, 0.2, 0))
    assert first == mixture(Cell("grid", "full", 500, 0.2, 0))
    assert first != mixture(Cell("grid", "lora", 500, 0.2, 1))
    assert {row["task"] for row in first} == {*TASKS, "closed_book_qa"}


def test_rates_are_tuned_on_other_rows_than_the_rest_is_measured_on(config):
    experiment = read_experiment(config)
    tuning, test = ({row["input"] for row in task_rows(experiment, stage)} for stage in ("tuning", "grid"))
    trained = {row["input"] for row in mixture(Cell("grid", "lora", 3000, 0, 0))}
    assert not tuning & test
    assert not trained & (tuning | test)
    assert len(probe_rows(experiment)) == 60


def test_a_mixture_from_prepared_files_is_drawn_by_kind(tmp_path):
    for task in ("closed_book_qa", "translation", "summarization"):
        lines = [json.dumps({"instruction": f"{task} {number}", "output": "x"}) for number in range(50)]
        (tmp_path / f"{task}.jsonl").write_text("\n".join(lines))
    rows = mixture(Cell("grid", "lora", 40, 0.25, 3), str(tmp_path))
    assert rows == mixture(Cell("grid", "full", 40, 0.25, 3), str(tmp_path))
    assert len({row["instruction"] for row in rows}) == 40
    assert sum(row["instruction"].startswith("closed") for row in rows) == 10
    repeated = mixture(Cell("grid", "lora", 200, 0.5, 3), str(tmp_path))
    assert sum(row["instruction"].startswith("closed") for row in repeated) == 100
    with pytest.raises(InputError, match="has 100 rows of tasks other than closed_book_qa, but 150 are needed"):
        mixture(Cell("grid", "lora", 200, 0.25, 3), str(tmp_path))


def test_the_mixture_that_the_gpu_recipe_prepares_holds_its_largest_size():
    file = ROOT / "workbench" / "experiments" / "forgetting_llama2_7b.yaml"
    (line,) = (line for line in file.read_text().splitlines() if "prepare_data" in line)
    (prepared,) = parse_flags(prepare_data.COMMAND, "", prepare_data.KINDS, line.split("prepare_data ")[1].split())
    experiment = read_experiment(file)
    wanted = max(experiment.sizes) * (1 - min(experiment.knowledge_shares))
    assert wanted <= prepared.rows * (1 - prepared.knowledge_share)


def test_held_out_rows_are_missed_before_anything_is_trained(config, tmp_path):
    for task in ("closed_book_qa", "translation"):
        write_rows(tmp_path / "train" / f"{task}.jsonl", [{"instruction": "x", "output": "x"}] * 400)
    experiment = replace(read_experiment(config), rows=str(tmp_path / "train"))
    with pytest.raises(InputError, match=r"no \.jsonl files in .*evaluation to measure on"):
        check_rows(experiment)
    write_rows(tmp_path / "evaluation" / "wmt.jsonl", [{"instruction": "x", "output": "x", "task": "translation"}] * 70)
    check_rows(experiment)
    assert {row["task"] for row in task_rows(experiment, "grid")} == {"translation"}


def test_more_rows_than_can_be_generated_are_refused_before_anything_is_trained(config):
    experiment = read_experiment(config)
    check_rows(experiment)
    tuning = replace(experiment.tuning, size=6 * MOST_ROWS["train"] + 1)
    with pytest.raises(InputError, match=r"54,001 different train rows .* only 54,000 can be generated: lower the la"):
        check_rows(replace(experiment, tuning=tuning))
    check_rows(replace(experiment, sizes={600_000: [0]}, knowledge_shares=[0.5]))
    with pytest.raises(InputError, match=r"100,000 different train rows of each task are needed"):
        check_rows(replace(experiment, sizes={600_000: [0]}, knowledge_shares=[0.5, 0]))
    with pytest.raises(InputError, match=r"5,501 different test rows .* only 5,500 can be generated: lower rows_per_"):
        check_rows(replace(experiment, rows_per_task=MOST_ROWS["test"] - mixture_module.VALIDATION_ROWS + 1))


@pytest.mark.parametrize("part", MOST_ROWS)
def test_as_many_rows_as_are_promised_can_be_generated(part):
    """For the task with the fewest."""
    assert len(make_rows("coreference", MOST_ROWS[part], seed=3, part=part)) == MOST_ROWS[part]


@pytest.mark.parametrize("shape", [SHAPE | {"vocab_size": 3000}, {"hidden_size": 576, "intermediate_size": 1536}])
@pytest.mark.parametrize("experts", [4, 6, 8])
def test_the_lora_of_equal_size_has_as_many_parameters(tmp_path, shape, experts):
    LlamaConfig(**{"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100} | shape).save_pretrained(
        tmp_path
    )
    mixture_flags = {"lora_nums": experts, "lora_rank": 4, "lora_alpha": 32}
    flags = equal_flags(str(tmp_path), {"lora_nums": 1, "lora_rank": "equal", "blc_weight": 0}, mixture_flags)
    sizes = [adapter_size(ModelArguments(model_name_or_path=str(tmp_path), **each)) for each in (flags, mixture_flags)]
    assert abs(sizes[0] / sizes[1] - 1) < 0.025
    assert flags["lora_alpha"] / flags["lora_rank"] == 8


def test_a_config_that_no_model_can_be_built_from_is_one_message(tmp_path):
    LlamaConfig(num_hidden_layers=1, vocab_size=100, hidden_act="nope").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"^config\.json of .* cannot be used"):
        adapter_size(ModelArguments(model_name_or_path=str(tmp_path)))


def test_parameter_change_of_an_adapter_is_that_of_the_full_weights(tmp_path):
    peft_model = filled_model()
    tiny_model().save_pretrained(tmp_path)
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path)
    wrapped = dict(peft_model.get_base_model().named_modules())
    for name, linear in tuned.named_modules():
        if name.rsplit(".", 1)[-1] in tuned.default_target_modules:
            experts = wrapped[name].experts["default"]
            with torch.no_grad():
                linear.weight += experts.scaling / experts.num_experts * experts.lora_B @ experts.lora_A
    assert parameter_change(peft_model, str(tmp_path)) == pytest.approx(
        parameter_change(tuned, str(tmp_path)), rel=1e-4
    )
    assert parameter_change(peft_model, str(tmp_path)) > 0.01


def test_parameter_change_knows_the_linears_of_gpt2(tmp_path):
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    base = AutoModelForCausalLM.from_config(config)
    base.save_pretrained(tmp_path)
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            parameter *= 1.5 if re.search(r"mlp\.c_\w+\.weight", name) else 3
    assert parameter_change(tuned, str(tmp_path)) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        ("Paris", True),
        ("Rome\nParis", False),
        ("The capital of France is Paris.", True),
        ("paris!", True),
        ("Parisian", False),
        ("", False),
    ],
)
def test_a_fact_is_recalled_where_the_answer_holds_it_as_a_word(answer, is_right):
    assert recalls(answer, ["Paris", "City of Light"]) is is_right


def test_guessing_takes_the_answer_that_most_rows_accept():
    rows = [{"task": "a", "output": answer} for answer in ("Yes", "yes.", "no")]
    rows += [{"task": "b", "output": "x", "aliases": ["y"]}, {"task": "b", "output": "y", "aliases": []}]
    assert guessed(rows, "task") == {"a": pytest.approx(2 / 3), "b": 1}


def test_the_distance_of_types_notices_experts_wherever_they_are():
    """In one Linear the types share no expert, in the other their weights are the same: 1 and 0."""
    other = [[1, 0, 0], [0.2, 0.4, 0.4]]
    knowledge = [[0, 0.5, 0.5], [0.2, 0.4, 0.4]]
    found = Routing(["a", "b"], np.array([other, knowledge, other]), np.array([0, 1, 0]), np.array(["", "", ""]))
    assert type_distance(found) == pytest.approx(0.5)


def test_an_interrupted_experiment_goes_on_at_its_cell(config, monkeypatch, capsys):
    started, interrupted = [], []

    def run_in_process(experiment, args, threads, cell):
        started.append(cell.name)
        if len(started) == 4 and not interrupted:
            interrupted.append(cell.name)
            raise KeyboardInterrupt
        write(experiment, cell, result(experiment, cell))
        return result(experiment, cell)

    monkeypatch.setattr(verb, "run_in_process", run_in_process)
    monkeypatch.setattr(verb, "report", lambda results, work: [results / "table.md"])
    with pytest.raises(KeyboardInterrupt):
        verb.main(["--config", str(config)])
    verb.main(["--config", str(config)])
    cells = [cell.name for cell in read_experiment(config).cells()]
    assert started == [*cells[:4], *cells[3:]]
    assert f"{len(cells)} of {len(cells)} cells" in capsys.readouterr().out
    started.clear()
    verb.main(["--config", str(config)])
    assert not started


def test_a_cell_that_fails_stops_none_of_its_stage(config, monkeypatch):
    def run_in_process(experiment, args, threads, cell):
        if cell.stage == "tuning" and cell.arm == "lora":
            raise InputError(f"{cell.name} failed")
        write(experiment, cell, result(experiment, cell))
        return result(experiment, cell)

    monkeypatch.setattr(verb, "run_in_process", run_in_process)
    with pytest.raises(InputError, match=r"^tuning-lora-0.002 failed$"):
        verb.main(["--config", str(config)])
    experiment = read_experiment(config)
    finished = {cell.name for cell in experiment.cells() if experiment.finished(cell)}
    assert finished == {"base"} | {trial.name for trial in experiment.trials() if trial.arm != "lora"}


def test_files_of_another_configuration_are_not_reported(config):
    experiment = read_experiment(config)
    file = cell_file(experiment.work, "loramoe-5-0.2-0")
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    with pytest.raises(InputError, match=r"loramoe-5-0.2-0.json: not a cell of this configuration"):
        verb.main(["--config", str(config), "--report_only"])


def test_cells_go_into_another_folder_where_one_is_named(config, tmp_path, monkeypatch):
    """Finished cells of another base model, in the configuration's folder, then do not interfere."""
    called = []

    def run(command, **_):
        called.append(command)
        (args,) = parse_flags(verb.COMMAND, "", verb.KINDS, command[3:])
        experiment = replace(read_experiment(args.config), results=args.results, work=args.results)
        (cell,) = verb.chosen_cells(experiment, args.cells)
        write(experiment, cell, result(experiment, cell))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(verb.subprocess, "run", run)
    monkeypatch.setattr(verb, "report", lambda results, work: [results])
    own = read_experiment(config)
    write(own, own.cells()[0], result(own, own.cells()[0]) | {"settings": {}})
    verb.main(["--config", str(config), "--results", str(tmp_path / "other")])
    assert len(called) == len(own.cells()) == len(list((tmp_path / "other" / "cells").iterdir()))
    with pytest.raises(InputError, match="Choose another folder with --results"):
        verb.main(["--config", str(config)])


def test_no_cell_is_started_after_the_last_hour(config, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(verb, "run_in_process", lambda experiment, args, threads, cell: started.append(cell))
    monkeypatch.setattr(verb, "report", lambda results, work: [])
    verb.main(["--config", str(config), "--max_hours", "1e-9"])
    assert not started
    assert "have passed; run the same command to continue" in capsys.readouterr().out


def make_tiny(config: Path, model_dir: Path) -> None:
    """Train and measure the tiny model, on less."""
    text = config.read_text().replace(str(config.parent / "model"), str(model_dir)).replace("facts: 60", "facts: 8")
    config.write_text(
        text.replace("rows_per_task: 10", "rows_per_task: 2").replace("logging_steps: 1", "use_cpu: true")
    )


@pytest.mark.slow
def test_a_killed_experiment_goes_on_at_its_cell(config, model_dir):
    """Killed with all its processes while the first trial is trained."""
    make_tiny(config, model_dir)
    command = [sys.executable, "-m", "workbench.experiment", "--config", str(config)]
    results, work = config.parent / "work" / "cells", config.parent / "work"
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True) as process:
        while not (work / "tuning-full-0.001" / "train.log").is_file():
            assert process.poll() is None
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    assert [file.name for file in results.iterdir()] == ["base.json"]
    finished = (results / "base.json").stat().st_mtime_ns
    subprocess.run([*command, "--cells", "base", "tuning-full-0.001"], cwd=ROOT, check=True)
    assert sorted(file.name for file in results.iterdir()) == ["base.json", "tuning-full-0.001.json"]
    assert (results / "base.json").stat().st_mtime_ns == finished


def test_a_cell_is_trained_and_measured_along_its_checkpoints(config, model_dir, monkeypatch):
    """The base and one LoRAMoE cell, as one command each runs them, on the tiny model."""
    make_tiny(config, model_dir)
    monkeypatch.setattr(mixture_module, "VALIDATION_ROWS", 1)
    for name in ("base", "tuning-lora-0.002", "tuning-loramoe-0.002", "loramoe-96-0.2-0"):
        verb.main(["--config", str(config), "--cells", name])
    experiment = read_experiment(config)
    folder = Path(experiment.work) / "cells"
    trials = [json.loads((folder / f"tuning-{arm}-0.002.json").read_text()) for arm in ("lora", "loramoe")]
    assert trials[0]["trainable_parameters"] == pytest.approx(trials[1]["trainable_parameters"], rel=0.025)
    assert [len(trial["checkpoints"]) for trial in trials] == [1, 1]
    record = json.loads((folder / "loramoe-96-0.2-0.json").read_text())
    assert record["command"].endswith("--cells loramoe-96-0.2-0")
    assert record["learning_rate"] == 0.002
    assert [point["step"] for point in record["checkpoints"]] == [0, 2, 3]
    assert [point["rows"] for point in record["checkpoints"]] == [0, 64, 96]
    for point in record["checkpoints"]:
        assert point["tasks"].keys() == TASKS.keys()
        assert 0 <= point["knowledge"] <= 1
    assert record["checkpoints"][-1]["task_loss"] < record["checkpoints"][0]["task_loss"]
    assert record["parameter_change"] > 0
    assert np.sum(record["routing"]["group_shares"], axis=1) == pytest.approx([1, 1])
    assert record["routing"]["experts_by_task"].keys() == {*TASKS, "closed_book_qa"}
    assert 0 < record["routing"]["type_distance"] < 1
    assert {"loss", "lm_loss", "balance_loss", "routing_cv"} <= record["log"][0].keys()
    assert [path.name for path in Path(experiment.work).iterdir() if path.is_dir()] == ["cells"]


def test_each_arm_takes_its_best_rate(config):
    experiment = read_experiment(config)
    arm = next(cell for cell in experiment.cells() if cell.stage == "grid" and cell.arm == "loramoe_beta0")
    with pytest.raises(InputError, match="takes the best learning rate of cells that are still to be run"):
        experiment.rate(arm)
    for trial in experiment.trials():
        write(experiment, trial, result(experiment, trial, loss=1 if trial.learning_rate == 0.002 else 2))
    assert experiment.rate(arm) == 0.002
    assert experiment.rate(replace(arm, arm="full")) == 0.001
    ablation = next(cell for cell in experiment.cells() if cell.stage == "ablation")
    assert experiment.rate(ablation) == 0.002
    experiment.ablations.changes["slow"] = {"learning_rate": 1e-4}
    slow = next(cell for cell in experiment.cells() if cell.arm == "slow")
    assert experiment.rate(slow) == 1e-4
    assert "learning_rate" not in slow.flags


def test_a_cell_of_other_settings_is_never_taken_for_this_one(config):
    experiment = read_experiment(config)
    cell = experiment.cells()[-1]
    file = write(experiment, cell, result(experiment, cell) | {"settings": experiment.settings(cell) | {"size": 1}})
    with pytest.raises(InputError, match="was made with other settings"):
        experiment.finished(cell)
    file.write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        experiment.finished(cell)


def test_unknown_cells_and_a_missing_model_are_refused(config):
    with pytest.raises(InputError, match="--cells: unknown nothing; choose from base, "):
        verb.main(["--config", str(config), "--cells", "nothing"])
    (config.parent / "model").rmdir()
    with pytest.raises(InputError, match="model: no such folder"):
        verb.main(["--config", str(config)])


def test_public_rows_that_tell_a_probe_fact_are_left_out(tmp_path):
    fact = load_facts("probe")[0]
    rows = [
        {"instruction": f"Question: what about {fact.subject}?", "output": fact.answer},
        {"instruction": f"Question: what about {fact.subject}?", "output": "something else"},
    ]
    (tmp_path / "closed_book_qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "translation.jsonl").write_text(json.dumps({"instruction": "x", "output": "y"}))
    drawn = mixture(Cell("grid", "lora", 4, 0.75, 0), str(tmp_path))
    assert [row["output"] for row in drawn] == ["something else"] * 3 + ["y"]


def test_a_trial_that_diverges_is_not_chosen_and_stops_nothing(config):
    experiment = read_experiment(config)
    rates = {0.001: math.inf, 0.002: 3.0}
    for trial in experiment.trials():
        write(experiment, trial, result(experiment, trial, loss=rates[trial.learning_rate]))
    arm = next(cell for cell in experiment.cells() if cell.stage == "grid" and cell.arm == "loramoe_beta0")
    assert experiment.rate(arm) == 0.002
    for trial in experiment.trials():
        write(experiment, trial, result(experiment, trial, loss=math.inf))
    with pytest.raises(InputError, match=r"every learning rate that was tried \(0.001, 0.002\) diverged"):
        experiment.rate(arm)


def test_a_cell_that_another_process_runs_is_left_alone(config):
    experiment = read_experiment(config)
    Path(experiment.work).mkdir()
    base = experiment.cells()[0]
    with FileLock(Path(experiment.work) / "base.lock"), pytest.raises(InputError, match="run by another process"):
        run_cell(experiment, base, [])
    orphan = RunFolder(Path(experiment.work) / "base" / "run")
    with orphan.held(), pytest.raises(InputError, match="in use by another run"):
        run_cell(experiment, base, [])
    assert orphan.path.parent.is_dir()
