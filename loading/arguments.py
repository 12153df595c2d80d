"""The flags of `train.py`. Contradictions between them are found before anything is loaded."""

import argparse
import json
import math
import os
import re
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import parse_flag_from_env
from torch import nn
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_torch_tf32_available

from data import ORDERS, TEMPLATES, InputError
from data.probe import AUTO, NONE
from loading.command_line import FlagParser, a_seed, at_least, flag, listed, obstacle, one_of, range_problems, refuse
from loading.optimization import EVALUATED, optimizer_problems, schedule_problems
from peft import LoraConfig, TaskType

# The flag for each field of LoraConfig.
FLAG_OF_FIELD = {
    "r": "--lora_rank",
    "lora_alpha": "--lora_alpha",
    "lora_nums": "--lora_nums",
    "lora_dropout": "--lora_dropout",
    "blc_alpha": "--blc_alpha",
    "blc_weight": "--blc_weight",
    "blc_reference": "--blc_reference",
    "num_task_types": "--num_task_types",
    "task_type_names": "--task_type_names",
    "expert_groups": "--expert_groups",
    "lora_top_k": "--lora_top_k",
    "lora_shared_A": "--lora_shared_A",
    "lora_null_expert": "--lora_null_expert",
    "lora_rslora": "--lora_rslora",
    "target_modules": "--trainable",
    "layers_to_transform": "--layers_to_transform",
    "modules_to_save": "--modules_to_save",
}

ATTENTION = ("auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
FLASH_ATTENTION = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}

# The measurements of an evaluation; lower is better for all of these.
MEASURES = ("loss", "lm_loss", "perplexity")
# The share of known facts that are kept, of which higher is better; and the loss of a model that keeps enough of them.
KEPT = "knowledge_kept"
LOSS_IF_KEPT = "loss_if_kept"
BEST_BY = (*MEASURES, KEPT, LOSS_IF_KEPT)

# Bits of the base model's weights; 16 stands for weights that are not quantised.
KBITS = (4, 8, 16)

# Without this DeepSpeed setting, weights that ZeRO-3 has partitioned are not saved as a model.
GATHER = "stage3_gather_16bit_weights_on_model_save"

# Flag, allowed values, and the reason why others are not allowed.
UNSUPPORTED = (
    ("label_smoothing_factor", (0,), "--label_smoothing_factor bypasses the model's own loss and its balance term"),
    ("average_tokens_across_devices", (True,), "--average_tokens_across_devices false ties the loss to the processes"),
    ("fsdp", (None, False, ""), "--fsdp is not supported; shard with --deepspeed scripts/deepspeed/zero3.json"),
    ("remove_unused_columns", (False,), "--remove_unused_columns would remove columns that the collator needs"),
    ("eval_use_gather_object", (False,), "--eval_use_gather_object is not supported"),
    ("eval_do_concat_batches", (True,), "--eval_do_concat_batches false is not supported"),
    ("batch_eval_metrics", (False,), "--batch_eval_metrics is not supported"),
    ("use_liger_kernel", (False,), "--use_liger_kernel replaces the model's forward, which computes the balance term"),
    ("train_sampling_strategy", ORDERS, f"--train_sampling_strategy has to be one of {', '.join(ORDERS)}"),
    ("resume_from_checkpoint", (None,), "--resume_from_checkpoint: a run resumes from its last checkpoint by itself"),
    ("hub_strategy", ("end",), "--hub_strategy: --push_to_hub uploads a run once, after it has finished"),
    ("attn_implementation", ATTENTION, f"--attn_implementation has to be one of {', '.join(ATTENTION)}"),
    ("auto_find_batch_size", (False,), "--auto_find_batch_size would make the result depend on free memory"),
    ("torch_compile", (False,), "--torch_compile is not supported"),
    ("torch_compile_backend", (None,), "--torch_compile_backend: --torch_compile is not supported"),
    ("torch_compile_mode", (None,), "--torch_compile_mode: --torch_compile is not supported"),
    ("bf16_full_eval", (False,), "--bf16_full_eval would round the weights only for the last evaluation; use --bf16"),
    ("fp16_full_eval", (False,), "--fp16_full_eval would round the weights only for the last evaluation; use --fp16"),
    ("do_predict", (False,), "--do_predict: use python -m scripts.generate to answer prompts with a trained adapter"),
    ("save_on_each_node", (False,), "--save_on_each_node: all nodes share the run folder"),
    ("enable_jit_checkpoint", (False,), "--enable_jit_checkpoint: a run saves a checkpoint on SIGTERM by itself"),
    ("ignore_data_skip", (False,), "--ignore_data_skip would make a resumed run repeat some rows and skip others"),
    ("restore_callback_states_from_checkpoint", (False,),
     "--restore_callback_states_from_checkpoint: a resumed run restores all of its state by itself"),
    ("accelerator_config", (None,), "--accelerator_config is not supported: this project forms its own batches"),
    ("parallelism_config", (None,), "--parallelism_config is not supported; shard with --deepspeed"),
    ("fsdp_config", (None,), "--fsdp_config: FSDP is not supported; shard with --deepspeed"),
    ("liger_kernel_config", (None,), "--liger_kernel_config: --use_liger_kernel is not supported"),
    ("optim_target_modules", (None,), "--optim_target_modules is not used by any supported --optim"),
    ("dataloader_in_order", (True,), "--dataloader_in_order false would make the order of the rows random"),
    ("length_column_name", ("length",), "--length_column_name: the length of a row is its number of tokens"),
    ("greater_is_better", (None, False),
     f"--greater_is_better: lower is better for every measurement but {KEPT}, which sets this itself"),
    ("metric_for_best_model", (None, *BEST_BY, *(f"eval_{name}" for name in BEST_BY)),
     f"--metric_for_best_model has to be one of {', '.join(BEST_BY)}"),
    ("debug", (None, "", ["underflow_overflow"]), "--debug supports only underflow_overflow"),
)  # fmt: skip

# Flags that --packing contradicts, with the reason.
UNPACKED = (
    ("kl_weight", "--packing mixes the rows that --kl_weight compares with others"),
    ("blc_reference", "--packing leaves out the padding that --blc_reference counts"),
    ("output_router_logits", "--packing: the router loss of --output_router_logits would count padding"),
    ("neftune_noise_alpha", "--packing: the noise of --neftune_noise_alpha depends on the length of a row"),
)

RANGES = (
    at_least(
        1, "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "num_processes",
        "preprocessing_num_workers", "eval_accumulation_steps", "dataloader_prefetch_factor", "ddp_timeout",
        "ddp_bucket_cap_mb", "torch_empty_cache_steps",
    ),
    at_least(0, "dataloader_num_workers", "save_total_limit"),
    ("-1 or at least 1", lambda value: value == -1 or value >= 1, ("max_steps",)),
    a_seed("seed", "data_seed"),
    ("in [0, 1)", lambda value: 0 <= value < 1, ("adam_beta1", "adam_beta2")),
    ("from 0 to 1", lambda value: 0 <= value <= 1, ("least_kept",)),
    ("above 0", lambda value: math.isfinite(value) and value > 0, ("num_train_epochs", "adam_epsilon")),
    ("a number of at least 0", lambda value: math.isfinite(value) and value >= 0, (
        "learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "neftune_noise_alpha", "logging_steps",
        "eval_steps", "eval_delay", "save_steps", "kl_weight",
    )),
)  # fmt: skip


@dataclass
class ModelArguments:
    """The base model and the adapter on it."""

    model_name_or_path: str = flag(None, "base model: a local folder or a hub id")
    tokenizer_name_or_path: str | None = flag(None, "tokenizer; by default the base model's")
    tuning: Literal["loramoe", "full"] = flag("loramoe", "loramoe trains experts and routers; full trains all weights")
    peft_path: str | None = flag(None, "adapter folder to continue training from; by default a new adapter")
    lora_rank: int = flag(4, "rank of each expert")
    lora_alpha: float = flag(32, "the experts' output is scaled by lora_alpha / lora_rank")
    lora_nums: int = flag(6, "experts per adapted Linear; 1 is plain LoRA")
    lora_top_k: int | None = flag(None, "experts used for each token, at least 2; by default or with 0 all of them")
    lora_shared_A: bool | None = flag(None, "one A shared by all experts of a Linear, which then differ only in B")
    lora_null_expert: bool | None = flag(
        None,
        "one more router output, whose expert is zero: the weight it gets leaves the base model unchanged; it is the "
        "last expert, by default alone in the group of the last task type, world knowledge",
    )
    lora_rslora: bool | None = flag(
        None, "scale the experts' output by lora_alpha / sqrt(lora_rank), as rank-stabilized LoRA does"
    )
    lora_dropout: float = flag(0.05, "probability of dropping an input element of the experts, in [0, 1)")
    trainable: str = flag(
        "auto",
        "Linears to adapt: names separated by commas; all-linear (all except the output embedding); a regular "
        "expression that has to match complete dotted names; or auto, the architecture's feed-forward Linears",
    )
    layers_to_transform: str | None = flag(
        None, "layers to adapt, counting from 0, separated by commas; by default all"
    )
    modules_to_save: str | None = flag(
        None,
        "modules to train in full and save with the adapter, separated by commas, such as embed_tokens,lm_head",
    )
    blc_alpha: float = flag(0.1, "pull of a group of experts towards its task type, in [0, 1); the paper's delta")
    blc_weight: float = flag(0.1, "weight of the balance term in the loss, the paper's beta; 0 turns it off")
    blc_reference: bool = flag(
        False, "compute the balance term as the authors' code does: padding counts, and each process is separate"
    )
    num_task_types: int = flag(None, "number of task types; by default the number of --task_type_names, or 2")
    task_type_names: str | None = flag(
        None,
        "names of the task types, separated by commas, which rows may use instead of the numbers 0, 1, ...",
        aliases=["--task_types", "--task-types"],
    )
    expert_groups: str | None = flag(
        None,
        "sizes of the task types' groups of experts, a null expert included, separated by commas; by default equal",
    )
    output_router_logits: bool | None = flag(
        None, "for a base model that is itself a mixture of experts: add its router loss, and log it as aux_loss"
    )
    load_in_kbits: int = flag(16, "4 (nf4) or 8 (int8) quantises the frozen base model; 16 does not quantise it")
    attn_implementation: str = flag("auto", "attention kernel; auto is FlashAttention 2 if it can run, else sdpa")

    def lora_config(self) -> LoraConfig:
        """The adapter's configuration. Raises ValueError if a value is out of range."""
        return LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            base_model_name_or_path=self.model_name_or_path,
            r=self.lora_rank,
            lora_alpha=self.lora_alpha,
            lora_nums=self.lora_nums,
            lora_dropout=self.lora_dropout,
            blc_alpha=self.blc_alpha,
            blc_weight=self.blc_weight,
            blc_reference=self.blc_reference,
            num_task_types=self.num_task_types,
            task_type_names=listed(self.task_type_names),
            expert_groups=_numbers("expert_groups", self.expert_groups),
            lora_top_k=self.lora_top_k,
            lora_shared_A=bool(self.lora_shared_A),
            lora_null_expert=bool(self.lora_null_expert),
            lora_rslora=bool(self.lora_rslora),
            target_modules=_targets(self.trainable),
            layers_to_transform=_numbers("layers_to_transform", self.layers_to_transform),
            modules_to_save=listed(self.modules_to_save),
        )

    @cached_property
    def continued_config(self) -> LoraConfig | None:
        """The configuration of the adapter at `peft_path`. Raises ValueError if it cannot be used."""
        return LoraConfig.from_pretrained(self.peft_path) if self.peft_path else None

    def resolve(self, base: nn.Module) -> None:
        """Replace flags that leave a choice to the base model by its choice, so that the run's configuration says what
        was trained."""
        if self.trainable == "auto" and not self.peft_path:
            self.trainable = ",".join(base.default_target_modules)
        if hasattr(base, "router_aux_loss_coef") and self.output_router_logits is None:
            self.output_router_logits = bool(base.config.output_router_logits)

    def __post_init__(self):
        if self.num_task_types is None:
            self.num_task_types = len(listed(self.task_type_names) or (0, 1))


def _numbers(field_name: str, text: str | None) -> list[int] | None:
    numbers = listed(text)
    if numbers is not None and not all(number.isdecimal() for number in numbers):
        raise ValueError(f"{field_name} is {text!r}, but has to be whole numbers separated by commas")
    return None if numbers is None else [int(number) for number in numbers]


def _targets(text: str) -> list[str] | str | None:
    """`LoraConfig.target_modules` for `--trainable`: anything but names and commas is a regular expression."""
    if text == "auto":
        return None
    return listed(text) if re.fullmatch(r"[\w.,\s]*", text) else text


@dataclass
class ProbeArguments:
    """The knowledge probe: facts that the base model is asked, and then the trained one."""

    knowledge_probe: str = flag(
        AUTO, "facts: auto (of data/world_facts), none, or a file or folder of rows, which may have aliases"
    )
    probe_facts: int = flag(200, "number of facts; if there are more, a fixed random sample")

    def problems(self) -> list[str]:
        problems = range_problems(self, [at_least(1, "probe_facts")])
        if self.knowledge_probe not in (AUTO, NONE) and not Path(self.knowledge_probe).exists():
            problems.append(f"--knowledge_probe {self.knowledge_probe}: no such file or folder; allowed are auto, none")
        return problems


@dataclass
class DataArguments(ProbeArguments):
    """The data and its encoding as tokens."""

    dataset_dir: str = flag(None, "training rows: a data file, a folder of them, or a mix.yaml (docs/DATA.md)")
    validation_file: str | None = flag(
        None, "evaluation rows: a data file, a folder, or the held-out rows of a mix.yaml; by default none"
    )
    max_seq_length: int = flag(1024, "longest row in tokens; longer ones are truncated")
    packing: bool = flag(
        False, "fill each row of a batch up to max_seq_length with samples, which do not see each other"
    )
    prompt_template: str = flag("auto", "plain, chat (the tokenizer's template), or auto (chat if there is one)")
    train_on: Literal["all", "last"] = flag("all", "train on all answers of a conversation, or only on the last")
    data_cache_dir: str = flag(".cache/data", "cache folder for encoded data sets, keyed by content")
    preprocessing_num_workers: int | None = flag(None, "processes that check and encode rows")


@dataclass
class RunArguments(TrainingArguments):
    """Hugging Face's TrainingArguments with this project's defaults, plus flags of the run folder."""

    learning_rate: float = flag(2e-4, "peak learning rate")
    lr_scheduler_type: str = flag("cosine", "shape of the learning rate over the run")
    warmup_steps: float = flag(0.03, "warm-up steps; a number below 1 is a share of all steps")
    num_train_epochs: float = flag(1.0, "passes over the training rows")
    logging_steps: float = flag(5, "optimizer steps between two log lines")
    logging_first_step: bool = flag(True, "also log the first step")
    save_total_limit: int | None = flag(2, "checkpoints to keep; older ones are deleted; 0 keeps all")
    report_to: str = flag("tensorboard", "destination of the logs in addition to the terminal")
    train_sampling_strategy: str = flag(
        "group_by_length", f"order of the rows ({', '.join(ORDERS)}); grouping by length reduces padding"
    )
    activation_checkpointing: bool | None = flag(None, "recompute activations: less memory, about 1.5 times as slow")
    push_to_hub: bool = flag(False, "upload the run after it has finished")
    hub_strategy: str = flag("end", "time at which --push_to_hub uploads; only end is supported")
    # Every adapter parameter is used in every step, so DDP need not search for unused ones.
    ddp_find_unused_parameters: bool | None = flag(False, "let DDP search for parameters without a gradient")
    # The collator selects the fields of a row itself.
    remove_unused_columns: bool = flag(False, "drop data columns that the model does not use")
    num_processes: int | None = flag(None, "processes of the run on all nodes; by default the launcher's")
    profile_steps: str | None = flag(None, "optimizer steps, from 1, to record with the torch profiler: 5 or 5-7")
    kl_weight: float = flag(
        0.0,
        "weight in the loss of the KL divergence from the base model, the mean over all tokens of rows of task type 1",
    )
    least_kept: float = flag(
        0.9, "share of the known facts that a model has to keep to be the best by --metric_for_best_model loss_if_kept"
    )
    restart: bool = flag(False, "rename an existing output folder and start over")
    prepare_only: bool = flag(False, "check everything, encode the data and stop before any weights are loaded")

    def __post_init__(self):
        if self.save_strategy == "best" and self.metric_for_best_model is None:  # type: ignore[has-type]
            self.metric_for_best_model = "loss"
        if self.metric_for_best_model is not None:
            self.greater_is_better = self.metric_for_best_model.endswith(KEPT)
        super().__post_init__()


def is_knowledge(metric: str | None) -> bool:
    """Tell whether a `--metric_for_best_model` needs the knowledge probe."""
    return (metric or "").endswith((KEPT, LOSS_IF_KEPT))


def parse_steps(text: str) -> tuple[int, int] | None:
    """First and last step of `--profile_steps`, from 1: `5` or `5-7`. None if it is neither."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if match is None:
        return None
    first, last = int(match[1]), int(match[2] or match[1])
    return (first, last) if 1 <= first <= last else None


def parse_arguments(argv: list[str] | None = None) -> tuple[ModelArguments, DataArguments, RunArguments]:
    """Parse the command line.

    Raises:
        InputError: unknown flags, values of the wrong type, or contradicting settings, all reported at once.
    """
    parser = FlagParser((ModelArguments, DataArguments, RunArguments), "python train.py")
    values = vars(parser.parse_args(sys.argv[1:] if argv is None else argv))
    refuse(_contradictions(argparse.Namespace(**values)))
    given = {name: values[name] for name in ("deepspeed", "ddp_backend")}
    if "RANK" not in os.environ:
        # A single process, perhaps one that prepares a launch: DeepSpeed and the backend would wait for the others.
        values |= dict.fromkeys(given)
    try:
        model_args, data_args, args = parser.parse_dict(values)
    except ValueError as error:
        raise InputError(str(error)) from error
    for name, value in given.items():
        setattr(args, name, value)
    args.num_processes = args.num_processes or args.world_size
    model_args.model_name_or_path = model_args.model_name_or_path.rstrip("/")
    if not args.prepare_only and (problem := _launch_problem(args)):
        raise InputError(problem)
    if args.deepspeed and args.device.type == "cpu" and not args.prepare_only:
        _open_deepspeed_on_cpu()
    return model_args, data_args, args


def _launch_problem(args: RunArguments) -> str | None:
    """A mismatch between the flags and the running processes, or None."""
    if args.n_gpu > 1:
        return (
            "several GPUs need one process each: use run_loramoe.sh or torchrun, or select one with "
            "CUDA_VISIBLE_DEVICES"
        )
    if args.num_processes != args.world_size:
        return f"--num_processes is {args.num_processes}, but the launcher started {args.world_size}"
    return None


def _open_deepspeed_on_cpu() -> None:
    """Give DeepSpeed the gloo process group, which on a CPU nothing else does before the model is built.

    Its shared-memory collectives are not compiled: they are optional with gloo, but the build needs a compiler, takes
    up to two minutes, and leaves a lock that blocks every later run if it is interrupted.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")


def _contradictions(flags: argparse.Namespace) -> list[str]:
    """One sentence for each invalid flag or combination of flags."""
    finders = (_missing, _adapter_problems, _data_problems, _evaluation_problems, _training_problems, _device_problems)
    return [problem for find in finders for problem in find(flags)]


def _missing(flags: argparse.Namespace) -> list[str]:
    needed = ("model_name_or_path", "dataset_dir", "output_dir")
    problems = [f"--{name} is missing" for name in needed if not getattr(flags, name)]
    for name in ("model_name_or_path", "tokenizer_name_or_path"):
        if (place := getattr(flags, name)) and place.startswith((".", "/", "models/")) and not Path(place).is_dir():
            problems.append(f"--{name} {place}: no such folder")
    for name in ("output_dir", "data_cache_dir"):
        if flags.output_dir and (problem := obstacle(Path(getattr(flags, name)).absolute())):
            problems.append(f"--{name} {getattr(flags, name)} cannot be made: {problem}")
    return problems


def _adapter_problems(flags: argparse.Namespace) -> list[str]:
    problems = range_problems(flags, [one_of(KBITS, "load_in_kbits")])
    if flags.tuning == "full":
        if flags.peft_path:
            problems.append("--tuning full does not train an adapter, so it cannot continue from --peft_path")
        if flags.kl_weight:
            problems.append("--tuning full changes the base model, with which --kl_weight compares")
        if flags.load_in_kbits in (4, 8):
            problems.append(f"--tuning full cannot train weights that --load_in_kbits {flags.load_in_kbits} quantises")
        return problems
    try:
        ModelArguments(**{name: getattr(flags, name) for name in ModelArguments.__dataclass_fields__}).lora_config()
    except ValueError as error:
        pattern = r"\b(" + "|".join(FLAG_OF_FIELD) + r")\b"
        problems += re.sub(pattern, lambda match: FLAG_OF_FIELD[match[0]], str(error)).splitlines()
    if flags.peft_path and not (Path(flags.peft_path) / "adapter_config.json").is_file():
        problems.append(f"--peft_path {flags.peft_path} is not an adapter folder: it has no adapter_config.json")
    return problems


def _data_problems(flags: argparse.Namespace) -> list[str]:
    problems = range_problems(flags, [at_least(2, "max_seq_length"), one_of(TEMPLATES, "prompt_template")])
    problems += ProbeArguments(flags.knowledge_probe, flags.probe_facts).problems()
    if flags.packing:
        problems += [reason for name, reason in UNPACKED if getattr(flags, name)]
        if flags.train_sampling_strategy == "sequential":
            problems.append("--packing reorders the rows, against --train_sampling_strategy sequential")
    return problems


def _evaluation_problems(flags: argparse.Namespace) -> list[str]:
    problems = []
    if not flags.validation_file:
        asked = [name for name in ("do_eval", "eval_on_start") if getattr(flags, name)]
        asked += [f"eval_strategy {flags.eval_strategy}"] if flags.eval_strategy != "no" else []
        problems += [f"--{name} needs a --validation_file" for name in asked]
    by_knowledge = [f"metric_for_best_model {flags.metric_for_best_model}"] * is_knowledge(flags.metric_for_best_model)
    if flags.knowledge_probe == NONE:
        problems += [f"--{name} needs a --knowledge_probe" for name in by_knowledge]
    if flags.greater_is_better is False and (flags.metric_for_best_model or "").endswith(KEPT):
        problems.append(f"--greater_is_better false contradicts --{by_knowledge[0]}, of which more is better")
    if flags.lr_scheduler_type in EVALUATED:
        kind = flags.lr_scheduler_type
        problems += [f"--lr_scheduler_type {kind} follows a loss, so it excludes --{name}" for name in by_knowledge]
    if flags.eval_strategy == "no":
        asked = ["load_best_model_at_end"] if flags.load_best_model_at_end else []
        asked += ["save_strategy best"] if flags.save_strategy == "best" else []
        problems += [f"--{name} needs an --eval_strategy" for name in (*asked, *by_knowledge)]
    return problems


def _training_problems(flags: argparse.Namespace) -> list[str]:
    # `accelerate launch` sets this for FSDP. On a CPU, Trainer would silently fall back to plain data parallelism.
    problems = []
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        problems.append(
            "ACCELERATE_USE_FSDP is set, but FSDP is not supported: unset it, start with run_loramoe.sh or torchrun, "
            "and shard with --deepspeed scripts/deepspeed/zero3.json"
        )
    if flags.deepspeed:
        problems += _deepspeed_problems(flags)
    problems += [reason for name, allowed, reason in UNSUPPORTED if getattr(flags, name) not in allowed]
    out_of_range = range_problems(flags, RANGES)
    if flags.profile_steps and parse_steps(flags.profile_steps) is None:
        problems.append(
            f"--profile_steps is {flags.profile_steps!r}, but has to be a step or a range, such as 5 or 5-7"
        )
    # The libraries check the rest; they would report the same numbers again.
    problems += out_of_range or [*optimizer_problems(flags), *schedule_problems(flags)]
    known = {"none", "all", *get_available_reporting_integrations()}
    if flags.report_to not in known:
        problems.append(
            f"--report_to {flags.report_to} is not installed here; available are {', '.join(sorted(known))}"
        )
    if not flags.dataloader_num_workers:
        problems += [
            f"--{name} needs --dataloader_num_workers of at least 1"
            for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context")
            if getattr(flags, name)
        ]
    checkpointing = {flags.activation_checkpointing, flags.gradient_checkpointing}
    if checkpointing == {True, False}:
        problems.append("--activation_checkpointing and --gradient_checkpointing, the same flag, contradict each other")
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        if re.sub(r"\s", "", getattr(flags, name) or "{}").lower() not in ("{}", '{"use_reentrant":false}'):
            problems.append(
                f'--{name} can only be {{"use_reentrant": false}}: re-entrant checkpointing detaches the balance term'
            )
    return problems


def _device_problems(flags: argparse.Namespace) -> list[str]:
    problems = []
    on_cpu = flags.use_cpu or not torch.cuda.is_available()
    if flags.fp16 and on_cpu:
        problems.append("--fp16 has no effect on a CPU (training would silently stay in fp32); use --bf16 or neither")
    if flags.tf32 and not is_torch_tf32_available():
        problems.append("--tf32 needs a GPU of compute capability 8.0 or more")
    kernel = flags.attn_implementation
    if on_cpu and kernel in ("flex_attention", *FLASH_ATTENTION):
        problems.append(f"--attn_implementation {kernel} cannot train on a CPU; use sdpa or eager")
    elif kernel in FLASH_ATTENTION and not FLASH_ATTENTION[kernel]():
        problems.append(f"--attn_implementation {kernel}: its package is not installed or does not support this GPU")
    elif kernel in FLASH_ATTENTION and not (flags.bf16 or flags.fp16):
        problems.append(f"--attn_implementation {kernel} computes in half precision: add --bf16 or --fp16")
    return problems


def _deepspeed_problems(flags: argparse.Namespace) -> list[str]:
    try:
        config = json.loads(Path(flags.deepspeed).read_text())
    except OSError:
        return [f"--deepspeed {flags.deepspeed}: no such file; ready-made files are in scripts/deepspeed"]
    except ValueError as error:
        return [f"--deepspeed {flags.deepspeed}: not valid JSON ({error})"]
    if not isinstance(config, dict):
        return [f"--deepspeed {flags.deepspeed}: has to be a JSON object"]
    if not flags.prepare_only and "RANK" not in os.environ:
        return ["--deepspeed needs a launcher, even for one process: use run_loramoe.sh or torchrun"]
    zero = config.get("zero_optimization")
    zero = zero if isinstance(zero, dict) else {}
    stage = zero.get("stage")
    if stage not in (1, 2, 3):
        return [f"--deepspeed {flags.deepspeed}: the stage in zero_optimization has to be 1, 2 or 3"]
    if problems := _deepspeed_mismatches(config, flags):
        return problems
    if stage == 3 and flags.tuning == "full" and not zero.get(GATHER):
        return [
            f"--tuning full would not save any weights: set {GATHER} to true in zero_optimization of {flags.deepspeed}"
        ]
    if flags.save_only_model and flags.load_best_model_at_end:
        return ["--save_only_model with --load_best_model_at_end fails under --deepspeed; remove one of them"]
    if stage == 3 and flags.load_in_kbits in (4, 8):
        return [f"--load_in_kbits {flags.load_in_kbits} cannot be sharded by ZeRO-3; use scripts/deepspeed/zero2.json"]
    return []


def _deepspeed_mismatches(config: dict, flags: argparse.Namespace) -> list[str]:
    """Settings of a DeepSpeed file that would override flags."""
    wanted = {
        "train_micro_batch_size_per_gpu": flags.per_device_train_batch_size,
        "gradient_accumulation_steps": flags.gradient_accumulation_steps,
        "gradient_clipping": flags.max_grad_norm,
    }
    found = {name: config.get(name) for name in wanted}
    if "train_batch_size" in config:
        processes = flags.num_processes or int(os.environ.get("WORLD_SIZE", "1"))
        found["train_batch_size"] = config["train_batch_size"]
        rows = flags.per_device_train_batch_size * flags.gradient_accumulation_steps
        wanted["train_batch_size"] = rows * processes
    for half in ("bf16", "fp16"):
        section = config.get(half)
        found[f"{half}.enabled"] = section.get("enabled", False) if isinstance(section, dict) else False
        wanted[f"{half}.enabled"] = getattr(flags, half)
    problems = [
        f"--deepspeed {flags.deepspeed}: {name} is {'missing' if value is None else json.dumps(value)}, but has to be "
        f"auto, or {json.dumps(wanted[name])} as in the flags"
        for name, value in found.items()
        if value not in ("auto", wanted[name])
    ]
    problems += [
        f"--deepspeed {flags.deepspeed}: remove {name}; the flags choose it"
        for name in ("optimizer", "scheduler")
        if name in config
    ]
    return problems
