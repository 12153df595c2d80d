"""The benchmark: its variants compute the method, and its file holds what it promises."""

import json
from collections import Counter
from functools import partial

import pytest
import torch
from conftest import ROOT, filled_model, tiny_model

from data import InputError
from workbench import benchmark_data, benchmark_packing
from workbench.benchmark import main, read_results
from workbench.benchmark_report import draw
from workbench.instruments import step
from workbench.peers import PYTHON, Peer
from workbench.rounds import Times
from workbench.variants import LoopLayer, PlainLayer, PlainLlama, Variant, compute_as, random_batch

NUMBERS = {
    "dropout", "step_ratio", "step_ratio_low", "step_ratio_high", "step_seconds", "rounds", "saved_bytes_ratio",
    "flops_ratio", "saved_bytes", "flops", "resident_before_step", "peak_resident",
}  # fmt: skip


def gradients(model, batch) -> dict[str, torch.Tensor]:
    """Loss and adapter gradients of one training step."""
    loss = model.train()(**batch).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    return {"loss": loss.detach(), **found}


def batch_with_prompts() -> dict[str, torch.Tensor]:
    batch = random_batch(300, 4, 12)
    batch["labels"] = batch["labels"].masked_fill(torch.arange(12) < 5, -100)
    return batch


@pytest.mark.parametrize("layer_class", [PlainLayer, LoopLayer])
def test_other_forwards_compute_the_same_step(layer_class):
    """Losses and all gradients, from adapters whose weights are not zero; logits at all positions included."""
    model, other = filled_model(), filled_model()
    compute_as(other, layer_class, dropout=0.0)
    other.get_base_model().__class__ = PlainLlama
    ours, theirs = gradients(model, batch_with_prompts()), gradients(other, batch_with_prompts())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_variants_share_the_base_weights_and_nothing_else():
    base = tiny_model()
    batch = random_batch(300, 2, 8)
    models = [Variant(name).model(base) for name in ("frozen", "loramoe", "plain", "loop")]
    for model in models:
        step(model, batch)
        weights = [p.data_ptr() for p in model.parameters() if not p.requires_grad]
        assert weights == [p.data_ptr() for p in base.parameters()]
    losses = [model(**batch).lm_loss for model in models]
    assert not torch.equal(losses[0], losses[1])
    torch.testing.assert_close(losses[1:], losses[1:2] * 3)
    assert not any(p.requires_grad for p in models[0].parameters())


def test_every_variant_warms_up_and_slow_ones_take_part_in_every_third_round():
    calls = Counter()

    def run(name: str) -> float:
        calls[name] += 1
        return float(calls[name])

    times = Times({Variant(name): partial(run, name) for name in ("lora", "loop")}, rounds=4)
    assert times.rounds[Variant("lora")] == {0: 2, 1: 3, 2: 4, 3: 5}
    assert times.rounds[Variant("loop")] == {0: 2, 3: 3}


def test_the_file_holds_a_row_for_each_variant_and_dropout(tmp_path, capsys):
    file = tmp_path / "results.json"
    sections = "steps,lengths,decode"
    main(["--quick", "--rounds", "1", "--sections", sections, "--json", str(file)])
    results = json.loads(file.read_text())
    assert {"commit", "command", "machine", "versions", "seconds"} <= results.keys()
    expected = {
        (name, p) for name in ("frozen", "lora", "loramoe", "top2", "shared_a", "plain", "loop") for p in (0.0, 0.05)
    }
    assert {(row["variant"], row["dropout"]) for row in results["rows"]} == expected
    for row in results["rows"]:
        assert row.keys() == {"variant", *NUMBERS}
        assert row["variant"] != "frozen" or row["step_ratio"] == row["saved_bytes_ratio"] == row["flops_ratio"] == 1
        # The kernel's figures are off by a few pages, more than so small a step takes.
        assert min(row["peak_resident"], row["resident_before_step"]) > 100e6
    table = capsys.readouterr().out
    main(["--markdown", str(file)])
    assert capsys.readouterr().out == table
    assert table.count("\n| --- |") == 4


def test_training_packing_and_experts_are_measured_and_drawn(tmp_path, model_dir, monkeypatch):
    file = tmp_path / "results.json"
    flags = ["--quick", "--rounds", "1", "--sections", "experts,training,packing", "--model", str(model_dir)]
    monkeypatch.setattr(benchmark_packing, "MIXED_ROWS", 40)
    monkeypatch.setattr(benchmark_packing, "TINY", benchmark_packing.TINY[:2])
    main([*flags, "--json", str(file)])
    results = read_results(file)
    assert results["training"]["samples_per_second"] > 0
    assert results["step_losses"]["loramoe"] == pytest.approx(results["step_losses"]["plain"], abs=1e-3)
    assert len(results["step_losses"]["plain"]) == 20
    padding = {row["batches"]: row["padding"] for row in results["packing"] if row["rows"] == "tiny data"}
    assert padding["8 rows in random order"] > padding["8 rows, grouped by length"] > padding["2 packs of 256"]
    assert all(row["tokens_per_second"] > 0 for row in results["packing"] if "ratio" in row)
    pictures = draw(results, tmp_path)
    assert [picture.name for picture in pictures] == ["experts.png", "step_losses.png"]
    assert all(5_000 < picture.stat().st_size < 150_000 for picture in pictures)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sections", "steps,speed"], "unknown: speed; choose from steps, experts"),
        (["--rounds", "0"], "--rounds is 0, but has to be at least 1"),
        (["--quick", "--sections", "training"], "name one with --model"),
        (["--model", "no/such/folder"], "no base model could be loaded from no/such/folder"),
        (["--markdown", "no_such.json"], "no_such.json cannot be read"),
    ],
)
def test_bad_input_is_refused(flags, message):
    with pytest.raises(InputError, match=message):
        main(flags)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["peft_lora", "xlora"])
def test_peers_run_the_package_from_pypi(name):
    folder = ROOT / "models" / "SmolLM2-135M-Instruct"
    if not PYTHON.exists() or not folder.exists():
        pytest.skip("bash workbench/benchmark_peers.sh and bash run_loramoe.sh make what this needs")
    variant, peer = Variant(name, experts=2, rank=4), Peer(str(folder))
    try:
        batch = random_batch(1000, 1, 16)
        package = peer.build(variant)
        assert package["version"] == "0.21.2"
        assert str(PYTHON.parent.parent) in package["file"]
        assert peer.step(variant, batch) > 0
        assert peer.measure(variant, batch)["saved_bytes"] > 0
        assert peer.memory(variant, batch)["peak_resident"] > 500e6
    finally:
        peer.close()


def test_the_data_benchmark_refuses_bad_numbers_and_makes_the_folder_of_its_file(tmp_path, model_dir, monkeypatch):
    with pytest.raises(InputError, match=r"--rows is 0, but has to be at least 1\n.*--num_proc is 0"):
        benchmark_data.main(["--rows", "0", "--num_proc", "0"])
    file = tmp_path / "new" / "figures.json"
    monkeypatch.setattr(benchmark_data, "measure", lambda *_: {"rows": 7})
    benchmark_data.main(["--rows", "7", "--tokenizer", str(model_dir), "--json", str(file)])
    assert json.loads(file.read_text())["rows"] == 7
