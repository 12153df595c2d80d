"""What a finished run tells, against the saved adapter looked at row by row, without batches or padding."""

import json
import shutil
from functools import cached_property

import numpy as np
import pytest
import torch
from conftest import filled_model, tiny_tokenizer
from test_train import Runner
from torch.nn import functional
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig

from data import Encoding, encode_prompt, encode_target, load_data
from inference.routing import Routing, routing_lines, routing_summary
from peft import LoraConfig, PeftModel
from training import report
from training.report import MAX_NEW_TOKENS
from training.trainer import LoRAMoETrainer
from transformers_patch import AutoModelForCausalLM, RoutingRecorder
from transformers_patch.labels import SupervisedTokens

TASK_TYPES = (0, 1, 1, None, 0, 1)


def held_out_rows() -> list[dict]:
    """Rows of very different lengths; as many kinds of task as task types, and one row without a type."""
    return [
        {
            "instruction": f"{'Please, ' * (5 * index % 7)}name {index}",
            "input": "",
            "output": f"{index} " * (index + 1),
            "task_type": kind,
            "task": f"kind {kind}",
        }
        for index, kind in enumerate(TASK_TYPES)
    ]


class FinishedRun:
    """A short run from a filled adapter that also evaluates after each of its steps, and its parts made anew."""

    def __init__(self, folder, model_dir):
        self.runner, self.start, self.tokenizer = Runner(folder, model_dir), folder / "start", tiny_tokenizer()
        filled_model().save_pretrained(self.start)
        (folder / "test.json").write_text(json.dumps(held_out_rows()))
        adapter = {"peft_path": self.start, "lora_rank": 2, "lora_alpha": 4}
        self.results = self.runner(**adapter, max_steps=2, warmup_steps=0, eval_strategy="steps", eval_steps=1)
        self.routing = json.loads((self.runner.output / "routing.json").read_text())

    def model(self, adapter) -> PeftModel:
        return PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(self.runner.flags["model_name_or_path"]), adapter
        )

    def encoded(self) -> list[tuple[list[int], list[int]]]:
        """Prompt and answer of every row."""
        return [
            (
                encode_prompt(self.tokenizer, "chat", row["instruction"], row["input"]),
                encode_target(self.tokenizer, "chat", row["instruction"], row["input"], row["output"]),
            )
            for row in held_out_rows()
        ]

    def lm_loss(self, adapter) -> float:
        """Mean over all answer tokens of all rows."""
        model, total, count = self.model(adapter), 0.0, 0
        for prompt, answer in self.encoded():
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            total += cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
            count += len(answer)
        return total / count

    @cached_property
    def shares(self) -> dict[str, torch.Tensor]:
        """Mean share (module, expert) by task type, each row alone and unpadded."""
        model, found = self.model(self.runner.output), {}
        for kind, (prompt, answer) in zip(TASK_TYPES, self.encoded(), strict=True):
            with torch.no_grad(), RoutingRecorder(model) as recorder:
                model(torch.tensor([prompt + answer]))
            rows = found.setdefault("-1" if kind is None else str(kind), [])
            rows.append(torch.stack([weights_BTE[0].mean(dim=0) for weights_BTE in recorder.weights.values()]))
        return {kind: torch.stack(rows).mean(dim=0) for kind, rows in found.items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_dir) -> FinishedRun:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
        return FinishedRun(tmp_path_factory.mktemp("report"), model_dir)


@pytest.mark.parametrize("experts", [1, 4])
def test_evaluation_computes_one_cross_entropy_and_what_a_forward_with_labels_gives(
    tmp_path, model_dir, monkeypatch, experts
):
    step, entropy, batches, calls = LoRAMoETrainer.prediction_step, functional.cross_entropy, [], []

    def counted(*args, **kwargs):
        calls.append(args)
        return entropy(*args, **kwargs)

    def compared(trainer, model, inputs, *args, **kwargs):
        labelled = {name: value for name, value in inputs.items() if name not in ("lengths", "sources")}
        with torch.no_grad(), RoutingRecorder(model) as recorder:
            output = model(**labelled)
        expected = [SupervisedTokens(inputs["labels"]).scores(output.logits)[:, :2]]
        nll, tokens = expected[0].sum(dim=0)
        torch.testing.assert_close(nll / tokens, output.lm_loss)
        if experts > 1:
            expected.append(recorder.sample_shares(inputs["attention_mask"]).transpose(0, 1))
        batches.append(inputs)
        with monkeypatch.context() as patch:
            patch.setattr(functional, "cross_entropy", counted)
            loss, found, labels = step(trainer, model, dict(inputs), *args, **kwargs)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        return loss, found, labels

    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    monkeypatch.setattr(LoRAMoETrainer, "prediction_step", compared)
    Runner(tmp_path, model_dir)(max_steps=2, lora_nums=experts, per_device_eval_batch_size=2)
    assert len(calls) == len(batches) == 6


def assert_close(found: list, expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=0)


def test_the_rows_tell_faults_apart(finished):
    """Lengths, task types and expert groups all have to differ clearly, or the comparisons below show nothing."""
    lengths = [len(prompt) for prompt, _ in finished.encoded()]
    assert max(lengths) > 2 * min(lengths)
    groups = torch.stack([shares.mean(dim=0).view(2, 2).sum(dim=1) for shares in finished.shares.values()])
    assert (groups[:, 0] - groups[:, 1]).abs().min() > 0.01
    assert torch.pdist(groups).min() > 1e-3


def test_routing_json_holds_the_mean_share_of_every_expert(finished):
    routing = finished.routing
    assert routing["rows"] == {"-1": 1, "0": 2, "1": 3}
    names = [f"model.layers.{layer}.mlp.{name}_proj" for layer in range(2) for name in ("gate", "up", "down")]
    assert [name[name.index("model.layers") :] for name in routing["modules"]] == names
    assert routing["rows_by_task"] == {"kind 0": 2, "kind 1": 3, "kind None": 1}
    for field in ("expert_share_by_task_type", "expert_share_by_task_type_and_module", "group_share_by_task_type"):
        assert routing[field].keys() == finished.shares.keys()
    for kind, shares in finished.shares.items():
        task = "kind None" if kind == "-1" else f"kind {kind}"
        assert_close(routing["expert_share_by_task_and_module"][task], shares)
        assert_close(routing["expert_share_by_task"][task], shares.mean(dim=0))
        assert_close(routing["expert_share_by_task_type_and_module"][kind], shares)
        assert_close(routing["expert_share_by_task_type"][kind], shares.mean(dim=0))
        assert_close(routing["group_share_by_task_type"][kind], shares.mean(dim=0).view(2, 2).sum(dim=1))


def test_the_printed_table_holds_the_share_of_every_group(finished):
    head, *lines = finished.results["routing_table"]
    assert head.split("  ")[-1].strip() == "experts 2-3"
    assert head.index("experts 0-1") < head.index("experts 2-3")
    names = {"-1": "no task type", "0": "task type 0 (other tasks)", "1": "task type 1 (world knowledge)"}
    assert len(lines) == 3
    for line, (kind, name) in zip(lines, names.items(), strict=True):
        shown = [float(cell.rstrip("%")) for cell in line.removeprefix(f"  {name}").split()]
        expected = finished.shares[kind].mean(dim=0).view(2, 2).sum(dim=1) * 100
        assert shown == pytest.approx(expected.tolist(), abs=0.051)


def test_experts_that_the_task_types_do_not_divide_have_no_groups():
    shares_BLE = torch.softmax(torch.randn(2, 1, 5), dim=-1).numpy()
    routing = Routing(["up"], shares_BLE, np.array([0, 1]), np.array(["", ""]))
    config = LoraConfig(lora_nums=5, num_task_types=2, blc_weight=0)
    assert routing_lines(routing, config) == ["no groups: 5 experts cannot be split among 2 task types"]
    assert "group_share_by_task_type" not in routing_summary(routing, config)


def test_losses_before_and_after_are_those_of_the_first_and_the_last_adapter(finished):
    """The log has evaluations in between, so taking another entry than the right one shows."""
    losses = [entry["eval_lm_loss"] for entry in finished.runner.log() if "eval_lm_loss" in entry]
    assert len(set(losses)) == 3
    assert finished.results["eval_lm_loss_before"] == pytest.approx(finished.lm_loss(finished.start), rel=1e-4)
    assert finished.results["eval_lm_loss_after"] == pytest.approx(finished.lm_loss(finished.runner.output), rel=1e-4)


def test_samples_answer_the_prompt_alone(finished):
    """One row of each kind of task: the answer to the batch of padded prompts is that to each prompt by itself."""
    model, rows = finished.model(finished.runner.output), held_out_rows()
    samples = finished.results["samples"]
    first_of_kind = (0, 1, 3)
    assert len(samples) == len(first_of_kind)
    for index, (shown, expected, generated) in zip(first_of_kind, samples, strict=True):
        prompt = torch.tensor([finished.encoded()[index][0]])
        output = model.generate(prompt, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, pad_token_id=1)
        answer = finished.tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)
        assert (shown, expected) == (rows[index]["instruction"], rows[index]["output"])
        assert generated == answer.strip()
    assert len({generated for *_, generated in samples}) > 1


@pytest.mark.parametrize("tuning", ["loramoe", "full"])
def test_samples_do_not_follow_what_the_base_models_folder_proposes(tmp_path, model_dir, monkeypatch, tuning):
    """A model that is trained in full hands the proposals on all the same."""
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    base, run = tmp_path / "base", Runner(tmp_path, model_dir)
    shutil.copytree(model_dir, base)
    GenerationConfig(repetition_penalty=3.0, min_new_tokens=12, eos_token_id=1).save_pretrained(base)
    plain, proposed = (
        run(model_name_or_path=model, output_dir=tmp_path / f"on {model.name}", tuning=tuning, max_steps=1)
        for model in (model_dir, base)
    )
    assert proposed["samples"] == plain["samples"]
    if tuning == "full":
        assert GenerationConfig.from_pretrained(tmp_path / "on base").repetition_penalty == 3


def test_samples_end_where_the_template_ends_an_answer(finished, monkeypatch):
    """Its turns end with <s> here, which the base model does not know as an end."""
    model, tokenizer, seen = finished.model(finished.runner.output), tiny_tokenizer(), []
    tokenizer.chat_template = tokenizer.chat_template.replace("</s>", "<s>")
    rows, _ = load_data(finished.runner.folder / "test.json", tokenizer, Encoding("auto", 128, 2), finished.start)
    monkeypatch.setattr(report, "generate_answers", lambda model, prompts, settings: seen.append(settings) or prompts)
    for template, ends in (("auto", [0, 1]), ("plain", [1])):
        report.generate_samples(model, tokenizer, rows, template)
        assert seen.pop().eos_token_id == ends
