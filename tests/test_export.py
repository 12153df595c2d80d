"""Mixtures exported as plain LoRAs and complete models, against the mixture and against what other programs load."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import example_rows, fill_adapter, filled_model, full_disk, tiny_tokenizer
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    FalconConfig,
    FalconForCausalLM,
    GenerationConfig,
    LlamaForCausalLM,
)

from data import Encoding, InputError, load_data
from peft import Calibration, LoraConfig, PeftModel, Router, get_peft_model, static_lora
from peft.saving import WEIGHTS_NAME as WEIGHTS
from scripts import export_lora
from scripts.export_lora import adapted
from transformers_patch import AutoModelForCausalLM as PatchedAutoModel

INPUT = torch.randint(4, 300, (3, 20), generator=torch.Generator().manual_seed(2))
KINDS = ("uniform", "calibrated", "fitted")


@pytest.fixture
def export(adapter_dir, tmp_path, capsys, data_file):
    """Calls the program on the tiny adapter; returns the output folder and what was printed."""

    def call(*switches: str, adapter=adapter_dir, **flags):
        output = tmp_path / "exported"
        shutil.rmtree(output, ignore_errors=True)
        values = {"adapter": adapter, "output": output, "data": data_file, "calibration_data": data_file} | flags
        values["data_cache_dir"] = tmp_path / "cache"
        words = [text for name, value in values.items() if value is not None for text in (f"--{name}", str(value))]
        export_lora.main([*words, *switches])
        return output, capsys.readouterr().out

    return call


def refusal(export, *switches: str, **flags) -> str:
    with pytest.raises(InputError) as caught:
        export(*switches, **flags)
    return str(caught.value)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(INPUT).logits


def with_adapter_file(model_dir, folder, linears: int = 6) -> LlamaForCausalLM:
    """A stock Llama, the exported LoRA added to its weights straight from the file, in the way of PyPI's `peft`."""
    model = LlamaForCausalLM.from_pretrained(model_dir)
    config, tensors = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / WEIGHTS)
    modules = {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith("lora_A.weight")}
    assert len(tensors) == 2 * len(modules) == 2 * linears
    for name in modules:
        delta = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        with torch.no_grad():
            weight = model.get_submodule(name.removeprefix("base_model.model.")).weight
            weight += config["lora_alpha"] / config["r"] * delta
    return model


def constant_router(folder, model_dir, **settings) -> PeftModel:
    """Zero the routers in an adapter folder: every weight is 1 / E, whatever the input."""
    model = filled_model(base_model_name_or_path=str(model_dir), **settings)
    for module in model.modules():
        if isinstance(module, Router):
            torch.nn.init.zeros_(module.weight)
    model.save_pretrained(folder)
    return model


MIXTURES = [{}, {"lora_null_expert": True}, {"lora_null_expert": True, "lora_nums": 1}, {"lora_rslora": True}]


@pytest.mark.parametrize("settings", MIXTURES)
@pytest.mark.parametrize("weights", KINDS)
def test_with_a_constant_router_the_exported_lora_equals_the_mixture(export, adapter_dir, model_dir, weights, settings):
    mixture = constant_router(adapter_dir, model_dir, **settings)
    assert (logits(mixture) - logits(LlamaForCausalLM.from_pretrained(model_dir))).abs().max() > 0.1
    folder, shown = export(weights=weights)
    torch.testing.assert_close(logits(with_adapter_file(model_dir, folder)), logits(mixture), rtol=1e-5, atol=1e-5)
    (line,) = (line for line in shown.splitlines() if line.startswith(weights))
    assert float(line.split()[-1]) < 1e-6


@pytest.mark.parametrize("weights", KINDS)
def test_an_adapted_output_layer_is_exported_and_merged_like_any_linear(export, adapter_dir, model_dir, weights):
    mixture = constant_router(adapter_dir, model_dir, target_modules=["up_proj", "lm_head"])
    exported = with_adapter_file(model_dir, export(weights=weights)[0], linears=3)
    torch.testing.assert_close(logits(exported), logits(mixture), rtol=1e-5, atol=1e-5)
    merged = LlamaForCausalLM.from_pretrained(export("--merge", weights=weights)[0])
    torch.testing.assert_close(logits(merged), logits(mixture), rtol=1e-5, atol=1e-5)


def test_the_configuration_is_that_of_a_plain_lora_and_keeps_the_scaling(export):
    folder, _ = export(weights="uniform")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    assert config["target_modules"] == ["down_proj", "gate_proj", "up_proj"]
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", WEIGHTS]


@pytest.mark.parametrize("weights", KINDS)
def test_a_merged_model_is_one_for_stock_transformers(export, model_dir, weights):
    expected = logits(with_adapter_file(model_dir, export(weights=weights)[0]))
    folder, _ = export("--merge", weights=weights)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is LlamaForCausalLM
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert not (folder / "adapter_config.json").exists()
    assert AutoTokenizer.from_pretrained(folder)("the cat").input_ids == tiny_tokenizer()("the cat").input_ids


def test_a_merged_model_generates_as_the_base_models_folder_proposes(export, model_dir, tmp_path):
    base, fields = tmp_path / "base", {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 3]}
    shutil.copytree(model_dir, base)
    GenerationConfig(**fields).save_pretrained(base)
    folder, _ = export("--merge", weights="uniform", base_model=base)
    found, wanted = (json.loads((place / "generation_config.json").read_text()) for place in (folder, base))
    assert found == wanted


def test_the_printed_costs_are_those_of_each_row_by_itself(export, model_dir, adapter_dir, data_file, tmp_path):
    folder, shown = export(weights="calibrated")
    mixture, static = filled_model().eval(), with_adapter_file(model_dir, folder)
    rows, _ = load_data(data_file, tiny_tokenizer(), Encoding("plain", 128, 2), tmp_path / "cache")
    totals, tokens = torch.zeros(3), 0
    for row in rows:
        ids, start = torch.tensor([row["input_ids"]]), row["spans"][0]
        with torch.no_grad():
            p, q = (model(ids).logits[0, start - 1 : -1].log_softmax(dim=-1) for model in (mixture, static))
        targets = ids[0, start:, None]
        kl = (p.exp() * (p - q)).sum()
        totals += torch.stack([-p.gather(1, targets).sum(), -q.gather(1, targets).sum(), kl])
        tokens += len(targets)
    lm_mixture, lm_static, kl = (totals / tokens).tolist()
    lines = {line.split()[0]: line.split() for line in shown.splitlines()}
    assert float(lines["mixture"][1]) == pytest.approx(lm_mixture, abs=6e-5)
    assert float(lines["calibrated"][1]) == pytest.approx(lm_static, abs=6e-5)
    assert float(lines["calibrated"][-1]) == pytest.approx(kl, abs=1e-5)
    assert kl > 1e-4


def calibrated(rows: torch.Tensor, mask: torch.Tensor, **settings) -> tuple[PeftModel, dict, Calibration]:
    model = filled_model(**settings).eval()
    experts = {name: layer.experts["default"] for name, layer in adapted(model.get_base_model())}
    with torch.no_grad(), Calibration(experts) as calibration:
        for part in (slice(0, 1), slice(1, 3)):
            calibration.mask_BT = mask[part]
            model(rows[part])
    return model, experts, calibration


def inputs_of(model, experts, mask) -> dict[str, torch.Tensor]:
    """The input of each adapted Linear at the tokens that count."""
    found = {}
    hooks = [
        module.register_forward_pre_hook(lambda module, args, name=name: found.update({name: args[0][mask.bool()]}))
        for name, module in experts.items()
    ]
    logits(model)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("settings", MIXTURES[:2])
def test_calibration_takes_means_over_the_tokens_and_the_fit_is_the_least_squares_one(settings):
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[1, 15:] = 0
    model, experts, calibration = calibrated(INPUT, mask, **settings)
    for name, x_NI in inputs_of(model, experts, mask).items():
        module = experts[name]
        with torch.no_grad():
            weights_NE, hidden_NS = module.router(x_NI)[:, :4], x_NI @ module.lora_A.T
            torch.testing.assert_close(calibration.mean_weights(name).float(), weights_NE.mean(dim=0))
            target_NO = (hidden_NS * weights_NE.repeat_interleave(2, dim=1)) @ module.lora_B.T

            def error(lora, x_NI=x_NI, target_NO=target_NO) -> float:
                return (x_NI @ lora[0].T @ lora[1].T - target_NO).square().sum().item()

            best = torch.linalg.lstsq(hidden_NS.double(), target_NO.double()).solution
            best_error = (hidden_NS.double() @ best - target_NO).square().sum().item()
        fits = [calibration.fitted_lora(name, rank) for rank in (2, 4, 8)]
        assert [A.shape[0] for A, _ in fits] == [2, 4, 8]
        errors = [error(fit) for fit in fits]
        assert errors[2] == pytest.approx(best_error, rel=1e-3)
        assert errors[0] > errors[1] > errors[2]
        assert errors[2] < error(static_lora(module, calibration.mean_weights(name)))
        # The best map of a lower rank: of the fitted outputs, as many principal directions.
        outputs_NO = x_NI @ fits[2][0].T @ fits[2][1].T
        lost = torch.linalg.svdvals(outputs_NO.detach())[2:].square().sum().item()
        assert errors[0] == pytest.approx(best_error + lost, rel=1e-3)


def test_calibration_on_one_task_type_sees_its_rows_alone(export, tmp_path):
    (tmp_path / "ones.json").write_text(json.dumps([row for row in example_rows() if row["task_type"] == 1]))
    of_type, _ = export(weights="calibrated", task_type=1)
    tensors = load_file(of_type / WEIGHTS)
    alone, shown = export(weights="calibrated", calibration_data=tmp_path / "ones.json")
    assert all(torch.equal(tensors[key], value) for key, value in load_file(alone / WEIGHTS).items())
    assert shown.startswith("12 rows")
    everything, _ = export(weights="calibrated")
    assert any(not torch.equal(tensors[key], value) for key, value in load_file(everything / WEIGHTS).items())


def test_a_fitted_lora_has_the_rank_that_is_asked_for(export):
    folder, _ = export(weights="fitted", rank=3)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == 2
    assert {min(tensor.shape) for tensor in load_file(folder / WEIGHTS).values()} == {3}


def test_a_plain_lora_is_exported_as_it_is(export, adapter_dir, model_dir):
    model = filled_model(lora_nums=1, base_model_name_or_path=str(model_dir))
    model.save_pretrained(adapter_dir)
    folder, _ = export()
    torch.testing.assert_close(logits(with_adapter_file(model_dir, folder)), logits(model), rtol=1e-5, atol=1e-5)


def test_a_plain_lora_is_fitted_to_the_rank_that_is_asked_for(export, adapter_dir, model_dir):
    model = filled_model(lora_nums=1, base_model_name_or_path=str(model_dir))
    model.save_pretrained(adapter_dir)
    complete = with_adapter_file(model_dir, export(rank=2)[0])
    torch.testing.assert_close(logits(complete), logits(model), rtol=1e-5, atol=1e-5)
    folder, _ = export(rank=1)
    config, tensors = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / WEIGHTS)
    assert (config["r"], config["lora_alpha"]) == (1, 2)
    assert {min(tensor.shape) for tensor in tensors.values()} == {1}


def test_a_quantised_base_exports_an_adapter_but_cannot_be_merged_into(export, adapter_dir, quantisable_dir):
    base = LlamaForCausalLM.from_pretrained(quantisable_dir)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=2, lora_nums=2, blc_weight=0.0, base_model_name_or_path=str(quantisable_dir)
    )
    fill_adapter(get_peft_model(base, config)).save_pretrained(adapter_dir)
    assert "quantised weights (Linear4bit)" in refusal(export, "--merge", load_in_kbits=4)
    _, shown = export(load_in_kbits=4)
    assert "saved a LoRA of rank 4" in shown


REFUSED = {
    "--rank is 9, but can be at most 8 for this adapter": {"rank": 9},
    "--rank is 0": {"rank": 0},
    "--rank needs --weights fitted": {"rank": 2, "weights": "uniform"},
    "--task_type is 2; this adapter has 0 to 1": {"task_type": 2},
    "names a validation_file": {"data": None},
    "names a dataset_dir": {"calibration_data": None},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_exported_is_refused(export, tmp_path, message):
    assert message in refusal(export, **REFUSED[message])
    assert not (tmp_path / "exported").exists()


def test_a_linear_of_another_class_that_computes_the_same_is_merged(export, tmp_path, data_file):
    config = FalconConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False)
    torch.manual_seed(0)
    FalconForCausalLM(config).save_pretrained(tmp_path / "falcon")
    tiny_tokenizer().save_pretrained(tmp_path / "falcon")
    settings = {"r": 2, "lora_alpha": 4, "lora_nums": 1, "target_modules": ["dense_h_to_4h", "dense_4h_to_h"]}
    base = PatchedAutoModel.from_pretrained(tmp_path / "falcon")
    model = fill_adapter(get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings)))
    model.active_peft_config.base_model_name_or_path = str(tmp_path / "falcon")
    model.save_pretrained(tmp_path / "mixture")
    tiny_tokenizer().save_pretrained(tmp_path / "mixture")
    merged, _ = export("--merge", adapter=tmp_path / "mixture", weights="uniform")
    found = logits(FalconForCausalLM.from_pretrained(merged))
    assert (found - logits(FalconForCausalLM.from_pretrained(tmp_path / "falcon"))).abs().max() > 0.1
    torch.testing.assert_close(found, logits(model), rtol=1e-4, atol=1e-4)


def test_an_output_that_is_a_link_to_nowhere_is_named(export, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "is a link to" in refusal(export, output=tmp_path / "link")


def test_a_full_disk_is_one_message_and_leaves_nothing(export, tmp_path):
    with full_disk(20_000):
        assert "exported cannot be written: " in refusal(export, "--merge")
    assert not [path for path in tmp_path.iterdir() if "exported" in path.name]


def test_an_output_may_be_a_link_to_an_empty_folder(export, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    export(output=tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / WEIGHTS).is_file()


def test_an_output_folder_that_holds_something_is_left_alone(export, model_dir):
    assert "is not an empty folder" in refusal(export, output=model_dir)
    assert "holds a complete model" in refusal(export, adapter=model_dir)


PYPI_PROGRAM = """
import sys, torch
from peft import PeftModel, __file__, __version__
from transformers import AutoModelForCausalLM
assert __version__ == "0.21.2" and __file__.startswith(sys.argv[1]), __file__
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[2]), sys.argv[3]).eval()
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[4])).logits, sys.argv[5])
"""


@pytest.mark.slow
@pytest.mark.parametrize("weights", KINDS)
def test_pypis_peft_loads_the_adapter_and_gives_the_predicted_logits(export, model_dir, tmp_path, weights):
    """Its package lies in a separate folder that only that program sees; this environment does not have it."""
    place = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(place), "peft==0.21.2"]
    subprocess.run(install, check=True, timeout=600)
    folder, _ = export(weights=weights)
    torch.save(INPUT, tmp_path / "input.pt")
    paths = [str(path) for path in (place, model_dir, folder, tmp_path / "input.pt", tmp_path / "logits.pt")]
    program = [sys.executable, "-c", PYPI_PROGRAM, *paths]
    outcome = subprocess.run(program, cwd=tmp_path, env={"PYTHONPATH": str(place)}, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(found, logits(with_adapter_file(model_dir, folder)), rtol=0, atol=1e-4)
