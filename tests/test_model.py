"""The adapted model: losses, gradients, saving, loading, generation."""

import pytest
import torch
from conftest import fill_adapter, filled_model, full_disk, tiny_config, tiny_model
from reference import balance_loop
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BitsAndBytesConfig, GPTNeoXConfig, LlamaForCausalLM

from peft import (
    LoraConfig,
    LoraLayer,
    PeftModel,
    TaskType,
    find_targets,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from transformers_patch import AutoModelForCausalLM, LlamaLoRAMoEForCausalLM, RoutingRecorder

MLP = [f"model.layers.{layer}.mlp.{name}" for layer in range(2) for name in ("gate_proj", "up_proj", "down_proj")]
TENSORS = ["lora_A", "lora_B", "router.weight"]


def make_batch(pad: int = 0, side: str = "right") -> dict[str, torch.Tensor]:
    """Three rows of 9, 6 and 4 tokens, the first three unlabelled; `pad` further columns of padding."""
    generator = torch.Generator().manual_seed(3)
    lengths, width = (9, 6, 4), 9 + pad
    ids = torch.full((3, width), 1)
    mask, labels = torch.zeros(3, width, dtype=torch.long), torch.full((3, width), -100)
    for row, length in enumerate(lengths):
        span = slice(0, length) if side == "right" else slice(width - length, width)
        tokens = torch.randint(2, 300, (length,), generator=generator)
        ids[row, span], mask[row, span] = tokens, 1
        labels[row, span] = torch.where(torch.arange(length) < 3, -100, tokens)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "task_types": torch.tensor([0, 1, 0])}


def gradients(model: nn.Module, batch: dict, part: str) -> dict[str, torch.Tensor]:
    """Gradients of one part of the loss; checks first that each of A, B and router has one that is not zero."""
    model.zero_grad()
    getattr(model(**batch), part).backward(retain_graph=True)
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    # The balance term reaches B and A through the routers of later layers alone.
    reached = {name: grad for name, grad in found.items() if grad is not None and grad.abs().max() > 0}
    for kind in TENSORS:
        assert any(name.endswith(kind) for name in reached), f"no {part} gradient on any {kind}"
    return {name: torch.zeros(()) if grad is None else grad.clone() for name, grad in found.items()}


def test_loss_is_lm_loss_plus_weighted_balance_term():
    model, batch = filled_model(blc_weight=0.3).train(), make_batch()
    with RoutingRecorder(model) as recorder:
        output = model(**batch)
    assert len(recorder.weights) == 6
    torch.testing.assert_close(output.loss, output.lm_loss + 0.3 * output.balance_loss)
    expected = balance_loop(list(recorder.weights.values()), [9, 6, 4], [0, 1, 0], groups=[2, 2], delta=0.1)
    torch.testing.assert_close(output.balance_loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.lm_loss, lm_loss_of_all_logits(model, batch))


def lm_loss_of_all_logits(model: nn.Module, batch: dict) -> torch.Tensor:
    """Next-token cross-entropy from the logits of every position."""
    logits = model(batch["input_ids"], batch["attention_mask"]).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("targets", [["gate_proj", "up_proj", "down_proj"], ["up_proj", "lm_head"]])
def test_the_lm_loss_and_its_gradients_are_those_of_all_logits(side, targets):
    model, batch = filled_model(target_modules=targets).train(), make_batch(pad=2, side=side)
    batch["labels"][1] = -100
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ours, expected = model(**batch).lm_loss, lm_loss_of_all_logits(model, batch)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    for found, wanted in zip(
        torch.autograd.grad(ours, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        assert (found - wanted).norm() <= 1e-6 * wanted.norm()
        assert wanted.norm() > 0
    by_five = model(**batch, num_items_in_batch=torch.tensor(5)).lm_loss
    torch.testing.assert_close(by_five, expected * (6 + 1) / 5, rtol=1e-6, atol=0)


@pytest.mark.parametrize("targets", [["gate_proj"], ["lm_head"]])
def test_logits_are_those_of_the_labelled_positions(targets):
    model, batch = filled_model(target_modules=targets).eval(), make_batch(pad=2)
    every = model(batch["input_ids"], batch["attention_mask"]).logits
    rows_of_logits = [every[0, 2:8], every[1, 2:5], every[2, 2:3]]
    torch.testing.assert_close(model(**batch).logits, torch.cat(rows_of_logits)[None], rtol=1e-5, atol=1e-6)
    assert model(batch["input_ids"], batch["attention_mask"]).logits.shape == (3, 11, 300)


@pytest.mark.parametrize("settings", [{}, {"lora_nums": 1, "target_modules": ["up_proj", "lm_head"]}])
@pytest.mark.parametrize("count", [None, 5])
def test_a_batch_without_labels_has_a_loss_of_zero_and_zero_gradients(count, settings):
    model, batch = filled_model(blc_weight=0.0, **settings).train(), make_batch()
    batch["labels"].fill_(-100)
    output = model(**batch, num_items_in_batch=count)
    assert output.loss == 0
    output.loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_labels_that_cannot_be_are_named():
    model, batch = filled_model(), make_batch()
    with pytest.raises(ValueError, match=r"labels have shape \(3, 8\); this batch needs \(3, 9\)"):
        model(**batch | {"labels": batch["labels"][:, :8]})
    with pytest.raises(ValueError, match="logits_to_keep cannot be given with labels"):
        model(**batch, logits_to_keep=1)
    assert model(batch["input_ids"], logits_to_keep=1).logits.shape == (3, 1, 300)


def test_beta_zero_is_the_lm_loss_bit_for_bit():
    batch = make_batch()
    without, plain = filled_model(blc_weight=0).train()(**batch), filled_model(blc_weight=0.1).train()(**batch)
    assert torch.equal(without.loss, plain.lm_loss)
    assert torch.equal(without.loss, without.lm_loss)
    assert without.balance_loss == 0


def test_with_beta_zero_the_term_is_not_computed(monkeypatch):
    monkeypatch.setattr(LlamaLoRAMoEForCausalLM, "_balance_term", lambda *arguments, **kwargs: pytest.fail("computed"))
    output = filled_model(blc_weight=0).train()(**make_batch())
    assert output.routing_shares.shape == (6, 3, 4)


def test_logits_can_be_left_out():
    model, batch = filled_model().train(), make_batch()
    without = model(**batch, return_logits=False)
    assert without.logits is None
    assert "logits" not in without
    assert torch.equal(without.loss, model(**batch).loss)


def test_in_eval_mode_the_loss_is_the_lm_loss():
    output = filled_model().eval()(**make_batch())
    assert torch.equal(output.loss, output.lm_loss)
    assert output.balance_loss > 0


def test_one_expert_has_no_balance_term():
    output = filled_model(lora_nums=1).train()(**make_batch())
    assert output.balance_loss == 0
    assert torch.equal(output.loss, output.lm_loss)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("part", ["lm_loss", "balance_loss"])
def test_padding_has_no_influence_on_losses_and_gradients(side, part):
    model = filled_model().train()
    tight, padded = make_batch(), make_batch(pad=5, side=side)
    torch.testing.assert_close(getattr(model(**padded), part), getattr(model(**tight), part), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(model, padded, part), gradients(model, tight, part), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("part", ["lm_loss", "balance_loss"])
def test_the_order_of_rows_has_no_influence(part):
    model, batch = filled_model().train(), make_batch()
    turned = {name: tensor.flip(0) for name, tensor in batch.items()}
    torch.testing.assert_close(getattr(model(**turned), part), getattr(model(**batch), part), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(model, turned, part), gradients(model, batch, part), rtol=1e-4, atol=1e-6)


def test_the_authors_statistic_counts_padding_and_equals_ours_at_one_length():
    ours, theirs = filled_model().train(), filled_model(blc_reference=True).train()
    padded, tight = make_batch(pad=5), make_batch()
    one_length = {name: tensor[:, :4] if tensor.ndim == 2 else tensor for name, tensor in tight.items()}
    torch.testing.assert_close(theirs(**one_length).balance_loss, ours(**one_length).balance_loss)
    assert abs(theirs(**padded).balance_loss / theirs(**tight).balance_loss - 1) > 1e-2
    with RoutingRecorder(theirs) as recorder:
        term = theirs(**padded).balance_loss
    weights = list(recorder.weights.values())
    torch.testing.assert_close(term, balance_loop(weights, [14, 14, 14], [0, 1, 0], groups=[2, 2], delta=0.1))


@pytest.mark.parametrize("reference", [False, True])
def test_a_padding_example_counts_nowhere(reference):
    model, batch = filled_model(blc_reference=reference).train(), make_batch()
    rows = {name: tensor[:2] for name, tensor in batch.items()}
    filled = {name: tensor.clone() for name, tensor in batch.items()}
    filled["labels"][2], filled["row_weights"] = -100, torch.tensor([1, 1, 0])
    for part in ("lm_loss", "balance_loss"):
        torch.testing.assert_close(getattr(model(**filled), part), getattr(model(**rows), part))
        torch.testing.assert_close(gradients(model, filled, part), gradients(model, rows, part), rtol=1e-4, atol=1e-6)


def test_a_row_without_a_token_counts_nowhere_but_in_the_authors_statistic():
    batch = make_batch()
    rows = {name: tensor[:2] for name, tensor in batch.items()}
    batch["labels"][2], batch["attention_mask"][2] = -100, 0
    ours, theirs = filled_model().train(), filled_model(blc_reference=True).train()
    torch.testing.assert_close(ours(**batch).balance_loss, ours(**rows).balance_loss)
    assert abs(theirs(**batch).balance_loss / theirs(**rows).balance_loss - 1) > 1e-2


def test_the_padding_token_has_no_influence():
    model, batch, other = filled_model().train(), make_batch(pad=3), make_batch(pad=3)
    other["input_ids"] = torch.where(batch["attention_mask"] == 0, 77, batch["input_ids"])
    assert torch.equal(model(**batch).loss, model(**other).loss)


def test_a_fresh_adapter_is_the_base_model_bit_for_bit():
    base = tiny_model()
    batch = make_batch()
    expected = base(batch["input_ids"], batch["attention_mask"]).logits
    model = get_peft_model(base, LoraConfig(task_type=TaskType.CAUSAL_LM))
    assert torch.equal(model(batch["input_ids"], batch["attention_mask"]).logits, expected)


def test_disable_adapter_gives_the_base_model_back():
    model, batch = filled_model(), make_batch()
    expected = tiny_model()(**batch)
    with model.disable_adapter():
        output = model.train()(**batch)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.loss, expected.loss)
    assert model(**batch).balance_loss > 0


def test_disabling_nests_and_keeps_the_adapter_that_is_chosen_meanwhile():
    model, batch = filled_model(), make_batch()
    second = fill_adapter(filled_model(), seed=2)
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=4, lora_nums=4, lora_dropout=0.0))
    set_peft_model_state_dict(model, get_peft_model_state_dict(second), "second")
    base, expected = tiny_model()(**batch).logits, second(**batch).logits
    with model.disable_adapter():
        with model.disable_adapter():
            model.set_adapter("second")
        assert torch.equal(model(**batch).logits, base)
    assert torch.equal(model(**batch).logits, expected)


def test_a_step_moves_every_adapter_tensor_and_no_base_weight():
    model = filled_model().train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    model(**make_batch()).loss.backward()
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    expected = {f"base_model.model.{module}.experts.default.{tensor}" for module in MLP for tensor in TENSORS}
    assert trainable == expected
    assert moved == expected


def test_saved_keys_are_exact_and_reloading_is_bit_equal(tmp_path):
    model, batch = filled_model(), make_batch()
    model.save_pretrained(tmp_path)
    expected = {f"base_model.model.{module}.experts.{tensor}" for module in MLP for tensor in TENSORS}
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == expected
    assert {file.name for file in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    again = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert not again.training
    trainable = PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True)
    assert trainable.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()


def test_gathered_tensors_that_lack_some_of_the_adapter_are_not_saved(tmp_path):
    model = filled_model()
    tensors = model.state_dict()
    key = next(name for name in tensors if name.endswith("lora_A"))
    del tensors[key]
    with pytest.raises(ValueError, match=f"missing: {key.replace('.default', '')}$"):
        model.save_pretrained(tmp_path, state_dict=tensors)
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_loading_names_every_key_that_does_not_fit(tmp_path):
    filled_model().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(name for name in tensors if name.endswith("lora_A"))
    tensors["surplus"] = tensors.pop(key)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=rf"missing: {key}\n  unexpected: surplus"):
        PeftModel.from_pretrained(tiny_model(), tmp_path)


def test_loading_onto_a_model_of_another_width_names_the_layers(tmp_path):
    filled_model().save_pretrained(tmp_path)
    other = AutoModelForCausalLM.from_config(tiny_config(intermediate_size=64))
    with pytest.raises(ValueError, match=r"down_proj.experts.lora_A has shape \(8, 48\), the model needs \(8, 64\)"):
        PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.parametrize("damage", ["truncate", "delete"])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_damaged_adapter_folders_are_named(tmp_path, name, damage):
    filled_model().save_pretrained(tmp_path)
    file = tmp_path / name
    file.write_bytes(file.read_bytes()[:20]) if damage == "truncate" else file.unlink()
    with pytest.raises(ValueError, match=name):
        PeftModel.from_pretrained(tiny_model(), tmp_path)


def test_a_damaged_adapter_leaves_the_model_as_it_was(tmp_path):
    model, base = filled_model(), tiny_model()
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="is damaged"):
        model.load_adapter(tmp_path, "other")
    with pytest.raises(ValueError, match="is damaged"):
        PeftModel.from_pretrained(base, tmp_path)
    assert list(model.peft_config) == ["default"]
    assert not any(isinstance(module, LoraLayer) for module in base.modules())


def test_an_adapter_of_another_width_leaves_the_model_as_it_was(tmp_path):
    """The adapter goes onto Linears that have one, onto some that have none, and copies a module."""
    targets = {"target_modules": ["down_proj", "q_proj"], "modules_to_save": ["lm_head"]}
    settings = LoraConfig(r=2, lora_nums=4, **targets)
    wider = get_peft_model(AutoModelForCausalLM.from_config(tiny_config(intermediate_size=64)), settings)
    wider.save_pretrained(tmp_path / "wider")
    fitting = fill_adapter(filled_model(**targets), seed=2).eval()
    fitting.save_pretrained(tmp_path / "fitting")
    model, base, batch = filled_model(), tiny_model(), make_batch()
    for adapted, load in (
        (model, lambda folder: model.load_adapter(folder, "other")),
        (base, lambda folder: PeftModel.from_pretrained(base, folder)),
    ):
        before, loss = [(n, type(m)) for n, m in adapted.named_modules()], adapted(**batch).loss
        with pytest.raises(ValueError, match="the adapter does not fit this model"):
            load(tmp_path / "wider")
        assert [(n, type(m)) for n, m in adapted.named_modules()] == before
        assert torch.equal(adapted(**batch).loss, loss)
    assert list(model.peft_config) == ["default"]
    model.load_adapter(tmp_path / "fitting", "other")
    model.set_adapter("other")
    again = PeftModel.from_pretrained(base, tmp_path / "fitting")
    for loaded in (model.eval(), again):
        assert torch.equal(loaded(**batch).logits, fitting(**batch).logits)


@pytest.mark.parametrize("inside", [False, True])
def test_a_model_with_an_adapter_is_not_wrapped_again(inside):
    model = filled_model(target_modules=["up_proj"])
    with pytest.raises(ValueError, match="has an adapter already: add another one"):
        get_peft_model(model.get_base_model() if inside else model, LoraConfig(target_modules=["gate_proj"]))


def test_several_adapters_on_one_base(tmp_path):
    batch = make_batch()
    first, second = filled_model().eval(), fill_adapter(filled_model(lora_nums=2), seed=2).eval()
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    model = PeftModel.from_pretrained(tiny_model(), tmp_path / "first", adapter_name="first")
    model.load_adapter(tmp_path / "second", "second")
    assert torch.equal(model(**batch).logits, first(**batch).logits)
    model.set_adapter("second")
    assert torch.equal(model(**batch).logits, second(**batch).logits)
    torch.testing.assert_close(model(**batch).balance_loss, second(**batch).balance_loss)
    with pytest.raises(ValueError, match=r"no adapter named 'third'; this model has first, second"):
        model.set_adapter("third")


@pytest.mark.parametrize("targets", [["up_proj"], ["q_proj"]], ids=["next to the first", "on other Linears"])
def test_an_adapter_that_is_loaded_later_drops_nothing_at_inference(tmp_path, targets):
    batch = make_batch()
    second = fill_adapter(filled_model(lora_dropout=0.5, target_modules=targets), seed=2).eval()
    filled_model(target_modules=["up_proj"]).save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    model = PeftModel.from_pretrained(tiny_model(), tmp_path / "first", adapter_name="first")
    model.load_adapter(tmp_path / "second", "second", is_trainable=True)
    model.set_adapter("second")
    assert torch.equal(model(**batch).logits, second(**batch).logits)
    assert not torch.equal(model.train()(**batch).logits, second(**batch).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_alpha": 8}, r"lora_alpha is 8, the adapter has 4\. Load it under another name"),
        ({"lora_top_k": 2}, "lora_top_k is 2, the adapter has None"),
        ({"lora_null_expert": True}, "lora_null_expert is True, the adapter has False"),
        ({"lora_rslora": True}, "lora_rslora is True, the adapter has False"),
    ],
)
def test_weights_are_not_replaced_by_those_of_another_configuration(tmp_path, changes, message):
    batch, model = make_batch(), filled_model().eval()
    expected = model(**batch).logits
    fill_adapter(filled_model(**changes), seed=2).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path / "other", "default")
    assert torch.equal(model(**batch).logits, expected)
    same = fill_adapter(filled_model(lora_dropout=0.1), seed=2).eval()
    same.save_pretrained(tmp_path / "same")
    model.load_adapter(tmp_path / "same", "default")
    assert torch.equal(model(**batch).logits, same(**batch).logits)


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_with_and_without_cache_is_the_same(beams):
    model, batch = filled_model().eval(), make_batch(side="left")
    arguments = {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "max_new_tokens": 8,
        "do_sample": False,
        "num_beams": beams,
    }
    cached = model.generate(**arguments, use_cache=True)
    assert torch.equal(cached, model.generate(**arguments, use_cache=False))
    assert torch.equal(cached, model.generate(**arguments, use_cache=True, task_types=batch["task_types"]))
    base = tiny_model().generate(**arguments)
    assert cached.shape != base.shape or not torch.equal(cached, base)


def test_attention_projections_can_be_targets():
    model = filled_model(target_modules=["q_proj", "v_proj", "o_proj"]).train()
    wrapped = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    names = ("q_proj", "v_proj", "o_proj")
    assert wrapped == {f"base_model.model.model.layers.{n}.self_attn.{name}" for n in range(2) for name in names}
    gradients(model, make_batch(), "lm_loss")
    gradients(model, make_batch(), "balance_loss")


def test_missing_targets_are_named_with_near_misses():
    with pytest.raises(ValueError, match=r"'gate_prj' does not exist in the model; did you mean 'gate_proj'"):
        get_peft_model(tiny_model(), LoraConfig(target_modules=["gate_prj"]))
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp' is a LlamaMLP; only Linear layers"):
        get_peft_model(tiny_model(), LoraConfig(target_modules=["mlp"]))


@pytest.mark.parametrize("name", ["proj", "ate_proj", "p.gate_proj", "gate", "layers.0.mlp.gate_pro", "0.mlp"])
def test_a_target_is_named_by_whole_parts(name):
    """`0.mlp` is a complete name, but not of a Linear: nothing that only looks like a target is adapted."""
    with pytest.raises(ValueError, match=r"does not exist in the model|only Linear layers"):
        find_targets(tiny_model(), [name])


@pytest.mark.parametrize(
    ("name", "count"), [("gate_proj", 2), ("mlp.gate_proj", 2), ("0.mlp.gate_proj", 1), (MLP[0], 1), ("lm_head", 1)]
)
def test_a_target_may_be_any_whole_end_of_a_name(name, count):
    targets = find_targets(tiny_model(), [name])
    assert len(targets) == count
    assert all(found.split(".")[-len(name.split(".")) :] == name.split(".") for found in targets)


def test_a_and_routers_start_kaiming_uniform_and_b_at_zero():
    model = get_peft_model(tiny_model(), LoraConfig(r=2, lora_nums=4))
    seen = []
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            assert not parameter.any(), name
        elif parameter.requires_grad:
            bound = parameter.shape[1] ** -0.5
            assert 0.9 * bound < parameter.abs().max() <= bound, name
            assert parameter.abs().min() > 0, name
            seen.append(parameter.flatten()[:8])
    assert len(seen) == 12
    assert torch.pdist(torch.stack(seen)).min() > 0


def test_a_stock_model_is_refused_where_the_balance_term_counts():
    with pytest.raises(TypeError, match=r"LlamaForCausalLM does not compute the balance term.*AutoModelForCausalLM"):
        get_peft_model(LlamaForCausalLM(tiny_config()), LoraConfig())
    get_peft_model(LlamaForCausalLM(tiny_config()), LoraConfig(blc_weight=0))
    get_peft_model(LlamaForCausalLM(tiny_config()), LoraConfig(lora_nums=1))


@pytest.mark.parametrize("null_expert", [False, True])
@pytest.mark.parametrize("part", ["lm_loss", "balance_loss"])
def test_checkpointing_changes_no_gradient(part, null_expert):
    model, batch = filled_model(lora_null_expert=null_expert).train(), make_batch()
    expected = gradients(model, batch, part)
    model.activation_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients(model, batch, part), expected, rtol=1e-5, atol=1e-7)


def test_reentrant_checkpointing_is_refused():
    model = filled_model().train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="re-entrant gradient checkpointing"):
        model(**make_batch())


def test_training_with_a_frozen_adapter_is_refused(tmp_path):
    filled_model().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_model(), tmp_path)
    with pytest.raises(RuntimeError, match=r"the adapter is frozen.*load it with is_trainable=True"):
        model.train()(**make_batch())
    assert model.eval()(**make_batch()).balance_loss > 0


def test_nothing_is_recorded_in_inference(monkeypatch):
    monkeypatch.setattr(RoutingRecorder, "__enter__", lambda self: pytest.fail("the recorder was opened"))
    model, batch = filled_model().eval(), make_batch()
    model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=2)


def test_a_compiled_model_gives_the_same_logits_and_losses():
    model, batch = filled_model().eval(), make_batch()
    compiled = torch.compile(model, backend="eager")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
    for part in ("lm_loss", "balance_loss"):
        torch.testing.assert_close(getattr(compiled(**batch), part), getattr(model(**batch), part))
    with pytest.raises(ValueError, match="task_types has 2 in row 0"):
        compiled(**batch | {"task_types": torch.tensor([2, 1, 0])})


def test_bad_task_types_and_masks_are_named():
    model, batch = filled_model().train(), make_batch()
    with pytest.raises(ValueError, match=r"task_types has shape \(2,\); this batch needs \(3,\)"):
        model(**batch | {"task_types": torch.tensor([0, 1])})
    for bad in (2, -2):
        with pytest.raises(ValueError, match=rf"task_types has {bad} in row 1; allowed are 0 to 1 and -1 for no type"):
            model(**batch | {"task_types": torch.tensor([0, bad, 0])})
    with pytest.raises(ValueError, match=r"needs an attention_mask of shape .* this one is \(3, 1, 9, 9\)"):
        model(**batch | {"attention_mask": torch.ones(3, 1, 9, 9, dtype=torch.bool)})


def test_evaluation_takes_any_mask_of_the_base_model():
    """One that covers a cache as well, and one of four dimensions, which has no rows to take shares of."""
    model, ids = filled_model().eval(), make_batch()["input_ids"][:1]
    labels = torch.cat([torch.full((1, 5), -100), ids[:, 5:]], dim=1)
    labels[:, 5] = -100  # predicted from the last token in the cache
    expected = model(ids, labels=labels).lm_loss
    cache = model(ids[:, :5], use_cache=True).past_key_values
    continued = model(ids[:, 5:], past_key_values=cache, attention_mask=torch.ones_like(ids), labels=labels[:, 5:])
    torch.testing.assert_close(continued.lm_loss, expected)
    assert continued.balance_loss > 0
    causal = torch.ones(1, 1, *ids.shape[1:] * 2, dtype=torch.bool).tril()
    for without_term in (model, filled_model(blc_weight=0.0).eval(), filled_model(blc_weight=0.0).train()):
        output = without_term(ids, attention_mask=causal, labels=labels)
        torch.testing.assert_close(output.loss, expected)
        assert output.balance_loss == 0


def test_task_types_may_be_left_out():
    model, batch = filled_model().train(), make_batch()
    del batch["task_types"]
    assert torch.equal(model(**batch).loss, model(**batch, task_types=torch.tensor([-1, -1, -1])).loss)


def test_outputs_as_a_tuple():
    batch = make_batch()
    loss, logits, *_ = filled_model().eval()(**batch, return_dict=False)
    assert (loss.shape, logits.shape) == ((), (1, 6 + 3 + 1, 300))


def test_a_full_disk_leaves_the_adapter_that_was_there(tmp_path):
    filled_model().save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with full_disk(1000), pytest.raises(OSError, match="File too large"):
        filled_model(lora_nums=6).save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_fully_tuned_model_is_saved_as_a_stock_llama(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    stock = LlamaForCausalLM.from_pretrained(tmp_path)
    assert stock.config.architectures == ["LlamaForCausalLM"]
    batch = make_batch()
    assert torch.equal(stock(batch["input_ids"]).logits, model(batch["input_ids"]).logits)


@pytest.mark.parametrize("settings", [{"modules_to_save": ["embed_tokens"]}, {"target_modules": ["lm_head"]}])
def test_the_vocabulary_is_not_resized_under_an_adapter_on_it(settings):
    with pytest.raises(ValueError, match="resize the base model first"):
        filled_model(**settings).get_base_model().resize_token_embeddings(320)
    assert filled_model().get_base_model().resize_token_embeddings(320).num_embeddings == 320


def test_an_adapted_base_model_is_neither_saved_nor_uploaded(tmp_path):
    model = filled_model()
    with pytest.raises(ValueError, match="save the PeftModel"):
        model.get_base_model().save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="train with --push_to_hub, or write the folder with save_pretrained"):
        model.push_to_hub("someone/mine")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base_models_train_with_checkpointing(tmp_path, bits):
    stock = LlamaForCausalLM(tiny_config(hidden_size=64, intermediate_size=128))
    stock.save_pretrained(tmp_path / "base")
    quantization = {
        4: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        8: BitsAndBytesConfig(load_in_8bit=True),
    }[bits]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantization)
    config = LoraConfig(r=2, lora_alpha=4, lora_nums=4, lora_dropout=0.0)
    model = fill_adapter(get_peft_model(prepare_model_for_kbit_training(base), config)).train()
    assert type(model.get_submodule("base_model.model.model.layers.0.mlp.up_proj.base_layer")).__module__.startswith(
        "bitsandbytes"
    )
    for part in ("lm_loss", "balance_loss"):
        gradients(model, make_batch(), part)
    assert (
        model.get_nb_trainable_parameters()[1]
        == sum(p.numel() for p in stock.parameters()) + (model.get_nb_trainable_parameters()[0])
    )
    model.save_pretrained(tmp_path / "adapter")
    full = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    batch = make_batch()
    assert (full(**batch).logits - model.eval()(**batch).logits).abs().mean() < 0.2


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_model_in_half_precision_works_with_and_without_autocast(tmp_path, bits, architecture):
    """Normalisations stay in half precision, and so does what is kept of them for the backward pass."""
    config, target = tiny_config(hidden_size=64, intermediate_size=128), "up_proj"
    if architecture == "gpt_neox":
        sizes = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
        config = GPTNeoXConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, pad_token_id=1)
        target = "dense_h_to_4h"
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
    quantization = {
        4: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
        8: BitsAndBytesConfig(load_in_8bit=True),
    }[bits]
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, dtype=torch.bfloat16)
    settings = LoraConfig(r=2, lora_alpha=4, lora_nums=4, lora_dropout=0.0, target_modules=[target])
    model = fill_adapter(get_peft_model(prepare_model_for_kbit_training(base), settings)).train()
    norms = [module for module in model.modules() if type(module).__name__.endswith("Norm")]
    outputs = []
    for norm in norms:
        norm.register_forward_hook(lambda module, inputs, output: outputs.append(output.dtype))
    batch = make_batch()
    loss = model(**batch).loss
    loss.backward()
    assert set(outputs) == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(**batch).loss, loss, rtol=2e-2, atol=0)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert model.eval().generate(**inputs, max_new_tokens=3, do_sample=False).shape[0] == 3
