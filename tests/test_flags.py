"""Every flag that `train.py` has from transformers works, is refused, or has no effect for a stated reason."""

import errno
import json
import os
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_launch import dry_run_in, launch, stand_in_repository
from test_train import Runner, interrupt_after, same_adapter
from transformers import LlamaForCausalLM, TrainingArguments

import train
from data import InputError
from loading.arguments import DataArguments, ModelArguments, RunArguments, parse_arguments
from loading.base_model import quantization
from loading.optimization import EVALUATED, OPTIMIZERS
from loading.run_files import ADDED
from training import checkpoint
from training.run_folder import WITHOUT_EFFECT, WITHOUT_EFFECT_PREFIXES, RunFolder

# Values that leave every bit of the adapter as it is: of all flags that are said to decide nothing, and of more.
WITHOUT_A_TRACE = (
    {
        "do_train": "true", "do_eval": "true", "eval_strategy": "steps", "eval_steps": 1, "eval_delay": 1,
        "eval_on_start": "true", "profile_steps": "1-2",
        "save_only_model": "true", "eval_do_concat_batches": "true", "eval_accumulation_steps": 1,
        "per_device_eval_batch_size": 2, "save_steps": 1, "save_total_limit": 0,
        "logging_steps": 3, "logging_first_step": "false", "logging_nan_inf_filter": "false", "log_level": "error",
        "log_level_replica": "error", "log_on_each_node": "false", "disable_tqdm": "true", "report_to": "none",
        "run_name": "x", "project": "x", "trackio_space_id": "x", "trackio_bucket_id": "x", "local_rank": 0,
        "trackio_static_space_id": "x", "dataloader_num_workers": 2, "dataloader_prefetch_factor": 3,
        "dataloader_persistent_workers": "true", "dataloader_multiprocessing_context": "fork",
        "dataloader_pin_memory": "false", "preprocessing_num_workers": 2, "ddp_timeout": 60, "ddp_backend": "gloo",
        "hub_token": "x", "hub_private_repo": "true", "hub_model_id": "x", "hub_strategy": "end",
        "hub_always_push": "true", "hub_revision": "x", "push_to_hub": "false", "debug": "underflow_overflow",
    },
    {
        "eval_strategy": "epoch", "save_strategy": "best", "greater_is_better": "false", "logging_strategy": "epoch",
        "skip_memory_metrics": "false", "torch_empty_cache_steps": 1, "use_cache": "true", "label_names": "x",
        "prediction_loss_only": "true", "include_for_metrics": "loss", "include_num_input_tokens_seen": "true",
        "tf32": "false", "full_determinism": "true", "gradient_checkpointing": "true",
        "gradient_checkpointing_kwargs": '{"use_reentrant": false}', "average_tokens_across_devices": "true",
        "remove_unused_columns": "false", "length_column_name": "length", "data_cache_dir": "elsewhere",
    },
    {"validation_file": None, "save_strategy": "no", "activation_checkpointing": "true",
     "activation_checkpointing_kwargs": '{"use_reentrant": false}'},
)  # fmt: skip

# The ones among them that do nothing here.
HARMLESS = {
    "do_train": "train.py trains",
    "do_eval": "a run is evaluated if it has a validation_file",
    "eval_on_start": "it is, if it has a validation_file",
    "prediction_loss_only": "an evaluation returns likelihoods and routing shares, no logits",
    "include_for_metrics": "the measures need neither inputs nor the loss of a batch",
    "label_names": "the Trainer of this project knows which columns are labels",
    "use_cache": "training has no use for a cache",
    "local_rank": "the launcher's environment says it",
    "hub_always_push": "a run is uploaded once, at its end",
    "trackio_space_id": "without trackio", "trackio_bucket_id": "without trackio",
    "trackio_static_space_id": "without trackio", "project": "without trackio",
}  # fmt: skip

# Values that change what is trained.
DECIDING = {
    "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "num_train_epochs": 1, "max_steps": 3,
    "learning_rate": 0.02, "warmup_steps": 2, "weight_decay": 0.5, "adam_beta1": 0.5, "adam_beta2": 0.9,
    "adam_epsilon": 0.1, "max_grad_norm": 0.1, "bf16": "true", "neftune_noise_alpha": 5, "seed": 4, "data_seed": 4,
    "train_sampling_strategy": "sequential", "dataloader_drop_last": "true",
}  # fmt: skip
SCHEDULES = {
    "linear": None,
    "cosine_with_restarts": '{"num_cycles": 2}',
    "polynomial": '{"power": 2}',
    "constant": None,
    "constant_with_warmup": None,
    "inverse_sqrt": None,
    "cosine_with_min_lr": '{"min_lr": 0.001}',
    "cosine_warmup_with_min_lr": '{"min_lr_rate": 0.1}',
    "warmup_stable_decay": '{"num_decay_steps": 2}',
    "reduce_lr_on_plateau": '{"patience": 0, "threshold": 1000}',
    "greedy": '{"min_lr": 0.001, "patience": 0, "threshold": 1000}',
}
OF_DDP = {
    "ddp_find_unused_parameters": "true", "ddp_bucket_cap_mb": 1, "ddp_broadcast_buffers": "false",
    "ddp_static_graph": "false", "ddp_backend": "gloo", "ddp_timeout": 600,
}  # fmt: skip
ELSEWHERE = {
    "deepspeed": "test_launch.py", "load_best_model_at_end": "below", "output_dir": "every run", "use_cpu": "every run",
}  # fmt: skip
# The flag in question comes first.
REFUSED = [
    ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor bypasses"),
    ({"average_tokens_across_devices": "false"}, "--average_tokens_across_devices false ties"),
    ({"fsdp": "full_shard"}, "--fsdp is not supported"),
    ({"fsdp_config": "x.json"}, "--fsdp_config: FSDP is not supported"),
    ({"remove_unused_columns": "true"}, "--remove_unused_columns would remove columns"),
    ({"eval_do_concat_batches": "false"}, "--eval_do_concat_batches false is not supported"),
    ({"batch_eval_metrics": "true"}, "--batch_eval_metrics is not supported"),
    ({"use_liger_kernel": "true"}, "--use_liger_kernel replaces"),
    ({"liger_kernel_config": "{}"}, "--liger_kernel_config"),
    ({"train_sampling_strategy": "x"}, "--train_sampling_strategy has to be one of"),
    ({"resume_from_checkpoint": "x"}, "from its last checkpoint by itself"),
    ({"hub_strategy": "every_save"}, "--hub_strategy: --push_to_hub uploads"),
    ({"auto_find_batch_size": "true"}, "--auto_find_batch_size would make"),
    ({"torch_compile": "true"}, "--torch_compile is not supported"),
    ({"torch_compile_backend": "eager"}, "--torch_compile is not supported"),
    ({"torch_compile_mode": "default"}, "--torch_compile is not supported"),
    ({"bf16_full_eval": "true"}, "--bf16_full_eval would round"),
    ({"fp16_full_eval": "true"}, "--fp16_full_eval would round"),
    ({"do_predict": "true"}, "--do_predict: use python -m scripts.generate"),
    ({"do_eval": "true", "validation_file": None}, "--do_eval needs a --validation_file"),
    ({"eval_on_start": "true", "validation_file": None}, "--eval_on_start needs a --validation_file"),
    ({"eval_strategy": "epoch", "validation_file": None}, "--eval_strategy epoch needs a --validation_file"),
    ({"save_strategy": "best"}, "--save_strategy best needs an --eval_strategy"),
    ({"load_best_model_at_end": "true"}, "--load_best_model_at_end needs an --eval_strategy"),
    ({"load_best_model_at_end": "true", "eval_strategy": "epoch"}, "save and eval strategy to match"),
    ({"metric_for_best_model": "eval_runtime"}, "--metric_for_best_model has to be one of loss, lm_loss, perplexity"),
    ({"greater_is_better": "true"}, "lower is better for every measurement"),
    ({"save_on_each_node": "true"}, "--save_on_each_node: all nodes share"),
    ({"enable_jit_checkpoint": "true"}, "--enable_jit_checkpoint: a run saves a checkpoint on SIGTERM"),
    ({"ignore_data_skip": "true"}, "--ignore_data_skip would make"),
    ({"restore_callback_states_from_checkpoint": "true"}, "--restore_callback_states_from_checkpoint: a resumed"),
    ({"accelerator_config": '{"split_batches": true}'}, "--accelerator_config is not supported"),
    ({"parallelism_config": "{}"}, "--parallelism_config"),
    ({"dataloader_in_order": "false"}, "--dataloader_in_order false would make"),
    ({"dataloader_multiprocessing_context": "x"}, "argument --dataloader_multiprocessing_context"),
    ({"dataloader_multiprocessing_context": "fork"}, "--dataloader_multiprocessing_context needs --dataloader_num_w"),
    ({"dataloader_persistent_workers": "true"}, "--dataloader_persistent_workers needs --dataloader_num_workers"),
    ({"dataloader_prefetch_factor": 2}, "--dataloader_prefetch_factor can only be set"),
    ({"length_column_name": "task"}, "--length_column_name: the length of a row"),
    ({"eval_use_gather_object": "true"}, "--eval_use_gather_object is not supported"),
    ({"activation_checkpointing": "false", "gradient_checkpointing": "true"}, "contradict each other"),
    ({"debug": "tpu_metrics_debug"}, "--debug supports only underflow_overflow"),
    ({"report_to": "wandb"}, "--report_to wandb is not installed here"),
    ({"log_level": "x"}, "argument --log_level"),
    ({"log_level_replica": "x"}, "argument --log_level_replica"),
    ({"include_num_input_tokens_seen": "x"}, "argument --include_num_input_tokens_seen"),
    ({"ddp_backend": "x"}, "argument --ddp_backend"),
    ({"deepspeed": "none.json"}, "--deepspeed none.json: no such file"),
    ({"fp16": "true"}, "--fp16 has no effect on a CPU"),
    ({"tf32": "true"}, "--tf32 needs a GPU"),
    ({"activation_checkpointing_kwargs": '{"use_reentrant": true}'}, "re-entrant checkpointing detaches"),
    ({"activation_checkpointing_kwargs": '{"preserve_rng_state": false}'}, "can only be .*use_reentrant"),
    ({"gradient_checkpointing_kwargs": "x"}, "--gradient_checkpointing_kwargs can only be"),
    ({"optim": "galore_adamw"}, "--optim galore_adamw is not supported; supported are adamw_torch,"),
    ({"optim": "lomo"}, "--optim lomo is not supported"),
    ({"optim": "x"}, "argument --optim"),
    ({"optim_args": "momentum=0.9"}, "--optim_args is 'momentum=0.9', but --optim adamw_torch_fused does not read any"),
    ({"optim_args": "momentum", "optim": "sgd"}, "--optim sgd reads momentum=VALUE, dampening=VALUE, nesterov=VALUE"),
    ({"optim_args": "momentum=x", "optim": "sgd"}, "--optim sgd cannot be used: could not convert"),
    ({"optim_target_modules": "all-linear"}, "--optim_target_modules is not used by any supported"),
    ({"lr_scheduler_type": "x"}, "--lr_scheduler_type is 'x'; allowed are linear, cosine"),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, "--lr_scheduler_type cosine_with_min_lr cannot .* min_lr_rate"),
    ({"lr_scheduler_type": "warmup_stable_decay"}, "cannot be used .*num_decay_steps"),
    ({"lr_scheduler_type": "greedy", "eval_strategy": "epoch", "learning_rate": 1e-4}, "greedy needs a min_lr"),
    *[({"lr_scheduler_type": name}, f"--lr_scheduler_type {name} needs an --eval_strategy") for name in EVALUATED],
    ({"lr_scheduler_kwargs": '{"min_lr": 1}', "lr_scheduler_type": "cosine_with_min_lr"}, "gives rates outside 0 to"),
    ({"lr_scheduler_kwargs": "x"}, "--lr_scheduler_kwargs is 'x', but has to be a JSON object"),
    ({"lr_scheduler_kwargs": '{"x": 1}'}, r"--lr_scheduler_kwargs {\"x\": 1}: .*unexpected keyword"),
    ({"lr_scheduler_kwargs": '{"x": 1}', "lr_scheduler_type": "constant"}, "_type constant does not read any"),
    ({"lr_scheduler_kwargs": '{"mode": "max"}', "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
     "mode has to be min"),
    *[({"lr_scheduler_type": name, "eval_strategy": "epoch", "metric_for_best_model": metric,
        "knowledge_probe": "auto"},
       f"--lr_scheduler_type {name} follows a loss, so it excludes --metric_for_best_model {metric}")
      for name in EVALUATED for metric in ("knowledge_kept", "eval_loss_if_kept")],
    *[({"greater_is_better": "false", "eval_strategy": "epoch", "metric_for_best_model": metric,
        "knowledge_probe": "auto"},
       f"--greater_is_better false contradicts --metric_for_best_model {metric}, of which more is better")
      for metric in ("knowledge_kept", "eval_knowledge_kept")],
]  # fmt: skip
OUT_OF_RANGE = {
    "per_device_train_batch_size": 0, "per_device_eval_batch_size": 0, "gradient_accumulation_steps": 0,
    "eval_accumulation_steps": 0, "dataloader_prefetch_factor": 0, "ddp_timeout": 0, "ddp_bucket_cap_mb": 0,
    "torch_empty_cache_steps": 0, "dataloader_num_workers": -1, "save_total_limit": -1, "max_steps": 0,
    "seed": 2**32, "data_seed": -5, "adam_beta1": 1, "adam_beta2": -0.1, "adam_epsilon": 0, "num_train_epochs": 0,
    "learning_rate": "inf", "weight_decay": -1, "max_grad_norm": "nan", "warmup_steps": "nan",
    "neftune_noise_alpha": -1, "logging_steps": -1, "eval_steps": -1, "eval_delay": -1, "save_steps": -1,
}  # fmt: skip


@pytest.fixture
def run(tmp_path, model_dir, monkeypatch) -> Runner:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    runner = Runner(tmp_path, model_dir)
    runner.flags |= {"max_steps": 4, "lora_dropout": 0.2}
    return runner


@pytest.fixture
def no_global_state(monkeypatch):
    """Undoes what --full_determinism and --log_level set in this process."""
    for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "")
    level = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(level)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.setattr(train, "build_model", lambda *arguments: pytest.fail("weights were read"))


def test_every_flag_of_transformers_is_in_the_tables():
    inherited = {field.name for field in fields(TrainingArguments)}
    own = {field.name for kind in (ModelArguments, DataArguments, RunArguments) for field in fields(kind)} - inherited
    tried = {name for flags in WITHOUT_A_TRACE for name in flags} | {*DECIDING, *OF_DDP, *ELSEWHERE}
    tried |= {"lr_scheduler_type", "lr_scheduler_kwargs", "optim", "optim_args", "metric_for_best_model"}
    refused = {next(iter(changes)) for changes, _ in REFUSED} | {*OUT_OF_RANGE}
    assert tried | refused >= inherited
    assert tried | refused <= inherited | own
    assert HARMLESS.keys() <= {name for flags in WITHOUT_A_TRACE for name in flags}


def test_flags_that_are_refused_are_refused_before_any_weight_is_read(run, no_weights):
    cases = [*REFUSED, *(({name: value}, f"--{name} is .*, but has to be") for name, value in OUT_OF_RANGE.items())]
    for changes, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            train.main(run.arguments(**changes, prepare_only="true"))
        assert "\n- --" not in str(caught.value), changes
    assert not run.output.exists()


def test_flags_without_effect_leave_no_trace_in_the_adapter(run, no_global_state, tmp_path, monkeypatch):
    """Dropout on. The flags that are not given: those that are refused, and those that say where and whether to run."""
    run()
    monkeypatch.chdir(tmp_path)
    for number, flags in enumerate(WITHOUT_A_TRACE):
        folder = tmp_path / f"run{number}"
        train.main(run.arguments(**flags, output_dir=folder))
        assert same_adapter(folder, run.output), flags
    names = {field.name for kind in (ModelArguments, DataArguments, RunArguments) for field in fields(kind)}
    claimed = {name for name in names if name in WITHOUT_EFFECT or name.startswith(WITHOUT_EFFECT_PREFIXES)}
    refused = {"do_predict", "resume_from_checkpoint", "save_on_each_node", "eval_use_gather_object"}
    # The device itself is in the configuration.
    where = {"output_dir", "prepare_only", "restart", "use_cpu"}
    assert claimed - {name for flags in WITHOUT_A_TRACE for name in flags} == refused | where


def test_the_device_and_the_attention_kernel_belong_to_the_configuration(run, no_weights):
    train.main(run.arguments(prepare_only="true"))
    file = run.output / "run_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"device": "cuda"}))
    with pytest.raises(InputError) as caught:
        train.main(run.arguments(attn_implementation="eager", prepare_only="true"))
    assert "attn_implementation: 'auto' there, 'eager' now" in str(caught.value)
    assert "device: 'cuda' there, 'cpu' now" in str(caught.value)


def test_flags_that_decide_change_the_adapter(run, tmp_path):
    run.flags |= {"validation_file": None, "per_device_train_batch_size": 5}
    train.main(run.arguments())
    for name, value in DECIDING.items():
        changes = {name: value} | ({"max_steps": None} if name == "num_train_epochs" else {})
        train.main(run.arguments(**changes, output_dir=tmp_path / name))
        assert not same_adapter(tmp_path / name, run.output), name
        assert_finite(tmp_path / name)


def assert_finite(folder: Path) -> None:
    assert all(tensor.isfinite().all() for tensor in load_file(folder / "adapter_model.safetensors").values())


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_optimizers(run, optim):
    args = {"sgd": "momentum=0.9, nesterov=true", "rmsprop": "alpha=0.9,centered=true", "ademamix": "t_alpha=9"}
    train.main(run.arguments(optim=optim, optim_args=args.get(optim), validation_file=None, max_steps=2))
    assert_finite(run.output)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(run, schedule):
    follows = {"eval_strategy": "steps", "eval_steps": 1} if schedule in EVALUATED else {"validation_file": None}
    train.main(run.arguments(lr_scheduler_type=schedule, lr_scheduler_kwargs=SCHEDULES[schedule], **follows))
    rates = [entry["learning_rate"] for entry in run.log() if "learning_rate" in entry]
    stages = {"constant": 1, "constant_with_warmup": 2, "warmup_stable_decay": 3, "greedy": 3}
    assert len({*rates}) == stages.get(schedule, len(rates))
    assert schedule == "greedy" or max(rates) <= run.flags["learning_rate"]


@pytest.mark.parametrize("settings", [{}, {"load_best_model_at_end": True}, {"lr_scheduler_type": "greedy"}])
def test_evaluations_decide_where_training_follows_them(run, no_weights, settings):
    train.main(run.arguments(**settings, eval_strategy="steps", eval_steps=2, prepare_only="true"))
    again = run.arguments(**settings, eval_strategy="steps", eval_steps=1, prepare_only="true")
    if not settings:
        train.main(again)
        return
    with pytest.raises(InputError, match=r"eval_steps: 2 there, 1\.0 now"):
        train.main(again)


@pytest.mark.parametrize("metric", [None, "perplexity", "eval_lm_loss"])
@pytest.mark.parametrize("save_strategy", ["steps", "best"])
def test_the_best_checkpoint_is_the_one_of_the_lowest_measure(run, metric, save_strategy):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "save_strategy": save_strategy}
    results = run(**settings, load_best_model_at_end=True, metric_for_best_model=metric, learning_rate=0.3)
    losses = [entry["eval_lm_loss"] for entry in run.log() if "eval_lm_loss" in entry and entry["step"]]
    assert losses.index(min(losses)) < len(losses) - 1
    assert results["eval_lm_loss_after"] == pytest.approx(min(losses), rel=1e-6)


def test_noise_on_the_embeddings_is_training_s_alone(run):
    results = run(neftune_noise_alpha=5, learning_rate=0)
    assert results["eval_lm_loss_after"] == results["eval_lm_loss_before"]


@pytest.mark.parametrize(("eval_steps", "save_steps"), [(2, 2), (1, 2), (2, 1)])
def test_resuming_next_to_evaluations_ends_as_without_them(run, tmp_path, eval_steps, save_steps):
    """Dropout on; the undisturbed run is not evaluated at all."""
    train.main(run.arguments(output_dir=tmp_path / "undisturbed", validation_file=None))
    settings = {"eval_strategy": "steps", "eval_steps": eval_steps, "save_steps": save_steps}
    interrupt_after(3, run, **settings)
    assert any(run.output.glob("checkpoint-*"))
    run(**settings)
    assert same_adapter(run.output, tmp_path / "undisturbed")


def test_two_processes_with_every_flag_of_ddp(run):
    launch(2, ["train.py", *run.arguments(**OF_DDP, max_steps=2)])
    assert_finite(run.output)


OWN_FLAGS = {
    "layers_to_transform": (99, "99"),
    "modules_to_save": ("nope", "nope"),
    "task_type_names": ("a,a", "--task_type_names"),
    "num_task_types": (0, "--num_task_types"),
    "lora_top_k": (1, "--lora_top_k"),
    "lora_dropout": (1, "--lora_dropout"),
    "expert_groups": ("1,x", "--expert_groups"),
    "trainable": ("(", "--trainable"),
    "output_router_logits": ("true", "--output_router_logits"),
    "preprocessing_num_workers": (0, "--preprocessing_num_workers is 0, but has to be at least 1"),
    "num_processes": (0, "--num_processes is 0, but has to be at least 1"),
    "dataset_dir": ("nowhere", "nowhere"),
    "validation_file": ("nowhere", "nowhere"),
    "tokenizer_name_or_path": ("./nowhere", "--tokenizer_name_or_path ./nowhere: no such folder"),
    "lora_alpha": (-1, "--lora_alpha"),
}


@pytest.mark.parametrize("name", OWN_FLAGS)
def test_bad_values_of_own_flags_are_named(run, no_weights, name):
    value, message = OWN_FLAGS[name]
    with pytest.raises(InputError, match=message):
        train.main(run.arguments(**{name: value}, prepare_only="true"))


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("flash_attention_2", "--attn_implementation flash_attention_2 cannot train on a CPU; use sdpa or eager"),
        ("flash_attention_3", "--attn_implementation flash_attention_3 cannot train on a CPU"),
        ("flex_attention", "--attn_implementation flex_attention cannot train on a CPU"),
    ],
)
def test_attention_kernels_that_cannot_train_here_are_refused(run, no_weights, kernel, message):
    with pytest.raises(InputError, match=message):
        train.main(run.arguments(attn_implementation=kernel, prepare_only="true"))


def test_an_attention_kernel_that_the_architecture_does_not_have_is_refused(run, no_weights, monkeypatch):
    monkeypatch.setattr(transformers.LlamaPreTrainedModel, "_supports_sdpa", False)
    with pytest.raises(InputError, match=r"--attn_implementation sdpa: .*does not support"):
        train.main(run.arguments(attn_implementation="sdpa", prepare_only="true"))


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", None])
def test_a_base_that_another_method_has_quantised_is_refused(run, model_dir, tmp_path, no_weights, method):
    base = shutil.copytree(model_dir, tmp_path / "quantised")
    config = json.loads((base / "config.json").read_text())
    settings = {"bits": 4, "group_size": 128} | ({"quant_method": method} if method else {})
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    with pytest.raises(InputError, match=rf"the weights of {base} are already quantised by {method or 'an unknown'}"):
        train.main(run.arguments(model_name_or_path=base, prepare_only="true"))
    assert not run.output.exists()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_that_bitsandbytes_has_quantised_trains_with_the_same_bits_alone(run, quantisable_dir, tmp_path, bits):
    base = shutil.copytree(quantisable_dir, tmp_path / "quantised")
    quantised = LlamaForCausalLM.from_pretrained(quantisable_dir, quantization_config=quantization(bits, torch.float32))
    quantised.save_pretrained(base)
    for other in (12 - bits, 16):
        with pytest.raises(InputError, match=rf"--load_in_kbits is {other}, but .* {bits} bits: set"):
            train.main(run.arguments(model_name_or_path=base, load_in_kbits=other, prepare_only="true"))
    results = run(model_name_or_path=base, load_in_kbits=bits)
    run.output = tmp_path / "from unquantised weights"
    expected = run(model_name_or_path=quantisable_dir, load_in_kbits=bits, output_dir=run.output)
    assert results["eval_lm_loss_after"] == pytest.approx(expected["eval_lm_loss_after"], rel=1e-5)


def test_restarting_a_linked_folder_keeps_the_link(run, tmp_path):
    (tmp_path / "disk" / "there").mkdir(parents=True)
    (tmp_path / "disk" / "there" / "file").write_text("x")
    run.output.symlink_to(tmp_path / "disk" / "there")
    archive = RunFolder(run.output).archive()
    assert (archive.parent, (archive / "file").read_text()) == (tmp_path / "disk", "x")
    assert run.output.is_symlink()
    assert not list(run.output.iterdir())
    with RunFolder(run.output).held():
        assert [file.name for file in (tmp_path / "disk").glob(".*")] == [".there.lock"]


def test_a_link_to_nowhere_is_refused(run, no_weights):
    run.output.symlink_to("nowhere")
    for folder in (run.output, run.output / "in it"):
        with pytest.raises(
            InputError, match=rf"cannot be made: {run.output} is a link to nowhere, which does not exist"
        ):
            train.main(run.arguments(output_dir=folder, prepare_only="true"))


ADVICE = {
    errno.EACCES: "make the folder writable and run",
    errno.EROFS: "mount the disk so that it can be written and run",
    errno.ENOSPC: "make room and run",
    errno.EDQUOT: "make room or have your quota raised and run",
    errno.EFBIG: r"raise the limit on the size of files \(ulimit -f\) and run",
    errno.EIO: "see whether the disk is broken and run",
}


@pytest.mark.parametrize("number", ADVICE, ids=errno.errorcode.get)
def test_what_cannot_be_written_comes_with_advice_that_fits(run, no_weights, monkeypatch, number):
    def refuse(*arguments, **keywords):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoint.Path, "mkdir", refuse)
    with pytest.raises(InputError, match=ADVICE[number]):
        RunFolder(run.output).claim({})


@pytest.mark.parametrize(
    ("where", "name", "found"),
    [
        ("caller", "dataset_dir", "caller/mine"),
        ("repository", "dataset_dir", "mine"),
        ("caller", "peft_path", "caller/mine"),
        ("caller", "output_dir", "caller/mine/default"),
        ("repository", "output_dir", "mine/default"),
        (None, "output_dir", "caller/mine/default"),
        (None, "pretrained_model", "mine"),
    ],
)
def test_relative_paths_are_the_callers(tmp_path, where, name, found):
    """The script lies in `repository` and is called in `caller`."""
    script, caller = tmp_path / "repository", tmp_path / "caller"
    arguments = call_from(caller, script, where and tmp_path / where / "mine", **{name: "mine"})
    flags = dict(zip(arguments[1::2], arguments[2::2], strict=False))
    names = {"dataset_dir": "--dataset_dir", "peft_path": "--peft_path", "output_dir": "--output_dir"}
    expected = found if not found.startswith("caller") else str(tmp_path / found)
    assert flags[names.get(name, "--model_name_or_path")] == expected


def test_a_run_of_an_earlier_version_is_known_by_its_old_names_and_missing_flags(tmp_path, model_dir):
    place = ["--model_name_or_path", str(model_dir), "--dataset_dir", "rows", "--output_dir", str(tmp_path / "run")]
    for flag in ("--task_type_names", "--task_types", "--task-types"):
        model_args, _, _ = parse_arguments([*place, flag, "a,b"])
        assert model_args.task_type_names == "a,b"
    folder = RunFolder(tmp_path / "run")
    folder.claim({"task_types": "a,b"})
    folder.check({"task_type_names": "a,b"} | ADDED)
    with pytest.raises(InputError, match="task_type_names: 'a,b' there, 'a,c' now"):
        folder.check({"task_type_names": "a,c"} | ADDED)
    with pytest.raises(InputError, match="train_on: 'all' there, 'last' now"):
        folder.check({"task_type_names": "a,b"} | ADDED | {"train_on": "last"})


def test_a_relative_path_that_is_nowhere_is_refused_with_both_places(tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as caught:
        call_from(tmp_path / "caller", tmp_path / "repository", None, dataset_dir="mine")
    assert caught.value.stderr == (
        f"error: dataset_dir is 'mine': there is no such file or folder in {tmp_path}/caller or in "
        f"{tmp_path}/repository\n"
    )


def call_from(caller: Path, repository: Path, existing: Path | None, **variables: str) -> list[str]:
    """The arguments of `train.py --prepare_only` if a copy of the script in `repository` is called in `caller`."""
    for folder in (caller, repository, *filter(None, [existing])):
        folder.mkdir(parents=True, exist_ok=True)
    # The folder of the run, which train.py would make.
    outputs = variables.get("output_dir", "outputs")
    at = repository if outputs == "outputs" or existing == repository / outputs else caller
    (at / outputs / "default").mkdir(parents=True)
    stand_in_repository(repository)
    return next(call for call in dry_run_in(repository, caller, **variables) if "--prepare_only" in call)
