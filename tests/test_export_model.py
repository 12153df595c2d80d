"""The routed mixture as a folder that loads without this repository."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import filled_model, fill_adapter, full_disk, tiny_config, tiny_tokenizer
from safetensors.torch import load_file, save_file
from test_architectures import ARCHITECTURES, UNPREPARED, adapted, stock_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig
from transformers import LlamaForCausalLM

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
    for place in (folder, folder.with_name(folder.name + "-scratch")):
        place.mkdir()
    export_model.write_model(trained, folder, folder.with_name(folder.name + "-scratch"))
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
