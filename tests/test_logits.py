"""Losses and scores whose logits are formed some rows at a time are those of all logits, and take little memory."""

import pytest
import torch
import torch.nn.functional as F
from conftest import filled_model, tiny_config
from test_architectures import adapted, checkpoint, each_architecture, make_batch  # noqa: F401
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from transformers_patch import LlamaLoRAMoEForCausalLM, logits
from transformers_patch.labels import SupervisedTokens
from transformers_patch.logits import CHUNK, UnformedLogits
from workbench.instruments import LiveBytes, SavedBytes

# Their forwards cap or scale the logits.
CHANGES_LOGITS = {"gemma2", "gemma3_text", "granite", "cohere2"}
DIVISORS = {
    "mean": {},
    "sum over a number": {"num_items_in_batch": 7},
    "over a tensor": {"num_items_in_batch": torch.tensor(7)},
}
SETTINGS = {
    "trained": {"modules_to_save": ["lm_head"]},
    "adapted": {"target_modules": ["lm_head", "up_proj"]},
}


@pytest.fixture
def chunked(monkeypatch) -> list:
    """Chunks of four rows of 300 logits; the list has an entry for every loss that is computed in chunks."""
    calls, original = [], UnformedLogits.cross_entropy
    monkeypatch.setattr(logits, "CHUNK", 4 * 300)
    monkeypatch.setattr(UnformedLogits, "cross_entropy", lambda *args: calls.append(args) or original(*args))
    return calls


def loss_and_gradients(model: nn.Module, batch: dict, **options) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(**batch, **options).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Losses to 1e-6, and gradients to what rounding makes of that on the way through the layers."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= (1e-6 if name == "loss" else 3e-6) * value.norm(), name


@each_architecture
def test_losses_and_gradients_of_every_architecture(name, checkpoint, chunked):  # noqa: F811
    model, batch = adapted(checkpoint(name)).train(), make_batch()
    expected = loss_and_gradients(model, batch)
    assert not chunked
    assert_equal(loss_and_gradients(model, batch, return_logits=False), expected)
    assert len(chunked) == (name not in CHANGES_LOGITS)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("divisor", DIVISORS.values(), ids=DIVISORS)
def test_every_divisor_with_and_without_bias(chunked, divisor, bias):
    model, batch = filled_model().train(), make_batch()
    if bias:
        model.get_output_embeddings().bias = nn.Parameter(torch.randn(300), requires_grad=False)
    expected = loss_and_gradients(model, batch, **divisor)
    assert_equal(loss_and_gradients(model, batch, return_logits=False, **divisor), expected)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch, return_logits=False, **divisor).loss, expected["loss"])
    assert len(chunked) == 2


def test_without_a_supervised_token_gradients_are_zero(chunked):
    model, batch = filled_model(blc_weight=0).train(), make_batch()
    batch["labels"].fill_(-100)
    found = loss_and_gradients(model, batch, return_logits=False)
    assert len(found) > 1
    assert not any(value.any() for value in found.values())


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_an_output_layer_that_is_trained_or_adapted_forms_its_logits(chunked, settings):
    model, batch = filled_model(**settings).train(), make_batch()
    expected = loss_and_gradients(model, batch)
    assert any("lm_head" in name for name in expected)
    assert_equal(loss_and_gradients(model, batch, return_logits=False), expected)
    assert not chunked


def fully_trained(model):
    model.get_output_embeddings().requires_grad_(True)


def watched(model):
    model.get_output_embeddings().register_forward_hook(lambda *args: None)


def moved(model):
    head = model.get_output_embeddings()
    head.forward = lambda x: F.linear(x, head.weight)


def scored_otherwise(model):
    model.get_base_model().loss_function = lambda logits, shift_labels, **kwargs: logits.float().square().mean()


@pytest.mark.parametrize("change", [fully_trained, watched, moved, scored_otherwise])
def test_what_needs_the_logits_gets_them(chunked, change):
    model, batch = filled_model().train(), make_batch()
    change(model)
    expected = loss_and_gradients(model, batch)
    assert_equal(loss_and_gradients(model, batch, return_logits=False), expected)
    assert not chunked


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("may_wait", [False, True])
def test_scores_are_those_of_all_logits(name, checkpoint, chunked, may_wait):  # noqa: F811
    model, batch = adapted(checkpoint(name)).eval(), make_batch()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    every_BTV = model(**inputs).logits[:, :-1].detach()
    batch["labels"][1, 4:7] = every_BTV[1, 3:6].argmax(dim=-1)
    labels = batch["labels"][:, 1:]
    nll = F.cross_entropy(every_BTV.transpose(1, 2), labels, reduction="none")
    wrong = (every_BTV.argmax(dim=-1) != labels) & (labels != -100)
    positions = SupervisedTokens(batch["labels"])
    with torch.no_grad(), positions.only(model, may_wait):
        scores_B3 = positions.scores(model(**inputs).logits)
    torch.testing.assert_close(scores_B3[:, 0], nll.sum(dim=1))
    assert torch.equal(scores_B3[:, 1], (labels != -100).sum(dim=1).float())
    assert torch.equal(scores_B3[:, 2], wrong.sum(dim=1).float())
    assert 0 < wrong[1].sum() < scores_B3[1, 1]


def head_and_rows(rows: int, hidden: int, vocabulary: int, dtype: torch.dtype) -> tuple:
    """An output layer, what it is given, and targets."""
    torch.manual_seed(0)
    head = nn.Linear(hidden, vocabulary, bias=False, dtype=dtype).requires_grad_(False)
    x_NH = torch.randn(rows, hidden).to(dtype).requires_grad_()
    return head, x_NH, torch.randint(vocabulary, (rows,))


def test_unformed_logits_are_formed_for_any_operation():
    head, x_NH, _ = head_and_rows(5, 8, 30, torch.bfloat16)
    unformed, expected = UnformedLogits(x_NH, head, torch.bfloat16), head(x_NH)[None]
    assert (unformed.shape, unformed.dtype, unformed.device) == (expected.shape, expected.dtype, expected.device)
    assert torch.equal(unformed * 2, expected * 2)
    assert torch.equal(torch.cat([unformed, unformed]), torch.cat([expected, expected]))
    assert unformed.contiguous() is unformed
    assert isinstance(unformed.float(), UnformedLogits)
    assert unformed.float().dtype is torch.float32
    assert torch.equal(unformed.float().tanh(), expected.float().tanh())
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(TypeError, match="logits that are not formed"):
        torch.add(unformed, 1)


def test_the_gradient_of_what_the_output_layer_is_given_is_equal_to_1e6(monkeypatch):
    monkeypatch.setattr(logits, "CHUNK", 16 * 2000)
    head, x_NH, targets_N = head_and_rows(200, 64, 2000, torch.float32)
    (expected,) = torch.autograd.grad(F.cross_entropy(head(x_NH), targets_N), x_NH)
    loss = UnformedLogits(x_NH, head, torch.float32).cross_entropy(targets_N, 200)
    for _ in range(2):
        (found,) = torch.autograd.grad(loss, x_NH, retain_graph=True)
        assert (found - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_float64_as_with_all_logits(monkeypatch, dtype):
    monkeypatch.setattr(logits, "CHUNK", 16 * 2000)
    head, x_NH, targets_N = head_and_rows(200, 64, 2000, dtype)
    exact = F.cross_entropy(F.linear(x_NH.double(), head.weight.double()), targets_N)
    formed = F.cross_entropy(head(x_NH).float(), targets_N)
    chunked = UnformedLogits(x_NH, head, dtype).cross_entropy(targets_N, 200)
    assert chunked.dtype is torch.float32
    assert (chunked - exact).abs() <= 1.1 * (formed - exact).abs() + 1e-6
    exact_gradient, formed_gradient, gradient = (
        torch.autograd.grad(loss, each)[0] for loss, each in ((exact, x_NH), (formed, x_NH), (chunked, x_NH))
    )
    assert (gradient - exact_gradient).norm() <= 1.1 * (formed_gradient - exact_gradient).norm()


def test_gradients_over_many_tokens_do_not_underflow_in_float16():
    head, x_NH, targets_N = head_and_rows(50, 16, 300, torch.float16)
    loss = UnformedLogits(x_NH, head, torch.float16).cross_entropy(targets_N, 3e6)
    (gradient,) = torch.autograd.grad(loss * 2.0**16, x_NH)
    double_NH = x_NH.detach().double().requires_grad_()
    exact = F.cross_entropy(F.linear(double_NH, head.weight.double()), targets_N, reduction="sum") / 3e6 * 2.0**16
    (exact_gradient,) = torch.autograd.grad(exact, double_NH)
    assert (gradient - exact_gradient).norm() <= 2e-3 * exact_gradient.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8192_labels_of_128256_words_take_under_one_gibibyte(dtype):
    """And what is kept for the backward pass is the rows' gradient."""
    with FakeTensorMode():
        head, x_NH, targets_N = head_and_rows(8192, 4096, 128_256, dtype)
        with LiveBytes() as live, SavedBytes(head) as saved:
            loss = UnformedLogits(x_NH, head, dtype).cross_entropy(targets_N, 8192)
            loss.backward()
    assert CHUNK * 4 < live.peak < 2**30
    assert saved.total == x_NH.numel() * x_NH.itemsize + 4


@pytest.mark.parametrize("train", [True, False])
def test_a_step_and_an_evaluation_hold_no_more_than_a_chunk(monkeypatch, train):
    """The largest tensor that they make is a chunk of logits, or what the layers make."""
    monkeypatch.setattr(logits, "CHUNK", 2 * 50_000)
    model = LlamaLoRAMoEForCausalLM(tiny_config(vocab_size=50_000)).requires_grad_(False)
    model.enable_input_require_grads()
    batch = {"input_ids": torch.zeros(4, 32, dtype=torch.long)}
    positions = SupervisedTokens(batch["input_ids"])
    with LiveBytes() as live, torch.set_grad_enabled(train):
        if train:
            model.train()(**batch, labels=batch["input_ids"], return_logits=False).loss.backward()
        else:
            with positions.only(model):
                positions.scores(model(**batch).logits)
    assert live.peak < 4 * 31 * 50_000 * 4 / 4
