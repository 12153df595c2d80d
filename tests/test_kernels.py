"""The fused kernels against the equations, by Triton's interpreter on a CPU.

It computes products of bfloat16 as if they were integers, so half precision is float16 here. tests/compile_kernels.py
compiles the kernels for GPUs; tests/test_gpu.py runs them on one.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import layer_loop, router_weights
from test_functions import saved_bytes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft import LoraConfig, LoraLayer

pytest.importorskip("triton", reason="needs triton (pip install triton), which torch brings for CUDA but not for CPUs")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the interpreter is for CPUs")

from peft import kernels  # noqa: E402


def choose_kernels(monkeypatch) -> list[Tensor]:
    """The list gets the bits of each mask that they draw, and counts their calls."""
    drawn, features = [], kernels.features

    def keep(*arguments):
        results = features(*arguments)
        drawn.append(results[-1])
        return results

    monkeypatch.setenv("LORAMOE_KERNELS", "triton")
    monkeypatch.setattr(kernels, "features", keep)
    return drawn


@pytest.fixture(autouse=True)
def bits(monkeypatch) -> list[Tensor]:
    return choose_kernels(monkeypatch)


def make_layer(features: int, experts: int = 8, rank: int = 4, dropout: float = 0.0, **settings) -> LoraLayer:
    torch.manual_seed(0)
    layer = LoraLayer(nn.Linear(features, 24, bias=False)).requires_grad_(False)
    settings = {"r": rank, "lora_alpha": 3 * rank, "lora_nums": experts, "lora_dropout": dropout} | settings
    layer.add_adapter("default", LoraConfig(blc_weight=0, **settings))
    layer.active_adapter = "default"
    nn.init.normal_(layer.experts["default"].lora_B)
    return layer.train()


def mask_of(bits: Tensor | None, x: Tensor, dropout: float) -> Tensor | float:
    """What x is multiplied with."""
    if bits is None:
        return 1
    return (bits[:, :, None].int() >> torch.arange(8, device=x.device) & 1).view(x.shape) / (
        1 - round(dropout * 2**16) / 2**16
    )


def objective(output: Tensor, weights: list[Tensor]) -> Tensor:
    """The router's weights have a gradient from outside, as by the balance term."""
    parts = [part.double() for part in (output, *weights)]
    return sum((part * torch.arange(part.numel(), device=part.device).view(part.shape).sin()).sum() for part in parts)


def assert_equal_to_the_loop(layer: LoraLayer, x: Tensor, bits: list, tolerance: float = 1e-5, autocast=False) -> None:
    """Output and gradients of one call of the kernels."""
    experts = layer.experts["default"]
    recorded: list[Tensor] = []
    if experts.router is not None:
        experts.router.register_forward_hook(lambda module, inputs, output: recorded.append(output))
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        output = layer(x)
    assert len(bits) == 1
    loop = layer_loop(x.float(), layer, mask_of(bits[0], x, experts.dropout))
    weights = [] if experts.router is None else [router_weights(x.float(), experts)]
    leaves = {name: leaf for name, leaf in [("x", x), *experts.named_parameters()] if leaf.requires_grad}
    found = [output, *recorded, *torch.autograd.grad(objective(output, recorded), leaves.values())]
    expected = [loop, *weights, *torch.autograd.grad(objective(loop, weights), leaves.values())]
    for name, ours, plain in zip(["output", *["weights"] * len(weights), *leaves], found, expected, strict=True):
        assert plain.norm() > 0, name
        assert (ours.double() - plain.double()).norm() <= tolerance * plain.double().norm(), name


OPTIONS = [
    *((experts, rank, {}) for experts, rank in ((1, 8), (2, 1), (6, 4), (8, 4), (32, 2), (8, 16))),
    *((experts, 4, {"lora_shared_A": True}) for experts in (2, 8)),
    *((experts, 3, {"lora_top_k": 2}) for experts in (3, 8)),
    (8, 2, {"lora_shared_A": True, "lora_top_k": 3}),
    *((experts, 4, {"lora_null_expert": True}) for experts in (1, 6, 31)),
    (6, 3, {"lora_null_expert": True, "lora_shared_A": True, "lora_top_k": 3}),
]


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize(("experts", "rank", "settings"), OPTIONS)
def test_outputs_and_gradients_are_those_of_the_loop(bits, experts, rank, settings, dropout):
    layer = make_layer(200, experts, rank, dropout, **settings)
    assert_equal_to_the_loop(layer, torch.randn(2, 35, 200, requires_grad=True), bits)


@pytest.mark.parametrize(("tokens", "features"), [(64, 8), (65, 576), (150, 640), (64, 1536), (64, 11008)])
def test_odd_sizes(bits, tokens, features):
    layer = make_layer(features, dropout=0.05)
    assert_equal_to_the_loop(layer, torch.randn(1, tokens, features, requires_grad=True), bits)


@pytest.mark.parametrize("programs", [1, 8])
def test_sums_may_be_split_over_any_number_of_programs(monkeypatch, bits, programs):
    monkeypatch.setattr(kernels, "_multiprocessors", lambda device: programs)
    layer = make_layer(640, dropout=0.25, lora_top_k=4)
    assert_equal_to_the_loop(layer, torch.randn(1, 150, 640, requires_grad=True), bits)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("input_dtype", [torch.float16, torch.float32])
def test_float32_experts_compute_in_half_precision(bits, input_dtype, autocast):
    layer = make_layer(576, dropout=0.25)
    if not autocast:
        layer.base_layer.to(input_dtype)
    x = torch.randn(1, 70, 576, dtype=input_dtype, requires_grad=True)
    tolerance = 2e-3 if autocast or input_dtype is torch.float16 else 1e-5
    assert_equal_to_the_loop(layer, x, bits, tolerance, autocast)


def test_weights_alone_may_have_a_gradient(bits):
    """That of the balance term, with a language model that does not depend on the layer."""
    layer = make_layer(64)
    x = torch.randn(1, 64, 64, requires_grad=True)
    router, recorded = layer.experts["default"].router, []
    router.register_forward_hook(lambda module, inputs, output: recorded.append(output))
    layer(x)
    leaves = [x, router.weight]
    found = torch.autograd.grad(recorded[0].square().sum(), leaves)
    expected = torch.autograd.grad(router_weights(x, layer.experts["default"]).square().sum(), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trained", ["lora_A", "lora_B", "router.weight", "x"])
def test_one_tensor_alone_may_be_trained(bits, trained):
    layer = make_layer(64, dropout=0.25).requires_grad_(False)
    x = torch.randn(1, 64, 64, requires_grad=trained == "x")
    if trained != "x":
        layer.experts["default"].get_parameter(trained).requires_grad_(True)
    assert_equal_to_the_loop(layer, x, bits)


def test_base_layers_of_any_kind_keep_what_they_hold(bits):
    """Their outputs and gradients are changed in place only where nothing else holds them."""
    layer, kept = make_layer(64), []
    layer.base_layer.register_forward_hook(lambda module, inputs, output: kept.append((output, output.clone())))
    layer.base_layer.register_full_backward_hook(
        lambda module, inputs, outputs: kept.extend((each, each.clone()) for each in (*inputs, *outputs))
    )
    assert_equal_to_the_loop(layer, torch.randn(1, 64, 64, requires_grad=True), bits)
    assert len(kept) == 3
    assert all(torch.equal(tensor, copy) for tensor, copy in kept)


@pytest.mark.parametrize("probability", [1e-4, 0.05, 0.999])
def test_masks_are_random_and_of_the_right_density(bits, probability):
    layer = make_layer(512, dropout=probability)
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        layer(torch.ones(1, 256, 512))
    kept = 1 - round(probability * 2**16) / 2**16
    five_sigma = 5 * (kept * (1 - kept) / bits[0].numel()) ** 0.5
    for bit in range(8):
        assert (bits[0] >> bit & 1).double().mean().item() == pytest.approx(kept, abs=five_sigma)
    assert torch.equal(bits[0], bits[2])
    assert not torch.equal(bits[0], bits[1])


def test_runs_are_equal_to_the_bit_with_checkpointing_too(bits):
    layer = make_layer(64, dropout=0.5)
    x = torch.randn(1, 130, 64, requires_grad=True)
    results = []
    for call in (layer, layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(5)
        output = call(x)
        gradients = torch.autograd.grad(output.square().sum(), [x, *layer.experts.parameters()])
        results.append([output, *gradients])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=0)


def test_kept_for_backward_are_the_input_thin_tensors_and_a_bit_for_each_dropped_element():
    layer = make_layer(64, dropout=0.5)
    x = torch.randn(1, 64, 64, requires_grad=True)
    thin = 64 * (32 + 32 + 8) * 4  # hidden and gated features, weights
    assert saved_bytes(lambda: layer(x), layer) == x.numel() * 4 + x.numel() // 8 + thin


@pytest.mark.parametrize(
    ("features", "tokens", "dtype", "settings"),
    [
        (62, 64, torch.float32, {}),
        (64, 63, torch.float32, {}),
        (64, 64, torch.float64, {}),
        (64, 64, torch.float32, {"experts": 33, "rank": 1}),
        (64, 64, torch.float32, {"experts": 8, "rank": 17}),
    ],
)
def test_what_the_kernels_cannot_do_is_left_to_torch(bits, features, tokens, dtype, settings):
    layer = make_layer(features, **settings).to(dtype)
    x = torch.randn(1, tokens, features, dtype=dtype)
    torch.testing.assert_close(layer(x), layer_loop(x, layer))
    assert not bits


def test_torch_is_the_default_on_a_cpu(monkeypatch, bits):
    layer, x = make_layer(64), torch.randn(1, 64, 64)
    for choice in ("torch", None):
        if choice is None:
            monkeypatch.delenv("LORAMOE_KERNELS")
        else:
            monkeypatch.setenv("LORAMOE_KERNELS", choice)
        layer(x)
    assert not bits
    monkeypatch.setenv("LORAMOE_KERNELS", "Triton")
    with pytest.raises(ValueError, match="LORAMOE_KERNELS is torch or triton, not 'Triton'"):
        layer(x)


@pytest.mark.parametrize("architecture", [80, 90])
def test_kernels_compile_for_gpus(architecture):
    """In a process without the interpreter."""
    command = [sys.executable, Path(__file__).with_name("compile_kernels.py"), str(architecture)]
    result = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 5
