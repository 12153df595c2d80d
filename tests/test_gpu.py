"""Tests that need a GPU: `bash scripts/test.sh -m gpu` on a node with one; they are skipped everywhere else."""

import sys

import pytest
import torch
from conftest import ROOT, filled_model
from safetensors.torch import load_file
from test_cuda_graph import PROMPTS, answers, one_by_one
from test_launch import call, free_port
from test_train import Runner, assert_learns
from transformers.utils import is_flash_attn_2_available

import train
from inference import cuda_graph
from loading.arguments import parse_arguments
from loading.base_model import build_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.device_count() != 1,
        reason=f"needs one visible GPU (CUDA_VISIBLE_DEVICES=0); torch sees {torch.cuda.device_count()} here",
    ),
]
needs_bf16 = pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)),
    reason="needs a GPU that computes in bf16",
)


@pytest.fixture
def run(tmp_path, model_dir, monkeypatch) -> Runner:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    runner = Runner(tmp_path, model_dir)
    del runner.flags["use_cpu"]
    return runner


def test_loss_and_gradients_are_those_of_the_cpu(run, tmp_path):
    """Float32, from non-zero A, B and routers, with the balance term."""
    rate = 1e4
    filled_model().save_pretrained(tmp_path / "adapter")
    start = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    step = {
        "peft_path": tmp_path / "adapter", "lora_rank": 2, "lora_alpha": 4, "lora_dropout": 0, "blc_weight": 1,
        "per_device_train_batch_size": 12, "max_steps": 1, "warmup_steps": 0, "max_grad_norm": 0,
        "optim": "sgd", "learning_rate": rate, "lr_scheduler_type": "constant", "validation_file": None,
    }  # fmt: skip
    gradients, losses = {}, {}
    for use_cpu in (True, False):
        run.output = tmp_path / f"cpu {use_cpu}"
        train.main(run.arguments(**step, use_cpu=use_cpu, output_dir=run.output))
        end = load_file(run.output / "adapter_model.safetensors")
        gradients[use_cpu] = {key: (start[key].double() - end[key].double()) / rate for key in start}
        losses[use_cpu] = run.log()[0]["loss"]
    assert losses[False] == pytest.approx(losses[True], rel=1e-5)
    for key, expected in gradients[True].items():
        assert expected.norm() > 0, key
        assert (gradients[False][key] - expected).norm() <= 1e-4 * expected.norm(), key


@needs_bf16
def test_bf16_trains(run):
    assert_learns(run, bf16=True)


def test_fp16_trains_with_a_scaler(run, monkeypatch):
    scalers, build = [], train.build_trainer

    def build_trainer(*arguments):
        trainer = build(*arguments)
        scalers.append(trainer.accelerator.scaler)
        return trainer

    monkeypatch.setattr(train, "build_trainer", build_trainer)
    assert_learns(run, fp16=True)
    assert scalers[0].is_enabled()


@needs_bf16
def test_flash_attention_is_chosen_where_it_can_run(run):
    model_args, _, args = parse_arguments(run.arguments(bf16=True))
    can_run = is_flash_attn_2_available() and torch.cuda.get_device_capability()[0] >= 8
    chosen = build_model(model_args, args).config._attn_implementation
    assert chosen == ("flash_attention_2" if can_run else "sdpa")
    model_args, _, args = parse_arguments(run.arguments())
    assert build_model(model_args, args).config._attn_implementation == "sdpa"


@needs_bf16
def test_nf4_trains(run, quantisable_dir):
    assert_learns(run, model_name_or_path=quantisable_dir, load_in_kbits=4, bf16=True)


@needs_bf16
def test_zero2_with_one_process_trains_on_the_gpu(run):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "1", "--master_port", str(free_port())]
    flags = run.arguments(bf16=True, deepspeed=ROOT / "scripts" / "deepspeed" / "zero2.json")
    outcome = call([sys.executable, *launcher, "train.py", *flags], DS_ACCELERATOR="cuda")
    assert outcome.returncode == 0, outcome.stdout[-3000:] + outcome.stderr[-3000:]
    losses = [entry["eval_lm_loss"] for entry in run.log() if "eval_lm_loss" in entry]
    assert losses[-1] < losses[0]


@needs_bf16
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize(
    "settings", [{}, {"experts": 6}, {"lora_shared_A": True}, {"lora_null_expert": True}, {"rank": 16}]
)
def test_fused_kernels(monkeypatch, settings, dropout):
    tests = pytest.importorskip("test_kernels", reason="needs triton")
    layer = tests.make_layer(1536, dropout=dropout, **settings).cuda()
    layer.base_layer.bfloat16()
    x = torch.randn(3, 111, 1536, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    tests.assert_equal_to_the_loop(layer, x, tests.choose_kernels(monkeypatch), tolerance=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)], ids=str)
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS[:3]], ids=["one", "padded"])
def test_answers_by_cuda_graph_are_those_of_one_kernel_at_a_time(monkeypatch, prompts, dtype):
    """Also with a dynamic cache, in float32: in bf16 a token may win by less than the two caches differ."""
    model, replays, capture = filled_model().eval().to("cuda", dtype), [], cuda_graph.capture

    def counted(compute, device):
        replay = capture(compute, device)
        return lambda: replays.append(device) or replay()

    monkeypatch.setattr(cuda_graph, "capture", counted)
    found = answers(model, prompts)
    assert len(replays) == max(map(len, found)) - 2
    if dtype == torch.float32:
        assert one_by_one(model, prompts) == found
    monkeypatch.setattr(cuda_graph, "capture", lambda compute, device: compute)
    assert answers(model, prompts) == found


def test_a_model_that_waits_for_the_device_is_decoded_without_a_graph(capsys):
    model = filled_model().eval().to("cuda")
    model.get_base_model().lm_head.register_forward_hook(lambda module, inputs, output: print(output.sum().item()))
    expected = one_by_one(model, PROMPTS)
    assert answers(model, PROMPTS) == expected
    assert "cannot be decoded by CUDA graph" in capsys.readouterr().err
    drawn = {"temperature": 1.0}
    assert answers(model, PROMPTS, **drawn) == one_by_one(model, PROMPTS, **drawn)
