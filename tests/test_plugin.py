"""`loramoe-peft`: built from the files of `peft/`, and, in an environment with PyPI's peft, the same method."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from conftest import ROOT, fill_adapter, tiny_config, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from inference.trained import InferenceArguments, load_trained
from peft import LoraConfig, TaskType, get_peft_model
from transformers_patch import AutoModelForCausalLM

PLUGIN = ROOT / "integrations" / "loramoe_peft"
SHARED = ("torch==", "transformers==", "tokenizers==", "accelerate==", "datasets==", "pytest==")
PINNED = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith(SHARED)]
IDS = torch.arange(2, 42).view(2, 20)

# What an adapter can be: settings of its LoraConfig, with the base model's name.
ADAPTERS: dict[str, tuple[str, dict]] = {
    "dense": ("llama", {}),
    "top_k": ("llama", {"lora_top_k": 2}),
    "shared_A": ("llama", {"lora_shared_A": True}),
    "null_expert": ("llama", {"lora_null_expert": True}),
    "rslora": ("llama", {"lora_rslora": True}),
    "one_expert": ("llama", {"lora_nums": 1, "blc_weight": 0}),
    "some_layers": ("llama", {"layers_to_transform": [1], "target_modules": "all-linear"}),
    "pattern": ("llama", {"target_modules": r"model\.layers\.\d+\.self_attn\.[qv]_proj"}),
    "conv1d": ("gpt2", {}),
    "copies": ("tied", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "norm": ("llama", {"modules_to_save": ["norm"], "expert_groups": [1, 3], "task_type_names": ["a", "b"]}),
}  # fmt: skip


def build(folder: Path) -> Path:
    """The package as a wheel has it, without a wheel: needs no network."""
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(folder / "base"),
               "--build-lib", str(folder / "lib")]  # fmt: skip
    subprocess.run(command, cwd=PLUGIN, check=True, capture_output=True)
    return folder / "lib" / "loramoe_peft"


def test_the_build_copies_the_method_and_nothing_else(tmp_path):
    built = build(tmp_path)
    assert len(list((built / "_method").iterdir())) == len(list((ROOT / "peft").glob("*.py")))
    for file in (ROOT / "peft").glob("*.py"):
        assert (built / "_method" / file.name).read_bytes() == file.read_bytes()
    own = {file.name for file in (PLUGIN / "src" / "loramoe_peft").glob("*.py")}
    assert {file.name for file in built.glob("*.py")} == own


def test_the_method_can_be_imported_under_another_name(tmp_path):
    """In a process without this repository on its path: no file of the method asks for a package named peft."""
    method = build(tmp_path) / "_method"
    method.rename(tmp_path / "elsewhere")
    code = "import elsewhere, sys; assert 'peft' not in sys.modules; print(elsewhere.LoraExperts.__module__)"
    shown = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert shown.stdout.strip() == "elsewhere.layer"


@pytest.mark.parametrize("name", ["sft.py", "dpo.py"])
def test_examples_are_short(name):
    assert len((PLUGIN / "examples" / name).read_text().splitlines()) < 60


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The Python of a new environment with PyPI's peft, TRL and the plug-in."""
    folder = tmp_path_factory.mktemp("plugin") / "env"
    venv.create(folder, with_pip=True)
    program = folder / "bin" / "python"
    packages = ["peft==0.21.2", "trl==1.16.0", *PINNED, str(PLUGIN)]
    subprocess.run([program, "-m", "pip", "install", "-q", *packages], check=True, timeout=3000)
    return program


def base_model(folder: Path, name: str) -> None:
    torch.manual_seed(0)
    if name == "gpt2":
        sizes = {"vocab_size": 300, "n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 2, "eos_token_id": 1}
        no_dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        config = GPT2Config(**sizes, bos_token_id=0, **no_dropout)
        GPT2LMHeadModel(config).save_pretrained(folder)
    else:
        LlamaForCausalLM(tiny_config(tie_word_embeddings=name == "tied")).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> Path:
    """A folder for each adapter, as this repository trains it, with the logits that it has here."""
    root = tmp_path_factory.mktemp("references")
    for base in ("llama", "gpt2", "tied"):
        base_model(root / "bases" / base, base)
    for name, (base, settings) in ADAPTERS.items():
        model = AutoModelForCausalLM.from_pretrained(root / "bases" / base)
        values = {"task_type": TaskType.CAUSAL_LM, "r": 2, "lora_alpha": 4, "lora_nums": 4, "lora_dropout": 0.0}
        model = fill_adapter(get_peft_model(model, LoraConfig(**(values | settings)))).eval()
        model.save_pretrained(root / "adapters" / name)
        with torch.no_grad():
            save_file({"logits": model(input_ids=IDS).logits}, root / "adapters" / name / "reference.safetensors")
    return root


def run_there(python: Path, *command: str | Path, **settings: str) -> str:
    values = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | settings
    values.pop("PYTHONPATH", None)
    shown = subprocess.run([python, *command], cwd=PLUGIN, env=values, capture_output=True, text=True, timeout=3000)
    assert shown.returncode == 0, shown.stdout[-6000:] + shown.stderr[-3000:]
    return shown.stdout


@pytest.mark.slow
def test_under_pypi_peft_it_is_the_same_method(python, references, tmp_path):
    """Its own tests, run there, and what they have written read here."""
    settings = {"REFERENCES": str(references), "WRITTEN": str(tmp_path), "PYTEST_ADDOPTS": "-p no:cacheprovider"}
    shown = run_there(python, "-m", "pytest", "-q", "tests", **settings)
    print(shown)
    for folder in sorted(tmp_path.iterdir()):
        logits = load_file(folder / "reference.safetensors")["logits"]
        model = load_trained(InferenceArguments(adapter=str(folder), dtype="float32", device_map="cpu")).model
        with torch.no_grad():
            assert torch.equal(model(input_ids=IDS).logits, logits), folder.name
    assert {folder.name for folder in tmp_path.iterdir()} == {*ADAPTERS, "sft", "dpo"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft.py", "dpo.py"])
def test_examples_run(python, references, tmp_path, name):
    base, output = references / "bases" / "llama", tmp_path / "adapter"
    shown = run_there(python, f"examples/{name}", base, output)
    assert "balance_loss" in shown
    assert json.loads((output / "adapter_config.json").read_text())["peft_type"] == "LORAMOE"
