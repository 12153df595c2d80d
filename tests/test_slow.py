"""The real model, through the script that people run: `bash scripts/test.sh -m slow`."""

import json
import subprocess
from pathlib import Path
from statistics import mean

import pytest
import torch
from conftest import ROOT
from test_launch import environment, free_port
from transformers import AutoTokenizer, BitsAndBytesConfig

from peft import PeftModel
from transformers_patch import AutoModelForCausalLM

pytestmark = pytest.mark.slow

MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"  # run_loramoe.sh makes it where it is missing
QUANTISATION = {
    4: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    8: BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.fixture
def train(tmp_path):
    """Calls run_loramoe.sh on the real model with all cores; keyword arguments are shell variables."""

    def call_script(*flags: str, **variables) -> str:
        settings = environment(output_dir=tmp_path / "outputs", master_port=free_port(), **variables)
        del settings["OMP_NUM_THREADS"]
        command = ["bash", "run_loramoe.sh", "--data_cache_dir", str(tmp_path / "cache"), *flags]
        outcome = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=1800)
        assert outcome.returncode == 0, outcome.stdout[-3000:] + outcome.stderr[-3000:]
        return outcome.stdout

    return call_script


def log_values(folder: Path, name: str) -> list[float]:
    """The values that a run has logged under a name, in their order."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in log if name in entry]


def results_table(shown: str) -> list[str]:
    """The lines of the results that a run prints at its end."""
    marks = ("held-out", "facts known before", "  task type")
    return [line.strip() for line in shown.splitlines() if any(mark in line for mark in marks)]


def test_the_main_job_learns_and_repeats_its_results(train, tmp_path):
    first = train(max_steps=12)
    results = json.loads((tmp_path / "outputs" / "default" / "all_results.json").read_text())
    print({name: value for name, value in results.items() if isinstance(value, float)})
    assert results["eval_lm_loss_after"] < results["eval_lm_loss_before"]
    second = train(max_steps=12)
    assert "this run is finished already" in second
    assert any("facts known before" in line for line in results_table(second))
    assert results_table(second) == results_table(first)


@pytest.mark.parametrize("bits", QUANTISATION)
def test_a_quantised_base_model_learns_and_its_adapter_loads_anywhere(train, tmp_path, bits):
    small = {"validation_file": "", "per_device_train_batch_size": 2, "max_steps": 20}
    train("--logging_steps", "1", "--probe_facts", "8", load_in_kbits=bits, gradient_checkpointing="true", **small)
    folder = tmp_path / "outputs" / "default"
    losses = log_values(folder, "lm_loss")
    print(f"{bits} bits: lm_loss {mean(losses[:5]):.4f} -> {mean(losses[-5:]):.4f}", losses)
    assert len(losses) == 20
    assert json.loads((folder / "all_results.json").read_text())["knowledge"]["facts"] == 8
    assert mean(losses[-5:]) < mean(losses[:5])
    prompt = AutoTokenizer.from_pretrained(folder)("The capital of Kenya is", return_tensors="pt")
    for quantization in (QUANTISATION[bits], None):
        base = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=quantization)
        model = PeftModel.from_pretrained(base, folder).eval()
        with torch.no_grad():
            adapted = model(**prompt).logits
            with model.disable_adapter():
                plain = model(**prompt).logits
        assert adapted.isfinite().all()
        assert not torch.equal(adapted, plain)
