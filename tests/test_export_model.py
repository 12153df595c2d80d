"""The routed mixture as a folder that loads without this repository."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import fill_adapter, filled_model, full_disk, tiny_config, tiny_tokenizer
from safetensors.torch import load_file, save_file
from test_architectures import ARCHITECTURES, UNPREPARED, adapted, stock_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    LlamaForCausalLM,
)

from data import InputError
from inference.standalone import modeling_lora_mixture as standalone
from inference.standalone import weights
from inference.trained import find_trained
from peft import LoraConfig, PeftModel, get_peft_model
from scripts import export_model
from transformers_patch import AutoModelForCausalLM as PatchedAutoModel

IDS = torch.randint(4, 300, (2, 12), generator=torch.Generator().manual_seed(2))
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}

# Loads every folder of a file of names, each also after saving it again, and writes what it gives next to it.
CHILD = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

inputs, greedy = load_file(sys.argv[1]), json.loads(sys.argv[2])
for folder in sys.argv[3:]:
    results = {}
    for place in (folder, folder + "-saved-again"):
        model, info = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True, output_loading_info=True)
        assert not any(info.values()), (place, info)
        with torch.no_grad():
            results["logits" if place == folder else "again"] = model(**inputs).logits.float()
        if place == folder:
            results["tokens"] = model.generate(**inputs, **greedy)
            model.save_pretrained(folder + "-saved-again")
    inner = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(inner).__name__ == "LoraMixtureModel" and inner.is_backend_compatible() == model.is_backend_compatible()
    with torch.no_grad():
        states = inner(**inputs, output_hidden_states=True).hidden_states[-1]
        results["states"] = (states - model(**inputs, output_hidden_states=True).hidden_states[-1]).abs().max()
    save_file(results, folder + ".results")
assert not {"inference", "peft", "data", "transformers_patch"} & set(sys.modules)
"""


def in_a_child(folders: list[Path], scratch: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What a process that does not see this repository gets from folders, by their names."""
    save_file({"input_ids": IDS}, scratch / "inputs")
    result = subprocess.run(
        [sys.executable, "-I", "-c", CHILD, scratch / "inputs", json.dumps(GREEDY), *folders],
        cwd=scratch,
        env=os.environ | {"HF_MODULES_CACHE": str(scratch / "modules")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return {folder.name: load_file(f"{folder}.results") for folder in folders}


def exported(model: PeftModel, base: Path, folder: Path) -> Path:
    """Export a mixture without the check of its logits, which takes a process of its own."""
    model.active_peft_config.base_model_name_or_path = str(base)
    model.save_pretrained(folder.with_name(folder.name + "-adapter"))
    tiny_tokenizer().save_pretrained(folder.with_name(folder.name + "-adapter"))
    trained = find_trained(str(folder.with_name(folder.name + "-adapter")))
    export_model.check_export(trained, folder)
    folder.mkdir()
    base_model = weights.load_offloaded(str(base), folder.with_name(folder.name + "-scratch"))
    export_model.write_model(base_model, trained, folder)
    return folder


def differences(models: dict[str, PeftModel], found: dict[str, dict[str, torch.Tensor]]) -> dict[str, float]:
    """The largest difference of logits of each export; other tokens, or other logits once saved again, are infinity."""
    worst = {}
    for name, model in models.items():
        with torch.no_grad():
            logits = model.eval()(IDS).logits.float()
            tokens = model.generate(input_ids=IDS, **GREEDY)
        same = torch.equal(tokens, found[name]["tokens"]) and torch.equal(found[name]["again"], found[name]["logits"])
        same = same and found[name]["states"] == 0
        worst[name] = (logits - found[name]["logits"]).abs().max().item() if same else float("inf")
    return worst


def test_every_architecture_gives_the_same_logits_and_tokens_elsewhere(tmp_path):
    models, folders = {}, []
    for name in ARCHITECTURES | UNPREPARED:
        base = tmp_path / "bases" / name
        stock_model(name).save_pretrained(base)
        models[name] = adapted(base)
        folders.append(exported(models[name], base, tmp_path / name))
    assert differences(models, in_a_child(folders, tmp_path)) == dict.fromkeys(models, 0.0)


TIED = {"tie_word_embeddings": True}
# Settings of the adapter and of the base model, a tiny Llama.
MIXTURES = {
    "top-k": ({"lora_top_k": 2}, {}),
    "shared_A": ({"lora_shared_A": True}, {}),
    "one_expert": ({"lora_nums": 1}, {}),
    "null_expert": ({"lora_null_expert": True}, {}),
    "null_expert_top-k": ({"lora_null_expert": True, "lora_top_k": 2}, {}),
    "null_expert_shared_A": ({"lora_null_expert": True, "lora_shared_A": True}, {}),
    "rslora": ({"lora_rslora": True, "r": 4}, {}),
    "one_and_null_expert": ({"lora_nums": 1, "lora_null_expert": True}, {}),
    "some_layers": ({"layers_to_transform": [1]}, {}),
    "all_linear": ({"target_modules": "all-linear"}, {}),
    "all_linear_tied": ({"target_modules": "all-linear"}, TIED),
    "output_layer": ({"target_modules": ["lm_head", "up_proj"]}, {}),
    "output_layer_tied": ({"target_modules": ["lm_head", "up_proj"]}, TIED),
    "trained_in_full": ({"modules_to_save": ["embed_tokens", "norm"]}, {}),
    "trained_in_full_tied": ({"modules_to_save": ["embed_tokens", "lm_head"]}, TIED),
    "biases": ({"target_modules": ["q_proj", "o_proj"]}, {"attention_bias": True}),
}


def test_every_kind_of_mixture_gives_the_same_logits_and_tokens_elsewhere(tmp_path):
    models, folders = {}, []
    for name, (settings, changes) in MIXTURES.items():
        base = tmp_path / "bases" / name
        torch.manual_seed(0)
        LlamaForCausalLM(tiny_config(initializer_range=0.2, **changes)).save_pretrained(base)
        values = {"task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "lora_nums": 4, "lora_dropout": 0.0} | settings
        model = get_peft_model(PatchedAutoModel.from_pretrained(base), LoraConfig(**values))
        models[name] = fill_adapter(model)
        folders.append(exported(models[name], base, tmp_path / name))
    assert differences(models, in_a_child(folders, tmp_path)) == dict.fromkeys(models, 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model_dir) -> Path:
    """The tiny Llama with 4 experts, exported without the check of its logits."""
    root = tmp_path_factory.mktemp("exported")
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 3]}
    shutil.copytree(model_dir, root / "base")
    GenerationConfig(**settings).save_pretrained(root / "base")
    return exported(filled_model(), root / "base", root / "out")


def run(adapter: Path, output: Path, *more: str) -> None:
    export_model.main(["--adapter", str(adapter), "--output", str(output), *more])


def refusal(adapter: Path, output: Path, *more: str) -> str:
    """The message; nothing may be left next to the output."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(InputError) as caught:
        run(adapter, output, *more)
    assert sorted(output.parent.iterdir()) == before
    return str(caught.value)


def test_the_command_compares_the_logits_and_writes_a_complete_folder(adapter_dir, tmp_path, capsys):
    run(adapter_dir, tmp_path / "new" / "out")
    shown = capsys.readouterr().out
    assert "largest difference of logits, in a process without this repository: 0.0e+00" in shown
    files = {"README.md", "config.json", "generation_config.json", "model.safetensors", "modeling_lora_mixture.py"}
    files |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {file.name for file in (tmp_path / "new" / "out").iterdir()} == files
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_in_half_precision_the_weights_are_rounded_as_a_loader_rounds_them(tmp_path, capsys):
    base = tmp_path / "base"
    stock_model("llama").bfloat16().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    model = adapted(base, base_model_name_or_path=str(base), lora_alpha=3, modules_to_save=["norm", "lm_head"])
    model.save_pretrained(tmp_path / "adapter")
    run(tmp_path / "adapter", tmp_path / "out")
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("largest difference"))
    difference = float(line.split()[-1])
    assert difference < 1e-5
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype=torch.float32)
    unrounded = PatchedAutoModel.from_pretrained(base, dtype=torch.float32)
    exact = PeftModel.from_pretrained(unrounded, tmp_path / "adapter")
    torch.testing.assert_close(again(IDS).logits, exact(IDS).logits, rtol=1e-5, atol=1e-5)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    ours = PeftModel.from_pretrained(PatchedAutoModel.from_pretrained(base), tmp_path / "adapter")
    errors = [(model(IDS).logits.float() - exact(IDS).logits).abs().mean() for model in (half, ours)]
    assert 0 < errors[0] < 1.2 * errors[1]


def test_it_is_refused_without_trust_remote_code(folder):
    for load in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(ValueError, match="trust_remote_code"):
            load.from_pretrained(folder, trust_remote_code=False)


def test_tokenizer_template_and_generation_settings_travel_along(folder):
    tokenizer, wanted = AutoTokenizer.from_pretrained(folder), tiny_tokenizer()
    assert tokenizer("the cat").input_ids == wanted("the cat").input_ids
    assert tokenizer.chat_template == wanted.chat_template
    found, proposed = (
        json.loads((place / "generation_config.json").read_text()) for place in (folder, folder.parent / "base")
    )
    assert found == proposed


def test_nothing_in_the_configuration_looks_like_a_mixture_of_expert_mlps(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "lora_mixture_llama"
    assert "moe" not in json.dumps(config).lower()
    assert not [name for name in config if "expert" in name]
    assert config["auto_map"]["AutoModelForDecision"] == "modeling_lora_mixture.LoraMixtureForCausalLM"
    assert len(config["lora_mixture"].pop("targets")) == 6
    settings = {"null_expert": False, "num_experts": 4, "rank": 2, "scaling": 2.0, "shared_A": False, "top_k": None}
    assert config["lora_mixture"] == settings


def test_only_the_imports_of_the_base_classes_differ_from_the_file_of_this_repository(tmp_path):
    base = tmp_path / "base"
    stock_model("gpt2").save_pretrained(base)
    lines = (exported(adapted(base), base, tmp_path / "out") / "modeling_lora_mixture.py").read_text().splitlines()
    ours = Path(standalone.__file__).read_text().splitlines()
    assert [line for line in lines if line not in ours] == [
        "from transformers import GPT2Config as BaseConfig",
        "from transformers import GPT2LMHeadModel as BaseForCausalLM",
        "from transformers import GPT2Model as BaseModel",
    ]
    assert len(lines) == len(ours)


def test_large_models_are_written_in_shards(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "MAX_SHARD_SIZE", "40KB")
    folder = exported(filled_model(), model_dir, tmp_path / "out")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert all(file.stat().st_size < 45_000 for file in shards)
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, filled_model().eval()(IDS).logits)


def tiny_mixture(targets: list[str]) -> standalone.LoraMixtureForCausalLM:
    settings = {"num_experts": 4, "null_expert": False, "rank": 2, "scaling": 2.0, "top_k": None, "shared_A": False}
    mixture = {"lora_mixture": settings | {"targets": targets}}
    return standalone.LoraMixtureForCausalLM(standalone.LoraMixtureConfig(**tiny_config().to_dict() | mixture))


def test_servers_split_the_parts_of_a_wrapped_linear_as_it_needs():
    mlp = [f"model.layers.{layer}.mlp.{name}" for layer in (0, 1) for name in ("gate_proj", "down_proj")]
    plan = tiny_mixture(mlp).model.tp_plan

    def style(name: str) -> str:
        return next(style for key, style in plan.items() if re.match(key.replace("*", r"\d+"), name))

    parts = ("base_layer", "lora_A", "router", "lora_B")
    assert [style(f"layers.1.mlp.gate_proj.{part}") for part in parts] == [
        "colwise",
        "replicate",
        "replicate",
        "colwise",
    ]
    assert [style(f"layers.1.mlp.down_proj.{part}") for part in parts] == ["rowwise", "rowwise", "rowwise", "replicate"]
    assert style("layers.0.mlp.up_proj") == "colwise"


def test_a_wrapped_linear_consists_of_plain_linears_in_a_class_of_their_own():
    model = tiny_mixture(["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"])
    mixture = model.model.layers[1].mlp.gate_proj
    assert not isinstance(mixture, nn.Linear)
    assert {type(part) for part in mixture.children()} == {nn.Linear}
    plain, wrapped = (type(layer.mlp) for layer in model.model.layers)
    assert plain is not wrapped
    assert issubclass(wrapped, plain)
    assert plain.__name__ == wrapped.__name__


def test_what_cannot_be_exported_is_refused_before_any_work(
    adapter_dir, quantisable_dir, model_dir, tmp_path, monkeypatch
):
    output = tmp_path / "out"
    monkeypatch.setattr(export_model, "load_offloaded", None)
    assert "holds a complete model" in refusal(model_dir, output)
    assert "is not an empty folder" in refusal(adapter_dir, adapter_dir)
    assert "no such folder" in refusal(tmp_path / "nowhere", output)
    (tmp_path / "folder").mkdir()
    assert "is not an adapter folder" in refusal(tmp_path / "folder", output)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9, 10**4))
    assert re.search(
        r"--output .*out needs 0\.0 GB, and .* has 0\.0 GB of free disk space", refusal(adapter_dir, output)
    )


def test_a_quantised_base_model_is_refused(adapter_dir, quantisable_dir, tmp_path):
    kbits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    LlamaForCausalLM.from_pretrained(quantisable_dir, quantization_config=kbits).save_pretrained(tmp_path / "kbits")
    tiny_tokenizer().save_pretrained(tmp_path / "kbits")
    base = PatchedAutoModel.from_pretrained(quantisable_dir)
    adapter = LoraConfig(r=2, lora_nums=2, base_model_name_or_path=str(tmp_path / "kbits"))
    fill_adapter(get_peft_model(base, adapter)).save_pretrained(adapter_dir)
    assert "are quantised" in refusal(adapter_dir, tmp_path / "out")
    export_model.check_export(find_trained(str(adapter_dir), str(quantisable_dir)), tmp_path / "out")


def test_damaged_weights_and_a_full_disk_are_one_message(adapter_dir, model_dir, tmp_path):
    with full_disk(20_000):
        assert "out cannot be written: " in refusal(adapter_dir, tmp_path / "out")
    base = tmp_path / "base"
    shutil.copytree(model_dir, base)
    os.truncate(base / "model.safetensors", 10_000)
    assert f"the weights of {base} could not be read" in refusal(
        adapter_dir, tmp_path / "out", "--base_model", str(base)
    )


CHILDREN = {
    "can be at most": '{"difference": 0.1, "odd": []}',
    "missing_keys: lm_head.weight": '{"difference": 0.0, "odd": ["missing_keys: lm_head.weight"]}',
    "largest difference .*: nan": '{"difference": NaN, "odd": []}',
}


@pytest.mark.parametrize("message", CHILDREN)
def test_an_export_with_other_logits_is_not_kept(adapter_dir, tmp_path, monkeypatch, message):
    child = subprocess.CompletedProcess([], 0, f"loading\n{CHILDREN[message]}\n", "")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: child)
    assert re.search(message, refusal(adapter_dir, tmp_path / "out"))


def test_an_export_that_cannot_be_loaded_is_not_kept(adapter_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(export_model, "write_code", lambda base, folder: None)
    assert re.search("cannot be loaded, nothing was kept: .*Error", refusal(adapter_dir, tmp_path / "out"))
