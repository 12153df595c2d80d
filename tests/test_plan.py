"""The planner: exact counts on small models, published sizes of large ones, and what each setting must change."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, filled_model, tiny_config
from test_architectures import ARCHITECTURES as TINY
from transformers import AutoModelForCausalLM, PhimoeConfig

from data import InputError
from peft import LoraConfig
from transformers_patch import logits
from transformers_patch.auto import DEFAULT_TARGETS
from workbench.architectures import ARCHITECTURES, find_architecture
from workbench.footprint import Footprint, Shape, count_step
from workbench.instruments import LiveBytes, SavedBytes
from workbench.plan import REDUCE_BUCKET, Setup, check, host_memory, main, memory_per_gpu, peak
from workbench.variants import random_batch

PUBLISHED_SIZES = {
    "SmolLM2-135M": 134_515_008,
    "Llama-2-7B": 6_738_415_616,
    "Llama-2-13B": 13_015_864_320,
    "Llama-2-70B": 68_976_648_192,
    "Llama-3-8B": 8_030_261_248,
    "Llama-3-70B": 70_553_706_496,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-32B": 32_762_123_264,
}
SHAPE = Shape(4, 32, 4 * 31, torch.float32, casts_adapter=False, checkpointing=False)
ADAPTER = {"r": 2, "lora_alpha": 4, "lora_nums": 4, "lora_dropout": 0.0, "blc_weight": 0}
COUNTS = Footprint(
    frozen_parameters=1000,
    trainable_parameters=100,
    quantisable_parameters=800,
    quantisable_rows=10,
    largest_linear=200,
    saved=0,
    activations=5000,
    logits=700,
    backward=300,
    gradients=400,
    flops=1,
)
SETUP = Setup(gpus=1, zero=0, offload="none", bits=16, itemsize=2)


def count(shape: Shape = SHAPE, **adapter) -> Footprint:
    return count_step(tiny_config(), LoraConfig(**ADAPTER | adapter), shape)


@pytest.fixture
def config_file(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    return str(tmp_path / "config.json")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_built_in_architectures_have_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(find_architecture(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED_SIZES[name]


def test_parameters_of_the_tiny_model_are_those_of_its_equations():
    """Two layers of hidden size 32 and MLP width 48, 2 of 4 heads for keys and values, vocabulary 300."""
    attention, mlp, norms = 32 * 32 * 2 + 32 * 16 * 2, 3 * 32 * 48, 2 * 32
    counts = count()
    assert counts.frozen_parameters == 2 * (attention + mlp + norms) + 32 + 2 * 300 * 32
    assert counts.quantisable_parameters == 2 * (attention + mlp)
    assert counts.quantisable_rows == 2 * (32 + 16 + 16 + 32 + 48 + 48 + 32)
    stacked, widths = 4 * 2, (32, 32, 48)
    assert counts.trainable_parameters == 2 * (3 * stacked * (32 + 48) + 4 * sum(widths))


def test_every_linear_of_gpt2_is_one_that_quantisation_takes():
    """Hidden size 32 and MLP width 48; its Linears are transformers' Conv1D, also those that are not adapted."""
    kind, sizes, _ = TINY["gpt2"]
    counts = count_step(kind(**sizes), LoraConfig(target_modules=DEFAULT_TARGETS["gpt2"], **ADAPTER), SHAPE)
    assert counts.quantisable_parameters == sizes["n_layer"] * 32 * (3 * 32 + 32 + 2 * 48)
    assert counts.quantisable_rows == sizes["n_layer"] * (3 * 32 + 32 + 48 + 32)


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_counts_without_data_are_those_of_a_real_step(dropout):
    counts = count(lora_dropout=dropout)
    model = filled_model(lora_dropout=dropout).train()
    live = LiveBytes()
    with live:
        with SavedBytes(model) as saved:
            loss = model(**random_batch(300, 4, 32), return_logits=False).loss
        loss.backward()
    assert counts.saved == pytest.approx(saved.total, rel=0.02)
    assert counts.step_peak == pytest.approx(live.peak, rel=0.05)


def test_counts_follow_the_settings():
    counts = count()
    longer, fewer_labels = count(replace(SHAPE, length=64, labelled=4 * 63)), count(replace(SHAPE, labelled=8))
    half = count(replace(SHAPE, dtype=torch.bfloat16, casts_adapter=True))
    recomputed = count(replace(SHAPE, checkpointing=True))
    assert longer.activations > 1.9 * counts.activations
    assert longer.flops > 2 * counts.flops
    assert fewer_labels.logits < counts.logits / 8
    assert fewer_labels.activations == counts.activations
    assert half.activations < 0.6 * counts.activations
    assert half.gradients == counts.gradients / 2
    assert recomputed.activations < 0.5 * counts.activations
    assert 1.2 * counts.flops < recomputed.flops < 1.6 * counts.flops
    assert count(lora_nums=8).trainable_parameters == 2 * counts.trainable_parameters
    assert count(lora_dropout=0.05).activations > counts.activations
    column = 2 * (2 * 32 + 48)  # a row of W_g for each Linear of two layers
    for experts, columns in ((4, 1), (1, 2)):
        with_null, without = (count(lora_nums=experts, lora_null_expert=null) for null in (True, False))
        assert with_null.trainable_parameters - without.trainable_parameters == columns * column


def test_logits_count_in_full_where_they_are_not_formed_in_chunks(monkeypatch):
    """With ZeRO-3, and where the model scales them: log-softmax, its gradient and that of the logits at least."""
    monkeypatch.setattr(logits, "CHUNK", 300)
    all_logits = SHAPE.labelled * 300 * 4
    kind, sizes, _ = TINY["granite"]
    scaled = count_step(kind(**sizes), LoraConfig(**ADAPTER, target_modules=["up_proj"]), SHAPE)
    assert count().logits < all_logits < scaled.logits / 3
    assert count(replace(SHAPE, forms_logits=True)).logits > 3 * all_logits


def test_memory_of_one_gpu_adds_up():
    memory = memory_per_gpu(COUNTS, SETUP)
    assert memory == {
        "weights": 1000 * 2 + 100 * 4,
        "gradients": 100 * 4,
        "optimizer": 100 * 8,
        "activations": 5000,
        "logits": 700,
        "layers' backward": 300,
        "buffers": 0,
    }
    assert peak(memory) == sum(memory.values()) - 300


def test_zero_divides_what_its_stages_say():
    ddp, one, two, three = (memory_per_gpu(COUNTS, replace(SETUP, gpus=4, zero=stage)) for stage in range(4))
    assert ddp["buffers"] == 400  # gradient buckets
    assert (one["optimizer"], one["gradients"], one["weights"]) == (100 * 16 / 4, 400, 2200)
    assert (two["optimizer"], two["gradients"], two["weights"]) == (400, 100, 2200)
    assert (three["optimizer"], three["gradients"], three["weights"]) == (400, 100, 1000 * 2 / 4 + 200)
    assert one["buffers"] == two["buffers"] == 50_000_000 * 2
    assert three["buffers"] == 50_000_000 * 2 + 1100 * 2  # and all parameters gathered, since there are so few


def test_offloading_moves_memory_to_the_host():
    setup = replace(SETUP, gpus=4, zero=3, offload="all")
    memory = memory_per_gpu(COUNTS, setup)
    assert memory["weights"] == memory["gradients"] == memory["optimizer"] == 0
    assert host_memory(COUNTS, setup) == 4 * (400 + 100 + 700)
    assert host_memory(COUNTS, replace(setup, offload="none")) == 0


def test_quantisation_packs_the_linears_of_the_decoder_alone():
    eight = memory_per_gpu(COUNTS, replace(SETUP, bits=8))
    four = memory_per_gpu(COUNTS, replace(SETUP, bits=4))
    assert eight["weights"] == 800 + 10 * 4 + 200 * 2 + 100 * 4
    assert four["weights"] == 413 + 200 * 2 + 100 * 4  # 4.127 bits each
    assert four["buffers"] == 200 * 2


def test_a_plan_is_printed_and_written(config_file, tmp_path, capsys):
    file = tmp_path / "plan.json"
    main(["--model", config_file, "--gpus", "8", "--zero", "2", "--batch", "2", "--length", "16", "--json", str(file)])
    shown, result = capsys.readouterr().out, json.loads(file.read_text())
    for name in ("weights", "gradients", "optimizer", "activations", "logits", "peak"):
        assert f"\n  {name} " in shown
    assert result["samples_per_step"] == 16
    assert result["seconds_per_step"] == result["flops_per_gpu_and_step"] / (312e12 * 0.4)
    assert result["hours_per_million_samples"] == pytest.approx(1e6 / 16 * result["seconds_per_step"] / 3600)
    main(["--model", config_file, "--length", "16", "--lora_null_expert"])
    assert "(6 experts of rank 4 and a null expert on " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch", "0"], "--batch is 0, but has to be at least 1"),
        (["--mfu", "1.5"], "--mfu is 1.5, but has to be above 0 and at most 1"),
        (["--zero", "3", "--load_in_kbits", "4"], "cannot be sharded by --zero 3; use --zero 2"),
        (["--offload", "all"], "--offload all needs --zero 3"),
        (["--lora_rank", "0"], "--lora_rank is 0, but has to be a whole number of at least 1"),
        (["--trainable", "gate_poj"], "target module 'gate_poj' does not exist.*did you mean 'gate_proj'"),
        (["--batch", "0", "--length", "0"], "- --batch is 0.*\n- --length is 0"),
    ],
)
def test_bad_input_is_refused(config_file, flags, message):
    with pytest.raises(InputError, match=message):
        main(["--model", config_file, *flags])


@pytest.mark.parametrize("name", ["gpt2", "phi3", "starcoder2", "mixtral"])
def test_the_linears_that_training_adapts_by_default_are_planned(tmp_path, capsys, name):
    kind, sizes, _ = TINY[name]
    kind(**sizes).save_pretrained(tmp_path)
    main(["--model", str(tmp_path), "--batch", "1", "--length", "8"])
    assert f"on {','.join(DEFAULT_TARGETS[name])})" in capsys.readouterr().out


def test_a_router_that_is_a_linear_by_class_is_counted():
    config = PhimoeConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    shape = replace(SHAPE, dtype=torch.bfloat16)  # the only one in which torch counts products of many experts
    counts = count_step(config, LoraConfig(target_modules=["q_proj"], **ADAPTER), shape)
    assert counts.quantisable_rows == 2 * (32 + 16 + 16 + 32 + 4)


def test_unknown_models_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file or folder, and not a built-in architecture; these are SmolLM2"):
        main(["--model", "Llama-4"])
    with pytest.raises(InputError, match="does not contain a model configuration"):
        main(["--model", str(tmp_path)])


@pytest.mark.parametrize("change", [{"intermediate_size": -1}, {"hidden_act": "nope"}])
def test_a_config_that_no_model_can_be_built_from_is_one_message(config_file, change):
    file = Path(config_file)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=r"^config\.json of .* cannot be used"):
        main(["--model", str(config_file)])


@pytest.mark.slow
def test_counts_meet_real_steps_of_the_real_model():
    folder = ROOT / "models" / "SmolLM2-135M-Instruct"
    if not folder.exists():
        pytest.skip("bash run_loramoe.sh makes the model")
    lines, saved_error, peak_error = check(str(folder))
    print(*lines, sep="\n")
    assert saved_error < 0.05
    assert peak_error < 0.10


def test_the_shipped_deepspeed_files_are_those_that_are_planned():
    for file in (ROOT / "scripts" / "deepspeed").glob("*.json"):
        config = json.loads(file.read_text())
        assert config["zero_optimization"]["reduce_bucket_size"] == REDUCE_BUCKET
        assert config["data_types"] == {"grad_accum_dtype": "fp32"}
