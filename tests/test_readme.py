"""The commands of the README are accepted by the programs, and its Python runs."""

import argparse
import importlib
import re
import shlex
import sys

import pytest
from conftest import ROOT, filled_model
from test_launch import LAUNCHER_VARIABLES, SHELL_VARIABLES, TRAIN_VARIABLES, call
from transformers import AutoModelForCausalLM, AutoTokenizer

from loading.arguments import DataArguments, ModelArguments, RunArguments
from loading.command_line import FlagParser, parse_flags
from training.knowledge import REMEDIES

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "data" / "world_facts" / "README.md"]
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR"}
PROGRAM = re.compile(r"(?:python -m |bash )((?:scripts|workbench)[./]\w+)(?:\.sh)?(?: |$)(.*)")
NO_FLAGS = {"scripts.test", "scripts.run_on_hosts", "workbench.benchmark_peers", "workbench.build_world_facts"}
TRAINING = re.compile(r"run_loramoe\.sh|train\.sbatch|run_on_hosts\.sh|train\.py")


def commands() -> list[str]:
    """Every line of every page's shell blocks, continued lines joined; and the commands with flags within sentences."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        found += re.findall(r"`((?:\w+=\S* )*(?:bash|python) [^`]+ --[^`]+)`", prose)
    return found


def test_every_command_names_a_program_and_variables_that_exist():
    assert len(commands()) > 50
    for command in commands():
        words = shlex.split(command, comments=True)
        variables = [word.split("=")[0] for word in words if re.match(r"\w+=", word)]
        assert set(variables) <= {*SHELL_VARIABLES, *ENVIRONMENT}, command
        for word in words:
            if word.startswith(("scripts.", "workbench.")) and "-m" in words:
                assert (ROOT / f"{word.replace('.', '/')}.py").is_file(), command
            if word.endswith((".sh", ".py")) or word.startswith(("scripts/", "workbench/")):
                assert (ROOT / word).exists(), command


@pytest.mark.parametrize("command", dict.fromkeys(line for line in commands() if TRAINING.search(line)))
def test_the_flags_of_train_py_parse_the_values_that_the_pages_give(command):
    words = shlex.split(command, comments=True)
    flags = [word for word in words[words.index(next(filter(TRAINING.search, words))) + 1 :] if word != "HOSTFILE"]
    for name, value in (word.split("=", 1) for word in words if re.match(r"\w+=", word)):
        if name in TRAIN_VARIABLES and value:
            flags += [TRAIN_VARIABLES[name][0], value]
        assert name not in LAUNCHER_VARIABLES.keys() & {"num_processes", "nnodes", "node_rank"} or value.isdigit()
    if flags != ["--help"]:
        FlagParser((ModelArguments, DataArguments, RunArguments), "python train.py").parse_args(flags)


@pytest.mark.parametrize("command", dict.fromkeys(line for line in commands() if PROGRAM.search(line)))
def test_the_programs_parse_the_flags_that_the_pages_give(command, monkeypatch):
    name, flags = PROGRAM.search(command).groups()
    name, flags = name.replace("/", "."), shlex.split(flags, comments=True)
    if name in NO_FLAGS or flags == ["--help"]:
        return
    program = importlib.import_module(name)
    if hasattr(program, "KINDS"):
        parse_flags(program.COMMAND, "", program.KINDS, flags)
    elif hasattr(program, "parse"):
        program.parse(flags)
    else:
        only_parse(program, flags, monkeypatch)


def only_parse(program, flags: list[str], monkeypatch) -> None:
    """Run a program up to the point where it has parsed its flags."""

    class ParsedError(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def stop(parser, *args):
        parse(parser, *args)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [program.__name__, *flags])
    with pytest.raises(ParsedError):
        program.main()


def python_block(page: str = "README.md") -> str:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    return block


def test_the_python_block_runs_as_printed(tmp_path, model_dir, monkeypatch, capsys):
    """On the tiny model, under the names of folders that the block has."""
    adapter, base = tmp_path / "outputs" / "default", tmp_path / "models" / "SmolLM2-135M-Instruct"
    base.parent.mkdir()
    base.symlink_to(model_dir)
    filled_model().save_pretrained(adapter)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(adapter)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(python_block(), "README.md", "exec"), names)
    assert capsys.readouterr().out.strip()
    alone = AutoModelForCausalLM.from_pretrained(model_dir).generate(
        **names["prompt"], max_new_tokens=10, do_sample=False
    )
    assert names["answer"].tolist() == alone.tolist()


def test_the_loss_is_made_of_what_the_page_of_the_method_says(tmp_path, model_dir, monkeypatch):
    base = tmp_path / "models" / "SmolLM2-135M-Instruct"
    base.parent.mkdir()
    base.symlink_to(model_dir)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(python_block("docs/METHOD.md"), "METHOD.md", "exec"), names)
    output, beta = names["output"], names["model"].active_peft_config.blc_weight
    assert output.balance_loss > 0
    assert output.loss.item() == pytest.approx((output.lm_loss + beta * output.balance_loss).item())


@pytest.mark.slow
def test_the_python_block_runs_on_the_real_model():
    for folder in ("outputs/default", "models/SmolLM2-135M-Instruct"):
        if not (ROOT / folder).exists():
            pytest.skip(f"{folder} is not there yet; bash run_loramoe.sh makes it")
    outcome = call([sys.executable, "-c", python_block()])
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert outcome.stdout.strip()


def test_every_file_that_the_pages_link_to_exists():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_number_on_the_page_of_results_stands_in_a_table():
    tables = " ".join(file.read_text() for file in (ROOT / "docs" / "results").glob("*/table.md"))
    page = " ".join((ROOT / "docs" / "RESULTS.md").read_text().split())
    numbers = re.findall(r"(?<![\w.])[+-]?\d\.\d{3,4}\b(?: ± \d\.\d{3})?", page)
    assert sum("±" in number for number in numbers) > 20
    assert not [number for number in numbers if number not in tables]


def test_every_other_number_of_the_results_is_one_of_the_experiments():
    """Counts, percentages and settings, of all sections on what was measured."""
    measured = (ROOT / "docs" / "RESULTS.md").read_text().split("\n## Elsewhere\n")[0]
    measured = re.sub(r"\]\([^)]*\)|^## \d\.", "", measured, flags=re.MULTILINE)  # targets of links, headings
    files = [*(ROOT / "docs" / "results").glob("*/table.md"), *(ROOT / "workbench" / "experiments").glob("*.yaml")]
    known = " ".join(file.read_text() for file in files)
    found, allowed = (
        set(re.findall(r"(?<![\w.,])\d(?:[\d,.]*\d)?(?:e-\d+)?(?!\w)", text)) for text in (measured, known)
    )
    assert len(found) > 100
    assert not found - allowed


def test_the_remedies_for_forgetting_are_those_of_the_table_in_its_order():
    table = (ROOT / "docs" / "results" / "frontier_small" / "table.md").read_text().split("\n## Variants\n")[1]
    rows = [line.split(" | ") for line in table.split("\n## ")[0].splitlines() if line.startswith("| ")][2:]
    lowest = {}  # by change, the lower bound of what is kept more than without it
    for name, *_, gain in (row[:6] for row in rows):
        mean, _, half = gain.partition(" ± ")
        lowest[name.removeprefix("| ")] = float(mean) - float(half) if half else 0
    for helped in REMEDIES.values():
        assert list(helped) == [name for name in lowest if name in helped]
        assert list(lowest).index("reference") > len(helped) > 0
        assert all(text.startswith("perhaps ") == (lowest[name] <= 0) for name, text in helped.items())
