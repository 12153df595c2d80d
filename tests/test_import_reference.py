"""Checkpoints of the authors' code become adapters of this one that compute the same."""

import json
import os
import re
import shlex
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, tiny_model
from safetensors.torch import load_file
from test_launch import SHELL_VARIABLES, call
from test_model import MLP, make_batch
from transformers import LlamaForCausalLM

from data import InputError
from loading.arguments import parse_arguments
from peft import LoraConfig, PeftModel
from scripts.import_reference import import_checkpoint, main

PREFIX = "base_model.model."
UP = f"{PREFIX}model.layers.0.mlp.up_proj"


class Checkpoint:
    """A checkpoint folder as the authors' code writes it, with random weights away from zero."""

    def __init__(self, folder: Path, experts: int = 4, rank: int = 2, dtype=torch.float32, modules=MLP, **fields):
        self.folder, self.output, self.experts = folder / "sft_lora_model", folder / "ours", experts
        self.base = LlamaForCausalLM(tiny_config()).eval()
        self.base.load_state_dict(tiny_model().state_dict())
        self.modules = modules
        self.fields = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "/their/disk/llama",
            "inference_mode": True,
            "r": rank,
            "target_modules": ["gate_proj", "up_proj", "down_proj"],
            "lora_alpha": 6.0,
            "lora_nums": experts,
            "blc_alpha": 0.0,
            "blc_weight": 0.0,
            "lora_dropout": 0.05,
            "merge_weights": False,
            "fan_in_fan_out": False,
            "enable_lora": None,
            "bias": "none",
            "modules_to_save": None,
        } | fields
        generator = torch.Generator().manual_seed(7)
        self.tensors = {
            f"{PREFIX}{module}.{part}.weight": (torch.randn(shape, generator=generator) * 0.3).to(dtype)
            for module in modules
            for part, shape in self.shapes(module, rank).items()
        }
        self.save()

    def shapes(self, module: str, rank: int) -> dict[str, tuple[int, int]]:
        out_features, in_features = self.base.get_submodule(module).weight.shape
        shapes = {"lora_route": (self.experts, in_features)}
        for n in range(self.experts):
            shapes |= {f"lora_A{n}": (rank, in_features), f"lora_B{n}": (out_features, rank)}
        return shapes

    def save(self) -> None:
        self.folder.mkdir(exist_ok=True)
        (self.folder / "adapter_config.json").write_text(json.dumps(self.fields))
        torch.save(self.tensors, self.folder / "adapter_model.bin")

    @property
    def scaling(self) -> float:
        return self.fields["lora_alpha"] / self.fields["r"] ** (0.5 if self.fields.get("use_rslora") else 1)

    def looped_logits(self, batch: dict) -> torch.Tensor:
        """Output of the checkpoint: a stock Llama whose Linears add their experts one by one."""
        hooks = [self.base.get_submodule(name).register_forward_hook(self.adding(name)) for name in self.modules]
        logits = self.base(batch["input_ids"], batch["attention_mask"]).logits
        for hook in hooks:
            hook.remove()
        return logits

    def adding(self, module: str):
        def hook(linear, inputs, output):
            def weight(part: str) -> torch.Tensor:
                return self.tensors[f"{PREFIX}{module}.{part}.weight"].float()

            shares = torch.softmax(inputs[0] @ weight("lora_route").T, dim=-1)
            for n in range(self.experts):
                expert = inputs[0] @ weight(f"lora_A{n}").T @ weight(f"lora_B{n}").T
                output = output + shares[..., n : n + 1] * expert * self.scaling
            return output

        return hook

    def run(self, *flags: str) -> None:
        main(["--checkpoint", str(self.folder), "--output", str(self.output), *flags])

    def assert_same_logits(self) -> None:
        batch = make_batch(pad=2)
        expected = self.looped_logits(batch)
        model = PeftModel.from_pretrained(tiny_model(), self.output)
        logits = model(batch["input_ids"], batch["attention_mask"]).logits
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        plain = self.base(batch["input_ids"], batch["attention_mask"]).logits
        assert (expected - plain).abs().max() > 0.1

    def refused(self, pattern: str) -> None:
        """The import ends with one message and does not leave any files."""
        before = sorted(self.folder.parent.iterdir())
        with pytest.raises(InputError, match=pattern):
            self.run()
        assert sorted(self.folder.parent.iterdir()) == before


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"experts": 3, "rank": 4},
        {"experts": 1},
        {"use_rslora": True},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16},
        {"experts": 2, "blc_alpha": 0.1, "blc_weight": 0.2},
    ],
    ids=str,
)
def test_the_adapter_computes_what_a_loop_over_the_checkpoint_computes(tmp_path, settings):
    checkpoint = Checkpoint(tmp_path, **settings)
    checkpoint.run()
    checkpoint.assert_same_logits()
    kinds = ["lora_A", "lora_B", *(["router.weight"] if checkpoint.experts > 1 else [])]
    tensors = load_file(checkpoint.output / "adapter_model.safetensors")
    assert set(tensors) == {f"{PREFIX}{module}.experts.{kind}" for module in MLP for kind in kinds}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert {file.name for file in tmp_path.iterdir()} == {"sft_lora_model", "ours"}
    assert {file.name for file in checkpoint.output.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_the_configuration_carries_over(tmp_path):
    checkpoint = Checkpoint(tmp_path, blc_alpha=0.2, blc_weight=0.3, lora_dropout=0.25)
    checkpoint.run("--num_task_types", "4", "--base_model", "my/llama")
    assert LoraConfig.from_pretrained(checkpoint.output) == LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path="my/llama",
        r=2,
        lora_alpha=6.0,
        lora_nums=4,
        lora_dropout=0.25,
        blc_alpha=0.2,
        blc_weight=0.3,
        num_task_types=4,
        target_modules=["gate_proj", "up_proj", "down_proj"],
    )


@pytest.mark.parametrize(
    ("wanted", "modules", "expected"),
    [
        (["up_proj", "W_pack"], MLP[1::3], ["up_proj"]),
        (["mlp.up_proj"], MLP[1::3], ["mlp.up_proj"]),
        (["proj"], MLP, sorted(MLP)),
        (r".*layers\.1\.mlp\.up_proj", MLP[4:5], MLP[4:5]),
    ],
)
def test_targets_find_exactly_the_linears_of_the_checkpoint(tmp_path, wanted, modules, expected):
    checkpoint = Checkpoint(tmp_path, modules=modules, target_modules=wanted)
    checkpoint.run()
    assert LoraConfig.from_pretrained(checkpoint.output).target_modules == expected
    checkpoint.assert_same_logits()


def test_the_summary_says_what_was_imported_and_how_to_go_on(tmp_path, capsys, data_file, model_dir):
    checkpoint = Checkpoint(tmp_path)
    checkpoint.run()
    out = capsys.readouterr().out
    assert "6 adapted Linears (down_proj, gate_proj, up_proj), each with 4 experts of rank 2" in out
    assert f'from_pretrained(base, "{checkpoint.output}")' in out
    assert "note" not in out
    words = shlex.split(next(line for line in out.splitlines() if "run_loramoe.sh" in line))
    assert {word.split("=")[0] for word in words[:2]} <= set(SHELL_VARIABLES)
    others = [
        "--model_name_or_path",
        model_dir,
        "--dataset_dir",
        data_file,
        "--output_dir",
        tmp_path,
        "--use_cpu",
        "true",
    ]
    flags = words[words.index("run_loramoe.sh") + 1 :]
    model_args, data_args, _ = parse_arguments([*map(str, others), *flags])
    ours = LoraConfig.from_pretrained(checkpoint.output)
    ours.base_model_name_or_path = str(model_dir)
    assert (model_args.lora_config(), data_args.prompt_template) == (ours, "plain")
    assert model_args.peft_path == str(checkpoint.output)


def test_one_expert_loses_its_router_with_a_note(tmp_path, capsys):
    Checkpoint(tmp_path, experts=1).run()
    out = capsys.readouterr().out
    assert "each with 1 expert of rank 2" in out
    assert "note: the routers (lora_route) were dropped" in out


def test_missing_and_surplus_keys_and_wrong_shapes_are_named_together(tmp_path):
    checkpoint = Checkpoint(tmp_path)
    checkpoint.tensors["lm_head.weight"] = torch.ones(3)
    checkpoint.tensors[f"{UP}.lora_A4.weight"] = torch.ones(2, 32)
    del checkpoint.tensors[f"{UP}.lora_B3.weight"]
    checkpoint.tensors[f"{UP}.lora_A0.weight"] = torch.ones(2, 33)
    checkpoint.tensors[f"{UP}.lora_B1.weight"] = torch.ones(2, 48)
    checkpoint.tensors[f"{UP}.lora_A2.weight"] = torch.ones(2, 32, dtype=torch.int8)
    checkpoint.save()
    lines = [
        f"missing: {UP}.lora_B3.weight",
        f"unexpected: {UP}.lora_A4.weight",
        "unexpected: lm_head.weight",
        f"{UP}.lora_A0.weight has shape (2, 33), but has to have (2, 32)",
        f"{UP}.lora_B1.weight has shape (2, 48), but has to have (48, 2)",
        f"{UP}.lora_A2.weight holds torch.int8, but has to be float",
    ]
    checkpoint.refused(
        "adapter_model.bin does not fit its adapter_config.json:\n  " + re.escape("\n  ".join(lines)) + "$"
    )


def test_partitioned_weights_are_explained(tmp_path):
    checkpoint = Checkpoint(tmp_path)
    checkpoint.tensors = {key: torch.empty(0) for key in checkpoint.tensors}
    checkpoint.save()
    checkpoint.refused(r"lora_A0.weight has shape \(0\), but has to have \(2, in\)(.|\n)*ZeRO-3")


def test_plain_lora_weights_are_explained(tmp_path):
    checkpoint = Checkpoint(tmp_path)
    checkpoint.tensors = {f"{UP}.lora_A.weight": torch.ones(2, 32)}
    checkpoint.save()
    checkpoint.refused(rf"there are no experts: no key is like .*lora_A0.weight\n  unexpected: {UP}.lora_A.weight")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_of_more_than_tensors_is_refused_and_not_run(tmp_path, zipped):
    class Unsafe:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    checkpoint = Checkpoint(tmp_path)
    for surplus, name in ((Unsafe(), f"{os.mkdir.__module__}.mkdir"), (Namespace(lr=1), "argparse.Namespace")):
        tensors = checkpoint.tensors | {"surplus": surplus}
        torch.save(tensors, checkpoint.folder / "adapter_model.bin", _use_new_zipfile_serialization=zipped)
        checkpoint.refused(rf"contains more than tensors: it refers to {name}. .*refused for safety")
        assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0, 0.002, 0.5, 0.999])
def test_a_truncated_pickle_is_named(tmp_path, zipped, share):
    checkpoint = Checkpoint(tmp_path)
    file = checkpoint.folder / "adapter_model.bin"
    torch.save(checkpoint.tensors, file, _use_new_zipfile_serialization=zipped)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    checkpoint.refused(r"adapter_model.bin is damaged or incomplete, or torch.save did not write it")


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ([torch.ones(2)], "holds a list, but has to be a dictionary"),
        ({3: torch.ones(2)}, "holds a dict, but has to be a dictionary of tensors by name"),
        ({"step": 3}, "may only contain tensors, but these are not: step"),
    ],
)
def test_pickles_of_other_things_are_named(tmp_path, content, pattern):
    checkpoint = Checkpoint(tmp_path)
    checkpoint.tensors = content
    checkpoint.save()
    checkpoint.refused(pattern)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.bin"])
def test_missing_files_are_named(tmp_path, name):
    checkpoint = Checkpoint(tmp_path)
    (checkpoint.folder / name).unlink()
    checkpoint.refused(f"sft_lora_model is not a checkpoint of the authors' code: it does not have {name} ")


@pytest.mark.parametrize(
    ("text", "pattern"),
    [('{"r": ', "is not valid JSON"), ("\ud800", "is not valid JSON"), ("[3]", "holds a list, but has to be")],
)
def test_a_damaged_configuration_is_named(tmp_path, text, pattern):
    checkpoint = Checkpoint(tmp_path)
    (checkpoint.folder / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    checkpoint.refused(rf"adapter_config.json {pattern}")


def test_fields_that_cannot_be_imported_are_named_together(tmp_path):
    checkpoint = Checkpoint(
        tmp_path,
        bias="all",
        fan_in_fan_out=True,
        modules_to_save=["lm_head"],
        enable_lora=[True, False],
        task_type="SEQ_CLS",
        use_rslora="yes",
        peft_type="LORAMOE",
    )
    checkpoint.fields |= {"r": "4", "target_modules": None}
    del checkpoint.fields["lora_nums"]
    checkpoint.save()
    lines = [
        'bias is "all", which',
        "enable_lora is [true, false], which",
        "fan_in_fan_out is true, which",
        "lora_nums is missing, but has to be a whole number",
        'modules_to_save is ["lm_head"], which',
        'peft_type is "LORAMOE", which',
        'r is "4", but has to be a whole number',
        "target_modules is null, but has to be a list of names",
        'task_type is "SEQ_CLS", which',
        'use_rslora is "yes", which',
    ]
    checkpoint.refused(r"cannot be imported:\n  " + r".*\n  ".join(map(re.escape, lines)))


def test_values_that_our_configuration_refuses_are_named(tmp_path):
    Checkpoint(tmp_path, lora_dropout=1.0).refused(r"lora_dropout is 1.0, but has to be in \[0, 1\)")


def test_groups_have_to_be_equal_only_where_the_balance_term_counts(tmp_path):
    Checkpoint(tmp_path, experts=3, blc_weight=0.1).refused(
        "lora_nums is 3 and num_task_types is 2: the experts cannot"
    )
    Checkpoint(tmp_path, experts=3, blc_weight=0.0).run()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_output_that_is_taken_is_left_alone(tmp_path, kind):
    checkpoint = Checkpoint(tmp_path)
    mine = checkpoint.output / "mine" if kind == "folder" else checkpoint.output
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    checkpoint.refused("ours exists and is not an empty folder")
    assert mine.read_text() == "mine"


def test_an_empty_output_folder_and_missing_parents_are_fine(tmp_path):
    checkpoint = Checkpoint(tmp_path)
    checkpoint.output.mkdir()
    checkpoint.run()
    deep = tmp_path / "a" / "b"
    import_checkpoint(checkpoint.folder, deep)
    assert (
        load_file(deep / "adapter_model.safetensors").keys()
        == load_file(checkpoint.output / "adapter_model.safetensors").keys()
    )


def test_an_interrupted_import_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(self, directory):
        assert (directory / "adapter_model.safetensors").exists()
        raise KeyboardInterrupt

    checkpoint = Checkpoint(tmp_path)
    monkeypatch.setattr(LoraConfig, "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.run()
    assert [file.name for file in tmp_path.iterdir()] == ["sft_lora_model"]


def test_the_program_prints_one_line_and_exits_with_1(tmp_path):
    program = [sys.executable, "-m", "scripts.import_reference"]
    outcome = call([*program, "--checkpoint", str(tmp_path / "none"), "--output", str(tmp_path / "ours")])
    assert outcome.returncode == 1
    assert outcome.stderr.startswith("error: ")
    assert outcome.stderr.count("\n") == 1
    assert outcome.stdout == ""
