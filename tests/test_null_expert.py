"""A router output whose expert is zero, from the configuration to a run."""

import json
import re

import pytest
import torch
from conftest import filled_model, tiny_model
from reference import balance_loop
from test_model import MLP, gradients, make_batch
from test_train import Runner
from torch import nn

from data import InputError
from peft import LoraConfig, PeftModel, Router, get_peft_model
from transformers_patch import RoutingRecorder

# Settings with a null expert, and the sizes of the groups that they give.
GROUPS = [
    ({"lora_nums": 4}, [4, 1]),
    ({"lora_nums": 1}, [1, 1]),
    ({"lora_nums": 4, "expert_groups": [2, 3]}, [2, 3]),
    ({"lora_nums": 4, "num_task_types": 3}, [2, 2, 1]),
    ({"lora_nums": 4, "num_task_types": 1}, [5]),
    ({"lora_nums": 3, "num_task_types": 3, "blc_weight": 0}, [4]),
]


@pytest.mark.parametrize(("settings", "groups"), GROUPS)
def test_by_default_it_is_alone_in_the_group_of_the_last_task_type(settings, groups):
    config = LoraConfig(lora_null_expert=True, **settings)
    assert (config.group_sizes, config.routed_experts) == (groups, sum(groups))
    assert config.null_expert == sum(groups) - 1
    assert config.balances == (config.blc_weight > 0)


REFUSED = [
    ({"lora_nums": 3, "num_task_types": 3}, "cannot be split into 2 equal groups next to the null expert's; choose a"),
    ({"expert_groups": [3, 3]}, r"expert_groups is \[3, 3\], .* add up to lora_nums and the null expert, 7$"),
    ({"lora_top_k": 8}, "lora_top_k is 8, but has to be from 2 to lora_nums and the null expert, 7, or 0"),
    ({"lora_null_expert": 1}, "lora_null_expert is 1, but has to be true or false"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_what_cannot_be_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**{"lora_null_expert": True} | settings)


BALANCED = [*GROUPS[:4], *((settings | {"lora_top_k": 3}, groups) for settings, groups in (GROUPS[0], GROUPS[3]))]


@pytest.mark.parametrize(("settings", "groups"), BALANCED)
def test_the_balance_term_and_the_loss_reach_it_like_any_expert(settings, groups):
    model, types = filled_model(lora_null_expert=True, **settings).train(), [len(groups) - 1, 1, 0]
    batch = make_batch() | {"task_types": torch.tensor(types)}
    with RoutingRecorder(model) as recorder:
        output = model(**batch)
    weights = list(recorder.weights.values())
    torch.testing.assert_close(torch.stack(weights).sum(dim=-1), torch.ones(len(MLP), *batch["input_ids"].shape))
    expected = balance_loop(weights, [9, 6, 4], types, groups, delta=0.1)
    torch.testing.assert_close(output.balance_loss, expected, rtol=1e-5, atol=1e-6)
    for part in ("lm_loss", "balance_loss"):
        routers = {name: each for name, each in gradients(model, batch, part).items() if name.endswith("router.weight")}
        assert len(routers) == len(MLP)
        assert all(gradient[-1].abs().max() > 0 for gradient in routers.values())


@pytest.mark.parametrize("experts", [1, 4])
def test_with_all_of_the_weight_it_is_the_base_model_bit_for_bit(experts):
    model, batch = filled_model(lora_nums=experts, lora_null_expert=True).train(), make_batch()
    expected = tiny_model()(**batch)
    assert not torch.equal(model(**batch).logits, expected.logits)

    def route_to_it(router: Router, inputs: tuple, weights: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(torch.full(weights.shape[:-1], experts), experts + 1).to(weights)

    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(route_to_it)
    output = model.eval()(**batch)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.loss, expected.loss)


def test_a_fresh_adapter_is_the_base_model_bit_for_bit():
    batch = make_batch()
    model = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", lora_null_expert=True))
    assert torch.equal(model.eval()(**batch).logits, tiny_model()(**batch).logits)


@pytest.mark.parametrize("experts", [1, 4])
def test_saving_and_loading_keeps_every_bit(tmp_path, experts):
    model, batch = filled_model(lora_nums=experts, lora_null_expert=True).eval(), make_batch()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_null_expert"] is True
    again = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(again(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize(("null_expert", "rows", "needed"), [(True, 5, 4), (False, 4, 5)])
def test_weights_with_it_do_not_load_without_it_nor_the_reverse(tmp_path, null_expert, rows, needed):
    filled_model(lora_null_expert=null_expert).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_null_expert": not null_expert}))
    message = rf"router.weight has shape \({rows}, \d+\), the model needs \({needed}, \d+\)"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(tiny_model(), tmp_path)


def test_adapters_of_earlier_versions_have_none(tmp_path):
    filled_model().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    values = json.loads(file.read_text())
    del values["lora_null_expert"]
    file.write_text(json.dumps(values))
    assert LoraConfig.from_pretrained(tmp_path).lora_null_expert is False
    assert torch.equal(
        PeftModel.from_pretrained(tiny_model(), tmp_path)(**make_batch()).logits,
        filled_model().eval()(**make_batch()).logits,
    )


@pytest.fixture
def run(tmp_path, model_dir, monkeypatch) -> Runner:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    return Runner(tmp_path, model_dir)


@pytest.mark.parametrize(("experts", "first"), [(4, "experts 0-3"), (1, "expert 0")])
def test_a_run_trains_it_reports_it_and_goes_on_with_it(run, tmp_path, capsys, experts, first):
    results = run(lora_nums=experts, lora_null_expert="true", blc_alpha=0.6)
    assert results["eval_lm_loss_after"] < results["eval_lm_loss_before"]
    config = LoraConfig.from_pretrained(run.output)
    assert (config.lora_null_expert, config.group_sizes) == (True, [experts, 1])
    routing = json.loads((run.output / "routing.json").read_text())
    assert (routing["num_experts"], routing["null_expert"]) == (experts + 1, experts)
    assert all(len(shares) == experts + 1 for shares in routing["expert_share_by_task_type"].values())
    assert re.split("  +", results["routing_table"][0].strip()) == [first, "null expert"]
    card = (run.output / "README.md").read_text()
    assert "LoRAMoE adapter" in card
    assert "lora_null_expert" in card
    assert any("group_share_type_1" in line for line in run.log())
    flags = {"lora_nums": experts, "peft_path": run.output, "output_dir": tmp_path / "on", "max_steps": 1}
    with pytest.raises(InputError, match="--lora_null_expert is False, the adapter has True"):
        run(**flags)
    run(**flags, lora_null_expert="true")


def test_a_run_without_it_has_the_losses_of_a_run_that_does_not_know_it(run, tmp_path):
    """A router of other shape would draw other initial weights."""
    losses = []
    for output, flags in (("run", {}), ("off", {"lora_null_expert": "false"}), ("on", {"lora_null_expert": "true"})):
        run(max_steps=2, output_dir=tmp_path / output, **flags)
        state = json.loads((tmp_path / output / "trainer_state.json").read_text())
        losses.append([line["loss"] for line in state["log_history"] if "lm_loss" in line])
    assert losses[0] == losses[1] != losses[2]
