"""The hand-written backward passes of the experts against plain autograd, and what they keep."""

import pytest
import torch
from reference import experts_autograd
from test_layer import make_layer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peft import LoraExperts, LoraLayer
from peft.dropout import dropout_mask

TOKENS = (2, 7)
KEPT = 0.75


def fixed_mask(x: Tensor, probability: float) -> tuple[Tensor, float]:
    """A pattern instead of chance; three of four elements stay."""
    return (torch.arange(x.numel()) % 4 > 0).view(x.shape).to(torch.uint8), KEPT


def make_experts(count: int, dropout: float = 0.0, **settings) -> LoraExperts:
    return make_layer(count, dropout=dropout, **settings).experts["default"]


def saved_bytes(call, *modules: torch.nn.Module) -> int:
    """Bytes of all tensors that autograd keeps in a call, each storage once and the modules' parameters left out."""
    parameters = {parameter.untyped_storage()._cdata for module in modules for parameter in module.parameters()}
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = call()  # noqa: F841  the graph has to live until the storages are counted
    return sum(storage.nbytes() for storage in storages.values())


COUNTS = [(1, False), (4, False), (4, True)]  # of trained experts, and whether there is a null expert
# dtypes of experts, of the input, of the base layer's output; autocast; tolerance
PRECISIONS = {
    "float32": (torch.float32, torch.float32, torch.float32, False, 1e-5),
    "bfloat16": (torch.bfloat16, torch.bfloat16, torch.bfloat16, False, 1e-2),
    "bfloat16 base": (torch.float32, torch.bfloat16, torch.bfloat16, False, 1e-2),
    "autocast": (torch.float32, torch.float32, torch.bfloat16, True, 1e-2),
    "autocast of a bfloat16 base": (torch.float32, torch.bfloat16, torch.bfloat16, True, 1e-2),
}


@pytest.mark.parametrize("dropout", [0.0, 1 - KEPT])
@pytest.mark.parametrize(("count", "null_expert"), COUNTS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_outputs_and_gradients_are_those_of_plain_autograd(monkeypatch, precision, count, null_expert, dropout):
    monkeypatch.setattr("peft.layer.dropout_mask", fixed_mask)
    expert_dtype, input_dtype, output_dtype, autocast, tolerance = PRECISIONS[precision]
    experts = make_experts(count, dropout, lora_null_expert=null_expert).to(expert_dtype)
    x = torch.randn(*TOKENS, 6, dtype=input_dtype, requires_grad=True)
    base = torch.randn(*TOKENS, 5, dtype=output_dtype, requires_grad=True)
    mask = fixed_mask(x, dropout)[0] / KEPT if dropout else None
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, plain = experts(x, lambda x: base), experts_autograd(experts, x, base, mask)
    assert ours.dtype == plain.dtype == output_dtype
    direction = torch.randn(*TOKENS, 5)
    leaves = {"x": x, "base": base} | dict(experts.named_parameters())
    found, expected = (
        torch.autograd.grad((output.float() * direction).sum(), leaves.values()) for output in (ours, plain)
    )
    for name, ours, plain in zip(["output", *leaves], [ours, *found], [plain, *expected], strict=True):  # noqa: B020
        assert ours.dtype == plain.dtype, name
        assert plain.norm() > 0, name
        assert (ours.float() - plain.float()).norm() <= tolerance * plain.float().norm(), name


@pytest.mark.parametrize("dropout", [0.0, 1 - KEPT])
@pytest.mark.parametrize(("count", "null_expert"), COUNTS)
def test_gradients_are_those_of_finite_differences(monkeypatch, count, null_expert, dropout):
    """Of the output and of the router weights, by which the balance term reaches router and input."""
    monkeypatch.setattr("peft.layer.dropout_mask", fixed_mask)
    experts = make_experts(count, dropout, lora_null_expert=null_expert).double()
    routed = []
    if experts.router is not None:
        experts.router.register_forward_hook(lambda module, inputs, output: routed.append(output))
    x = torch.randn(*TOKENS, 6, dtype=torch.float64, requires_grad=True)
    base = torch.randn(*TOKENS, 5, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, base: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        routed.clear()
        return experts(x, lambda x: base), *routed

    assert torch.autograd.gradcheck(call, (x, base, *experts.parameters()))


@pytest.mark.parametrize("compiled", [False, True])
def test_dropout_scales_what_stays_by_the_exact_probability(compiled):
    """Compiled, it is one graph without a break."""
    experts = make_experts(1, dropout=0.3)
    with torch.no_grad():
        experts.lora_A.copy_(torch.eye(2, 6))
        experts.lora_B.copy_(torch.eye(5, 2))
    call = torch.compile(experts, fullgraph=True, backend="aot_eager") if compiled else experts
    outputs = call(torch.ones(1, 5000, 6), lambda x: x.new_zeros(1, 5000, 5))[..., :2]
    kept = 1 - round(0.3 * 2**16) / 2**16
    torch.testing.assert_close(outputs.unique(), torch.tensor([0.0, experts.scaling / kept]))
    assert outputs.mean().item() == pytest.approx(experts.scaling, rel=0.02)


@pytest.mark.parametrize("probability", [1e-4, 0.05, 0.5, 0.999])
@pytest.mark.parametrize("shape", [(1000, 1001), (3, 333_333)])
def test_dropout_masks_are_random_and_of_the_right_density(probability, shape):
    torch.manual_seed(0)
    x = torch.empty(shape)
    mask, kept = dropout_mask(x, probability)
    assert (mask.shape, mask.dtype) == (shape, torch.uint8)
    assert abs(kept - (1 - probability)) <= 2**-17
    five_sigma = 5 * (probability * (1 - probability) / (x.numel() / 4)) ** 0.5
    for lane in range(4):
        assert mask.flatten()[lane::4].double().mean().item() == pytest.approx(kept, abs=five_sigma)
    again, _ = dropout_mask(x, probability)
    assert not torch.equal(mask, again)
    torch.manual_seed(0)
    assert torch.equal(mask, dropout_mask(x, probability)[0])


@pytest.mark.parametrize("probability", [1e-9, 1 - 1e-9])
def test_extreme_probabilities_of_dropout_stay_finite(probability):
    mask, kept = dropout_mask(torch.empty(4, 4), probability)
    assert 0 < kept <= 1
    assert mask.float().mean().round() == round(kept)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_for_backward_are_one_input_the_masks_and_thin_tensors(dtype, dropout, count):
    """Two Linears with the same input, as gate and up are; the dropped input and the gated features are not kept."""
    layers = [make_layer(count, rank=2, dropout=dropout).train() for _ in range(2)]
    for layer in layers:
        layer.base_layer.to(dtype)
    x = torch.randn(*TOKENS, 6, dtype=dtype, requires_grad=True)
    tokens = x.numel() // 6
    hidden, weights = tokens * count * 2 * x.element_size(), tokens * count * 4 * (count > 1)
    mask = x.numel() * (dropout > 0)
    expected = x.numel() * x.element_size() + 2 * (hidden + weights + mask)
    assert saved_bytes(lambda: [layer(x) for layer in layers], *layers) == expected


def test_a_frozen_adapter_keeps_no_input():
    layer = make_layer().requires_grad_(False)
    x = torch.randn(*TOKENS, 6, requires_grad=True)
    thin = x.numel() // 6 * (4 * 2 + 4) * 4
    assert saved_bytes(lambda: layer(x), layer) == thin
    layer(x).sum().backward()
    assert x.grad.abs().max() > 0


def test_nothing_is_kept_without_gradients():
    layer = make_layer()
    x = torch.randn(*TOKENS, 6)
    with torch.no_grad():
        assert saved_bytes(lambda: layer(x), layer) == 0
    with torch.inference_mode():
        torch.testing.assert_close(layer(x).clone(), layer(x))


@pytest.mark.parametrize("count", [1, 4])
def test_no_tokens_have_gradients_of_zero(count):
    layer = make_layer(count)
    x = torch.randn(1, 0, 6, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape
    assert not any(parameter.grad.any() for parameter in layer.experts.parameters())


def twice(layer: LoraLayer, x: Tensor) -> Tensor:
    """One module in two places of a graph."""
    return layer(torch.nn.functional.pad(layer(x), (0, 1)))


def test_checkpointing_draws_the_same_mask_again():
    layer = make_layer(dropout=0.5).train()
    x = torch.randn(*TOKENS, 6, requires_grad=True)
    leaves = [x, *layer.experts.parameters()]
    gradients = []
    for call in (twice, lambda *inputs: checkpoint(twice, *inputs, use_reentrant=False)):
        torch.manual_seed(5)
        gradients.append(torch.autograd.grad(call(layer, x).square().sum(), leaves))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_a_module_may_be_used_twice():
    layer = make_layer()
    x = torch.randn(*TOKENS, 6, requires_grad=True)
    leaves = [x, *layer.experts.parameters()]
    found = torch.autograd.grad(twice(layer, x).square().sum(), leaves)
    layer.experts["default"].forward = lambda x, base: experts_autograd(layer.experts["default"], x, base(x))
    torch.testing.assert_close(found, torch.autograd.grad(twice(layer, x).square().sum(), leaves))


def test_the_output_may_be_changed_in_place():
    """As some base models do, whose next step is `add_` or an activation."""
    layer = make_layer()
    x = torch.randn(*TOKENS, 6, requires_grad=True)
    leaves = [x, *layer.experts.parameters()]
    found, expected = (torch.autograd.grad(call(layer(x)).square().sum(), leaves) for call in (torch.relu_, torch.relu))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_full_backward_hooks_on_every_module_change_nothing():
    layer = make_layer()
    x = torch.randn(*TOKENS, 6, requires_grad=True)
    leaves = [x, *layer.experts.parameters()]
    expected = torch.autograd.grad(layer(x).square().sum(), leaves)
    seen = set()
    for module in layer.modules():
        module.register_full_backward_hook(lambda module, *gradients: seen.add(type(module).__name__))
    torch.testing.assert_close(torch.autograd.grad(layer(x).square().sum(), leaves), expected)
    assert {"LoraLayer", "Linear", "LoraExperts", "Router"} <= seen


def test_second_derivatives_are_those_of_plain_autograd():
    experts = make_experts(4).double()
    x = torch.randn(*TOKENS, 6, dtype=torch.float64, requires_grad=True)
    base = torch.randn(*TOKENS, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda *leaves: experts(leaves[0], lambda x: leaves[1]), (x, base, *experts.parameters())
    )


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_compiled_layer_has_no_graph_break_and_with_equal_masks_equal_results(monkeypatch, dropout):
    layer = make_layer(dropout=dropout).train()
    x = torch.randn(*TOKENS, 6, requires_grad=True)
    leaves = [x, *layer.experts.parameters()]
    torch.compile(layer, fullgraph=True)(x).sum().backward()
    monkeypatch.setattr("peft.layer.dropout_mask", fixed_mask)
    results = []
    for call in (layer, torch.compile(layer, fullgraph=True)):
        output = call(x)
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
