"""The main job on other base models than Llama, and with the options that concern targets and task types."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import deepspeed_file, example_rows, tiny_tokenizer
from safetensors.torch import load_file
from test_architectures import stock_model
from test_launch import call, launch
from test_train import Runner

from data import InputError
from loading import base_model
from loading.arguments import ModelArguments
from peft import LoraConfig, PeftModel
from scripts import evaluate
from transformers_patch import AutoModelForCausalLM

TARGETS = {"gpt2": ["mlp.c_fc", "mlp.c_proj"], "qwen3": ["down_proj", "gate_proj", "up_proj"]}


@pytest.fixture
def runner(tmp_path, monkeypatch):
    """Makes a Runner of `train.main` for a tiny base model of some architecture."""
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)

    def make(architecture: str, **changes) -> Runner:
        folder = tmp_path / architecture
        model = stock_model(architecture)
        model.config.update(changes)
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        return Runner(tmp_path, folder)

    return make


@pytest.mark.parametrize(
    ("kind", "chosen"), [(transformers.Qwen3Config, "flash_attention_2"), (transformers.CodeGenConfig, None)]
)
def test_flash_attention_is_chosen_where_gpu_package_and_architecture_have_it(tmp_path, monkeypatch, kind, chosen):
    kind().save_pretrained(tmp_path)
    model_args = ModelArguments(model_name_or_path=str(tmp_path))
    args = SimpleNamespace(bf16=True, fp16=False, device=torch.device("cuda"))
    monkeypatch.setattr(base_model, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert base_model._attention(model_args, args) == chosen
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert base_model._attention(model_args, args) is None


@pytest.mark.parametrize("architecture", TARGETS)
def test_the_main_job_runs_on_another_architecture(runner, architecture, tmp_path):
    run = runner(architecture)
    outcome = call(
        ["bash", "run_loramoe.sh", "--data_cache_dir", str(tmp_path / "cache"), "--probe_facts", "4"],
        pretrained_model=run.flags["model_name_or_path"],
        dataset_dir=run.flags["dataset_dir"],
        validation_file=run.flags["validation_file"],
        output_dir=tmp_path / "outputs",
        exp_name="x",
        max_steps=3,
        lr=1e-2,
        lora_nums=4,
    )
    assert outcome.returncode == 0, outcome.stderr
    folder = tmp_path / "outputs" / "x"
    assert LoraConfig.from_pretrained(folder).target_modules == TARGETS[architecture]
    results = json.loads((folder / "all_results.json").read_text())
    assert results["eval_lm_loss_after"] < results["eval_lm_loss_before"]
    assert "first training row" in outcome.stdout
    assert "of 4 facts known before" in outcome.stdout
    assert "[[number" in outcome.stdout


def test_rows_samples_and_answers_end_where_a_table_of_positions_ends(runner, tmp_path):
    """This GPT-2 has 128 positions; prompts of 113 tokens leave 15, fewer than samples and the longest answer take."""
    run = runner("gpt2")
    held_out = [{"instruction": "x" * 110, "output": "b"}] * 4 + [{"instruction": "x", "output": "b" * 30}]
    run.flags["validation_file"].write_text(json.dumps([{"instruction": "x" * 150, "output": "b"}, *held_out]))
    with pytest.raises(
        InputError, match=r"rows of 155 tokens, but .* \(gpt2\) has 128 positions; set --max_seq_length 128"
    ):
        run(max_steps=1)
    run.flags["validation_file"].write_text(json.dumps(held_out))
    assert len(run(max_steps=1)["samples"]) == 3
    flags = ["--adapter", run.output, "--output", tmp_path / "measured.json", "--data_cache_dir", tmp_path / "cache"]
    evaluate.main([*map(str, flags), "--metrics", "exact_match"])
    assert json.loads((tmp_path / "measured.json").read_text())["data"][0]["max_new_tokens"] == 31


def test_the_router_loss_of_a_mixture_of_experts_base_is_logged_apart(runner):
    run = runner("mixtral", output_router_logits=False)
    results = run(output_router_logits="true", gradient_accumulation_steps=2)
    lines = [line for line in run.log() if "lm_loss" in line]
    for line in lines:
        assert line["aux_loss"] > 1
        # `loss` is Trainer's, rounded: LM loss, beta times the balance term, and the base's coefficient times its term.
        expected = line["lm_loss"] + 0.1 * line["balance_loss"] + 0.001 * line["aux_loss"]
        assert line["loss"] == pytest.approx(expected, abs=1e-3)
    assert results["samples"]


def test_a_base_without_router_loss_has_none_to_log(runner):
    run = runner("qwen3")
    with pytest.raises(InputError, match=r"--output_router_logits: Qwen3LoRAMoEForCausalLM has no router loss"):
        run(output_router_logits="true")


def test_named_task_types_unequal_groups_and_top_k(runner, capsys):
    run = runner("gemma2")
    names = ("other", "knowledge", "code")
    rows = [row | {"task_type": names[index % 2]} for index, row in enumerate(example_rows(13))]
    run.flags["dataset_dir"].write_text(json.dumps(rows))
    held_out = [
        row | {"task_type": kind} for row, kind in zip(example_rows(5), (0, "code", "code", 1, None), strict=True)
    ]
    run.flags["validation_file"].write_text(json.dumps(held_out))
    run(task_type_names=",".join(names), expert_groups="1,2,1", lora_top_k=2)
    config = LoraConfig.from_pretrained(run.output)
    assert (config.num_task_types, config.task_type_names) == (3, list(names))
    assert (config.expert_groups, config.lora_top_k) == ([1, 2, 1], 2)
    shown = capsys.readouterr().out
    assert shown.count("warning: there are evaluation rows of task type code, but no training rows") == 1
    assert "  task type knowledge" in shown
    groups = json.loads((run.output / "routing.json").read_text())["group_share_by_task_type"]
    assert set(groups) == {"-1", "0", "1", "2"}
    assert all(sum(shares) == pytest.approx(1, abs=1e-5) and len(shares) == 3 for shares in groups.values())


PROBLEMS = {
    "groups": ({"expert_groups": "1,2"}, r"--expert_groups is \[1, 2\], but has to be 2 whole numbers of at least 1"),
    "no numbers": ({"expert_groups": "one,3"}, r"--expert_groups is 'one,3', but has to be whole numbers separated by"),
    "names": ({"task_types": "a,a"}, r"--task_type_names is \['a', 'a'\], but has to be 2 different names"),
    "names and number": ({"task_types": "a,b", "num_task_types": 4}, r"--task_type_names is .* 4 different names"),
    "top 1": ({"lora_top_k": 1}, r"--lora_top_k is 1, but has to be from 2 to --lora_nums, 4"),
    "expression": ({"trainable": "(q"}, r"--trainable '\(q' is not a regular expression"),
    "unknown type": ({"task_types": "a,b"}, r"'task_type' is \"c\", but has to be one of a, b, or 0 or 1"),
}


@pytest.mark.parametrize(("changes", "message"), PROBLEMS.values(), ids=PROBLEMS)
def test_what_cannot_be_is_refused(runner, changes, message):
    run = runner("qwen3")
    run.flags["dataset_dir"].write_text(json.dumps([row | {"task_type": "c"} for row in example_rows(3)]))
    with pytest.raises(InputError, match=message):
        run(**changes)


def embeddings(folder) -> dict[str, torch.Tensor]:
    return {
        key: tensor for key, tensor in load_file(folder / "adapter_model.safetensors").items() if ".trained." in key
    }


def test_tied_embeddings_trained_in_full_end_the_same_on_two_shards_and_when_resumed(runner, tmp_path):
    """Gemma 2 ties its embeddings. One process; ZeRO-3 on two; ZeRO-3 again from the checkpoint of its fourth step."""
    run = runner("gemma2", tie_word_embeddings=True)
    settings = {"modules_to_save": "embed_tokens,lm_head", "lora_dropout": 0, "num_train_epochs": 1, "logging_steps": 1}
    run(**settings, per_device_train_batch_size=2, output_dir=tmp_path / "one")
    alone = embeddings(tmp_path / "one")
    flags = run.arguments(**settings, per_device_train_batch_size=1, deepspeed=deepspeed_file(tmp_path, "zero3.json"))
    program = tmp_path / "commands.json"
    program.write_text(json.dumps([flags]))
    launch(2, ["tests/regimes.py", str(program)])
    sharded = embeddings(run.output)
    assert alone.keys() == sharded.keys() == {"base_model.model.model.embed_tokens.trained.weight"}
    (one,), (two,) = alone.values(), sharded.values()
    start = stock_model("gemma2").get_input_embeddings().weight
    assert (one - start).norm() > 1e-2 * start.norm()
    assert (two - one).norm() <= 1e-3 * (one - start).norm()
    shutil.rmtree(run.output / "checkpoint-6")
    for name in ("all_results.json", "adapter_model.safetensors"):
        (run.output / name).unlink()
    launch(2, ["tests/regimes.py", str(program)])
    (again,) = embeddings(run.output).values()
    assert torch.equal(again, two)
    base = AutoModelForCausalLM.from_pretrained(run.flags["model_name_or_path"])
    model = PeftModel.from_pretrained(base, run.output)
    assert torch.equal(model.get_output_embeddings().weight, again)


def test_full_fine_tuning_leaves_a_folder_of_the_stock_class(runner):
    run = runner("phi3")
    run(tuning="full", learning_rate=1e-3, num_train_epochs=1)
    assert type(transformers.AutoModelForCausalLM.from_pretrained(run.output)) is transformers.Phi3ForCausalLM
