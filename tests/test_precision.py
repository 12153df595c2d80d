"""Half precision under autocast, with a gradient scaler: what `--fp16` does on a GPU, done by hand on a CPU."""

import pytest
import torch
from conftest import example_rows, filled_model, tiny_tokenizer
from torch import Tensor
from torch.nn.functional import mse_loss

from data import Collator, Encoding, load_data
from peft import LoraConfig, LoraLayer
from transformers_patch.recorder import RoutingRecorder

BETA = 10.0
SCALE = 2.0**8  # large enough to matter, and small enough that no gradient here overflows float16
# What rounding may change in a gradient, in relative L2 norm: ten units in the last place.
ROUNDING = {dtype: 10 * torch.finfo(dtype).eps for dtype in (torch.float16, torch.bfloat16)}
HALF = pytest.mark.parametrize("dtype", ROUNDING, ids=["fp16", "bf16"])


def gradients(parameters: dict[str, Tensor], loss: Tensor, scaled: bool) -> dict[str, Tensor]:
    """Gradients of a loss; through a scaler, and unscaled again, where wanted."""
    optimizer = torch.optim.SGD(parameters.values())
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=scaled)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    return {name: parameter.grad.clone() for name, parameter in parameters.items()}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert found[name].isfinite().all(), name
        assert found[name].dtype is torch.float32
        assert not torch.equal(found[name], gradient), f"{name} was computed in float32"
        assert (found[name] - gradient).norm() <= ROUNDING[dtype] * gradient.norm(), name


@HALF
def test_the_gradients_of_a_layer(dtype):
    torch.manual_seed(0)
    layer = LoraLayer(torch.nn.Linear(24, 16, bias=False).requires_grad_(False))
    layer.add_adapter("default", LoraConfig(r=4, lora_alpha=8, lora_nums=4, lora_dropout=0.0))
    layer.active_adapter = "default"
    torch.nn.init.normal_(layer.experts["default"].lora_B)
    parameters = dict(layer.experts.named_parameters())
    x, target = torch.randn(4, 7, 24), torch.randn(4, 7, 16)
    found = {}
    for half in (False, True):
        with torch.autocast("cpu", dtype, enabled=half):
            output = layer(x)
            weights = layer.experts["default"].router(x)
        assert output.dtype is (dtype if half else torch.float32)
        assert weights.dtype is torch.float32
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(4, 7))
        found[half] = gradients(parameters, mse_loss(output.float(), target), scaled=half)
    assert_near(found[True], found[False], dtype)


@pytest.fixture
def batch(tmp_path, data_file) -> dict[str, Tensor]:
    rows = load_data(data_file, tiny_tokenizer(), Encoding("auto", 256, 2), tmp_path / "cache")[0]
    batch = Collator(pad_token_id=1)([rows[index] for index in range(len(example_rows()))])
    del batch["lengths"], batch["sources"]
    return batch


@HALF
@pytest.mark.parametrize("part", ["loss", "balance_loss"])
def test_the_gradients_of_a_model(batch, dtype, part):
    """The complete loss, and the balance term alone, which reaches only what lies before a router."""
    model = filled_model(blc_weight=BETA).train()
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if part == "balance_loss":
        parameters = {name: parameter for name, parameter in parameters.items() if "router" in name}
    found, values = {}, {}
    for half in (False, True):
        with torch.autocast("cpu", dtype, enabled=half), RoutingRecorder(model) as recorder:
            output = model(**batch)
        assert {weights.dtype for weights in recorder.weights.values()} == {torch.float32}
        assert output.balance_loss.dtype is torch.float32
        values[half] = output.balance_loss.item()
        found[half] = gradients(parameters, getattr(output, part), scaled=half)
    assert values[True] == pytest.approx(values[False], rel=ROUNDING[dtype])
    assert_near(found[True], found[False], dtype)
