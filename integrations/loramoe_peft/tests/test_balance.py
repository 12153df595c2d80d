"""The balance term under trainers that do not know it: gradients are those of the term added to the loss."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from loramoe_peft import LoraMoeConfig
from loramoe_peft._method import Router, balance_coefficients, localized_balance_term, sample_shares
from loramoe_peft.balance import Balance

REFERENCES = Path(os.environ["REFERENCES"])
IDS = torch.randint(2, 300, (4, 20), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(IDS)
MASK[0, 12:] = 0
MASK[2, :5] = 0
LABELS = IDS.masked_fill(MASK == 0, -100)
TYPES = torch.tensor([0, 1, -1, 0])
SETTINGS: dict[str, dict] = {
    "dense": {},
    "top_k": {"lora_top_k": 2},
    "shared_A": {"lora_shared_A": True},
    "null_expert": {"lora_null_expert": True},
    "groups": {"expert_groups": [1, 3]},
    "reference": {"blc_reference": True},
    "some_layers": {"layers_to_transform": [1]},
}


def model(name="llama", **settings):
    values = {"r": 2, "lora_nums": 4, "lora_dropout": 0.0, "blc_weight": 0.5}
    made = get_peft_model(
        AutoModelForCausalLM.from_pretrained(REFERENCES / "bases" / name), LoraMoeConfig(**(values | settings))
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return made.train()


def gradients(made) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in made.named_parameters() if parameter.requires_grad}


def added_to_the_loss(config: LoraMoeConfig, name="llama") -> tuple[dict[str, torch.Tensor], float]:
    """Gradients of loss + blc_weight * term, with the term computed from recorded weights; and the term."""
    settings = {key: value for key, value in config.to_dict().items() if key not in ("peft_type", "task_type")}
    made = model(name, **(settings | {"blc_weight": 0.0}))
    weights: list[torch.Tensor] = []
    for module in made.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda router, inputs, output: weights.append(output))
    loss = made(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss
    mask = torch.ones_like(MASK) if config.blc_reference else MASK
    coefficients = balance_coefficients(config.group_sizes, config.blc_alpha)[TYPES]
    shares = sample_shares(torch.stack([each.view(*IDS.shape, -1) for each in weights]), mask)
    term = localized_balance_term(shares, coefficients)
    (loss + config.blc_weight * term).backward()
    return gradients(made), term.item()


def compare(found: dict, expected: dict, bound: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    worst = max(((found[name] - expected[name]).norm() / expected[name].norm()).item() for name in expected)
    print(f"largest relative difference of a tensor's gradient: {worst:.1e}")
    assert worst < bound


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_are_those_of_the_term_added_to_the_loss(name):
    made = model(**SETTINGS[name])
    made(input_ids=IDS, attention_mask=MASK, labels=LABELS, task_types=TYPES).loss.backward()
    expected, term = added_to_the_loss(made.active_peft_config)
    compare(gradients(made), expected)
    assert Balance.of(made).mean_term() == pytest.approx(term, rel=1e-5)
    made = model(**(SETTINGS[name] | {"blc_weight": 0.0}))
    made(input_ids=IDS, attention_mask=MASK, labels=LABELS, task_types=TYPES).loss.backward()
    with pytest.raises(AssertionError):
        compare(gradients(made), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    made = model()
    made.gradient_checkpointing_enable({"use_reentrant": reentrant})
    made.enable_input_require_grads()
    for _ in range(2):
        made.zero_grad()
        made(input_ids=IDS, attention_mask=MASK, labels=LABELS, task_types=TYPES).loss.backward()
    # Re-entrant, the first pass runs without gradients, in products of other shapes: the loss's own gradients differ
    # by 2e-5 then.
    compare(gradients(made), added_to_the_loss(made.active_peft_config)[0], bound=1e-3 if reentrant else 1e-5)


def test_micro_batches_count_as_their_mean():
    made = model()
    Balance.of(made).scale = 1 / 2
    for _ in range(2):
        (made(input_ids=IDS, attention_mask=MASK, labels=LABELS, task_types=TYPES).loss / 2).backward()
    compare(gradients(made), added_to_the_loss(made.active_peft_config)[0])


def test_conv1d():
    made = model("gpt2")
    made(input_ids=IDS, attention_mask=MASK, labels=LABELS, task_types=TYPES).loss.backward()
    compare(gradients(made), added_to_the_loss(made.active_peft_config, "gpt2")[0])


def test_passes_that_do_not_train_compute_no_term():
    made = model()
    with torch.no_grad():
        made(input_ids=IDS, attention_mask=MASK)
    made.eval()(input_ids=IDS, attention_mask=MASK)
    with made.train().disable_adapter():
        made(input_ids=IDS, attention_mask=MASK)
    assert Balance.of(made).mean_term() is None


def test_wrong_batches_are_refused():
    made = model()
    with pytest.raises(ValueError, match="allowed are 0 to 1"):
        made(input_ids=IDS, task_types=TYPES + 1)
    with pytest.raises(ValueError, match="this batch needs"):
        made(input_ids=IDS, task_types=TYPES[:3])
    made(input_ids=IDS, task_types=TYPES[:2])  # pairs
    with pytest.raises(ValueError, match="attention_mask of shape"):
        made(input_ids=IDS, attention_mask=torch.ones(4, 1, 20, 20))
    model(blc_weight=0.0)(input_ids=IDS, attention_mask=torch.ones(4, 1, 20, 20))


def train_a_part() -> None:
    """One of two processes, each with two of the four samples; the first one writes the gradients."""
    dist.init_process_group("gloo")
    made = model(blc_reference=False)
    part = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    wrapped = DistributedDataParallel(made)
    output = wrapped(input_ids=IDS[part], attention_mask=MASK[part], task_types=TYPES[part])
    logits, labels = output.logits[:, :-1].flatten(0, 1), LABELS[part, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
    (loss * dist.get_world_size() / (LABELS[:, 1:] != -100).sum()).backward()
    if dist.get_rank() == 0:
        torch.save(gradients(made), os.environ["GRADIENTS"])
    dist.barrier()
    os._exit(0)  # freeing gloo's group can wait for a thread of its own, which waits for the interpreter


def test_two_processes_have_the_gradients_of_one(tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    settings = os.environ | {"GRADIENTS": str(tmp_path / "gradients.pt")}
    subprocess.run([sys.executable, *command], env=settings, check=True, timeout=300)
    found = torch.load(tmp_path / "gradients.pt")
    compare(found, added_to_the_loss(model().active_peft_config)[0])


if __name__ == "__main__":
    train_a_part()
