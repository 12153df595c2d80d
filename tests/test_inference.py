"""A trained adapter on its base model: what is loaded, and what is refused with one message."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, filled_model, tiny_config, tiny_tokenizer
from transformers import GenerationConfig, LlamaForCausalLM

from data import InputError
from inference import trained
from inference.generation import DecodingArguments
from inference.trained import InferenceArguments, load_trained
from loading.arguments import ModelArguments
from loading.command_line import output_problem, parse_flags
from peft import PeftModel
from transformers_patch.recorder import RoutingRecorder

INPUT = torch.arange(5, 25)[None]


def load(folder, **flags):
    return load_trained(InferenceArguments(adapter=str(folder), **flags))


def refusal(folder, **flags) -> str:
    with pytest.raises(InputError) as caught:
        load(folder, **flags)
    return str(caught.value)


def test_an_adapter_folder_alone_gives_the_trained_model(adapter_dir, model_dir):
    trained = load(adapter_dir)
    with torch.no_grad():
        expected = filled_model().eval()(INPUT).logits
        base = LlamaForCausalLM.from_pretrained(model_dir)(INPUT).logits
        torch.testing.assert_close(trained.model(INPUT).logits, expected)
        assert not torch.allclose(expected, base)
        with trained.as_base():
            torch.testing.assert_close(trained.model(INPUT).logits, base)
    assert not trained.model.training
    assert trained.template() == "plain"
    assert trained.template("auto") == "chat"
    assert trained.run_config["max_seq_length"] == 128


def test_a_checkpoint_has_the_configuration_of_its_run(adapter_dir, monkeypatch):
    checkpoint = adapter_dir / "checkpoint-5"
    checkpoint.mkdir()
    for file in [file for file in adapter_dir.iterdir() if file.is_file() and file.name != "run_config.json"]:
        shutil.copy(file, checkpoint)
    assert load(checkpoint).run_config == load(adapter_dir).run_config
    monkeypatch.chdir(checkpoint)
    assert load(".").template() == "plain"


def test_the_tokenizer_is_the_base_models_where_the_folder_has_none(adapter_dir):
    for name in ("tokenizer.json", "tokenizer_config.json", "run_config.json", "chat_template.jinja"):
        (adapter_dir / name).unlink(missing_ok=True)
    assert load(adapter_dir).template() == "chat"


def test_a_folder_of_a_complete_model_works_but_has_no_base(model_dir):
    trained = load(model_dir)
    assert not isinstance(trained.model, PeftModel)
    with pytest.raises(InputError, match="holds a complete model"):
        trained.as_base()


def test_the_names_of_a_fully_tuned_models_task_types_are_read_as_train_reads_them(model_dir, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "tuned")
    for flag in ("task_type_names", "task_types"):  # the latter is the flag of earlier runs
        flags = {flag: "other, world knowledge ,", "num_task_types": 2}
        (folder / "run_config.json").write_text(json.dumps(flags))
        assert load(folder).task_type_names == ("other", "world knowledge")
    flags = ModelArguments(task_type_names="other, world knowledge ,")
    assert flags.lora_config().task_type_names == ["other", "world knowledge"]


def test_sampling_that_the_base_models_folder_proposes_is_not_taken_over(adapter_dir, model_dir, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(model_dir, base)
    GenerationConfig(do_sample=True, temperature=0.6, repetition_penalty=1.3, eos_token_id=7).save_pretrained(base)
    trained = load(adapter_dir, base_model=str(base))
    assert trained.model.generation_config.do_sample in (None, False)
    assert trained.model.generation_config.repetition_penalty in (None, 1.0)
    assert trained.end_tokens("plain") == [1, 7]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kbits", "bound"), [(4, 0.8), (8, 0.1)])
def test_a_quantised_base_under_the_adapter(adapter_dir, kbits, bound, dtype):
    quantised, exact = load(adapter_dir, load_in_kbits=kbits, dtype=dtype), load(adapter_dir)
    with torch.no_grad():
        difference = (quantised.model(INPUT).logits - exact.model(INPUT).logits).norm()
        assert 0 < difference < bound * exact.model(INPUT).logits.norm()


def test_bfloat16_is_taken_at_its_word(adapter_dir):
    trained = load(adapter_dir, dtype="bfloat16")
    assert trained.model.dtype == torch.bfloat16
    assert trained.model(INPUT).logits.isfinite().all()


@pytest.mark.parametrize(("capable", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_that_only_emulates_bfloat16_computes_in_float16(monkeypatch, capable, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: capable or including_emulation
    )
    assert InferenceArguments(adapter="x").torch_dtype is dtype
    assert InferenceArguments(adapter="x", device_map="cpu").torch_dtype is torch.float32


def test_a_folder_that_is_no_adapter(tmp_path):
    assert "no such folder" in refusal(tmp_path / "nowhere")
    assert "it has no adapter_config.json" in refusal(tmp_path)


def test_an_adapter_from_the_hub(adapter_dir, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append(name)
        return str(adapter_dir)

    monkeypatch.setattr(trained, "snapshot_download", download)
    with torch.no_grad():
        assert torch.equal(load("someone/adapter").model(INPUT).logits, load(adapter_dir).model(INPUT).logits)
    assert asked == ["someone/adapter"]


def test_a_complete_model_from_the_hub(model_dir, monkeypatch):
    monkeypatch.setattr(trained, "snapshot_download", lambda name, allow_patterns: str(model_dir))
    assert not isinstance(load("someone/model").model, PeftModel)


@pytest.mark.parametrize("name", ["someone/adapter", "adapter", "no id"])
def test_an_adapter_that_neither_folder_nor_hub_has(name):
    """The tests run offline."""
    assert f"--adapter {name}: no such folder, and it could not be downloaded from the hub: " in refusal(name)


def test_a_failure_without_a_message_is_named(monkeypatch):
    def fail(name, allow_patterns):
        raise TimeoutError

    monkeypatch.setattr(trained, "snapshot_download", fail)
    assert refusal("someone/adapter").endswith("could not be downloaded from the hub: TimeoutError")


def test_a_base_model_that_is_not_there(adapter_dir, tmp_path):
    message = refusal(adapter_dir, base_model=str(tmp_path / "nowhere"))
    assert "no such folder (--base_model)" in message


def test_names_that_the_system_refuses_are_one_message(adapter_dir):
    for name in ("x" * 300, f"./{'x' * 300}"):
        assert "cannot be read: File name too long" in refusal(name)
        assert "cannot be read: File name too long" in refusal(adapter_dir, base_model=name)


def test_an_adapter_that_names_no_base_model(adapter_dir):
    config = json.loads((adapter_dir / "adapter_config.json").read_text())
    (adapter_dir / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    assert "give one with --base_model" in refusal(adapter_dir)


def test_a_base_model_of_another_size_is_refused_by_layer_before_its_weights_are_read(adapter_dir, tmp_path):
    other = tmp_path / "other"
    tiny_config(hidden_size=64, intermediate_size=96, num_hidden_layers=2).save_pretrained(other)  # no weights
    tiny_tokenizer().save_pretrained(other)
    message = refusal(adapter_dir, base_model=str(other))
    assert "model.layers.0.mlp.down_proj.experts.lora_A has shape (8, 48), the model needs (8, 96)" in message
    assert len(message.splitlines()) < 20
    assert "more" in message.splitlines()[-1]


def test_another_base_model_of_the_same_shape_is_warned_of(adapter_dir, model_dir, tmp_path, capsys):
    load(adapter_dir, base_model=f"{model_dir}/.")
    assert "warning" not in capsys.readouterr().err
    load(adapter_dir, base_model=str(shutil.copytree(model_dir, tmp_path / "other")))
    assert re.search(r"warning: the adapter was trained on .*tiny-llama, and the base .*other", capsys.readouterr().err)


DAMAGE = [
    ("config.json", {"dtype": "foo"}, "has no attribute 'foo'"),
    ("config.json", {"hidden_size": "big"}, "field 'hidden_size'"),
    ("config.json", {"num_attention_heads": 0}, "ZeroDivisionError"),
    ("config.json", {"rope_parameters": {"rope_type": "odd"}}, "KeyError: 'odd'"),
    ("config.json", {"hidden_act": "odd"}, "KeyError: 'odd'"),
    ("config.json", {"pad_token_id": 999}, "Padding_idx"),
    ("config.json", {"head_dim": -1}, "negative dimension"),
    ("tokenizer_config.json", {"eos_token": 7}, "eos_token has to be"),
    ("tokenizer_config.json", {"tokenizer_class": 7}, "AttributeError"),
]


def test_a_base_model_whose_json_files_are_damaged(adapter_dir, model_dir, tmp_path):
    """Also if the tokenizer is the adapter's, so that the model's configuration is read for the model alone."""
    base = shutil.copytree(model_dir, tmp_path / "base")
    for adapter in (adapter_dir, base):
        for name, changes, message in DAMAGE:
            if (adapter, name) == (adapter_dir, "tokenizer_config.json"):
                continue
            complete = (base / name).read_text()
            (base / name).write_text(json.dumps(json.loads(complete) | changes))
            assert re.search(rf"config.json .*cannot be used \(.*{message}", refusal(adapter, base_model=str(base)))
            (base / name).write_text(complete)


def test_adapter_weights_that_are_damaged_or_missing(adapter_dir):
    weights = adapter_dir / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "is damaged or incomplete" in refusal(adapter_dir)
    weights.unlink()
    assert "holds no adapter weights" in refusal(adapter_dir)


def test_a_run_config_that_is_damaged(adapter_dir):
    (adapter_dir / "run_config.json").write_text("{")
    assert "run_config.json is not valid JSON" in refusal(adapter_dir)
    (adapter_dir / "run_config.json").write_text("[]")
    assert "run_config.json holds [] instead of an object" in refusal(adapter_dir)
    damaged = {"max_seq_length": "abc", "num_task_types": True, "prompt_template": None, "validation_file": ["x"]}
    (adapter_dir / "run_config.json").write_text(json.dumps(damaged | {"task_types": None, "dataset_dir": "rows"}))
    message = refusal(adapter_dir)
    assert [name for name in damaged if f"{name!r} is {json.dumps(damaged[name])}, but has to be" in message] == [
        *damaged
    ]
    assert len(message.splitlines()) == len(damaged)


def test_flags_are_refused_all_at_once():
    flags = "--adapter x --load_in_kbits 3 --batch_size 0 --device_map gpu --top_p 0.5 --temperature -1"
    with pytest.raises(InputError) as caught:
        parse_flags("verb", "", (InferenceArguments, DecodingArguments), flags.split())
    for name in ("--load_in_kbits is 3", "--batch_size is 0", "--device_map gpu", "--temperature is -1"):
        assert name in str(caught.value)


def unreadable(path: Path):
    raise PermissionError(errno.EACCES, "Permission denied", str(path))


def test_places_that_cannot_be_written_are_named_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "folder.json").mkdir()
    for name, message in {
        "file/x.json": "file is not a folder",
        "file/new/x.json": "file is not a folder",
        "loop/x.json": "loop is a link to",
        "folder.json": "is a folder, but has to be a file",
        "x" * 300 + ".json": "File name too long",
        "x" * 300 + "/x.json": "File name too long",
        "caf\udce9/x.json": "not valid UTF-8",
    }.items():
        assert message in output_problem(tmp_path / name, [str(tmp_path / "other")])
    assert output_problem(tmp_path / "new" / "x.json") is output_problem(None) is None
    assert output_problem(tmp_path / "folder.json", is_folder=True) is None
    assert "is not an empty folder" in output_problem(tmp_path, is_folder=True)
    assert "File name too long" in output_problem(tmp_path / "x.json", ["x" * 300])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", unreadable)
        assert "Permission denied" in output_problem(tmp_path, is_folder=True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert output_problem(tmp_path / "new" / "x.json").endswith(f"{tmp_path} is not writable")


def test_unknown_and_missing_flags():
    with pytest.raises(InputError, match="did you mean --batch_size"):
        parse_flags("verb", "", (InferenceArguments,), ["--adapter", "x", "--batchsize", "3"])
    with pytest.raises(InputError, match="required: --adapter"):
        parse_flags("verb", "", (InferenceArguments,), [])


@pytest.mark.slow
def test_the_trained_model_of_the_main_job():
    if not (ROOT / "outputs" / "default").exists():
        pytest.skip("bash run_loramoe.sh makes outputs/default")
    assert (
        load(ROOT / "outputs" / "default", base_model=str(ROOT / "models/SmolLM2-135M-Instruct")).template() == "chat"
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_experts_of_a_half_precision_model_are_cast_once_without_changing_a_bit(adapter_dir, dtype):
    cast = load(adapter_dir, dtype=dtype).model
    each_call = load_trained(InferenceArguments(adapter=str(adapter_dir), dtype=dtype), casts_experts=False).model
    assert {parameter.dtype for parameter in cast.parameters()} == {getattr(torch, dtype)}
    assert {parameter.dtype for parameter in each_call.parameters()} == {getattr(torch, dtype), torch.float32}
    with torch.no_grad(), RoutingRecorder(cast) as weights, RoutingRecorder(each_call) as expected:
        assert torch.equal(cast(INPUT).logits, each_call(INPUT).logits)
    for name in expected.weights:
        assert weights.weights[name].dtype == torch.float32
        assert torch.equal(weights.weights[name], expected.weights[name])
