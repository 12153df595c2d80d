"""A model's folder never runs its own code, whatever is answered on the terminal."""

import ast
import io
import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from transformers import AutoTokenizer, Gemma3Config

import train
from data import InputError
from scripts import evaluate, export_lora, generate
from transformers_patch import AutoModelForCausalLM
from transformers_patch.auto import load_config
from workbench import plan

CODE = """
from pathlib import Path
Path(r"{marker}").touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "mine"
class Model(LlamaForCausalLM):
    pass
class Tokenizer(PreTrainedTokenizerFast):
    pass
def generate(model, **kwargs):
    return model
"""
# What each file of the folder says, apart from the code; for some, transformers has its own class.
NEEDED = {
    "tokenizer": (
        "tokenizer_config.json",
        {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Tokenizer", None]}},
    ),
    "configuration": ("config.json", {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}),
    "attention": ("config.json", {"attn_implementation": "someone/kernel"}),
}
NOT_NEEDED = {
    "model": ("config.json", {"auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}),
    "generation": ("generation_config.json", {"eos_token_id": 1}),
}


@pytest.fixture
def folder_with(tmp_path, model_dir, monkeypatch):
    """Makes a base model's folder with code, which leaves a file if it runs; the terminal says yes to everything."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 99))

    def make(file: str, changes: dict):
        folder = shutil.copytree(model_dir, tmp_path / "base", dirs_exist_ok=True)
        code = CODE.format(marker=tmp_path / "ran")
        (folder / "mine.py").write_text(code)
        (folder / "custom_generate").mkdir(exist_ok=True)
        (folder / "custom_generate" / "generate.py").write_text(code)
        found = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        (folder / file).write_text(json.dumps(found | changes))
        return folder

    return make


def programs(folder, adapter_dir, data_file, tmp_path):
    """Every program that loads a base model, as a call without arguments."""
    out, cache = tmp_path / "out", ["--data_cache_dir", str(tmp_path / "cache")]
    shutil.rmtree(out, ignore_errors=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (adapter_dir / name).unlink(missing_ok=True)  # the base model's is to be loaded
    adapter = ["--adapter", str(adapter_dir), "--base_model", str(folder)]
    trained = [*cache, "--use_cpu", "true", "--model_name_or_path", str(folder), "--dataset_dir", str(data_file)]
    trained += ["--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--prepare_only", "true"]
    trained += ["--knowledge_probe", "none"]
    rows = ["--data", str(data_file), *cache]
    return {
        "train": lambda: train.main(trained),
        "generate": lambda: generate.main([*adapter, "--prompt", "Hi", "--max_new_tokens", "2"]),
        "whole model": lambda: generate.main(["--adapter", str(folder), "--prompt", "Hi", "--max_new_tokens", "2"]),
        "evaluate": lambda: evaluate.main([*adapter, *rows, "--metrics", "lm_loss"]),
        "export": lambda: export_lora.main([*adapter, *rows, "--output", str(out), "--weights", "uniform", "--merge"]),
        "Python": lambda: AutoModelForCausalLM.from_pretrained(folder),
        "plan": lambda: plan.main(["--model", str(folder)]),
    }


@pytest.mark.parametrize("kind", NEEDED)
def test_a_folder_that_needs_its_own_code_is_refused(folder_with, adapter_dir, data_file, tmp_path, kind):
    calls = programs(folder_with(*NEEDED[kind]), adapter_dir, data_file, tmp_path)
    if kind == "tokenizer":  # these load none
        del calls["Python"], calls["plan"]
    for name, call in calls.items():
        with pytest.raises(ValueError, match=r"needs custom Python code .* which is never executed") as caught:
            call()
        assert name == "Python" or isinstance(caught.value, InputError)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", NOT_NEEDED)
def test_code_that_transformers_has_a_class_for_is_left_alone(folder_with, adapter_dir, data_file, tmp_path, kind):
    for call in programs(folder_with(*NOT_NEEDED[kind]), adapter_dir, data_file, tmp_path).values():
        call()
    assert not (tmp_path / "ran").exists()


def test_the_folder_would_run_its_code(folder_with, tmp_path):
    AutoTokenizer.from_pretrained(folder_with(*NEEDED["tokenizer"]), trust_remote_code=True)
    assert (tmp_path / "ran").exists()


def test_an_attention_kernel_of_the_hub_is_refused_in_every_part_of_a_configuration(tmp_path):
    kernel = "someone/kernel"
    for changes in ({"_attn_implementation": kernel}, {"attn_implementation": {"": "sdpa", "text_config": kernel}}):
        Gemma3Config().save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=r"needs custom Python code \(attn_implementation .* 'someone/kernel'"):
            load_config(tmp_path)


def test_custom_code_cannot_be_asked_for(model_dir):
    with pytest.raises(ValueError, match="is never run; leave it out"):
        AutoModelForCausalLM.from_pretrained(model_dir, trust_remote_code=True)


PACKAGES = ("peft", "transformers_patch")
# Loads the folder that an export has just written, with this repository's modelling file.
WITH_OWN_CODE = Path("inference/standalone/compare.py")


def loading_calls(tree: ast.AST) -> list[ast.Call]:
    """Calls that load by name with a class of transformers; those of this repository are left out."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or node.module.split(".")[0] in PACKAGES):
            own |= {alias.asname or alias.name for alias in node.names}
    methods = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    loading = [call for call in methods if call.func.attr in ("from_pretrained", "from_config")]
    return [call for call in loading if ast.unparse(call.func.value) not in own]


def test_every_loading_call_says_that_code_is_not_trusted():
    found = []
    folders = ("data", "peft", "transformers_patch", "loading", "inference", "training", "scripts", "workbench")
    for file in [ROOT / "train.py", *(file for name in folders for file in (ROOT / name).rglob("*.py"))]:
        for call in loading_calls(ast.parse(file.read_text())):
            said = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            trusted = str(file.relative_to(ROOT) == WITH_OWN_CODE)
            assert said.get("trust_remote_code") == trusted, f"{file}:{call.lineno}"
            found.append(call)
    assert len(found) >= 5
