"""Speed in log lines, and the trace of the profiler."""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import tiny_config
from test_train import Runner

from data import IGNORED_LABEL, InputError
from peft import LoraConfig, get_peft_model
from training import throughput
from training.profiling import StepProfiler
from training.throughput import FlopsEstimate, Throughput, peak_flops
from transformers_patch import LlamaLoRAMoEForCausalLM
from workbench.instruments import count_flops

ONE_PROCESS = SimpleNamespace(parallel_mode=transformers.training_args.ParallelMode.NOT_PARALLEL, world_size=1)


@pytest.fixture
def run(tmp_path, model_dir, monkeypatch) -> Runner:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    return Runner(tmp_path, model_dir)


def make_model(adapted: bool, tied: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8}
    model = LlamaLoRAMoEForCausalLM(tiny_config(**sizes, tie_word_embeddings=tied))
    return get_peft_model(model, LoraConfig(lora_nums=4, r=4, blc_weight=0)).train() if adapted else model.train()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_the_estimate_is_near_what_a_step_counts(adapted, tied):
    """Layers below the first adapted Linear have no backward pass, but the estimate counts one."""
    model = make_model(adapted, tied)
    ids = torch.randint(300, (2, 64), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :33] = IGNORED_LABEL
    counted = count_flops(lambda: model(input_ids=ids, labels=labels).loss.backward())
    # The kernels compute the product of Q and K again in the backward pass: 14 T^2 in place of 12.
    recomputed = 2 * 8 * 64 * 2 * 64**2
    estimate = FlopsEstimate(model).flops(tokens=128, supervised_tokens=62, squared_lengths=2 * 64**2)
    assert 1 <= estimate / (counted - recomputed) < 1.06


def test_a_weight_that_a_trained_copy_replaces_does_not_count():
    config = LoraConfig(lora_nums=4, r=4, blc_weight=0, modules_to_save=["lm_head"])
    model = get_peft_model(LlamaLoRAMoEForCausalLM(tiny_config()), config)
    head = model.get_output_embeddings().weight.numel()
    assert FlopsEstimate(model).flops(tokens=0, supervised_tokens=1, squared_lengths=0) == 6 * head


def test_tokens_per_second_leave_out_padding_and_pauses(monkeypatch):
    clock = iter([100.0, 103.0, 113.0, 115.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    counter = Throughput(make_model(adapted=True), torch.device("cpu"))
    counter.watch([5, 10], supervised_tokens=7)  # at 100
    with counter.paused():  # from 103 to 113
        pass
    assert counter.scalars(ONE_PROCESS) == {"tokens_per_second": 15 / 5}  # at 115


def test_the_peak_of_a_gpu_is_known_by_its_name():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H200 NVL") == 835e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA A10") == 125e12
    assert peak_flops("NVIDIA GeForce RTX 4090") == 165e12
    for name in ("NVIDIA RTX A1000", "NVIDIA A10G", "NVIDIA GeForce RTX 4090 D", "H100 MIG 1g.10gb", "something else"):
        assert peak_flops(name) is None


def test_log_lines_hold_the_speed_and_steps_are_profiled(run):
    run(profile_steps="2-3", eval_strategy="steps", eval_steps=2)
    lines = [entry for entry in run.log() if "lm_loss" in entry]
    assert all(entry["tokens_per_second"] > 0 for entry in lines)
    assert not any({"mfu", "peak_memory_gib"} & entry.keys() for entry in lines)
    (trace,) = (run.output / "profile").iterdir()
    assert trace.name == "steps-2-3-rank-0.json.gz"
    names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert {"aten::addmm_", "Optimizer.step#AdamW.step"} <= names


def test_a_run_that_resumes_inside_the_profiled_steps_profiles_the_rest(tmp_path):
    profiler = StepProfiler(2, 3, tmp_path)
    arguments = (SimpleNamespace(process_index=0), SimpleNamespace(global_step=2), None)
    profiler.on_step_begin(*arguments)
    torch.ones(2) + 1
    arguments[1].global_step = 3
    profiler.on_step_end(*arguments)
    assert [file.name for file in (tmp_path / "profile").iterdir()] == ["steps-3-3-rank-0.json.gz"]


@pytest.mark.parametrize("steps", ["0", "3-2", "first", "2-"])
def test_profile_steps_that_cannot_be(run, steps):
    with pytest.raises(InputError, match=r"--profile_steps is .* but has to be a step or a range, such as 5 or 5-7"):
        run(profile_steps=steps)
