"""Every supported architecture, with a tiny random base model, through everything that a user does with it."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import fill_adapter, tiny_tokenizer
from reference import balance_loop
from transformers import PretrainedConfig, PreTrainedModel

from inference.trained import TrainedModel
from peft import Calibration, LoraConfig, LoraExperts, LoraLayer, PeftModel, TaskType, get_peft_model
from scripts.plot_routing import route_prompt
from transformers_patch import AutoModelForCausalLM, RoutingRecorder
from transformers_patch.auto import DEFAULT_TARGETS

LAYERS = 2
GATED = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
GPT2 = {"vocab_size": 300, "n_embd": 32, "n_inner": 48, "n_layer": LAYERS, "n_head": 4, "n_positions": 128}


class Architecture(NamedTuple):
    """A model configuration of transformers, and the Linears of one layer that are adapted by default."""

    config: Callable[..., PretrainedConfig]
    values: dict
    targets: tuple[str, ...]


ARCHITECTURES = {
    "llama": Architecture(transformers.LlamaConfig, SIZES, GATED),
    "mistral": Architecture(transformers.MistralConfig, SIZES | {"sliding_window": 6}, GATED),
    "qwen2": Architecture(transformers.Qwen2Config, SIZES, GATED),
    "qwen3": Architecture(transformers.Qwen3Config, SIZES | {"head_dim": 8}, GATED),
    "gemma2": Architecture(
        transformers.Gemma2Config,
        SIZES | {"head_dim": 8, "sliding_window": 6, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.0},
        GATED,
    ),
    "gemma3_text": Architecture(
        transformers.Gemma3TextConfig,
        SIZES
        | {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
        | {"final_logit_softcapping": 1.0},
        GATED,
    ),
    "phi3": Architecture(transformers.Phi3Config, SIZES, ("gate_up_proj", "down_proj")),
    "olmo2": Architecture(transformers.Olmo2Config, SIZES, GATED),
    "granite": Architecture(
        transformers.GraniteConfig, SIZES | {"logits_scaling": 4.0, "residual_multiplier": 0.5}, GATED
    ),
    "smollm3": Architecture(transformers.SmolLM3Config, SIZES | {"no_rope_layers": [1, 0]}, GATED),
    "starcoder2": Architecture(transformers.Starcoder2Config, SIZES | {"sliding_window": 6}, ("c_fc", "c_proj")),
    "gpt2": Architecture(
        transformers.GPT2Config, GPT2 | {"bos_token_id": 0, "eos_token_id": 1}, ("c_fc", "c_proj")
    ),
    "mixtral": Architecture(transformers.MixtralConfig, SIZES | EXPERTS, ATTENTION),
    "qwen3_moe": Architecture(
        transformers.Qwen3MoeConfig, SIZES | EXPERTS | {"head_dim": 8, "moe_intermediate_size": 16}, ATTENTION
    ),
}  # fmt: skip
# Decoders that nobody prepared for, by the generic path. The last two put all tokens in one row before their MLP.
UNPREPARED = {
    "cohere2": Architecture(transformers.Cohere2Config, SIZES | {"logit_scale": 1.0}, GATED),
    "stablelm": Architecture(transformers.StableLmConfig, SIZES, GATED),
    "qwen2_moe": Architecture(
        transformers.Qwen2MoeConfig,
        SIZES | EXPERTS | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
        GATED,
    ),
    "opt": Architecture(
        transformers.OPTConfig,
        SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
        ("fc1", "fc2"),
    ),
}

# Settings of the adapter that every architecture has to work with.
ADAPTERS = {
    "default": {},
    "three types, unequal groups, top-k": {
        "num_task_types": 3,
        "task_type_names": ["other", "knowledge", "code"],
        "expert_groups": [1, 2, 1],
        "lora_top_k": 2,
    },
    "shared A": {"lora_shared_A": True},
}

each_architecture = pytest.mark.parametrize("name", ARCHITECTURES | UNPREPARED)


def config_of(name: str) -> PretrainedConfig:
    architecture = (ARCHITECTURES | UNPREPARED)[name]
    return architecture.config(**architecture.values, attention_dropout=0.0)


def stock_model(name: str) -> PreTrainedModel:
    """Random weights, large enough for the layers to matter; nothing of ours in it."""
    torch.manual_seed(0)
    config = config_of(name)
    for field in ("attn_pdrop", "embd_pdrop", "resid_pdrop", "embedding_dropout", "residual_dropout"):
        if hasattr(config, field):
            setattr(config, field, 0.0)
    config.initializer_range = 0.2
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folders with stock checkpoints, made once each."""
    root, made = tmp_path_factory.mktemp("architectures"), {}

    def folder(name: str):
        if name not in made:
            made[name] = root / name
            stock_model(name).save_pretrained(made[name])
        return made[name]

    return folder


def adapted(folder, filled: bool = True, **settings) -> PeftModel:
    values = {"task_type": TaskType.CAUSAL_LM, "r": 2, "lora_alpha": 4, "lora_nums": 4, "lora_dropout": 0.0}
    if folder.name in UNPREPARED:
        values["target_modules"] = UNPREPARED[folder.name].targets
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(**(values | settings)))
    return fill_adapter(model) if filled else model


def make_batch(types: tuple[int, ...] = (0, 1, -1)) -> dict[str, torch.Tensor]:
    """Three rows of 10, 7 and 5 tokens, padded on the right, the first three unlabelled."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 300, (3, 10), generator=generator)
    mask = (torch.arange(10) < torch.tensor([[10], [7], [5]])).long()
    labels = ids.masked_fill((mask == 0) | (torch.arange(10) < 3), -100)
    ids = ids.masked_fill(mask == 0, 1)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "task_types": torch.tensor(types)}


def gradients(model: PeftModel, batch: dict, part: str) -> dict[str, torch.Tensor]:
    model.zero_grad()
    getattr(model(**batch), part).backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def test_every_architecture_in_the_table_is_tested():
    assert ARCHITECTURES.keys() == DEFAULT_TARGETS.keys()


@each_architecture
def test_a_fresh_adapter_on_a_stock_checkpoint_changes_no_bit(name, checkpoint):
    batch = make_batch()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    stock = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(name)).eval()
    model = adapted(checkpoint(name), filled=False).eval()
    logits = stock(**inputs).logits
    assert logits.std() > 0.1
    assert torch.equal(model(**inputs).logits, logits)
    wrapped = {n.split(".")[-1] for n, module in model.named_modules() if isinstance(module, LoraLayer)}
    count = sum(isinstance(module, LoraLayer) for module in model.modules())
    assert wrapped == set((ARCHITECTURES | UNPREPARED)[name].targets)
    assert count == LAYERS * len(wrapped)


@each_architecture
def test_losses_are_the_stock_model_s(name, checkpoint):
    batch = make_batch()
    stock = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(name)).eval()
    stock.config.output_router_logits = False
    expected = stock(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")}).loss
    output = adapted(checkpoint(name), filled=False).train()(**batch)
    torch.testing.assert_close(output.lm_loss, expected)
    model = AutoModelForCausalLM.from_pretrained(checkpoint(name)).eval()
    torch.testing.assert_close(model(**batch).loss, expected)


@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
@each_architecture
def test_it_trains_and_gradients_reach_every_router(name, settings, checkpoint):
    batch = make_batch((0, settings.get("num_task_types", 2) - 1, -1))
    model = adapted(checkpoint(name), **settings).train()
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    with RoutingRecorder(model) as recorder:
        output = model(**batch)
    kept = settings.get("lora_top_k", 4)
    assert all((weights > 0).sum(dim=-1).eq(kept).all() for weights in recorder.weights.values())
    assert len(recorder.weights) == LAYERS * len((ARCHITECTURES | UNPREPARED)[name].targets)
    for part in ("lm_loss", "balance_loss"):
        found = gradients(model, batch, part)
        for parameter, gradient in found.items():
            reaches = part == "lm_loss" or parameter.endswith("router.weight")
            assert not reaches or gradient.abs().max() > 0, (part, parameter)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        output = model(**batch)
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[2] < losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


@pytest.mark.parametrize("part", ["lm_loss", "balance_loss"])
@each_architecture
def test_checkpointing_changes_no_gradient(name, part, checkpoint):
    model, batch = adapted(checkpoint(name)).train(), make_batch()
    expected = gradients(model, batch, part)
    model.activation_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients(model, batch, part), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
@each_architecture
def test_saved_and_loaded_it_is_the_same_to_the_bit(name, settings, checkpoint, tmp_path):
    model, batch = adapted(checkpoint(name), **settings).eval(), make_batch()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint(name)), tmp_path)
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert again.active_peft_config.target_modules == sorted(DEFAULT_TARGETS.get(name) or UNPREPARED[name].targets)


@each_architecture
def test_generation_with_and_without_cache_is_the_same(name, checkpoint):
    model, batch = adapted(checkpoint(name)).eval(), make_batch()
    arguments = {
        "input_ids": batch["input_ids"].flip(1),
        "attention_mask": batch["attention_mask"].flip(1),
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 1,
    }
    cached = model.generate(**arguments, use_cache=True)
    assert torch.equal(cached, model.generate(**arguments, use_cache=False))
    with model.disable_adapter():
        base = model.generate(**arguments, use_cache=True)
    assert cached.shape != base.shape or not torch.equal(cached, base)


@each_architecture
def test_without_the_adapter_it_is_the_base_model(name, checkpoint):
    model, batch = adapted(checkpoint(name)).eval(), make_batch()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    expected = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(name)).eval()(**inputs).logits
    routed = model(**inputs).logits
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, expected)
    assert torch.equal(model(**inputs).logits, routed)
    assert not torch.allclose(routed, expected, rtol=1e-3, atol=1e-3)


@each_architecture
def test_a_fully_tuned_model_is_saved_as_the_stock_class(name, checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint(name)).train()
    batch = make_batch()
    model(**batch).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(0.1 * parameter.grad) if parameter.grad is not None else None
    model.save_pretrained(tmp_path)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert stock.config.architectures == [type(stock).__name__]
    assert "LoRAMoE" not in type(stock).__name__
    assert torch.equal(stock(batch["input_ids"]).logits, model.eval()(batch["input_ids"]).logits)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_the_router_loss_of_a_mixture_of_experts_base_is_its_own_and_reported_apart(name, checkpoint):
    batch = make_batch()
    model = adapted(checkpoint(name), blc_weight=0.3).train()
    output = model(**batch, balance_scale=0.5)
    stock = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(name))
    coefficient = stock.router_aux_loss_coef
    with model.disable_adapter():
        theirs = stock(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")})
        ours = model(**batch)
    torch.testing.assert_close(ours.aux_loss, theirs.aux_loss)
    torch.testing.assert_close(ours.loss, theirs.loss)
    assert output.aux_loss > 0
    added = 0.5 * (0.3 * output.balance_loss + coefficient * output.aux_loss)
    torch.testing.assert_close(output.loss, output.lm_loss + added)
    assert torch.equal(model.eval()(**batch).loss, model(**batch).lm_loss)
    assert any(gradient.abs().max() > 0 for gradient in gradients(model, batch, "aux_loss").values())
    model.config.output_router_logits = False
    assert model(**batch).aux_loss is None


@pytest.mark.parametrize("config", [transformers.PhimoeConfig, transformers.Llama4TextConfig])
def test_all_linear_leaves_routers_that_return_more_than_a_tensor_alone(config):
    model = AutoModelForCausalLM.from_config(config(**SIZES, **EXPERTS, head_dim=8, intermediate_size_mlp=48))
    adapter = LoraConfig(r=2, lora_nums=4, target_modules="all-linear")
    model = fill_adapter(get_peft_model(model, adapter)).train()
    assert {n.split(".")[-1] for n, module in model.named_modules() if isinstance(module, LoraLayer)} >= set(ATTENTION)
    gradients(model, make_batch(), "loss")


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("reference", [False, True])
def test_the_balance_term_of_a_base_that_flattens_its_tokens_is_that_of_its_rows(masked, reference, checkpoint):
    model, batch = adapted(checkpoint("opt"), blc_reference=reference).train(), make_batch((0, 1, 0))
    if not masked:
        del batch["attention_mask"]
    with RoutingRecorder(model) as recorder:
        output = model(**batch)
    lengths = [10, 7, 5] if masked and not reference else [10, 10, 10]
    weights = [weights.view(3, 10, 4) for weights in recorder.weights.values()]
    torch.testing.assert_close(output.balance_loss, balance_loop(weights, lengths, [0, 1, 0], [2, 2], 0.1))


def test_a_base_that_takes_a_mask_for_each_kind_of_layer_is_evaluated_with_them(checkpoint):
    """They do not tell padding from text, which the balance term needs and evaluation does not."""
    model, ids = adapted(checkpoint("gemma2")).eval(), make_batch()["input_ids"]
    causal = torch.full((1, 1, *ids.shape[1:] * 2), float("-inf")).triu(1)
    masks = {"full_attention": causal, "sliding_attention": causal}
    logits, found = model(ids, attention_mask=masks).logits, model(ids, attention_mask=masks, labels=ids)
    torch.testing.assert_close(found.loss, F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    assert found.balance_loss == 0
    with pytest.raises(ValueError, match=r"needs an attention_mask of shape .* this one is not a tensor"):
        model.train()(ids, attention_mask=masks, labels=ids)


def test_calibration_on_a_base_that_flattens_its_tokens_leaves_padding_out(checkpoint):
    model, batch = adapted(checkpoint("opt")).eval(), make_batch()
    experts = {name: module for name, module in model.named_modules() if isinstance(module, LoraExperts)}
    with torch.no_grad(), RoutingRecorder(model) as recorder, Calibration(experts) as calibration:
        calibration.mask_BT = batch["attention_mask"]
        model(batch["input_ids"], batch["attention_mask"])
    counts = batch["attention_mask"].flatten().bool()
    for name in experts:
        expected = recorder.weights[f"{name}.router"][counts].mean(dim=0)
        torch.testing.assert_close(calibration.mean_weights(name).float(), expected)


def test_the_routing_of_a_prompt_on_a_base_that_flattens_its_tokens(checkpoint):
    trained = TrainedModel(adapted(checkpoint("opt")).eval(), tiny_tokenizer(), {"prompt_template": "plain"}, "")
    routed = route_prompt(trained, "the cat")
    assert torch.tensor(routed["expert_weights"]).shape == (len(routed["tokens"]), 4)


@pytest.mark.parametrize("name", ["gpt2", "phi3"])
def test_transposed_and_fused_linears_get_the_right_shapes(name, checkpoint):
    model = adapted(checkpoint(name))
    shapes = {
        n.split(".")[-1]: (tuple(m.experts["default"].lora_A.shape), tuple(m.experts["default"].lora_B.shape))
        for n, m in model.named_modules()
        if isinstance(m, LoraLayer)
    }
    assert (
        shapes
        == {
            "gpt2": {"c_fc": ((8, 32), (48, 8)), "c_proj": ((8, 48), (32, 8))},
            "phi3": {"gate_up_proj": ((8, 32), (96, 8)), "down_proj": ((8, 48), (32, 8))},
        }[name]
    )


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.T5Config(), "'t5' are not supported: transformers has no language model class"),
        (transformers.BertConfig(), "it is an encoder"),
        (transformers.MambaConfig(), "the forward of MambaForCausalLM does not take past_key_values, position_ids"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_what_does_not_fit_is_refused_with_a_reason_and_what_is_tested(config, reason):
    with pytest.raises(ValueError, match=reason + r".*Tested are gemma2, .*starcoder2"):
        AutoModelForCausalLM.from_config(config)


HYBRID = {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
IMAGES = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
OTHER_FORMS = {
    "an older name": lambda: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**SIZES | {"intermediate_size": 48})
    ),
    "images and text": lambda: transformers.Qwen3_5ForConditionalGeneration(
        transformers.Qwen3_5Config(text_config=SIZES | HYBRID, vision_config=IMAGES)
    ),
}


@pytest.mark.parametrize("make", OTHER_FORMS.values(), ids=OTHER_FORMS)
def test_a_checkpoint_whose_tensors_have_other_names_is_read_as_stock_reads_it(make, tmp_path):
    torch.manual_seed(0)
    make().save_pretrained(tmp_path)
    batch = make_batch()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(model(**inputs).logits, stock(**inputs).logits)


def test_a_base_without_known_linears_asks_for_names():
    values = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 300}
    model = AutoModelForCausalLM.from_config(transformers.GPTNeoXConfig(**values, intermediate_size=48))
    with pytest.raises(
        ValueError, match=r"no default target modules are known for GPTNeoXLoRAMoEForCausalLM: .*dense_4h_to_h"
    ):
        get_peft_model(model, LoraConfig())
    assert isinstance(get_peft_model(model, LoraConfig(target_modules="dense_h_to_4h")), PeftModel)
