"""Modules that an adapter adapts (`target_modules`, `layers_to_transform`) or trains in full (`modules_to_save`)."""

import pytest
import torch
from conftest import fill_adapter, filled_model, tiny_config, tiny_model
from safetensors.torch import load_file
from test_model import make_batch

from loading.arguments import ModelArguments
from peft import (
    LoraConfig,
    LoraLayer,
    PeftModel,
    TrainedCopy,
    find_targets,
    get_peft_model,
    get_peft_model_state_dict,
    static_lora,
)
from transformers_patch import LlamaLoRAMoEForCausalLM

MLP = {f"model.layers.{layer}.mlp.{name}" for layer in range(2) for name in ("gate_proj", "up_proj", "down_proj")}
ATTENTION = {f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "qkvo"}
FIRST = {name for name in MLP if ".0." in name}

TARGETS = {
    "list of names": (["gate_proj", "up_proj", "down_proj"], None, MLP),
    "all-linear": ("all-linear", None, MLP | ATTENTION),
    "expression": (r"model\.layers\.0\.mlp\..*", None, FIRST),
    "expression for the end of names": (r".*\.(q|v)_proj", None, {n for n in ATTENTION if n[-6] in "qv"}),
    "layers": (["gate_proj", "up_proj", "down_proj"], [0], FIRST),
    "all-linear in a layer": ("all-linear", [1], {n for n in MLP | ATTENTION if ".1." in n}),
}


@pytest.mark.parametrize(("wanted", "layers", "expected"), TARGETS.values(), ids=TARGETS)
def test_targets_are_found(wanted, layers, expected):
    model = tiny_model()
    assert set(find_targets(model, wanted, layers)) == expected
    adapted = get_peft_model(model, LoraConfig(target_modules=wanted, layers_to_transform=layers))
    prefix = "base_model.model."
    assert {n.removeprefix(prefix) for n, m in adapted.named_modules() if isinstance(m, LoraLayer)} == expected


def test_none_is_the_architecture_s_default_and_is_saved_by_name(tmp_path):
    model = filled_model()
    model.save_pretrained(tmp_path)
    assert LoraConfig.from_pretrained(tmp_path).target_modules == ["down_proj", "gate_proj", "up_proj"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auto", None),
        ("q_proj", ["q_proj"]),
        (" up_proj, mlp.down_proj ", ["mlp.down_proj", "up_proj"]),
        ("all-linear", "all-linear"),
        (r".*mlp\.(up|down)_proj", r".*mlp\.(up|down)_proj"),
        (r"model\.layers\.\d{1,2}\.mlp\..*", r"model\.layers\.\d{1,2}\.mlp\..*"),
    ],
)
def test_the_flag_means_names_or_an_expression(text, expected):
    assert ModelArguments(trainable=text).lora_config().target_modules == expected


def test_every_flag_of_the_adapter_reaches_its_configuration():
    values = {
        "lora_nums": 4, "lora_alpha": 5.0, "lora_dropout": 0.25, "lora_top_k": 3, "lora_shared_A": True,
        "lora_null_expert": True, "lora_rslora": True, "blc_alpha": 0.5, "blc_weight": 0.7, "num_task_types": 3,
    }  # fmt: skip
    config, default = ModelArguments(lora_rank=7, **values).lora_config(), ModelArguments().lora_config()
    assert {name: getattr(config, name) for name in values} == values
    assert config.r == 7
    assert all(getattr(default, name) != value for name, value in values.items())


PROBLEMS = {
    "no match": ({"target_modules": "mlp.*"}, r"no Linear has a name that the regular expression 'mlp\.\*' matches"),
    "no expression": ({"target_modules": "(q"}, r"target_modules '\(q' is not a regular expression"),
    "no such layer": ({"layers_to_transform": [1, 7]}, r"names 7, but there are target modules in layers 0, 1 only"),
    "no layers": ({"layers_to_transform": []}, r"layers_to_transform is \[\], but has to be a list of layer numbers"),
    "no such module": ({"modules_to_save": ["embed"]}, r"'embed' does not exist in the model; did you mean 'embed_tok"),
    "no weight": ({"modules_to_save": ["mlp"]}, r"'model.layers.0.mlp' .* is a LlamaMLP, which has no weight itself"),
    "both": ({"target_modules": ["lm_head"], "modules_to_save": ["lm_head"]}, "it can be only one of them"),
}


@pytest.mark.parametrize(("settings", "message"), PROBLEMS.values(), ids=PROBLEMS)
def test_what_cannot_be_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny_model(), LoraConfig(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task_type_names": "ab"}, "task_type_names is 'ab', but has to be 2 different names"),
        ({"lora_alpha": True}, "lora_alpha is True, but has to be a number above 0"),
        ({"blc_weight": True}, "blc_weight is True, but has to be a number of at least 0"),
        ({"inference_mode": "x"}, "inference_mode is 'x', but has to be true or false"),
        ({"target_modules": [1, "a"]}, r"target_modules is \[1, 'a'\], but has to be a list of names"),
        ({"modules_to_save": [["a"]]}, r"modules_to_save is \[\['a'\]\], but has to be a list of names"),
        (
            {"layers_to_transform": [0, "a"]},
            r"layers_to_transform is \[0, 'a'\], but has to be a list",
        ),
    ],
)
def test_values_of_another_type_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**settings)


def test_tuples_are_lists():
    values = {"expert_groups": (2, 4), "task_type_names": ("a", "b"), "target_modules": ("v", "q")}
    expected = LoraConfig(expert_groups=[2, 4], task_type_names=["a", "b"], target_modules=["q", "v"])
    assert LoraConfig(**values) == expected


SAVED, ADAPTED = {"target_modules": ["up_proj"], "modules_to_save": ["lm_head"]}, {"target_modules": ["lm_head"]}


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (ADAPTED, SAVED, "'lm_head' is in modules_to_save, but adapter 'one' of this model has it in target_modules"),
        (SAVED, ADAPTED, "'lm_head' cannot be adapted: adapter 'one' of this model has it in modules_to_save"),
    ],
)
def test_what_another_adapter_does_to_a_module_is_named(first, second, message):
    model = get_peft_model(tiny_model(), LoraConfig(**first), "one")
    with pytest.raises(ValueError, match=message):
        model.add_adapter("two", LoraConfig(**second))


def test_a_single_module_to_save_may_be_a_string():
    model = get_peft_model(tiny_model(), LoraConfig(modules_to_save="lm_head"))
    assert [name for name, module in model.named_modules() if isinstance(module, TrainedCopy)] == [
        "base_model.model.lm_head"
    ]


def model_with_embeddings(tied: bool, **settings) -> PeftModel:
    torch.manual_seed(0)
    base = LlamaLoRAMoEForCausalLM(tiny_config(tie_word_embeddings=tied))
    values = {"r": 2, "lora_alpha": 4, "lora_nums": 4, "lora_dropout": 0.0}
    return get_peft_model(base, LoraConfig(**values, modules_to_save=["embed_tokens", "lm_head"], **settings))


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_are_trained_saved_and_loaded(tied, tmp_path):
    batch = make_batch()
    model = fill_adapter(model_with_embeddings(tied)).train()
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    model(**batch).loss.backward()
    optimizer.step()
    unmoved = {n for n, p in model.named_parameters() if n in before and torch.equal(p, before[n])}
    assert not unmoved
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    model.save_pretrained(tmp_path)
    keys = {"base_model.model.model.embed_tokens.trained.weight"}
    keys |= set() if tied else {"base_model.model.lm_head.trained.weight"}
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {key for key in saved if ".experts." not in key} == keys
    torch.manual_seed(0)
    base = LlamaLoRAMoEForCausalLM(tiny_config(tie_word_embeddings=tied))
    again = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)
    assert (again.get_input_embeddings().weight is again.get_output_embeddings().weight) == tied


@pytest.mark.parametrize("tied", [False, True])
def test_without_the_adapter_the_embeddings_are_the_base_s(tied):
    batch = make_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    torch.manual_seed(0)
    expected = LlamaLoRAMoEForCausalLM(tiny_config(tie_word_embeddings=tied)).eval()(**inputs).logits
    model = model_with_embeddings(tied).eval()
    assert torch.equal(model(**inputs).logits, expected)
    fill_adapter(model)
    assert not torch.allclose(model(**inputs).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, expected)


def test_two_adapters_with_embeddings_of_their_own(tmp_path):
    batch = make_batch()
    first, second = (fill_adapter(model_with_embeddings(True), seed).eval() for seed in (1, 2))
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    torch.manual_seed(0)
    base = LlamaLoRAMoEForCausalLM(tiny_config(tie_word_embeddings=True))
    model = PeftModel.from_pretrained(base, tmp_path / "first", "first")
    model.load_adapter(tmp_path / "second", "second")
    assert torch.equal(model(**batch).logits, first(**batch).logits)
    model.set_adapter("second")
    assert torch.equal(model(**batch).logits, second(**batch).logits)


def test_one_of_two_tied_embeddings_is_refused():
    base = LlamaLoRAMoEForCausalLM(tiny_config(tie_word_embeddings=True))
    with pytest.raises(ValueError, match=r"'lm_head' .* shares its weight with 'model.embed_tokens' .* name both"):
        get_peft_model(base, LoraConfig(modules_to_save=["lm_head"]))


def test_tensors_gathered_by_a_trainer_are_saved_under_the_same_keys():
    """Their dictionary names a shared weight twice."""
    model = fill_adapter(model_with_embeddings(True))
    assert get_peft_model_state_dict(model, model.state_dict()).keys() == get_peft_model_state_dict(model).keys()


def test_embeddings_of_a_half_precision_base_are_trained_in_float32():
    batch = make_batch()
    torch.manual_seed(0)
    base = LlamaLoRAMoEForCausalLM(tiny_config()).to(torch.bfloat16)
    model = get_peft_model(base, LoraConfig(modules_to_save=["embed_tokens", "lm_head"]))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    output = model.train()(**batch)
    assert output.logits.dtype is torch.bfloat16
    output.loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(**batch).loss.isfinite()


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copy_dtype", [torch.float16, torch.bfloat16])
def test_embeddings_that_were_cast_to_half_precision_are_trained(base_dtype, copy_dtype):
    """As DeepSpeed leaves them, which casts every parameter: without autocast, inputs have to follow."""
    model = fill_adapter(model_with_embeddings(False)).to(base_dtype).train()
    exact = fill_adapter(model_with_embeddings(False)).to(base_dtype).train()
    copies = [module.trained for module in model.modules() if isinstance(module, TrainedCopy)]
    for each in copies:
        each.to(copy_dtype)
    output = model(**make_batch())
    assert output.logits.dtype is base_dtype
    torch.testing.assert_close(output.lm_loss, exact(**make_batch()).lm_loss, rtol=2e-2, atol=0)
    output.loss.backward()
    assert all(parameter.grad.any() for each in copies for parameter in each.parameters())


def test_a_lora_for_fixed_weights_equals_a_mixture_with_a_shared_a():
    """A router of zeros weighs all experts alike."""
    experts = filled_model(lora_shared_A=True).base_model.model.model.layers[0].mlp.up_proj.experts["default"]
    torch.nn.init.zeros_(experts.router.weight)
    x, base = torch.randn(2, 5, 32), torch.randn(2, 5, 48)
    A, B = static_lora(experts, torch.full((4,), 0.25))
    torch.testing.assert_close(experts(x, lambda x: base), base + experts.scaling * x @ A.T @ B.T)
