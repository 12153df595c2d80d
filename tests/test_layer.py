"""The multi-expert block against its equations."""

import pytest
import torch
from reference import layer_loop
from torch import nn

from peft import LoraConfig, LoraLayer, Router, fused


def make_layer(experts: int = 4, rank: int = 2, dropout: float = 0.0, filled: bool = True, **settings) -> LoraLayer:
    torch.manual_seed(0)
    layer = LoraLayer(nn.Linear(6, 5, bias=False))
    layer.add_adapter(
        "default", LoraConfig(r=rank, lora_alpha=3, lora_nums=experts, lora_dropout=dropout, blc_weight=0, **settings)
    )
    layer.active_adapter = "default"
    layer.base_layer.requires_grad_(False)
    if filled:
        nn.init.normal_(layer.experts["default"].lora_B)
    return layer


KINDS = [
    *((experts, settings) for experts in (1, 2, 3, 8) for settings in ({}, {"lora_shared_A": True})),
    *((experts, {"lora_top_k": 2}) for experts in (2, 3, 8)),
    *((experts, {"lora_null_expert": True}) for experts in (1, 3)),
    (1, {"lora_null_expert": True, "lora_shared_A": True}),
    (8, {"lora_null_expert": True, "lora_top_k": 4}),
]


@pytest.mark.parametrize(("experts", "settings"), KINDS)
@pytest.mark.parametrize("rank", [1, 4])
def test_outputs_and_gradients_equal_the_loop_over_experts(experts, rank, settings):
    layer = make_layer(experts, rank, **settings)
    x = torch.randn(2, 7, 6, requires_grad=True)
    direction = torch.randn(2, 7, 5)
    parameters = [x, *layer.experts.parameters()]
    ours, loop = layer(x), layer_loop(x, layer)
    ours_gradients = torch.autograd.grad((ours * direction).sum(), parameters)
    loop_gradients = torch.autograd.grad((loop * direction).sum(), parameters)
    assert all(gradient.abs().max() > 0 for gradient in loop_gradients)
    torch.testing.assert_close(ours, loop, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours_gradients, loop_gradients, rtol=1e-5, atol=1e-5)


def test_values_worked_by_hand():
    """Two experts of rank 1 on a 2 -> 1 Linear; the router is indifferent, so w = (1/2, 1/2)."""
    layer = make_layer(experts=2, rank=1)
    layer = LoraLayer(nn.Linear(2, 1, bias=False))
    layer.add_adapter("default", LoraConfig(r=1, lora_alpha=3, lora_nums=2, lora_dropout=0.0))
    layer.active_adapter = "default"
    experts = layer.experts["default"]
    with torch.no_grad():
        layer.base_layer.weight.copy_(torch.tensor([[1.0, 10.0]]))
        experts.lora_A.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        experts.lora_B.copy_(torch.tensor([[2.0, 4.0]]))
        experts.router.weight.zero_()
    # W0 x = 2 + 30 = 32; experts: 2 * 2 = 4 and 4 * 3 = 12; (alpha / r) * (4 + 12) / 2 = 3 * 8 = 24
    assert layer(torch.tensor([[[2.0, 3.0]]])).item() == 56


@pytest.mark.parametrize("null_expert", [False, True])
def test_a_fresh_adapter_changes_no_bit(null_expert):
    layer = make_layer(filled=False, lora_null_expert=null_expert)
    x = torch.randn(2, 7, 6)
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize(("settings", "scaling"), [({}, 0.75), ({"lora_rslora": True}, 1.5)])
def test_the_experts_output_is_scaled_by_alpha_over_the_rank_or_its_root(settings, scaling):
    layer, x = make_layer(rank=4, **settings), torch.randn(2, 7, 6)
    delta = layer(x) - layer.base_layer(x)
    layer.experts["default"].scaling = 1.0
    torch.testing.assert_close(delta, scaling * (layer(x) - layer.base_layer(x)), rtol=1e-5, atol=1e-5)


def test_one_expert_is_plain_lora_without_a_router():
    layer = make_layer(experts=1, rank=3)
    assert layer.experts["default"].router is None
    assert set(dict(layer.experts.named_parameters())) == {"default.lora_A", "default.lora_B"}
    A, B = layer.experts["default"].lora_A, layer.experts["default"].lora_B
    x = torch.randn(2, 7, 6)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + (x @ A.T @ B.T) * 3 / 3)


def test_one_expert_and_a_null_expert_are_a_lora_with_a_learned_gate():
    layer = make_layer(experts=1, rank=3, lora_null_expert=True)
    experts = layer.experts["default"]
    assert set(dict(experts.named_parameters())) == {"lora_A", "lora_B", "router.weight"}
    x = torch.randn(2, 7, 6)
    gate = torch.sigmoid(x @ (experts.router.weight[0] - experts.router.weight[1])).unsqueeze(-1)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + gate * (x @ experts.lora_A.T @ experts.lora_B.T))


@pytest.mark.parametrize("experts", [1, 4])
@pytest.mark.parametrize("settings", [{}, {"lora_top_k": 2}, {"dropout": 0.5}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_router_that_gives_the_null_expert_everything_leaves_the_base_model(experts, settings, dtype):
    layer = make_layer(experts, lora_null_expert=True, **settings)
    layer.base_layer.to(dtype)
    x = torch.randn(2, 7, 6, dtype=dtype)
    assert not torch.equal(layer(x), layer.base_layer(x))
    router = layer.experts["default"].router
    weights = router(x.float())
    assert weights.shape == (2, 7, experts + 1)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 7))
    x[..., 0] = 1
    with torch.no_grad():
        router.weight.zero_()[-1, 0] = 200  # exp(-200) is 0 in float32
        assert torch.equal(layer(x), layer.base_layer(x))
    assert torch.equal(layer(x), layer.base_layer(x))


def test_router_weights_sum_to_one_in_float32():
    router = Router(6, 4)
    weights = router.to(torch.bfloat16)(torch.randn(2, 7, 6, dtype=torch.bfloat16))
    assert weights.dtype is torch.float32
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 7))


def test_dropout_acts_in_training_only():
    layer = make_layer(dropout=0.5)
    x = torch.randn(2, 7, 6)
    assert not torch.equal(layer.train()(x), layer(x))
    torch.testing.assert_close(layer.eval()(x), layer_loop(x, layer))


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_base_with_float32_experts(autocast):
    layer = make_layer()
    reference = layer_loop(x := torch.randn(2, 7, 6), layer)
    if not autocast:
        layer.base_layer.to(torch.bfloat16)
        x = x.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = layer(x)
    assert output.dtype is torch.bfloat16
    torch.testing.assert_close(output.float(), reference, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize(
    ("capability", "has_triton", "chosen"), [((9, 0), True, True), ((9, 0), False, False), ((8, 0), True, False)]
)
def test_fused_kernels_are_the_default_on_gpus_that_have_shown_them(monkeypatch, capability, has_triton, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(fused, "find_spec", lambda name: has_triton or None)
    assert fused._are_proven.__wrapped__(torch.device("cuda")) is chosen
