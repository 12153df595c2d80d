"""The KL divergence from the base model on rows of task type 1."""

import json

import pytest
import torch
from conftest import example_rows, filled_model, tiny_model
from test_launch import deepspeed_file
from test_model import make_batch
from test_regimes import BF16, Case, Layout, assert_same
from test_train import Runner, interrupt_after, same_adapter

from data import Collator, InputError
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from training.replay import count_replayed, divergence
from transformers_patch.logits import kl_divergence

WEIGHT = 4.0
LAYOUTS = [Layout(8, 8, 1), Layout(8, 2, 4), Layout(8, 4, 2, checkpointing=True), Layout(7, 4, 4), Layout(8, 8, 1)]
HALF = len(LAYOUTS) - 1  # the one in bf16


def kl_loop(model: PeftModel, rows: list[list[int]]) -> tuple[torch.Tensor, int]:
    """Sum over the tokens of some rows, each by itself, of sum_v p(v) log(p(v) / q(v)), p the base model's; and their
    number."""
    total, count = torch.zeros(()), 0
    for row in rows:
        q = model(input_ids=torch.tensor([row])).logits[0, :-1].softmax(dim=-1)
        with torch.no_grad(), model.disable_adapter():
            p = model(input_ids=torch.tensor([row])).logits[0, :-1].softmax(dim=-1)
        total, count = total + (p * (p / q).log()).sum(), count + len(p)
    return total, count


def replayed(batch: dict) -> list[list[int]]:
    rows = zip(batch["input_ids"], batch["attention_mask"], batch["task_types"], strict=True)
    return [ids[mask == 1].tolist() for ids, mask, task_type in rows if task_type == 1]


@pytest.mark.parametrize("types", [[0, 1, 0], [1, 1, -1], [1, 0, 1]])
def test_it_is_that_of_a_loop_over_the_rows_of_type_1(types):
    model, batch = filled_model().train(), make_batch() | {"task_types": torch.tensor(types)}
    expected, count = kl_loop(model, replayed(batch))
    found = divergence(model, batch)
    assert count_replayed(batch) == count
    assert found > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [torch.autograd.grad(value, parameters) for value in (found, expected)]
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
    assert all(module.training for module in model.modules())


def test_a_fresh_adapter_has_none_exactly():
    """With dropout, of which B = 0 leaves no trace."""
    model = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.5)).train()
    assert divergence(model, make_batch() | {"task_types": torch.ones(3, dtype=torch.long)}) == 0


def test_rows_of_other_types_cost_nothing():
    batch = make_batch() | {"task_types": torch.tensor([0, -1, 2])}
    assert count_replayed(batch) == 0
    assert divergence(None, batch) == 0


@pytest.fixture(scope="module")
def case(tmp_path_factory, model_dir) -> Case:
    return Case(tmp_path_factory.mktemp("replay"), model_dir)


@pytest.mark.parametrize(("processes", "file"), [(1, None), (2, None), (2, "zero2.json"), (2, "zero3.json")], ids=str)
def test_it_is_the_mean_over_the_tokens_of_a_step_in_every_regime(case, processes, file):
    """Type 1 is in every other row, so that some micro-batches have none."""
    runs = [
        {
            "dataset_dir": case.folder / f"{layout.rows} rows.json",
            "gradient_accumulation_steps": layout.accumulation,
            "per_device_train_batch_size": layout.micro_batch // processes,
            "activation_checkpointing": layout.checkpointing,
            "blc_weight": 0,
            "bf16": index == HALF,
            "kl_weight": weight,
        }
        | ({"deepspeed": deepspeed_file(case.folder, file)} if file else {})
        for index, layout in enumerate(LAYOUTS)
        for weight in (0, WEIGHT)
    ]
    adapters, _ = case.run(f"{processes} {file}", processes, runs)
    gradients = map(case.gradients, adapters)
    for run, layout in zip(runs[::2], LAYOUTS, strict=True):
        without, total = next(gradients), next(gradients)
        found = {key: (total[key] - without[key]) / WEIGHT for key in total}
        case.model.zero_grad()
        batch = Collator(pad_token_id=1)([case.rows[index] for index in range(layout.rows)])
        value, count = kl_loop(case.model, replayed(batch))
        (value / count).backward()
        named = {name: each.grad for name, each in case.model.named_parameters() if each.requires_grad}
        expected = get_peft_model_state_dict(case.model, {name: grad.double() for name, grad in named.items()})
        assert_same(found, expected, without, BF16 if run["bf16"] else 1e-5)


@pytest.fixture
def run(tmp_path, model_dir, monkeypatch) -> Runner:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    return Runner(tmp_path, model_dir)


def test_a_run_logs_it_unweighted_and_resumes_with_it(run, tmp_path):
    settings = {"kl_weight": 0.5, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    run(**settings, output_dir=tmp_path / "undisturbed")
    interrupt_after(3, run, **settings)
    run(**settings)
    assert same_adapter(run.output, tmp_path / "undisturbed")
    lines = [line for line in run.log() if "lm_loss" in line]
    assert lines[0]["kl_loss"] == 0
    assert all(line["kl_loss"] > 0 for line in lines[2:])  # the rate of the first step is 0
    for line in lines:
        expected = line["lm_loss"] + 0.1 * line["balance_loss"] + 0.5 * line["kl_loss"]
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
    assert "| kl_weight | 0.5 |" in (run.output / "README.md").read_text()


def test_without_it_a_run_is_as_ever(run, tmp_path):
    run(max_steps=2)
    run(max_steps=2, kl_weight=0, output_dir=tmp_path / "off")
    assert same_adapter(run.output, tmp_path / "off")
    assert not any("kl_loss" in line for line in run.log())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"kl_weight": -1}, "--kl_weight is -1.0, but has to be a number of at least 0"),
        ({"tuning": "full"}, "--tuning full changes the base model, with which --kl_weight compares"),
        ({"packing": "true"}, "--packing mixes the rows that --kl_weight compares with others"),
        ({"dataset_dir": "others.json"}, "--kl_weight needs rows of task type 1, but .*others.json has none"),
    ],
)
def test_contradictions_are_refused(run, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "others.json").write_text(json.dumps(example_rows(12)[::2]))
    with pytest.raises(InputError, match=message):
        run(**{"kl_weight": 1} | flags)


def test_tokens_that_the_base_model_excludes_add_nothing():
    base_NV = torch.log_softmax(torch.tensor([[1.0, 2.0, -torch.inf]]), dim=-1)
    logits_NV = torch.tensor([[2.0, 1.0, 0.5]], requires_grad=True)
    found = kl_divergence(base_NV, torch.log_softmax(logits_NV, dim=-1))
    found.backward()
    expected = sum(p.exp() * (p - q) for p, q in zip(base_NV[0, :2], torch.log_softmax(logits_NV[0], -1), strict=False))
    assert found.item() == pytest.approx(expected.item())
    assert logits_NV.grad.isfinite().all()
    assert kl_divergence(base_NV, base_NV).item() == 0
