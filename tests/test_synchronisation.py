"""A training micro-batch neither waits for the device nor launches more than it needs."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import ROOT, filled_model
from test_model import make_batch
from test_train import Runner
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer

from data import supervised_indices
from workbench.instruments import WITHOUT_KERNEL

# Operations whose result depends on values, so that the host waits for the device.
WAITING = {"_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "repeat_interleave", "_unique2"}
# Methods that bring values to the host, and functions that take values from it.
TO_HOST = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")
FROM_HOST = ("tensor", "as_tensor", "from_numpy")


def site() -> str | None:
    """The line of this project that the present call comes from: the innermost one outside libraries, None if there is
    a library's between it and torch."""
    frame = sys._getframe(1)
    while frame and (frame.f_code.co_filename == __file__ or "/torch/" in frame.f_code.co_filename):
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    ours = path.is_relative_to(ROOT) and "site-packages" not in path.parts
    return f"{path.relative_to(ROOT)}:{frame.f_lineno}" if ours else None


class Operations(TorchDispatchMode):
    """Counts operations by name, and those that wait for the device by the line of this project that asks for them."""

    def __init__(self):
        super().__init__()
        self.launches, self.waits = Counter(), Counter()

    def __enter__(self) -> "Operations":
        self._patch = pytest.MonkeyPatch()
        for owner, names in ((torch.Tensor, TO_HOST), (torch, FROM_HOST)):
            for name in names:
                self._patch.setattr(owner, name, self._noting(name, getattr(owner, name)))
        return super().__enter__()

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        self._patch.undo()

    def _noting(self, name: str, original):
        def spy(*args, **kwargs):
            if line := site():
                self.waits[f"{name} at {line}"] += 1
            return original(*args, **kwargs)

        return spy

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        self.launches[name] += name not in WITHOUT_KERNEL
        if name in WAITING and (line := site()):
            self.waits[f"{name} at {line}"] += 1
        return operation(*args, **(kwargs or {}))


@pytest.fixture
def run(tmp_path, model_dir) -> Runner:
    return Runner(tmp_path, model_dir)


@pytest.mark.parametrize("settings", [{}, {"blc_reference": True}, {"packing": True}], ids=str)
def test_a_training_micro_batch_does_not_wait_for_the_device(run, monkeypatch, settings):
    training_step, operations, steps = Trainer.training_step, Operations(), []

    def watched(*args, **kwargs):
        steps.append(args)
        with operations:
            return training_step(*args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", watched)
    run(max_steps=2, eval_strategy="no", validation_file=None, save_strategy="no", **settings)
    assert len(steps) == 2
    assert operations.launches["mm"] > 0  # it did watch
    assert not operations.waits


def test_a_direct_call_waits_twice_and_is_seen_to():
    """The test above would see a wait: without the collator's fields, labels and task types are looked at."""
    model = filled_model().train()
    batch = make_batch()
    with Operations() as operations:
        model(**batch)
    waits = {tuple(wait.split(":")[0].split(" at ")) for wait in operations.waits}
    assert waits == {("nonzero", "data/collate.py"), ("tolist", "transformers_patch/mixin.py")}


def launches(**settings) -> int:
    """Of forward and backward pass, with what the collator gives."""
    model, batch = filled_model(**settings).train(), make_batch()
    batch |= {"row_weights": torch.ones(3, dtype=torch.long), "supervised_indices": supervised_indices(batch["labels"])}
    with Operations() as operations:
        model(**batch, return_logits=False).loss.backward()
    return operations.launches.total()


def test_what_the_balance_term_launches_hardly_depends_on_the_number_of_linears():
    """The routers' statistics are taken once for all, so that another Linear only adds its gradient to another one."""
    few, many = (
        launches(target_modules=targets) - launches(target_modules=targets, blc_weight=0)
        for targets in (["up_proj"], ["gate_proj", "up_proj", "down_proj"])
    )
    assert few <= 70
    assert many - few <= 4
