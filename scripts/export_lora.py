"""Export a mixture as a plain LoRA for other programs, and measure the loss of quality.

Run as ``python -m scripts.export_lora --adapter DIR --output DIR`` from the repository root. The output is a LoRA
adapter in the format of PyPI's `peft`, or with --merge the folder of a plain model. A router depends on its input, so
the export differs from the mixture: it replaces the router by something that is the same for every token.
docs/EXPORT.md says how well.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from datasets import Dataset
from torch import Tensor, nn

from data import InputError
from data.atomic import atomic_folder
from data.errors import writing
from inference.rows import batches, load_rows
from inference.trained import InferenceArguments, TrainedModel, load_trained
from loading.command_line import at_least, flag, output_problem, parse_flags, range_problems, run_verb
from peft import Calibration, LoraConfig, LoraLayer, PeftModel, merged_linear, static_lora
from peft.config import CONFIG_NAME
from peft.saving import save_adapter_weights
from peft.static import is_plain_product
from transformers_patch.labels import SupervisedTokens

COMMAND = "python -m scripts.export_lora"
STATIC = "static"

LowRank = tuple[Tensor, Tensor]  # A (K, I), B (O, K)


@dataclass
class ExportArguments:
    """The kind of export, and the data for it."""

    output: str = flag(None, "folder to create; has to be empty if it exists", required=True)
    weights: Literal["uniform", "calibrated", "fitted"] = flag(
        "fitted",
        "replacement of the router: uniform, the same weight for all experts; calibrated, the mean weights on the "
        "calibration rows; fitted, the linear map that is nearest to the mixture on these rows",
    )
    rank: int | None = flag(
        None, "rank of a fitted LoRA; by default and at most the number of experts times their rank"
    )
    task_type: int | None = flag(None, "calibrate and measure only on the rows of this task type")
    calibration_data: str | None = flag(None, "rows to calibrate on; by default the run's training rows")
    data: str | None = flag(None, "rows to measure on, file or folder; by default the run's validation file")
    merge: bool = flag(False, "write a complete model, with the LoRA added to its weights, instead of an adapter")
    data_cache_dir: str = flag(".cache/data", "cache folder for encoded data sets, keyed by content")

    def problems(self) -> list[str | None]:
        problems = [output_problem(self.output, is_folder=True), *range_problems(self, [at_least(1, "rank")])]
        if self.rank is not None and self.weights != "fitted":
            problems.append(f"--rank needs --weights fitted; the rank of {self.weights} is fixed")
        return problems


KINDS = (InferenceArguments, ExportArguments)


def main(argv: list[str] | None = None) -> None:
    """Read the command line, make the plain LoRA, compare it with the mixture and write it.

    Raises:
        InputError: flags, adapter or rows cannot be used. Nothing has been written.
    """
    inference, args = parse_flags(COMMAND, __doc__.splitlines()[0], KINDS, argv)
    trained = load_trained(inference, casts_experts=False)
    check_export(trained, args)
    path, rows = rows_of_type(trained, args.data, "validation_file", args)
    loras = make_loras(trained, args, inference.batch_size)
    config = add_static_adapter(trained.model, loras)
    other = partial(as_static, trained.model)
    if args.merge:
        layers = adapted(trained.model.get_base_model())
        other = partial(as_merged, trained.model, {name: merged_linear(layer, STATIC) for name, layer in layers})
    costs = compare(trained.model, batches(trained, rows, inference.batch_size, "measuring"), other)
    name = f"{args.weights}, merged" if args.merge else args.weights
    print(f"{len(rows)} rows of {path}, each answer with its end token", *cost_lines(costs, name), sep="\n")
    with (
        writing(f"{args.output} cannot be written", "once it can, run the same command again"),
        atomic_folder(Path(args.output)) as folder,
    ):
        if args.merge:
            base = trained.model.get_base_model()
            base.generation_config = trained.proposed_generation
            with other():
                base.save_pretrained(folder)
            trained.tokenizer.save_pretrained(folder)
        else:
            write_adapter(loras, config, trained.base_model, folder)
    print(f"saved a {'model' if args.merge else f'LoRA of rank {config.r}'} in {args.output}")


def check_export(trained: TrainedModel, args: ExportArguments) -> None:
    """Raises InputError if this model cannot be exported as the flags ask for."""
    if not isinstance(trained.model, PeftModel):
        raise InputError("this folder holds a complete model, not an adapter: it does not need an export")
    config, base = trained.model.active_peft_config, trained.model.get_base_model()
    if config.modules_to_save:
        raise InputError(
            f"this adapter has trained {', '.join(config.modules_to_save)} in full, which a plain LoRA cannot contain"
        )
    if args.task_type is not None and not 0 <= args.task_type < config.num_task_types:
        raise InputError(f"--task_type is {args.task_type}; this adapter has 0 to {config.num_task_types - 1}")
    if args.rank and args.rank > config.r * config.lora_nums:
        raise InputError(f"--rank is {args.rank}, but can be at most {config.r * config.lora_nums} for this adapter")
    if not args.merge:
        return
    for kind, linear in {type(layer.base_layer): layer.base_layer for _, layer in adapted(base)}.items():
        if not linear.weight.is_floating_point():
            raise InputError(
                f"--merge cannot add to quantised weights ({kind.__name__}): merge into the unquantised base model "
                "(--load_in_kbits 16), or export the adapter"
            )
        if not is_plain_product(linear):
            raise InputError(
                f"--merge does not know how a {kind.__name__} uses its weights (Conv1D stores them transposed); export "
                "the adapter instead"
            )
    if any(layer.weight is base.get_input_embeddings().weight for _, layer in adapted(base)):
        raise InputError("--merge cannot change the output layer, which shares its weights with the embeddings")


def adapted(base: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    return ((name, module) for name, module in list(base.named_modules()) if isinstance(module, LoraLayer))


def rows_of_type(trained: TrainedModel, path: str | None, field: str, args: ExportArguments) -> tuple[str, Dataset]:
    """The path and the rows of a file; with `--task_type`, only the rows of that task type.

    Raises:
        InputError: see `load_rows`; or there are no rows of this task type.
    """
    path, rows = load_rows(trained, path, field, args.data_cache_dir)
    if args.task_type is not None:
        rows = rows.select([index for index, kind in enumerate(rows["task_type"]) if kind == args.task_type])
        if not len(rows):
            raise InputError(f"{path} does not have a row of task type {args.task_type}")
    return path, rows


def make_loras(trained: TrainedModel, args: ExportArguments, batch_size: int) -> dict[str, LowRank]:
    """The plain LoRA of each adapted Linear, by the Linear's name."""
    experts = {name: layer.experts["default"] for name, layer in adapted(trained.model.get_base_model())}
    mixture = trained.model.active_peft_config
    if args.weights == "uniform" or (mixture.routed_experts == 1 and args.rank is None):
        weights_E = torch.full((mixture.lora_nums,), 1 / mixture.routed_experts)
        return {name: static_lora(module, weights_E) for name, module in experts.items()}
    _, rows = rows_of_type(trained, args.calibration_data, "dataset_dir", args)
    # An adapted output layer has to see every token; otherwise its logits are not needed.
    logits_to_keep = 0 if isinstance(trained.model.get_base_model().get_output_embeddings(), LoraLayer) else 1
    with torch.no_grad(), Calibration(experts) as calibration:
        for batch in batches(trained, rows, batch_size, "calibrating"):
            calibration.mask_BT = batch["attention_mask"]
            trained.model(
                input_ids=batch["input_ids"], attention_mask=calibration.mask_BT, logits_to_keep=logits_to_keep
            )
    if args.weights == "calibrated":
        return {name: static_lora(module, calibration.mean_weights(name)) for name, module in experts.items()}
    rank = args.rank or mixture.lora_nums * mixture.r
    return {name: calibration.fitted_lora(name, rank) for name in experts}


def add_static_adapter(model: PeftModel, loras: dict[str, LowRank]) -> LoraConfig:
    """Add the plain LoRA to the model as adapter `static`; returns its configuration."""
    mixture = model.active_peft_config
    # If only some layers are adapted, complete names select them; other loaders also understand these.
    targets = sorted(loras) if mixture.layers_to_transform else mixture.target_modules
    rank = next(iter(loras.values()))[0].shape[0]
    config = LoraConfig(
        task_type=mixture.task_type,
        base_model_name_or_path=mixture.base_model_name_or_path,
        inference_mode=True,
        r=rank,
        lora_alpha=mixture.scaling * rank,
        lora_nums=1,
        lora_dropout=0.0,
        blc_weight=0.0,
        target_modules=targets,
    )
    model.add_adapter(STATIC, config)
    with torch.no_grad():
        for name, layer in adapted(model.get_base_model()):
            for parameter, tensor in zip(layer.experts[STATIC].parameters(), loras[name], strict=True):
                parameter.copy_(tensor)
    return config


@contextmanager
def as_static(model: PeftModel):
    """A context in which the model has the plain LoRA in place of the mixture."""
    model.set_adapter(STATIC)
    yield
    model.set_adapter("default")


@contextmanager
def as_merged(model: PeftModel, merged: dict[str, nn.Linear]):
    """A context in which the base model is the complete model: merged Linears replace the adapted ones."""
    base = model.get_base_model()
    layers = {name: base.get_submodule(name) for name in merged}
    with as_static(model):
        for name, linear in merged.items():
            base.set_submodule(name, linear)
        yield
        for name, layer in layers.items():
            base.set_submodule(name, layer)


@dataclass
class Cost:
    """The measurements of one model, summed over supervised tokens or rows.

    Args:
        nll: negative log-likelihood.
        kl: Kullback-Leibler divergence of the model's next-token distribution from the mixture's.
        exact: rows in which every token of the answer is the most likely one.
    """

    nll: float = 0.0
    kl: float = 0.0
    exact: int = 0
    tokens: int = 0
    rows: int = 0


def compare(
    model: PeftModel, data: Iterable[dict[str, Tensor]], other: Callable[[], AbstractContextManager]
) -> tuple[Cost, Cost]:
    """Measure the mixture and, in the context `other`, its replacement, on the same batches."""
    costs = Cost(), Cost()
    for batch in data:
        mixture_NV = None
        for cost, context in zip(costs, (nullcontext, other), strict=True):
            with torch.no_grad(), context():
                log_p_NV = model(**batch).logits[0].float().log_softmax(dim=-1)
            positions = SupervisedTokens(batch["labels"].to(log_p_NV.device))
            mixture_NV = log_p_NV if mixture_NV is None else mixture_NV
            wrong_N = log_p_NV.argmax(dim=-1) != positions.targets_N
            cost.nll -= log_p_NV.gather(1, positions.targets_N[:, None]).sum().item()
            cost.kl += (mixture_NV.exp() * (mixture_NV - log_p_NV)).sum().item()
            cost.exact += len(batch["labels"]) - len(positions.samples_N[wrong_N].unique())
            cost.tokens += len(positions.targets_N)
            cost.rows += len(batch["labels"])
    return costs


def cost_lines(costs: tuple[Cost, Cost], name: str) -> list[str]:
    """The lines of a table of means per token or row."""
    lines = [f"{'':20}{'LM loss':>10}{'exact match':>16}{'KL to the mixture':>20}"]
    for label, cost in zip(("mixture", name), costs, strict=True):
        exact = f"{cost.exact} ({cost.exact / cost.rows:.1%})"
        lines.append(f"{label:20}{cost.nll / cost.tokens:>10.4f}{exact:>16}{cost.kl / cost.tokens:>20.6f}")
    return lines


def write_adapter(loras: dict[str, LowRank], config: LoraConfig, base_model: str, folder: Path) -> None:
    """Write a LoRA adapter with the tensor names and the configuration of PyPI's `peft`."""
    tensors = {}
    for name, (A_KI, B_OK) in loras.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = A_KI
        tensors[f"base_model.model.{name}.lora_B.weight"] = B_OK
    save_adapter_weights(tensors, folder)
    alpha = config.lora_alpha
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "target_modules": config.target_modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "use_rslora": False,
        "inference_mode": True,
    }
    (folder / CONFIG_NAME).write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    run_verb(main)
