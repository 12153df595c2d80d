"""TRL's own trainers with the plug-in: they train every tensor, and know the balance term."""

import os
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from loramoe_peft import LoraMoeConfig, LoraMoeTrainerMixin
from loramoe_peft.balance import Balance
from loramoe_peft.trainer import BalanceCallback

BASE = Path(os.environ["REFERENCES"]) / "bases" / "llama"
IDS = torch.arange(2, 42).view(2, 20)
ROWS = {
    "sft": [{"prompt": f"{i}+{i} is ", "completion": str(2 * i), "task_type": i % 2} for i in range(16)],
    "dpo": [{"prompt": f"{i}+{i} is ", "chosen": str(2 * i), "rejected": "no", "task_type": i % 2} for i in range(16)],
}
COMMON = {
    "max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
    "logging_steps": 1, "report_to": "none", "use_cpu": True, "save_strategy": "no", "bf16": False,
}  # fmt: skip


class RoutedSFTTrainer(LoraMoeTrainerMixin, SFTTrainer):
    pass


class RoutedDPOTrainer(LoraMoeTrainerMixin, DPOTrainer):
    pass


TRAINERS = {
    "sft": (SFTTrainer, RoutedSFTTrainer, SFTConfig, {"gradient_checkpointing": True}),
    "dpo": (DPOTrainer, RoutedDPOTrainer, DPOConfig, {"gradient_checkpointing": False}),
}


def trainer_of(kind: str, routed: bool, folder: Path, more: dict | None = None, **settings):
    stock, with_types, arguments, own = TRAINERS[kind]
    config = LoraMoeConfig(r=2, lora_nums=4, **({"lora_dropout": 0.0} | settings))
    return (with_types if routed else stock)(
        model=AutoModelForCausalLM.from_pretrained(BASE),
        args=arguments(output_dir=str(folder), **(COMMON | own | (more or {}))),
        train_dataset=Dataset.from_list(ROWS[kind]),
        processing_class=AutoTokenizer.from_pretrained(BASE),
        peft_config=config,
    )


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("kind", TRAINERS)
def test_stock_trainers_train_every_tensor_and_log_the_term(kind, routed, tmp_path):
    trainer = trainer_of(kind, routed, tmp_path)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".experts." in name}
    assert len(logged(trainer, "balance_loss")) == 4
    assert all(value > 0 for value in logged(trainer, "balance_loss"))
    assert len(logged(trainer, "loss")) == 4


@pytest.mark.parametrize("kind", TRAINERS)
def test_what_is_trained_is_saved_for_both_sides(kind, tmp_path):
    trainer = trainer_of(kind, True, tmp_path / "run")
    trainer.train()
    written = Path(os.environ["WRITTEN"]) / kind
    trainer.save_model(written)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), written)
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
        assert torch.equal(logits, trainer.model.eval()(input_ids=IDS).logits)
    save_file({"logits": logits}, written / "reference.safetensors")


@pytest.mark.parametrize("kind", TRAINERS)
def test_task_types_and_micro_batches_reach_the_term(kind, tmp_path, monkeypatch):
    found = []
    opened = Balance._open

    def spy(self, model, args, kwargs):
        result = opened(self, model, args, kwargs)
        if self._batch is not None:
            found.append((self._batch.task_types_B, len(self._batch.mask), self._batch.scale))
        return result

    monkeypatch.setattr(Balance, "_open", spy)
    trainer_of(kind, True, tmp_path).train()
    assert len(found) == 8
    for task_types, samples, scale in found:
        assert sorted(set(task_types.tolist())) in ([0], [1], [0, 1])
        assert samples == (4 if kind == "dpo" else 2)
        assert scale == 0.5
    assert {task_type for types, *_ in found for task_type in types.tolist()} == {0, 1}


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_step_has_the_gradient_of_the_term_added_to_its_loss(kind, tmp_path):
    """The gradient of the term is linear in its weight: that of weight 2 is twice as far from that of 0 as of 1."""

    def gradients(weight: float) -> torch.Tensor:
        trainer = trainer_of(kind, True, tmp_path, blc_weight=weight)
        generator = torch.Generator().manual_seed(1)
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        trainer.current_gradient_accumulation_steps = 2
        batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(2)]))
        trainer.model.train()
        trainer.compute_loss(trainer.model, batch).backward()
        return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad]).double()

    none, once, twice = (gradients(weight) for weight in (0.0, 1.0, 2.0))
    assert (once - none).norm() > 1e-2 * none.norm()
    assert ((twice - none) - 2 * (once - none)).norm() < 1e-5 * (twice - none).norm()


def test_a_run_resumes_to_the_same_weights(tmp_path):
    more = {"save_strategy": "steps", "save_steps": 2}
    through, resumed = (trainer_of("sft", True, tmp_path, more) for _ in range(2))
    through.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    others = dict(resumed.model.named_parameters())
    assert all(torch.equal(p, others[name]) for name, p in through.model.named_parameters())


def test_grpo_trains_every_tensor(tmp_path):
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(BASE),
        reward_funcs=lambda completions, **kwargs: [float(len(set(text))) for text in completions],
        args=GRPOConfig(output_dir=str(tmp_path), **COMMON, num_generations=2, max_completion_length=8),
        train_dataset=Dataset.from_list([{"prompt": f"{i}+{i} is "} for i in range(16)]),
        processing_class=AutoTokenizer.from_pretrained(BASE),
        peft_config=LoraMoeConfig(r=2, lora_nums=4),
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".experts." in name}
    assert len(logged(trainer, "balance_loss")) == 4


def test_fp16_is_refused():
    model = torch.nn.Linear(1, 1)
    Balance.around(model)
    arguments = TrainingArguments(use_cpu=True, report_to="none")
    arguments.fp16 = True
    with pytest.raises(ValueError, match="fp16"):
        BalanceCallback().on_train_begin(arguments, None, None, model=model)
    BalanceCallback().on_train_begin(arguments, None, None, model=torch.nn.Linear(1, 1))
