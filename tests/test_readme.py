"""What the README tells people to type is accepted by the programs, and its Python runs."""

import importlib
import re
import shlex
import sys

import pytest
from conftest import ROOT, filled_model
from test_launch import SHELL_VARIABLES, call
from transformers import AutoModelForCausalLM, AutoTokenizer

from loading.arguments import DataArguments, ModelArguments, RunArguments
from loading.command_line import parse_flags

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FLAGS = {name for part in (ModelArguments, DataArguments, RunArguments) for name in part.__dataclass_fields__}
VERBS = "generate|evaluate|plot_routing|export_lora|prepare_data|experiment|pretrain_small"
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR"}


def commands() -> list[str]:
    """Every shell line of every page, continued lines joined, comments left out."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return found


def test_every_command_names_a_program_variables_and_flags_that_exist():
    assert len(commands()) > 5
    for command in commands():
        words = shlex.split(command, comments=True)
        variables = [word.split("=")[0] for word in words if re.match(r"\w+=", word)]
        assert set(variables) <= {*SHELL_VARIABLES, *ENVIRONMENT}, command
        flags = [word.removeprefix("--").split("=")[0] for word in words if word.startswith("--")]
        if "run_loramoe.sh" in words or "train.py" in words:
            assert set(flags) <= FLAGS, command
        for word in words:
            if word.startswith(("scripts.", "workbench.")) and "-m" in words:
                assert (ROOT / f"{word.replace('.', '/')}.py").is_file(), command
            if word.endswith((".sh", ".py")) or word.startswith(("scripts/", "workbench/")):
                assert (ROOT / word).exists(), command


@pytest.mark.parametrize(
    "command",
    [line for line in commands() if re.search(rf"-m \w+\.({VERBS}) ", line)],
)
def test_the_verbs_take_the_flags_that_the_pages_give_them(command):
    verb, flags = re.search(r"-m (\w+\.\w+) (.*)", command).groups()
    program = importlib.import_module(verb)
    parse_flags(program.COMMAND, "", program.KINDS, shlex.split(flags))


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
    numbers = re.findall(r"(?<![\w.])[+-]?\d\.\d{3}\b(?: ± \d\.\d{3})?", page)
    assert sum("±" in number for number in numbers) > 20
    assert not [number for number in numbers if number not in tables]
