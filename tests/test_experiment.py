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
from loading.provenance import processor
from scripts import prepare_data
from scripts.prepare_data import write_rows
from training.run_folder import RunFolder
from transformers_patch import AutoModelForCausalLM
from workbench import experiment as verb
from workbench.experiments import cell as cell_module
from workbench.experiments.cell import guessed, recalls, run_cell, share_kept, train_flags, type_distance
from workbench.experiments.mixture import check_rows, mixture, probe_rows, task_rows
from workbench.experiments.parameters import adapter_size, equal_rank, parameter_change
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


def result(experiment: Experiment, cell: Cell, loss: float = 1.0, kept: float = 1.0) -> dict:
    """The part of a cell's file that running other cells needs."""
    measured = {"knowledge": kept, "knowledge_known": kept, "task_loss": loss}
    return {
        **measured,
        "settings": experiment.settings(cell),
        "seconds": 1.0,
        "cell": cell.name,
        "processor": processor(),
    }


def cell_of(arm: str, size: int, share: float, seed: int) -> Cell:
    return Cell(arm, share, 1e-3, 8, seed, size)


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
        flags = train_flags(replace(experiment, model=str(tmp_path)), cell, tmp_path)
        parse_arguments([*flags, "--prepare_only", "--use_cpu"])


def test_every_setting_comes_before_any_is_repeated(config):
    _, *cells = read_experiment(config).cells()
    grid = [cell for cell in cells if not cell.is_variant]
    assert [cell.seed for cell in grid] == [0] * 7 + [1] * 7
    assert len({cell.setting for cell in grid}) == 7
    assert [cell.name for cell in grid[:3]] == ["full-0.2-0.001-0", "lora-0.2-0.001-2-0", "lora-0.2-0.001-8-0"]
    variants = {cell.name: (cell.size, cell.flags["lora_nums"]) for cell in cells if cell.is_variant}
    assert variants == {"experts_2-0.2-0.002-8-0": (96, 2), "gentle-0.2-0.001-8-0": (48, 4)}


def test_the_scaling_is_that_of_the_arms_own_rank(config, tmp_path, monkeypatch):
    LlamaConfig(num_hidden_layers=1, vocab_size=100, hidden_size=64, intermediate_size=96).save_pretrained(tmp_path)
    experiment = replace(read_experiment(config), model=str(tmp_path))
    found = {}
    for cell in experiment.cells()[1:]:
        flags = dict(flag.removeprefix("--").split("=") for flag in train_flags(experiment, cell, tmp_path))
        found[cell.name] = [flags.get(name) for name in ("lora_rank", "lora_alpha", "learning_rate")]
    assert found["full-0.2-0.001-0"] == ["4", None, "0.001"]
    assert found["loramoe-0.2-0.002-8-0"] == ["4", "32", "0.002"]
    assert found["lora-0.2-0.001-2-0"][:2] == ["18", "36"]


def test_only_contenders_are_repeated(config):
    """Of two learning rates and scalings, those that another one beats by more than the margin are not."""
    experiment = read_experiment(config)
    lora = [cell for cell in experiment.cells() if cell.arm == "lora"]
    first, others = [c for c in lora if c.seed == 0], [c for c in lora if c.seed == 1]
    with pytest.raises(InputError, match=r"whether lora-0\.2-0\.001-2-1 is worth running follows from cells that are"):
        experiment.is_due(others[0])
    for cell, (loss, kept) in zip(first, [(3, 0.9), (4, 0.7), (2, 0.5), (math.inf, None)], strict=True):
        write(experiment, cell, result(experiment, cell, loss, kept))
    assert [experiment.is_due(cell) for cell in others] == [True, False, True, False]
    assert all(experiment.is_due(cell) for cell in first)
    assert experiment.is_due(next(cell for cell in experiment.cells() if cell.is_variant))
    strict = replace(experiment, loss_range=(1, 2.5))
    assert [strict.is_due(cell) for cell in others] == [False, False, True, False]
    for cell in first:  # with another share, each of the first seed's runs would make all others no contenders
        write(
            experiment, replace(cell, knowledge_share=0.5), result(experiment, replace(cell, knowledge_share=0.5), 0.1)
        )
    both = replace(experiment, knowledge_shares=[0.2, 0.5])
    assert [both.is_due(cell) for cell in others] == [True, False, True, False]


def test_cells_that_are_no_contenders_are_not_started(config, monkeypatch, capsys):
    started = []

    def run_in_process(experiment, args, threads, cell):
        started.append(cell)
        record = result(experiment, cell, kept=0.5 if cell.scaling == 2 else 0.9)
        write(experiment, cell, record)
        return record

    monkeypatch.setattr(verb, "run_in_process", run_in_process)
    monkeypatch.setattr(verb, "report", lambda experiment: [])
    verb.main(["--config", str(config)])
    assert {cell.scaling for cell in started if cell.seed == 0 and cell.arm == "lora"} == {2, 8}
    assert {cell.scaling for cell in started if cell.seed == 1 and cell.arm == "lora"} == {8}
    assert "2 cells are not run: with the first seed, their settings are no contenders" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [{"size": 7}, {"knowledge_share": 0.7}, {"seed": 7}, {"learning_rate": 0.7}, {"scaling": 7}, {"flags": {"a": 7}}],
    ids=lambda change: next(iter(change)),
)
def test_a_cell_made_with_another_setting_is_refused(config, change):
    experiment = read_experiment(config)
    cell = experiment.cells()[2]
    write(experiment, cell, result(experiment, replace(cell, **change)))
    with pytest.raises(InputError, match=rf"was made with other settings: (.*, )?{next(iter(change))} "):
        experiment.finished(cell)


def test_a_report_needs_neither_the_model_nor_its_weights(config):
    """They are not in the repository, and a Llama pretrained here has others."""
    experiment = read_experiment(config)
    cell = experiment.cells()[1]
    record = result(experiment, cell)
    record["settings"] |= {"model_sha256": ["0123456789ab"]}
    write(experiment, cell, record)
    assert experiment.finished(cell, is_only_read=True) == record
    with pytest.raises(InputError, match="was made with other settings: model_sha256"):
        experiment.finished(cell)


def test_what_is_kept_is_a_share_of_the_known_facts():
    assert share_kept("10110", "11010") == pytest.approx(2 / 3)
    assert share_kept("0000", "0110") == 0
    assert share_kept("0110", "0000") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("margin:", "margni:"), "the field margin is missing; unknown field margni"),
        (("model:", "model: ["), "cannot be read"),
        (("  loramoe:", "  mixture:"), "an arm is named mixture, but has to be one of full, lora, "),
        (("  loramoe: {", "  null_expert: {"), "lora_rank is equal, but there is no arm loramoe to be equal to"),
        (("logging_steps: 1", "prompt_template: plain"), "prompt_template cannot be set: it follows from the model's"),
        (("lora_rank: 4\n", "lora_alpha: 4\n"), "lora_alpha cannot be set: it follows from scalings"),
        (("{lora_nums: 2}", "{learning_rate: 1}"), "learning_rate cannot be set: it follows from learning_rates"),
        (
            ("flags: {lora_nums: 2}", "learning_rate: fast"),
            "learning_rate is 'fast': Value error, it has to be a number",
        ),
        (("scalings: [2, 8]", "scalings: ['2e-3']"), "scalings.0 is '2e-3': Value error, it has to be a number"),
        (("scalings: [2, 8]", "scalings: [true]"), "scalings.0 is True: Value error, it has to be a number"),
        (
            ("scalings: [2, 8]", "scalings: [2, 2]"),
            "two cells would be the same as lora-0.2-0.001-2-0; two cells would",
        ),
        (("scalings: [2, 8]", "scalings: [2, 2.0]"), "two cells would be the same as lora-0.2-0.001-2-0; two cells"),
        (("scalings: [2, 8]", "scalings: [0]"), "scalings.0 is 0: Value error, it has to be from 1e-12 to 1e.06"),
        (("scalings: [2, 8]", "scalings: []"), r"scalings is \[\]: List should have at least 1 item"),
        (("knowledge_shares: [0.2]", "knowledge_shares: [20]"), "knowledge_shares.0 is 20: .* from 0 to 1"),
        (("margin: ", "margin: -"), "margin is -.*: Value error, it has to be from 0 to 1"),
        (("loss_range: [1, 10]", "loss_range: [1, .nan]"), "loss_range.1 is nan: Value error, it has to be from"),
        (("size: 96", "size: 0"), "size is 0: Input should be greater than or equal to 1"),
        (("seeds: [0, 1]", "seeds: [0, 1, 2, 3, 4, 5]"), "seeds is .*: List should have at most 5 items"),
        (("logging_steps: 1", "output_dir: elsewhere"), "output_dir cannot be set: it follows from work"),
        (("  lora_rank: 4\n", ""), "loramoe.*: lora_rank is missing, which scalings are multiplied by"),
        (("experts_2:", "a/b:"), "a/b-0.2-0.002-8-0 cannot be the name of a file"),
        (("size: 96", "size: [96]"), r"size is \[96\]: Input should be a valid integer"),
        (("of: loramoe", "of: "), "variants.of is None: Input should be a valid string"),
        (("of: loramoe", "of: mixture"), r"variants are of mixture, which is not an arm"),
        (("seeds: [0, 1]", "seeds: []"), r"seeds is \[\]: List should have at least 1 item"),
        (("loss_range: [1, 10]", "loss_range: [10, 1]"), "loss_range is 10, 1, but has to rise"),
        (("loss_range: [1, 10]", "loss_range: [1]"), "loss_range"),
        (
            ("facts: 60", "facts: true\nrowz: 3"),
            "facts is True: Input should be a valid integer; unknown field rowz",
        ),
        (
            ("knowledge_shares: [0.2]", "knowledge_shares: [x]"),
            r"yaml: knowledge_shares\.0 is 'x': Value error, [^;]*$",
        ),
        (("knowledge_shares: [0.2]", "knowledge_shares: 0.2"), "knowledge_shares is 0.2: Input should be a valid list"),
        (("flags: {blc_weight: 0.1}", "flags:"), "arms.loramoe.flags is None: Input should be a valid dictionary"),
        (("  seeds: [0]\n", "  seedz: [0]\n"), "the field variants.seeds is missing; unknown field variants.seedz"),
    ],
)
def test_a_wrong_configuration_is_refused(config, change, message):
    assert change[0] in config.read_text()
    config.write_text(config.read_text().replace(*change, 1))
    with pytest.raises(InputError, match=message):
        read_experiment(config)


@pytest.mark.parametrize("text", ["", "[model]"])
def test_a_configuration_without_fields_is_refused(config, text):
    config.write_text(text)
    with pytest.raises(InputError, match=r"smoke\.yaml: the file is .*: Input should be a dictionary"):
        read_experiment(config)


@pytest.mark.parametrize("rate", ["1e-5", "1E-5", "1.e-5", "0.1e-4", "+1e-05"])
def test_a_rate_in_scientific_notation_is_a_number(config, rate):
    config.write_text(config.read_text().replace("learning_rates: [0.001]", f"learning_rates: [{rate}]"))
    cells = {cell.name: cell for cell in read_experiment(config).cells()}
    assert cells["full-0.2-1e-05-0"].learning_rate == 1e-5


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
        rows = mixture(cell_of("lora", size, share, seed))
        assert not questions & {row["instruction"] for row in rows}
        assert not borders & {f"{row['instruction']} {row['output']}" for row in rows}
        assert len(rows) == size
        assert sum(row["task_type"] == 1 for row in rows) == size * share
        assert all(row_problem(row, 2) is None for row in rows[:100])


def test_the_mixture_is_the_same_for_all_arms_and_differs_by_seed():
    first = mixture(cell_of("lora", 500, 0.2, 0))
    assert first == mixture(cell_of("full", 500, 0.2, 0))
    assert first != mixture(cell_of("lora", 500, 0.2, 1))
    assert {row["task"] for row in first} == {*TASKS, "closed_book_qa"}


def test_no_training_row_is_measured(config):
    experiment = read_experiment(config)
    trained = {row["input"] for row in mixture(cell_of("lora", 3000, 0, 0))}
    assert not trained & {row["input"] for row in task_rows(experiment)}
    assert len(task_rows(experiment)) == 10 * len(TASKS)
    assert len(probe_rows(experiment)) == 60


def test_a_mixture_from_prepared_files_is_drawn_by_kind(tmp_path):
    for task in ("closed_book_qa", "translation", "summarization"):
        lines = [json.dumps({"instruction": f"{task} {number}", "output": "x"}) for number in range(50)]
        (tmp_path / f"{task}.jsonl").write_text("\n".join(lines))
    rows = mixture(cell_of("lora", 40, 0.25, 3), str(tmp_path))
    assert rows == mixture(cell_of("full", 40, 0.25, 3), str(tmp_path))
    assert len({row["instruction"] for row in rows}) == 40
    assert sum(row["instruction"].startswith("closed") for row in rows) == 10
    repeated = mixture(cell_of("lora", 200, 0.5, 3), str(tmp_path))
    assert sum(row["instruction"].startswith("closed") for row in repeated) == 100
    with pytest.raises(InputError, match="has 100 rows of tasks other than closed_book_qa, but 150 are needed"):
        mixture(cell_of("lora", 200, 0.25, 3), str(tmp_path))


def test_the_mixture_that_the_gpu_recipe_prepares_is_large_enough():
    file = ROOT / "workbench" / "experiments" / "frontier_llama2_7b.yaml"
    (line,) = (line for line in file.read_text().splitlines() if "prepare_data" in line)
    (prepared,) = parse_flags(prepare_data.COMMAND, "", prepare_data.KINDS, line.split("prepare_data ")[1].split())
    experiment = read_experiment(file)
    wanted = experiment.size * (1 - min(experiment.knowledge_shares))
    assert wanted <= prepared.rows * (1 - prepared.knowledge_share)


def test_held_out_rows_are_missed_before_anything_is_trained(config, tmp_path):
    for task in ("closed_book_qa", "translation"):
        write_rows(tmp_path / "train" / f"{task}.jsonl", [{"instruction": "x", "output": "x"}] * 400)
    experiment = replace(read_experiment(config), rows=str(tmp_path / "train"))
    with pytest.raises(InputError, match=r"no \.jsonl files in .*evaluation to measure on"):
        check_rows(experiment)
    write_rows(tmp_path / "evaluation" / "wmt.jsonl", [{"instruction": "x", "output": "x", "task": "translation"}] * 70)
    check_rows(experiment)
    assert {row["task"] for row in task_rows(experiment)} == {"translation"}


def test_more_rows_than_can_be_generated_are_refused_before_anything_is_trained(config):
    experiment = read_experiment(config)
    check_rows(experiment)
    with pytest.raises(InputError, match=r"54,001 different train rows .* only 54,000 can be generated: lower size"):
        check_rows(replace(experiment, size=6 * MOST_ROWS["train"] + 1, knowledge_shares=[0]))
    check_rows(replace(experiment, size=600_000, knowledge_shares=[0.5], variants=None))
    with pytest.raises(InputError, match=r"100,000 different train rows of each task are needed"):
        check_rows(replace(experiment, size=600_000, knowledge_shares=[0.5, 0]))
    with pytest.raises(InputError, match=r"5,501 different test rows .* only 5,500 can be generated: lower rows_per_"):
        check_rows(replace(experiment, rows_per_task=MOST_ROWS["test"] + 1))


@pytest.mark.parametrize("part", MOST_ROWS)
def test_as_many_rows_as_are_promised_can_be_generated(part):
    """For the task with the fewest."""
    assert len(make_rows("coreference", MOST_ROWS[part], seed=3, part=part)) == MOST_ROWS[part]


@pytest.mark.parametrize("shape", [SHAPE | {"vocab_size": 3000}, {"hidden_size": 576, "intermediate_size": 1536}])
@pytest.mark.parametrize("experts", [4, 6, 8])
@pytest.mark.parametrize("null_expert", [False, True])
def test_the_lora_of_equal_size_has_as_many_parameters(tmp_path, shape, experts, null_expert):
    LlamaConfig(**{"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100} | shape).save_pretrained(
        tmp_path
    )
    mixture_flags = {"lora_nums": experts, "lora_rank": 4}
    flags = {"lora_nums": 1, "lora_rank": "equal", "blc_weight": 0, "lora_null_expert": null_expert}
    flags |= {"lora_rank": equal_rank(str(tmp_path), flags, mixture_flags)}
    sizes = [adapter_size(ModelArguments(model_name_or_path=str(tmp_path), **each)) for each in (flags, mixture_flags)]
    assert abs(sizes[0] / sizes[1] - 1) < 0.025


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
    monkeypatch.setattr(verb, "report", lambda experiment: [Path("table.md")])
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
        if cell.arm == "lora":
            raise InputError(f"{cell.name} failed")
        write(experiment, cell, result(experiment, cell))
        return result(experiment, cell)

    monkeypatch.setattr(verb, "run_in_process", run_in_process)
    with pytest.raises(InputError, match=r"(?s)^lora-0.2-0.001-2-0 failed\n.*lora-0.2-0.002-8-0 failed$"):
        verb.main(["--config", str(config)])
    experiment = read_experiment(config)
    finished = {cell.name for cell in experiment.cells() if experiment.finished(cell)}
    first = {cell.name for cell in experiment.cells() if cell.seed == 0}
    assert finished == {name for name in first if not name.startswith("lora-")}


@pytest.mark.parametrize("is_one", [False, True])
def test_cells_of_another_processor_are_kept_apart(config, is_one):
    experiment = read_experiment(config)
    base, cell, *_ = experiment.cells()
    write(experiment, base, result(experiment, base) | {"processor": "abacus"})
    with pytest.raises(InputError, match=r"^base was run on abacus, and this is .*; run the cells of this one in ano"):
        verb.main(["--config", str(config), *(["--cells", cell.name] if is_one else [])])


def test_files_of_another_configuration_are_not_reported(config):
    experiment = read_experiment(config)
    file = cell_file(experiment.work, "loramoe-0.2-0.005-8-0")
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    with pytest.raises(InputError, match=r"have cells of another configuration: loramoe-0\.2-0\.005-8-0; move"):
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
    monkeypatch.setattr(verb, "report", lambda experiment: [])
    own = read_experiment(config)
    write(own, own.cells()[0], result(own, own.cells()[0]) | {"settings": {}})
    verb.main(["--config", str(config), "--results", str(tmp_path / "other")])
    assert len(called) == len(own.cells()) == len(list((tmp_path / "other" / "cells").iterdir()))
    with pytest.raises(InputError, match="Choose another folder with --results"):
        verb.main(["--config", str(config)])


def test_no_cell_is_started_after_the_last_hour(config, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(verb, "run_in_process", lambda experiment, args, threads, cell: started.append(cell))
    monkeypatch.setattr(verb, "report", lambda experiment: [])
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
    """Killed with all its processes while the first cell is trained."""
    make_tiny(config, model_dir)
    command = [sys.executable, "-m", "workbench.experiment", "--config", str(config)]
    results, work = config.parent / "work" / "cells", config.parent / "work"
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True) as process:
        while not (work / "full-0.2-0.001-0" / "train.log").is_file():
            assert process.poll() is None
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    assert [file.name for file in results.iterdir()] == ["base.json"]
    finished = (results / "base.json").stat().st_mtime_ns
    subprocess.run([*command, "--cells", "base", "full-0.2-0.001-0"], cwd=ROOT, check=True)
    assert sorted(file.name for file in results.iterdir()) == ["base.json", "full-0.2-0.001-0.json"]
    assert (results / "base.json").stat().st_mtime_ns == finished


def test_a_cell_is_trained_and_measured(config, model_dir):
    """The base, a LoRA and a LoRAMoE cell, as one command each runs them, on the tiny model."""
    make_tiny(config, model_dir)
    for name in ("base", "lora-0.2-0.002-8-0", "loramoe-0.2-0.002-8-0"):
        verb.main(["--config", str(config), "--cells", name])
    experiment = read_experiment(config)
    folder = Path(experiment.work) / "cells"
    base, lora, record = (json.loads(file.read_text()) for file in sorted(folder.iterdir()))
    assert (base["cell"], base["knowledge_known"], len(base["recalled"])) == ("base", 1, 8)
    assert lora["trainable_parameters"] == pytest.approx(record["trainable_parameters"], rel=0.025)
    assert lora["routing"] is None
    assert record["command"].endswith("--cells loramoe-0.2-0.002-8-0")
    assert (record["learning_rate"], record["scaling"], record["size"]) == (0.002, 8, 96)
    assert record["tasks"].keys() == TASKS.keys()
    assert 0 <= record["knowledge"] <= 1
    assert record["task_loss"] < base["task_loss"]
    assert record["parameter_change"] > 0
    assert np.sum(record["routing"]["group_shares"], axis=1) == pytest.approx([1, 1])
    assert all(len(f"{record[name]:g}") >= len(f"{record[name]}") for name in ("task_loss", "parameter_change"))
    assert 0 < record["routing"]["type_distance"] < 1
    assert [path.name for path in Path(experiment.work).iterdir() if path.is_dir()] == ["cells"]
    verb.main(["--config", str(config), "--report_only"])
    assert (Path(experiment.results) / "table.md").is_file()


def test_a_training_that_diverges_is_a_result(config, model_dir, monkeypatch):
    make_tiny(config, model_dir)
    verb.main(["--config", str(config), "--cells", "base"])
    monkeypatch.setattr(cell_module, "train", lambda *_: None)
    verb.main(["--config", str(config), "--cells", "lora-0.2-0.002-8-0"])
    experiment = read_experiment(config)
    found = experiment.finished(next(cell for cell in experiment.cells() if cell.name == "lora-0.2-0.002-8-0"))
    assert (found["knowledge"], found["task_loss"]) == (None, math.inf)
    verb.main(["--config", str(config), "--report_only"])


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
    drawn = mixture(cell_of("lora", 4, 0.75, 0), str(tmp_path))
    assert [row["output"] for row in drawn] == ["something else"] * 3 + ["y"]


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
