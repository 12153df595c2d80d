"""What is added in place is added where it belongs, and never to a tensor that something else holds."""

import pytest
import torch
from reference import experts_autograd
from test_functions import KEPT, PRECISIONS, TOKENS, fixed_mask
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from peft import LoraConfig, LoraLayer
from peft.dropout import bool_mask, masked
from peft.products import makes_new_tensors
from workbench.instruments import Traffic


class ReturnsItsInput(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x


class PassesOnItsGradient(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class KeepsItsOutput(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


class ReturnsAnExpandedTensor(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., :1].expand(x.shape)


class IgnoresItsInput(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight[0].expand(x.shape)


def make_layer(base: nn.Linear, experts: int = 4, dropout: float = 0.0) -> LoraLayer:
    torch.manual_seed(0)
    layer = LoraLayer(base.requires_grad_(False))
    config = LoraConfig(r=2, lora_alpha=3, lora_nums=experts, lora_dropout=dropout, num_task_types=1)
    layer.add_adapter("default", config)
    layer.active_adapter = "default"
    nn.init.normal_(layer.experts["default"].lora_B)
    return layer.train()


def plain(layer: LoraLayer, x: Tensor, dropout: float = 0.0) -> Tensor:
    """The layer in plain autograd."""
    mask = fixed_mask(x, dropout)[0] / KEPT if dropout else None
    return experts_autograd(layer.experts["default"], x, layer.base_layer(x), mask)


def assert_same(layer: LoraLayer, x: Tensor, tolerance: float = 1e-5, dropout: float = 0.0, autocast: bool = False):
    """Outputs and gradients of a layer are those of plain autograd."""
    leaves = {"x": x} | dict(layer.experts.named_parameters())
    values = []
    for call in (layer, lambda x: plain(layer, x, dropout)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = call(1 * x)  # not a leaf, as inside a model
        gradients = torch.autograd.grad((output.float() * torch.arange(1.0, 7)).sum(), leaves.values())
        values.append([output, *gradients])
    for name, found, expected in zip(["output", *leaves], *values, strict=True):
        assert expected.norm() > 0, name
        assert found.dtype == expected.dtype, name
        assert (found.float() - expected.float()).norm() <= tolerance * expected.float().norm(), name


@pytest.mark.parametrize("experts", [1, 4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "kind", [nn.Linear, ReturnsItsInput, PassesOnItsGradient, KeepsItsOutput, ReturnsAnExpandedTensor]
)
def test_outputs_and_gradients_are_right_whatever_the_base_layer_does(kind, bias, experts):
    layer = make_layer(kind(6, 6, bias=bias), experts)
    assert makes_new_tensors(layer.base_layer) == (kind is nn.Linear)
    assert_same(layer, torch.randn(*TOKENS, 6, requires_grad=True))


def test_a_base_layer_may_ignore_its_input():
    assert_same(make_layer(IgnoresItsInput(6, 6)), torch.randn(*TOKENS, 6, requires_grad=True))


@pytest.mark.parametrize("bools", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 1 - KEPT])
@pytest.mark.parametrize("experts", [1, 4])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_outputs_and_gradients_are_right_in_every_precision(monkeypatch, precision, experts, dropout, bools):
    """With masks of a CPU (uint8) and of a GPU (bool)."""

    def mask(x: Tensor, probability: float) -> tuple[Tensor, float]:
        mask, kept = fixed_mask(x, probability)
        return (mask.bool() if bools else mask), kept

    monkeypatch.setattr("peft.layer.dropout_mask", mask)
    expert_dtype, input_dtype, output_dtype, autocast, tolerance = PRECISIONS[precision]
    layer = make_layer(nn.Linear(6, 6, bias=False), experts, dropout)
    layer.experts.to(expert_dtype)
    layer.base_layer.to(output_dtype)
    x = torch.randn(*TOKENS, 6, dtype=input_dtype, requires_grad=True)
    assert_same(layer, x, tolerance, dropout, autocast)


def test_inputs_need_not_be_contiguous():
    layer = make_layer(nn.Linear(6, 6, bias=False))
    x = torch.randn(6, 3, 4, requires_grad=True)
    assert_same(layer, x.permute(1, 2, 0).detach().requires_grad_())


def test_hooks_on_the_base_layer_see_its_own_output_and_gradient():
    layer = make_layer(nn.Linear(6, 6, bias=False))
    base, seen = layer.base_layer, {}
    base.register_forward_hook(lambda module, inputs, output: seen.update(output=output))
    base.register_full_backward_hook(lambda module, inputs, outputs: seen.update(gradient=inputs[0]))
    x = torch.randn(*TOKENS, 6, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(seen["output"], x @ base.weight.T)
    torch.testing.assert_close(seen["gradient"], torch.ones(*TOKENS, 6) @ base.weight)


def test_hooks_on_all_modules_see_the_base_layers_own_output():
    layer, seen = make_layer(nn.Linear(6, 6, bias=False)), {}
    handle = nn.modules.module.register_module_forward_hook(lambda module, _, output: seen.update({module: output}))
    try:
        x = torch.randn(*TOKENS, 6)
        layer(x)
    finally:
        handle.remove()
    torch.testing.assert_close(seen[layer.base_layer], x @ layer.base_layer.weight.T)


def test_a_graph_that_is_kept_gives_the_same_gradients_again():
    layer = make_layer(nn.Linear(6, 6, bias=False))
    x = torch.randn(*TOKENS, 6, requires_grad=True)
    leaves = [x, *layer.experts.parameters()]
    total = layer(x).square().sum()
    first, again = (torch.autograd.grad(total, leaves, retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)


def test_second_derivatives_of_a_layer():
    layer = make_layer(nn.Linear(6, 6, bias=False)).double()
    x = torch.randn(*TOKENS, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, *parameters: layer(x), (x, *layer.experts.parameters()))


def test_an_input_without_gradient_asks_the_base_layer_for_none():
    layer = make_layer(nn.Linear(6, 6, bias=False))
    seen = []
    layer.base_layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].requires_grad))
    layer(torch.randn(*TOKENS, 6)).sum().backward()
    assert seen == [False]
    assert all(parameter.grad.any() for parameter in layer.experts.parameters())


def test_masks_of_a_gpu():
    torch.manual_seed(0)
    x = torch.randn(1000, 1000)
    mask, kept = bool_mask(x, 0.05)
    assert (mask.shape, mask.dtype, kept) == (x.shape, torch.bool, 0.95)
    assert mask.double().mean().item() == pytest.approx(kept, abs=5 * (0.05 * 0.95 / x.numel()) ** 0.5)
    assert torch.equal(masked(x, mask), x * mask)


# Bytes that the adapter of one Linear moves, in those of its input X and of its output Y; kernels forward and backward,
# those of the Linear included. bf16 throughout, as under DeepSpeed; tensors with a few features a token do not count.
COUNTS = {0.05: ((16, 4), (10, 17)), 0.0: ((4, 4), (10, 15))}


@pytest.mark.parametrize("dropout", COUNTS)
def test_bytes_and_kernels_of_an_adapted_linear(monkeypatch, dropout):
    """On a GPU, whose kernels those of a CPU stand in for, with masks as there."""
    monkeypatch.setattr("peft.layer.dropout_mask", bool_mask)
    T, I, O = 64, 96, 160  # noqa: E741
    with FakeTensorMode():
        layer = make_layer(nn.Linear(I, O, bias=False, dtype=torch.bfloat16), 8, dropout)
        for module in layer.experts.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, dtype=torch.bfloat16)))
        x = torch.empty(1, T, I, dtype=torch.bfloat16, requires_grad=True)
        counts = []
        for call in (layer, layer.base_layer):
            with Traffic() as forward:
                output = call(x)
            with Traffic() as backward:
                torch.autograd.grad(
                    output, [x, *layer.experts.parameters()], torch.empty_like(output), allow_unused=True
                )
            counts.append((forward, backward))
    ours, base = counts
    sizes = T * I, T * O
    moved = [sum(t.moved[size] for t in ours) - sum(t.moved[size] for t in base) for size in sizes]
    assert [count / (2 * size) for count, size in zip(moved, sizes, strict=True)] == list(COUNTS[dropout][0])
    assert [traffic.launches.total() for traffic in ours] == list(COUNTS[dropout][1])
