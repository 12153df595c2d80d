"""The method under PyPI's peft. Run by tests/test_plugin.py of the repository, which makes what REFERENCES names."""

import json
import os
import warnings
from pathlib import Path

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import loramoe_peft
from loramoe_peft import LoraMoeConfig

REFERENCES = Path(os.environ["REFERENCES"])
NAMES = sorted(folder.name for folder in (REFERENCES / "adapters").iterdir())
IDS = torch.arange(2, 42).view(2, 20)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def base(name: str = "llama"):
    return AutoModelForCausalLM.from_pretrained(REFERENCES / "bases" / name)


def base_of(name: str):
    config = json.loads((REFERENCES / "adapters" / name / "adapter_config.json").read_text())
    return AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])


def reference(name: str):
    return load_file(REFERENCES / "adapters" / name / "reference.safetensors")["logits"]


def test_the_repository_is_not_what_was_imported():
    for module in (peft, loramoe_peft):
        assert "site-packages" in module.__file__
    assert peft.__version__ == "0.21.2"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_fresh_adapter_changes_nothing(name):
    before = logits(base(name))
    model = get_peft_model(base(name), LoraMoeConfig())
    assert torch.equal(logits(model), before)
    trained = {key.rpartition(".experts.default.")[2] for key, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B", "router.weight"}


@pytest.mark.parametrize("name", NAMES)
def test_adapters_of_the_repository_load_in_every_way_and_come_back_the_same(name, tmp_path):
    folder, expected = REFERENCES / "adapters" / name, reference(name)
    model = PeftModel.from_pretrained(base_of(name), folder)
    assert isinstance(PeftConfig.from_pretrained(folder), LoraMoeConfig)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(folder)), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base_of(name)))
    written = Path(os.environ["WRITTEN"]) / name
    model.save_pretrained(written)
    saved, own = (load_file(each / "adapter_model.safetensors") for each in (written, folder))
    assert saved.keys() == own.keys()
    assert all(torch.equal(saved[key], own[key]) for key in own)
    configs = [json.loads((each / "adapter_config.json").read_text()) for each in (written, folder)]
    assert configs[0] == configs[1] | {"inference_mode": True}
    save_file({"logits": expected}, written / "reference.safetensors")


@pytest.mark.parametrize("name", ["dense", "copies"])
def test_a_half_precision_base_keeps_the_adapter_in_float32(name):
    model = PeftModel.from_pretrained(base_of(name).to(torch.bfloat16), REFERENCES / "adapters" / name)
    saved = peft.get_peft_model_state_dict(model)
    own = load_file(REFERENCES / "adapters" / name / "adapter_model.safetensors")
    assert all(torch.equal(saved[key], own[key]) for key in own)
    assert logits(model).dtype == torch.bfloat16


def test_loading_onto_an_empty_model():
    folder = REFERENCES / "adapters" / "dense"
    model = PeftModel.from_pretrained(base(), folder, low_cpu_mem_usage=True)
    assert torch.equal(logits(model), reference("dense"))


def test_two_adapters_take_turns():
    model = PeftModel.from_pretrained(base(), REFERENCES / "adapters" / "dense", adapter_name="first")
    model.load_adapter(REFERENCES / "adapters" / "some_layers", "second")
    assert torch.equal(logits(model), reference("dense"))
    model.set_adapter("second")
    assert torch.equal(logits(model), reference("some_layers"))
    with pytest.raises(ValueError, match="one mixture can be active at a time"):
        model.base_model.set_adapter(["first", "second"])
    model.set_adapter("first")
    model.delete_adapter("second")
    assert torch.equal(logits(model), reference("dense"))
    assert not any(".second." in key for key in model.state_dict())


def test_unloading_gives_the_base_model_and_merging_is_refused():
    model = PeftModel.from_pretrained(base(), REFERENCES / "adapters" / "dense")
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="cannot be merged"):
            merge()
    assert torch.equal(logits(model.unload()), logits(base()))


def test_generating_with_a_cache_is_as_without():
    model = PeftModel.from_pretrained(base(), REFERENCES / "adapters" / "dense")
    shown = [
        model.generate(input_ids=IDS, max_new_tokens=12, do_sample=False, use_cache=cache, pad_token_id=1)
        for cache in (True, False)
    ]
    assert torch.equal(*shown)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="lora_nums is 5"):
        LoraMoeConfig(lora_nums=5)
    with pytest.raises(ValueError, match="did you mean 'gate_proj'"):
        get_peft_model(base(), LoraMoeConfig(target_modules=["gate_porj"]))


def test_nothing_is_warned_of(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = get_peft_model(base(), LoraMoeConfig())
        model.save_pretrained(tmp_path)
        PeftModel.from_pretrained(base(), tmp_path)
