"""`train.py` as a user runs it, in this process, on a tiny Llama."""

import errno
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, example_rows, filled_model, full_disk, tiny_config, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainerControl, TrainerState

import train
from data import InputError
from inference.contamination import Contamination
from loading import arguments
from loading.base_model import build_model
from peft import LoraConfig, LoraExperts, LoraLayer, PeftModel
from training import checkpoint
from training.run_folder import RunFolder
from training.stopping import StopSignals


class Runner:
    """Calls `train.main` with the flags of a short run; keyword arguments override them, None leaves one out."""

    def __init__(self, folder: Path, model_dir: Path):
        self.folder = folder
        self.output = folder / "run"
        (folder / "train.json").write_text(json.dumps(example_rows(12)))
        (folder / "test.json").write_text(json.dumps(example_rows(20)[15:]))
        self.flags = {
            "model_name_or_path": model_dir,
            "dataset_dir": folder / "train.json",
            "validation_file": folder / "test.json",
            "output_dir": self.output,
            "data_cache_dir": folder / "cache",
            "use_cpu": "true",
            "knowledge_probe": "none",
            "lora_nums": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "num_train_epochs": 2,
            "save_steps": 2,
            "seed": 3,
        }

    def arguments(self, **changes) -> list[str]:
        flags = {name: value for name, value in (self.flags | changes).items() if value is not None}
        return [text for name, value in flags.items() for text in (f"--{name}", str(value))]

    def __call__(self, **changes) -> dict:
        train.main(self.arguments(**changes))
        return json.loads(Path(changes.get("output_dir", self.output), "all_results.json").read_text())

    def log(self) -> list[dict]:
        return json.loads((self.output / "trainer_state.json").read_text())["log_history"]


@pytest.fixture
def run(tmp_path, model_dir, monkeypatch) -> Runner:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    return Runner(tmp_path, model_dir)


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test if a model is built."""
    monkeypatch.setattr(train, "build_model", lambda *arguments: pytest.fail("weights were read"))


def test_a_run_writes_everything_it_promises(run, capsys):
    results = run()
    names = {file.name for file in run.output.iterdir()}
    assert names >= {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "all_results.json", "checkpoint-6",
        "routing.json", "run_config.json", "tensorboard", "tokenizer.json", "trainer_state.json",
    }  # fmt: skip
    assert not any(file.suffix == ".bin" for file in run.output.iterdir())
    assert results["eval_lm_loss_after"] < results["eval_lm_loss_before"]
    assert results["eval_perplexity_after"] == pytest.approx(math.exp(results["eval_lm_loss_after"]))
    assert results["train_runtime"] > 0
    assert list((run.output / "tensorboard").iterdir())
    config = LoraConfig.from_pretrained(run.output)
    assert (config.lora_nums, config.r, config.num_task_types) == (4, 4, 2)
    routing = json.loads((run.output / "routing.json").read_text())
    assert len(routing["modules"]) == 6
    for shares in routing["group_share_by_task_type"].values():
        assert sum(shares) == pytest.approx(1)
    shown = capsys.readouterr().out
    for text in (
        "held-out LM loss",
        "held-out perplexity",
        "task type 1 (world knowledge)",
        "sample 2",
        str(run.output),
    ):
        assert text in shown


def test_log_lines_hold_both_losses_with_accumulation_and_a_short_last_window(run):
    """12 rows, micro-batches of 4, 2 per step: the second step of each epoch has one micro-batch alone."""
    run(gradient_accumulation_steps=2, blc_weight=0.5, lora_dropout=0)
    steps = [entry for entry in run.log() if "lm_loss" in entry]
    assert len(steps) == 4
    for entry in steps:
        assert entry["balance_loss"] > 0
        assert entry["loss"] == pytest.approx(entry["lm_loss"] + 0.5 * entry["balance_loss"], rel=1e-5)


def test_evaluation_is_per_token_whatever_the_batch_size(run):
    losses = [
        run(output_dir=run.folder / f"eval{size}", max_steps=1, per_device_eval_batch_size=size)["eval_lm_loss_before"]
        for size in (1, 3)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_evaluation_drops_no_row_where_training_does(run):
    """Five evaluation rows in batches of two."""
    losses = [
        run(output_dir=run.folder / drops, max_steps=1, per_device_eval_batch_size=2, dataloader_drop_last=drops)
        for drops in ("false", "true")
    ]
    assert losses[0]["eval_lm_loss_before"] == losses[1]["eval_lm_loss_before"]


def test_a_second_identical_call_repeats_the_results(run, capsys, monkeypatch):
    first = run()
    capsys.readouterr()
    monkeypatch.setattr(train, "build_model", lambda *arguments: pytest.fail("trained again"))
    assert run(logging_steps=2, save_steps=5) == first
    shown = capsys.readouterr().out
    assert "this run is finished already" in shown
    assert f"{first['eval_lm_loss_after']:.4f} after training" in shown


def test_training_rows_are_searched_for_probe_facts_once(run, monkeypatch):
    probe = {"knowledge_probe": "auto", "probe_facts": 2}
    train.main(run.arguments(**probe, prepare_only="true"))
    monkeypatch.setattr(Contamination, "of", lambda *arguments: pytest.fail("searched again"))
    first = run(**probe)
    assert first["knowledge"]["facts"] == 2
    monkeypatch.setattr(train, "make_probe", lambda *arguments: pytest.fail("of a finished run"))
    assert run(**probe) == first


def test_another_configuration_in_the_same_folder_is_refused(run, no_weights):
    train.main([*run.arguments(), "--prepare_only"])
    with pytest.raises(InputError) as caught:
        run(lora_rank=8, learning_rate=0.5)
    message = str(caught.value)
    assert "learning_rate: 0.01 there, 0.5 now" in message
    assert "lora_rank: 4 there, 8 now" in message
    assert "exp_name=" in message
    assert "--restart" in message
    (run.folder / "train.json").write_text(json.dumps(example_rows(13)))
    with pytest.raises(InputError, match="dataset_sha256"):
        run()


def test_what_a_killed_run_was_just_writing_is_cleared_away(run):
    expected = run()
    clean = {file.name for file in run.output.iterdir()}
    (run.output / "all_results.json").unlink()
    (run.output / ".all_results.json.1.tmp").write_text("{")
    for name in (checkpoint.TEMPORARY_NAME, ".files.1234abcd.tmp"):
        (run.output / name / "checkpoint-6").mkdir(parents=True)
    assert run()["eval_lm_loss_after"] == expected["eval_lm_loss_after"]
    assert {file.name for file in run.output.iterdir()} == clean


def test_restart_keeps_the_old_run_under_another_name(run):
    run(max_steps=1)
    old = load_file(run.output / "adapter_model.safetensors")
    assert run(lora_rank=2, restart=True, max_steps=1)["train_samples"] == 12
    assert LoraConfig.from_pretrained(run.output).r == 2
    (archive,) = run.folder.glob("run.before-*")
    kept = load_file(archive / "adapter_model.safetensors")
    assert all(torch.equal(kept[key], old[key]) for key in old)


@pytest.mark.parametrize(
    ("save_steps", "last_step"), [(2, 3), (3, 4), (2, 5)], ids=["in epoch 1", "between epochs", "in epoch 2"]
)
def test_an_interrupted_run_resumes_and_ends_the_same(run, capsys, save_steps, last_step):
    """Three steps an epoch, dropout on."""
    expected = run(output_dir=run.folder / "undisturbed")
    interrupt_after(last_step, run, save_steps=save_steps)
    results = run(save_steps=save_steps)
    assert f"resuming from {run.output / f'checkpoint-{last_step - 1}'}" in capsys.readouterr().out
    assert results["eval_lm_loss_before"] == expected["eval_lm_loss_before"]
    assert same_adapter(run.output, run.folder / "undisturbed")


def test_an_interrupted_training_leaves_no_handler_behind(run):
    """Processes forked later would not end at SIGTERM."""
    before = signal.getsignal(signal.SIGTERM)
    interrupt_after(1, run)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_that_sigterm_has_stopped_ends_the_same(run, capsys):
    """Dropout on; the checkpoint is that of no regular save."""
    run(output_dir=run.folder / "undisturbed", save_steps=5)
    signal_after(2, signal.SIGTERM, run, save_steps=5)
    assert "stopped by a signal; step 3 is saved" in capsys.readouterr().out
    run(save_steps=5)
    assert f"resuming from {run.output / 'checkpoint-3'}" in capsys.readouterr().out
    assert same_adapter(run.output, run.folder / "undisturbed")


STAGES = {
    "while the model is built": ("build_model", None),
    "in the evaluation before training": ("LoRAMoETrainer.prediction_step", 0),
    "in the evaluation after it": ("LoRAMoETrainer.prediction_step", 6),
}


@pytest.mark.parametrize(("function", "step"), STAGES.values(), ids=STAGES)
def test_sigterm_ahead_of_training_and_behind_it_stops_the_run(run, monkeypatch, capsys, function, step):
    *owner, name = function.split(".")
    owner = train.LoRAMoETrainer if owner else train
    original = getattr(owner, name)

    def signalled(first, *arguments, **keywords):
        if step in (None, getattr(getattr(first, "state", None), "global_step", None)):
            signal.raise_signal(signal.SIGTERM)
        return original(first, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, signalled)
        train.main(run.arguments(save_steps=6))
    assert (
        "stopped by a signal; the same command goes on from the last checkpoint, if there is one"
        in capsys.readouterr().out
    )
    assert not (run.output / "all_results.json").exists()
    assert len(list(run.output.glob("checkpoint-*"))) == (step == 6)
    assert run(save_steps=6)["eval_lm_loss_after"] > 0


@pytest.mark.parametrize("max_steps", [2, 3], ids=["in an epoch", "between epochs"])
def test_ending_a_run_again_trains_no_further_step(run, max_steps):
    """Three steps an epoch; a rate that is not 0 after the last step."""
    settings = {"max_steps": max_steps, "lr_scheduler_type": "constant"}
    expected = run(**settings)
    (run.output / "all_results.json").unlink()
    (run.output / "adapter_model.safetensors").rename(run.folder / "adapter_model.safetensors")
    results = run(**settings)
    assert json.loads((run.output / "trainer_state.json").read_text())["global_step"] == max_steps
    assert same_adapter(run.output, run.folder)
    assert results["eval_lm_loss_after"] == expected["eval_lm_loss_after"]


DAMAGED = {
    "adapter_model.safetensors": ["truncate", "delete"],
    "trainer_state.json": ["truncate", "delete"],
    "adapter_config.json": ["truncate", "delete"],
    "optimizer.pt": ["truncate", "delete"],
    "scheduler.pt": ["delete"],
}


@pytest.mark.parametrize(("name", "damage"), [(name, damage) for name, kinds in DAMAGED.items() for damage in kinds])
def test_a_damaged_checkpoint_is_named_and_skipped(run, capsys, name, damage):
    expected = run()
    for file in ("all_results.json", "adapter_model.safetensors"):
        (run.output / file).unlink()
    damaged = run.output / "checkpoint-6" / name
    damaged.write_bytes(damaged.read_bytes()[:40]) if damage == "truncate" else damaged.unlink()
    capsys.readouterr()
    results = run()
    shown = capsys.readouterr().out
    assert re.search(rf"checkpoint-6 cannot be resumed and is skipped: .*{name}", shown)
    assert f"resuming from {run.output / 'checkpoint-4'}" in shown
    assert results["eval_lm_loss_after"] == expected["eval_lm_loss_after"]
    assert checkpoint.checkpoint_problem(run.output / "checkpoint-6") is None


def test_without_a_whole_checkpoint_the_run_starts_from_its_beginning(run, capsys):
    expected = run(save_steps=6)
    for file in (run.output / "all_results.json", run.output / "checkpoint-6" / "optimizer.pt"):
        file.write_bytes(b"") if file.suffix == ".pt" else file.unlink()
    assert run(save_steps=6)["eval_lm_loss_after"] == expected["eval_lm_loss_after"]
    shown = capsys.readouterr().out
    assert "checkpoint-6 cannot be resumed and is skipped: optimizer.pt is damaged" in shown
    assert "no checkpoint is left to resume from, so the run starts from the beginning" in shown


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "adapter_config.json", "trainer_state.json", "all_results.json"]
)
def test_a_finished_run_with_a_damaged_file_is_refused_and_can_be_ended_again(run, name):
    expected = run()
    file = run.output / name
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(InputError, match=rf"holds a finished run, but {name} is damaged or incomplete .* delete all_"):
        run()
    (run.output / "all_results.json").unlink()
    assert run()["eval_lm_loss_after"] == expected["eval_lm_loss_after"]
    PeftModel.from_pretrained(tiny_model(), run.output)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "trainer_state.json"])
def test_a_finished_run_without_a_file_is_refused_and_can_be_ended_again(run, name):
    expected = run()
    (run.output / name).unlink()
    with pytest.raises(InputError, match=rf"holds a finished run, but it has no.* {name}.* delete all_results.json"):
        run()
    (run.output / "all_results.json").unlink()
    assert run()["eval_lm_loss_after"] == expected["eval_lm_loss_after"]
    PeftModel.from_pretrained(tiny_model(), run.output)


def test_a_finished_run_of_full_tuning_needs_its_configuration_as_well(run):
    run(tuning="full", max_steps=1)
    (run.output / "config.json").unlink()
    with pytest.raises(InputError, match=r"holds a finished run, but it has no config.json"):
        run(tuning="full", max_steps=1)


def test_a_damaged_configuration_of_a_run_is_named(run):
    run(max_steps=1)
    (run.output / "run_config.json").write_text("{")
    with pytest.raises(InputError, match=r"run_config.json is damaged .* --restart"):
        run(max_steps=1)


def interrupt_after(step: int, run, **flags) -> None:
    """A run that ends without a word after a step."""
    with pytest.raises(KeyboardInterrupt):
        signal_after(step, signal.SIGINT, run, **flags)


def signal_after(step: int, number: signal.Signals, run, **flags) -> None:
    """A run that gets a signal after a step, when the next one begins."""

    class Signal(TrainerCallback):
        def on_step_begin(self, args, state, control, **arguments):
            if state.global_step == step:
                signal.raise_signal(number)

    build = train.build_trainer

    def signalled(*arguments):
        trainer = build(*arguments)
        trainer.add_callback(Signal())
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build_trainer", signalled)
        train.main(run.arguments(**flags))


def same_adapter(first: Path, second: Path) -> bool:
    adapters = [load_file(folder / "adapter_model.safetensors") for folder in (first, second)]
    return all(torch.equal(adapters[0][key], adapters[1][key]) for key in adapters[1])


def test_a_full_disk_harms_no_earlier_checkpoint(run):
    """The disk is full for files of more than 36 kB: the adapter still fits, the optimizer's state does not."""
    run(output_dir=run.folder / "undisturbed")
    interrupt_after(3, run)
    command = ["bash", "-c", 'ulimit -f 36; exec "$@"', "-", sys.executable, "train.py", *run.arguments()]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert outcome.returncode == 1
    (said,) = re.findall(r"(?m)^error: .*", outcome.stderr)  # at the beginning of a line, not after the progress bar
    assert re.match(rf"error: {run.output}/checkpoint-4 could not be written: .*MB are free on this disk", said)
    assert f"The last good checkpoint is {run.output / 'checkpoint-2'}" in said
    assert "Traceback" not in outcome.stderr
    assert [folder.name for folder in run.output.glob("*checkpoint*")] == ["checkpoint-2"]
    run()
    assert same_adapter(run.output, run.folder / "undisturbed")


# What writes, the largest file that there is room for, and what is named.
FULL_AT_THE_END = {
    "adapter": ("LoRAMoETrainer.save_model", 500, "adapter_model.safetensors"),
    "tokenizer": ("LoRAMoETrainer.save_model", 5000, "adapter_model.safetensors"),
    "state of the training": ("finish", 500, "all_results.json"),
    "results": ("write_json", 10, "all_results.json"),
}


@pytest.mark.parametrize(("writer", "size", "name"), FULL_AT_THE_END.values(), ids=FULL_AT_THE_END)
def test_a_disk_that_is_full_at_the_end_is_one_message(run, monkeypatch, writer, size, name):
    small = {"lora_nums": 1, "lora_rank": 1, "trainable": "up_proj"}  # an adapter smaller than the tokenizer
    run(output_dir=run.folder / "undisturbed", **small)
    *owner, function = writer.split(".")
    write = getattr(train.LoRAMoETrainer if owner else train, function)

    def write_on_a_full_disk(*arguments, **keywords):
        if "_internal_call" in keywords:  # for a checkpoint
            return write(*arguments, **keywords)
        with full_disk(size):
            return write(*arguments, **keywords)

    monkeypatch.setattr(f"train.{writer}", write_on_a_full_disk)
    with pytest.raises(InputError, match=rf"{name} could not be written: .*File too large.*is .*checkpoint-6"):
        run(**small)
    left = {file.name for file in run.output.iterdir()}
    assert left < {file.name for file in (run.folder / "undisturbed").iterdir()}
    for name in left & {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"}:
        assert (run.output / name).read_bytes() == (run.folder / "undisturbed" / name).read_bytes()
    monkeypatch.undo()
    run(**small)
    assert same_adapter(run.output, run.folder / "undisturbed")


WRITERS = {
    "Python": lambda path: path.write_bytes(bytes(1000)),
    "torch": lambda path: torch.save(torch.zeros(1000), path),
    "torch, when closing the file": lambda path: torch.save(torch.zeros(1), path),
    "safetensors": lambda path: save_file({"zeros": torch.zeros(1000)}, path),
    "tokenizers": lambda path: tiny_tokenizer().backend_tokenizer.save(str(path)),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_every_writers_way_of_saying_that_the_disk_is_full_is_understood(tmp_path, write):
    with pytest.raises(InputError, match=r"x could not be written"), full_disk(100), checkpoint.writing(tmp_path, "x"):
        write(tmp_path / "x")


@pytest.mark.parametrize("error", [RuntimeError("expected scalar type Float"), FileNotFoundError(errno.ENOENT, "x")])
def test_other_errors_stay_what_they_are(tmp_path, error):
    with pytest.raises(type(error)), checkpoint.writing(tmp_path, "x"):
        raise error


def test_a_loss_that_is_not_finite_stops_the_run(run, monkeypatch):
    step = Trainer.compute_loss

    def compute_loss(self, *arguments, **keywords):
        loss, outputs = step(self, *arguments, **keywords)
        return (loss * float("nan") if self.state.global_step == 3 else loss), outputs

    monkeypatch.setattr(Trainer, "compute_loss", compute_loss)
    with pytest.raises(InputError) as caught:
        run(per_device_train_batch_size=2)
    message = str(caught.value)
    assert "the loss of step 4 is not finite" in message
    assert len(re.findall(r"train.json row \d+", message)) == 2
    assert f"the last good checkpoint is {run.output / 'checkpoint-2'}" in message
    assert not (run.output / "checkpoint-4").exists()


@pytest.mark.parametrize("max_grad_norm", [0, 1], ids=["as it is", "clipped"])
@pytest.mark.parametrize("step", [2, 6], ids=["at a checkpoint", "at the last step"])
def test_a_gradient_that_is_not_finite_stops_the_run(run, monkeypatch, step, max_grad_norm):
    """Its loss is finite. With two micro-batches a step, the rows of both are named."""
    training_step = Trainer.training_step

    def with_overflow(self, model, *arguments):
        loss = training_step(self, model, *arguments)
        if self.state.global_step == step - 1:
            next(parameter for parameter in model.parameters() if parameter.requires_grad).grad[0, 0] = float("inf")
        return loss

    monkeypatch.setattr(Trainer, "training_step", with_overflow)
    with pytest.raises(InputError) as caught:
        run(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=max_grad_norm)
    message = str(caught.value)
    assert f"the gradient of step {step} is not finite" in message
    assert len(re.findall(r"train.json row \d+", message)) == 4
    last = run.output / "checkpoint-4" if step == 6 else "none"
    assert f"the last good checkpoint is {last}" in message
    assert not (run.output / f"checkpoint-{step}").exists()
    assert not (run.output / "all_results.json").exists()


def test_of_many_rows_the_first_are_named(tmp_path):
    signals = StopSignals()
    signals.watch(torch.tensor(float("nan")), [f"row {n}" for n in range(12)])
    args = SimpleNamespace(fp16=False, deepspeed=None, output_dir=tmp_path)
    with pytest.raises(InputError, match=r"its rows were row 0, .*, row 9 and 2 more.* or lower the learning rate$"):
        signals.on_step_end(args, TrainerState(), TrainerControl(), SimpleNamespace(step_was_skipped=False))


def test_the_best_checkpoint_can_be_loaded_at_the_end(run):
    results = run(eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, learning_rate=0.3)
    losses = [entry["eval_lm_loss"] for entry in run.log() if "eval_lm_loss" in entry and entry["step"]]
    assert results["eval_lm_loss_after"] == pytest.approx(min(losses), rel=1e-6)


def trainer_of(run, **flags) -> Trainer:
    """The trainer of a finished run."""
    build, built = train.build_trainer, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build_trainer", lambda *arguments: built.append(build(*arguments)) or built[0])
        run(**flags)
    return built[0]


def test_an_adapter_that_is_not_partitioned_is_saved_without_gathering_the_base_model(run, monkeypatch):
    trainer = trainer_of(run, max_steps=1)
    engine = SimpleNamespace(config={"zero_optimization": {"stage": 2}}, save_checkpoint=lambda folder: None)
    trainer.is_deepspeed_enabled, trainer.deepspeed, trainer.model_wrapped = True, engine, engine
    monkeypatch.setattr(trainer.accelerator, "get_state_dict", lambda model: pytest.fail("gathered"))
    trainer.save_model(str(run.folder / "again"))
    assert same_adapter(run.folder / "again", run.output)


def test_full_tuning_takes_the_same_path(run, capsys):
    results = run(tuning="full", learning_rate=1e-3)
    assert results["eval_lm_loss_after"] < results["eval_lm_loss_before"]
    model = LlamaForCausalLM.from_pretrained(run.output)
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert "  task type" not in capsys.readouterr().out
    assert not (run.output / "routing.json").exists()


def test_full_tuning_keeps_proposed_settings_that_contradict_each_other(run, tmp_path, model_dir):
    """Older chat models propose a temperature without do_sample, and a Trainer adds its special tokens to it."""
    base, fields = tmp_path / "base", {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 1}
    shutil.copytree(model_dir, base)
    (base / "generation_config.json").write_text(json.dumps(fields))
    run(tuning="full", model_name_or_path=base, max_steps=1)
    found = json.loads((run.output / "generation_config.json").read_text())
    assert fields.items() <= found.items()
    LlamaForCausalLM.from_pretrained(run.output).save_pretrained(tmp_path / "again")


def test_an_adapter_of_another_base_model_is_warned_of(run, tmp_path, model_dir, capsys):
    for base, warned in ((str(model_dir), False), ("someone/else", True)):
        filled_model(base_model_name_or_path=base).save_pretrained(tmp_path / "adapter")
        same = {"peft_path": tmp_path / "adapter", "lora_rank": 2, "lora_alpha": 4}
        train.main(run.arguments(**same, prepare_only="true", output_dir=tmp_path / f"run {warned}"))
        said = "warning: the adapter was trained on someone/else, and the base model is" in capsys.readouterr().out
        assert said == warned


def test_training_continues_from_an_adapter(run, tmp_path):
    filled_model().save_pretrained(tmp_path / "adapter")
    same = {"peft_path": tmp_path / "adapter", "lora_rank": 2, "lora_alpha": 4}
    run(**same, learning_rate=0, lora_dropout=0.3)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "adapter", run.output))
    assert all(torch.equal(before[key], after[key]) for key in before)
    with pytest.raises(InputError, match=r"--lora_rank is 4, the adapter has 2; --lora_alpha is 32, the adapter has 4"):
        run(peft_path=tmp_path / "adapter")
    differing = "--expert_groups is 1,3, the adapter has none; --trainable is up_proj, the adapter has down_proj,"
    with pytest.raises(InputError, match=differing):
        run(**same, expert_groups="1, 3", trainable="up_proj")


@pytest.fixture
def built(monkeypatch) -> list:
    """The models that the runs of this test build."""
    models, build = [], train.build_model
    monkeypatch.setattr(train, "build_model", lambda *arguments: models.append(build(*arguments)) or models[-1])
    return models


def assert_learns(run, **flags) -> None:
    """Finite losses all the way, the balance term in them, and a lower held-out loss at the end."""
    results = run(**flags)
    steps = [entry for entry in run.log() if "lm_loss" in entry]
    assert len(steps) == 6
    assert all(math.isfinite(entry[name]) for entry in steps for name in ("loss", "lm_loss", "grad_norm"))
    assert all(entry["balance_loss"] > 0 for entry in steps)
    assert results["eval_lm_loss_after"] < results["eval_lm_loss_before"] - 0.05
    assert all(tensor.isfinite().all() for tensor in load_file(run.output / "adapter_model.safetensors").values())


def dtypes(model, trainable: bool) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters() if parameter.requires_grad == trainable}


def test_bf16_trains_a_float32_adapter_on_a_bf16_base(run, built):
    assert_learns(run, bf16=True)
    assert dtypes(built[0], trainable=True) == {torch.float32}
    assert dtypes(built[0], trainable=False) == {torch.bfloat16}
    tensors = load_file(run.output / "adapter_model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("bits", "kind"), [(4, "Linear4bit"), (8, "Linear8bitLt")])
def test_quantised_bases_train(run, built, quantisable_dir, bits, kind, bf16):
    assert_learns(run, model_name_or_path=quantisable_dir, load_in_kbits=bits, bf16=bf16)
    layers = [module.base_layer for module in built[0].modules() if isinstance(module, LoraLayer)]
    assert {type(layer).__name__ for layer in layers} == {kind}
    assert dtypes(built[0], trainable=True) == {torch.float32}


def test_evaluation_does_not_change_the_training_of_a_quantised_base(run, quantisable_dir):
    settings = {"model_name_or_path": quantisable_dir, "load_in_kbits": 4, "max_steps": 3, "lora_dropout": 0}
    norms = []
    for validation_file in (run.flags["validation_file"], None):
        run.output = run.folder / f"evaluated on {validation_file and validation_file.stem}"
        run(**settings, validation_file=validation_file, output_dir=run.output)
        norms.append([entry["grad_norm"] for entry in run.log() if "lm_loss" in entry])
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_training_without_evaluation(run):
    results = run(validation_file=None, max_steps=1)
    assert not any(name.startswith("eval") for name in results)


def test_evaluation_rows_that_are_training_rows_are_counted(run, capsys, no_weights):
    with pytest.raises(pytest.fail.Exception):
        run(validation_file=run.folder / "train.json")
    assert "warning: 12 of 12 evaluation rows are also training rows" in capsys.readouterr().out


BAD_FLAGS = {
    "rank 0": ({"lora_rank": 0}, r"--lora_rank is 0, but has to be a whole number of at least 1"),
    "delta 1": ({"blc_alpha": 1}, r"--blc_alpha is 1.0, but has to be in \[0, 1\)"),
    "delta below 0": ({"blc_alpha": -0.1}, r"--blc_alpha is -0.1, but has to be in \[0, 1\)"),
    "beta below 0": ({"blc_weight": -1}, r"--blc_weight is -1.0, but has to be a number of at least 0"),
    "uneven groups": ({"lora_nums": 5}, r"--lora_nums is 5 and --num_task_types is 2: .* cannot be split"),
    "no such target": ({"trainable": "gate_prj"}, r"'gate_prj' does not exist in the model; did you mean 'gate_proj'"),
    "no targets": ({"trainable": ","}, r"--trainable is empty"),
    "no such model": ({"model_name_or_path": "models/none"}, r"--model_name_or_path models/none: no such folder"),
    "no such adapter": ({"peft_path": "none"}, r"--peft_path none is not an adapter folder"),
    "bits": ({"load_in_kbits": 3}, r"--load_in_kbits is 3, but has to be one of 4, 8, 16"),
    "template": ({"prompt_template": "alpaca"}, r"--prompt_template is 'alpaca', but has to be one of auto, "),
    "length": ({"max_seq_length": 1}, r"--max_seq_length is 1, but has to be at least 2"),
    "no label left": ({"max_seq_length": 5}, r"train.json: no row has supervised tokens within max_seq_length 5"),
    "fp16 on a CPU": ({"fp16": True}, r"--fp16 has no effect on a CPU"),
    "FSDP": ({"fsdp": True}, r"--fsdp is not supported"),
    "no evaluation rows": (
        {"eval_strategy": "steps", "validation_file": None},
        r"--eval_strategy steps needs a --validation_file",
    ),
    "no such DeepSpeed file": ({"deepspeed": "none.json"}, r"--deepspeed none.json: no such file"),
    "re-entrant": (
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": '{"use_reentrant": true}'},
        r"re-entrant checkpointing detaches the balance term",
    ),
    "unknown flag": ({"lora_rnk": 4}, r"unrecognized arguments: --lora_rnk.*did you mean --lora_rank"),
    "wrong kind": ({"lora_rank": "four"}, r"argument --lora_rank.*invalid int value: 'four'"),
    "full tuning of an adapter": ({"tuning": "full", "peft_path": "x"}, r"--tuning full does not train an adapter"),
    "Trainer's own": ({"warmup_steps": -1}, r"warmup_steps"),
    "no finite scaling": ({"lora_alpha": "nan"}, r"--lora_alpha is nan, but has to be a number above 0"),
    "no finite beta": ({"blc_weight": "inf"}, r"--blc_weight is inf"),
    "negative seed": ({"seed": -1}, r"--seed is -1, but has to be from 0 to 4294967295"),
    "batch of none": (
        {"per_device_train_batch_size": 0},
        r"--per_device_train_batch_size is 0, but has to be at least 1",
    ),
    "no accumulation": ({"gradient_accumulation_steps": 0}, r"--gradient_accumulation_steps is 0"),
    "no epochs": ({"num_train_epochs": 0}, r"--num_train_epochs is 0.0, but has to be above 0"),
    "no rate": ({"learning_rate": "nan"}, r"--learning_rate is nan"),
    "columns": ({"remove_unused_columns": True}, r"--remove_unused_columns would remove columns"),
    "another forward": ({"use_liger_kernel": True}, r"--use_liger_kernel replaces the model's forward"),
    "a logger that is not there": ({"report_to": "wandb"}, r"--report_to wandb is not installed here"),
    "attention": ({"attn_implementation": "foo"}, r"--attn_implementation has to be one of auto, eager, sdpa"),
    "resume": ({"resume_from_checkpoint": "x"}, r"from its last checkpoint by itself"),
    "a file for a folder": ({"data_cache_dir": "README.md"}, r"--data_cache_dir README.md cannot be made"),
    "DeepSpeed without a launcher": ({"deepspeed": "scripts/deepspeed/zero2.json"}, r"--deepspeed needs a launcher"),
    "processes": ({"num_processes": 3}, r"--num_processes is 3, but the launcher started 1"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_bad_flags_are_named_before_any_weight_is_read(run, no_weights, changes, message):
    with pytest.raises(InputError, match=message):
        run(**changes)
    assert not run.output.exists()


def test_full_tuning_that_zero_3_would_not_gather_is_refused(run, no_weights):
    file = run.folder / "own.json"
    config = json.loads((ROOT / "scripts" / "deepspeed" / "zero3.json").read_text())
    del config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"set stage3_gather_16bit_weights_on_model_save to true in .* of .*own.json"):
        run(tuning="full", deepspeed=file, prepare_only=True)


def test_fsdp_that_accelerate_launch_asks_for_is_refused(run, no_weights, monkeypatch):
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"^ACCELERATE_USE_FSDP is set, but FSDP is not supported"):
        run()
    assert not run.output.exists()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    train.main([*run.arguments(), "--prepare_only"])


def test_a_tokenizer_that_exceeds_the_vocabulary_is_refused(run, tmp_path, tokenizer, no_weights):
    """Ids of added tokens lie beyond the model's last row of embeddings."""
    last = tiny_config().vocab_size - 1
    tokenizer.add_tokens([f"<extra {index}>" for index in range(last + 2 - len(tokenizer))])
    tokenizer.save_pretrained(tmp_path / "larger")
    with pytest.raises(InputError, match=rf"token ids up to {last + 1}, but the vocabulary of .* ends at {last}; use"):
        run(tokenizer_name_or_path=tmp_path / "larger")
    assert not run.output.exists()


def test_uneven_groups_are_allowed_without_the_balance_term(run, capsys):
    run(lora_nums=5, blc_weight=0, max_steps=1)
    assert "5 experts cannot be split among 2 task types" in capsys.readouterr().out


def test_dropout_of_a_continued_adapter_follows_the_flag(run, tmp_path, monkeypatch):
    filled_model().save_pretrained(tmp_path / "adapter")
    seen = []
    monkeypatch.setattr(
        train, "build_trainer", lambda model_args, args, *rest: seen.append(build_model(model_args, args))
    )
    with pytest.raises(AttributeError):
        run(peft_path=tmp_path / "adapter", lora_rank=2, lora_alpha=4, lora_dropout=0.3)
    assert {module.dropout for module in seen[0].modules() if isinstance(module, LoraExperts)} == {0.3}


@pytest.mark.parametrize("damage", ["truncated", "missing", "other model"])
def test_an_adapter_that_does_not_fit_is_found_before_any_weight_is_read(run, tmp_path, no_weights, damage):
    filled_model(target_modules=["q_proj"] if damage == "other model" else ["up_proj"]).save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    if damage == "other model":
        config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["up_proj"]}))
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:100])
    else:
        file.unlink()
    message = {
        "truncated": "damaged or incomplete",
        "missing": "holds no adapter weights",
        "other model": "does not fit",
    }
    with pytest.raises(InputError, match=message[damage]):
        run(peft_path=tmp_path / "a", lora_rank=2, lora_alpha=4, trainable="up_proj")


def test_a_base_model_without_readable_weights_is_named(run, model_dir, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model_dir / name).read_bytes())
    with pytest.raises(InputError, match=rf"the weights of {tmp_path} could not be read"):
        run(model_name_or_path=tmp_path)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(InputError, match=rf"the weights of {tmp_path} could not be read"):
        run(model_name_or_path=tmp_path)


def test_a_folder_in_use_is_refused(run, no_weights, monkeypatch):
    monkeypatch.setattr("training.run_folder.SECONDS_TO_WAIT", 0)
    with RunFolder(run.output).held(), pytest.raises(InputError, match="is in use by another run"):
        run()


@pytest.mark.parametrize("damaged", ["{", "[]"])
def test_a_folder_whose_configuration_is_damaged_is_left_alone(tmp_path, damaged):
    (tmp_path / "run_config.json").write_text(damaged)
    with pytest.raises(InputError, match=r"run_config.json is damaged \(.*, so what it belongs to is not known"):
        RunFolder(tmp_path).check({"max_steps": 1})


def test_another_number_of_processes_is_another_configuration(run, no_weights):
    train.main([*run.arguments(num_processes=1), "--prepare_only"])
    with pytest.raises(InputError, match="num_processes: 1 there, 2 now"):
        train.main([*run.arguments(num_processes=2), "--prepare_only"])


def test_a_copy_of_the_data_is_the_same_configuration(run, no_weights):
    train.main([*run.arguments(), "--prepare_only"])
    copy = run.folder / "copy.json"
    copy.write_bytes((run.folder / "train.json").read_bytes())
    train.main([*run.arguments(dataset_dir=copy), "--prepare_only"])


def test_contradictions_are_reported_together(run, no_weights):
    with pytest.raises(InputError) as caught:
        run(lora_rank=0, blc_alpha=2, load_in_kbits=5, fp16=True, dataset_dir=None)
    assert [line.ljust(14)[:14] for line in str(caught.value).splitlines()] == [
        "- --dataset_di",
        "- --load_in_kb",
        "- --lora_rank ",
        "- --blc_alpha ",
        "- --fp16 has n",
    ]  # fmt: skip


def test_bad_rows_are_found_before_any_weight_is_read(run, no_weights):
    (run.folder / "train.json").write_text(json.dumps([*example_rows(3), {"instruction": "Say"}]))
    with pytest.raises(InputError, match=r"train.json: row 4: has no 'output'"):
        run()
    assert not run.output.exists()


@pytest.mark.parametrize(("size", "processes"), [(13, 1), (5, 3)])
def test_rows_of_which_drop_last_leaves_none_are_refused(run, no_weights, size, processes):
    flags = run.arguments(dataloader_drop_last="true", per_device_train_batch_size=size, num_processes=processes)
    with pytest.raises(InputError, match=rf"there are 12, and a micro-batch has {size * processes} over all processes"):
        train.main([*flags, "--prepare_only"])
    assert not run.output.exists()


def test_every_deepspeed_file_is_accepted():
    for file in Path(arguments.__file__).parents[2].glob("scripts/deepspeed/*.json"):
        flags = ["--model_name_or_path", "m", "--dataset_dir", "d", "--output_dir", "o", "--prepare_only"]
        assert arguments.parse_arguments([*flags, "--deepspeed", str(file)])[2].deepspeed == str(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bf16": {"enabled": True}}, r"bf16.enabled is true, but has to be auto, or false as in the flags"),
        ({"train_batch_size": 64}, r"train_batch_size is 64, but has to be auto, or 4"),
        ({"gradient_clipping": None}, r"gradient_clipping is missing, but has to be auto, or 1.0"),
        ({"train_micro_batch_size_per_gpu": 3}, r"train_micro_batch_size_per_gpu is 3, but has to be auto, or 4"),
        ({"scheduler": {"type": "WarmupLR"}}, r"remove scheduler; the flags choose it"),
        ({"zero_optimization": None}, r"the stage in zero_optimization has to be 1, 2 or 3"),
        ({"zero_optimization": {"stage": 0}}, r"the stage in zero_optimization has to be 1, 2 or 3"),
    ],
)
def test_a_deepspeed_file_that_overrules_flags_is_refused(run, no_weights, changes, message):
    config = json.loads((ROOT / "scripts" / "deepspeed" / "zero2.json").read_text())
    file = run.folder / "zero.json"
    file.write_text(json.dumps(config | changes))
    with pytest.raises(InputError, match=message):
        run(deepspeed=file, prepare_only=True)


def test_no_logits_are_copied_to_float32_while_training(run, monkeypatch):
    """accelerate copies every output of a step under autocast, which is what this finds out about."""
    outputs = []
    compute_loss = Trainer.compute_loss

    def keep(*args, **kwargs):
        loss, output = compute_loss(*args, **kwargs)
        outputs.append(output)
        return loss, output

    monkeypatch.setattr(Trainer, "compute_loss", keep)
    run(bf16=True, max_steps=1, validation_file=None)
    assert outputs
    assert all("logits" not in output and output.logits is None for output in outputs)
