"""Runs that end early: SIGTERM around evaluations, and gradients that are never finite."""

import json
import signal
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file
from test_train import Runner
from transformers import Trainer, TrainerControl, TrainerState

import train
from data import InputError
from training.checkpoint import find_checkpoint
from training.stopping import MOST_SKIPPED_STEPS, StopSignals


@pytest.fixture
def run(tmp_path, model_dir, monkeypatch) -> Runner:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    return Runner(tmp_path, model_dir)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, model_dir):
    """The adapter and the state at the end of a run with these settings."""

    @cache
    def end_of(settings: tuple) -> tuple[dict[str, torch.Tensor], dict]:
        runner = Runner(tmp_path_factory.mktemp("undisturbed"), model_dir)
        runner(**dict(settings))
        state = json.loads((runner.output / "trainer_state.json").read_text())
        return load_file(runner.output / "adapter_model.safetensors"), state

    return lambda settings: end_of(tuple(settings.items()))


def evaluations(state: dict) -> list[tuple[int, float]]:
    return [(entry["step"], entry["eval_lm_loss"]) for entry in state["log_history"] if "eval_lm_loss" in entry]


def rates(state: dict) -> list[tuple[int, float]]:
    return [(entry["step"], entry["learning_rate"]) for entry in state["log_history"] if "learning_rate" in entry]


def checkpoints(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("checkpoint-*")}


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


def kill() -> NoReturn:
    raise KeyboardInterrupt


@contextmanager
def sigterm_at(method: str, step: int, event: Callable[[], None] = terminate):
    """A context in which the first call of a method of the trainer after so many steps comes with SIGTERM.

    Yields the names of the methods that are called from then on.
    """
    calls: list[str] = []

    def watched(name, original):
        def call(self, *arguments, **keywords):
            if not calls and name == method and self.state.global_step == step:
                calls.append("SIGTERM")
                event()
            elif calls:
                calls.append(name)
            return original(self, *arguments, **keywords)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("compute_loss", "prediction_step", "_save_checkpoint"):
            patch.setattr(train.LoRAMoETrainer, name, watched(name, getattr(train.LoRAMoETrainer, name)))
        yield calls


def assert_same_end(run: Runner, expected: dict[str, torch.Tensor], expected_state: dict) -> dict:
    """Compare evaluations, learning rates and adapter; return the state."""
    state = json.loads((run.output / "trainer_state.json").read_text())
    assert evaluations(state) == evaluations(expected_state)
    assert rates(state) == rates(expected_state)
    found = load_file(run.output / "adapter_model.safetensors")
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    return state


BEST = {"metric_for_best_model": "eval_lm_loss", "greater_is_better": "false"}
STEPS = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 4, "per_device_eval_batch_size": 2}
EPOCHS = {"eval_strategy": "epoch", "save_strategy": "epoch", "per_device_eval_batch_size": 2}
STEPS_AND_EPOCHS = EPOCHS | {"save_strategy": "steps", "save_steps": 3}
# Every evaluation lowers the rate.
FALLING = {"lr_scheduler_kwargs": '{"patience": 0, "threshold": 1000}'}
ONE = STEPS | {"eval_steps": 1, "save_steps": 1, "save_total_limit": 1, "load_best_model_at_end": "true"}
MOMENTS = {
    "in an evaluation": (STEPS, "prediction_step", 2, 2),
    "in an evaluation, where a save is due, too": (STEPS, "prediction_step", 4, 4),
    "in a step with an evaluation at its end": (STEPS, "compute_loss", 1, 2),
    "in a step of a run that saves models only": (STEPS | {"save_only_model": "true"}, "compute_loss", 1, 2),
    "in a step with an evaluation and a save at its end": (STEPS, "compute_loss", 3, 4),
    "in a save": (STEPS, "_save_checkpoint", 4, 5),
    "in the evaluation of an epoch": (EPOCHS, "prediction_step", 3, 3),
    "in the last step of an epoch": (EPOCHS, "compute_loss", 2, 3),
    "in the evaluation of an epoch, its step saved": (STEPS_AND_EPOCHS, "prediction_step", 3, 3),
    "in the last evaluation of training": (STEPS, "prediction_step", 6, 6),
    "in the last step of an epoch, whose evaluation comes after the save": (STEPS_AND_EPOCHS, "compute_loss", 2, 3),
    "in the last step, within an epoch": (EPOCHS | {"max_steps": 4}, "compute_loss", 3, 4),
    "in a step after the best checkpoint, of which one is kept": (ONE, "compute_loss", 3, 4),
    "in the evaluation of the best step": (STEPS | {"save_strategy": "best"}, "prediction_step", 4, 4),
}


@pytest.mark.parametrize(("settings", "method", "step", "saved"), MOMENTS.values(), ids=MOMENTS)
def test_sigterm_saves_without_an_evaluation_and_the_run_ends_the_same(
    run, undisturbed, capsys, settings, method, step, saved
):
    """Three steps an epoch; the evaluation that was left out is made up for, the best checkpoint's choice included."""
    settings = settings | BEST
    expected, expected_state = undisturbed(settings)
    with sigterm_at(method, step) as calls:
        train.main(run.arguments(**settings))
    assert f"stopped by a signal; step {saved} is saved" in capsys.readouterr().out
    assert find_checkpoint(run.output) == (run.output / f"checkpoint-{saved}", [])
    assert calls.count("prediction_step") == 0
    assert calls.count("compute_loss") == saved - step - (method == "compute_loss")
    assert calls.count("_save_checkpoint") == 1
    run(**settings)
    state = assert_same_end(run, expected, expected_state)
    for field in ("best_global_step", "best_metric"):
        assert state[field] == expected_state[field]
    places = [of["best_model_checkpoint"] and Path(of["best_model_checkpoint"]).name for of in (state, expected_state)]
    assert places[0] == places[1]


def test_sigterm_in_an_evaluation_that_is_made_up_for_leaves_it_due(run, capsys):
    with sigterm_at("prediction_step", 2):
        train.main(run.arguments(**STEPS))
    with sigterm_at("prediction_step", 2) as calls:
        train.main(run.arguments(**STEPS))
    assert calls == ["SIGTERM"]
    assert "the same command goes on from the last checkpoint" in capsys.readouterr().out
    run(**STEPS)
    assert [entry["step"] for entry in run.log() if "eval_lm_loss" in entry] == [0, 2, 4, 6, 6]


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
def test_an_evaluation_that_is_made_up_for_changes_the_learning_rate_after_a_kill_too(run, undisturbed, schedule):
    settings = STEPS | FALLING | {"lr_scheduler_type": schedule}
    expected, expected_state = undisturbed(settings)
    with sigterm_at("compute_loss", 3):
        train.main(run.arguments(**settings))
    with sigterm_at("compute_loss", 5, kill), pytest.raises(KeyboardInterrupt):
        run(**settings)
    run(**settings)
    assert_same_end(run, expected, expected_state)


def test_an_epochs_evaluation_that_is_killed_behind_its_steps_save_is_made_up_for(run, undisturbed):
    settings = STEPS_AND_EPOCHS | FALLING | {"lr_scheduler_type": "reduce_lr_on_plateau"}
    expected, expected_state = undisturbed(settings)
    with sigterm_at("prediction_step", 3, kill), pytest.raises(KeyboardInterrupt):
        run(**settings)
    run(**settings)
    assert_same_end(run, expected, expected_state)


def test_the_last_checkpoint_stays_until_the_run_is_finished(run, monkeypatch):
    """At this learning rate nothing is learnt, and the first checkpoint is the best."""
    settings = ONE | {"max_steps": 2, "learning_rate": 1e-30}
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", lambda *arguments: kill())
        with pytest.raises(KeyboardInterrupt):
            run(**settings)
    assert checkpoints(run.output) == {"checkpoint-1", "checkpoint-2"}
    run(**settings)
    assert checkpoints(run.output) == {"checkpoint-1"}


def test_a_torn_checkpoint_is_not_kept_in_place_of_the_one_that_sigterm_saves(run):
    settings = {"save_total_limit": 1}
    with sigterm_at("compute_loss", 1):
        train.main(run.arguments(**settings))
    (run.output / "checkpoint-6").mkdir()
    with sigterm_at("compute_loss", 2):
        train.main(run.arguments(**settings))
    assert find_checkpoint(run.output)[0] == run.output / "checkpoint-3"


def never_finite(monkeypatch, steps: range = range(1000)) -> None:
    """Have the optimizer leave steps out because of their gradients, as DeepSpeed and the scaler of fp16 do."""
    training_step = Trainer.training_step

    def with_overflow(self, *arguments):
        loss = training_step(self, *arguments)
        skips = self.state.global_step in steps
        monkeypatch.setattr(type(self.optimizer), "step_was_skipped", skips)
        if skips:
            for parameter in self.model.parameters():
                parameter.grad = None
        return loss

    monkeypatch.setattr(Trainer, "training_step", with_overflow)


def test_gradients_that_are_never_finite_end_the_run(run, monkeypatch):
    """Over a resumption, too."""
    never_finite(monkeypatch)
    settings = {"max_steps": 30, "num_train_epochs": None, "save_steps": 7}
    with sigterm_at("compute_loss", 8):
        train.main(run.arguments(**settings))
    with pytest.raises(InputError) as caught:
        run(**settings)
    said = str(caught.value)
    assert f"the gradient of step {MOST_SKIPPED_STEPS} is not finite, nor are those of the 19 steps before it" in said
    assert said.count("train.json row") == 4
    assert f"the last good checkpoint is {run.output / 'checkpoint-14'}" in said


def test_a_short_run_of_which_no_step_was_applied_does_not_finish(run, monkeypatch):
    never_finite(monkeypatch)
    with pytest.raises(InputError, match="the gradient of step 6 is not finite, nor are those of the 5 steps before"):
        run()
    assert not (run.output / "all_results.json").exists()


def test_steps_that_are_left_out_now_and_then_are_no_fault(run, monkeypatch):
    never_finite(monkeypatch, range(1, 6))
    run()


def test_the_end_of_deepspeeds_loss_scale_is_told_as_a_gradient(run, monkeypatch):
    def at_minimum(self, *arguments):
        if self.state.global_step < 1:
            return training_step(self, *arguments)
        self.stop_signals.watch(torch.tensor(1.0), ["row 7"])
        raise Exception("Current loss scale already at minimum - cannot decrease scale anymore. Exiting run.")

    training_step = Trainer.training_step
    monkeypatch.setattr(Trainer, "training_step", at_minimum)
    with pytest.raises(InputError, match="the gradient of step 2 is not finite; its rows were row 7"):
        run()


@pytest.mark.parametrize("skipped", [False, True])
def test_a_gradient_that_is_not_finite_is_a_fault_at_once_where_the_step_was_made(tmp_path, skipped):
    signals = StopSignals()
    signals.watch(torch.tensor(1.0), ["row 1"])
    signals.gradient_norm = torch.tensor(float("inf"))
    args = SimpleNamespace(fp16=False, output_dir=tmp_path)
    state, optimizer = TrainerState(epoch=0.5, global_step=1, max_steps=9), SimpleNamespace(step_was_skipped=skipped)
    if skipped:
        signals.on_step_end(args, state, TrainerControl(), optimizer)
    else:
        with pytest.raises(InputError, match="the gradient of step 1 is not finite; its rows were row 1"):
            signals.on_step_end(args, state, TrainerControl(), optimizer)


def test_a_step_that_a_fused_optimizer_skips_for_the_loss_scaler_is_no_fault(tmp_path):
    """The scaler calls a fused optimizer in any case, which finds the overflow itself."""
    weight = torch.nn.Parameter(torch.ones(2))
    Accelerator(cpu=True)  # sets the state that its optimizers look at
    optimizer = AcceleratedOptimizer(torch.optim.AdamW([weight], fused=True), scaler=torch.amp.GradScaler("cpu"))
    optimizer.scaler.scale(weight.sum()).backward()
    weight.grad.fill_(float("inf"))
    signals = StopSignals()
    signals.watch(torch.tensor(1.0), ["row 1"])
    signals.gradient_norm = torch.tensor(float("inf"))
    args, state = SimpleNamespace(fp16=True, output_dir=tmp_path), TrainerState(epoch=0.5, global_step=1, max_steps=9)
    signals.on_step_begin(args, state, TrainerControl(), optimizer)
    optimizer.step()
    assert torch.equal(weight, torch.ones(2))
    assert not optimizer.step_was_skipped
    signals.on_step_end(args, state, TrainerControl(), optimizer)
