"""Train a mixture of LoRA experts (or all weights) on instruction data. `python train.py --help` lists the flags."""

import os
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from data import (
    Collator,
    DataStatistics,
    Encoding,
    InputError,
    PackingCollator,
    Part,
    count_shared_rows,
    load_part,
    marked_row,
    pack,
    resolve_template,
    row_lengths,
    task_types,
)
from data.atomic import atomic_files, write_json
from data.probe import AUTO, NONE, ProbeFact, load_probe
from inference.contamination import revealed_facts
from inference.knowledge import Probe, encode_probe
from inference.knowledge_plot import plot_retention, retention_curve
from inference.routing import routing_lines, routing_summary, training_curves
from inference.routing_plot import write_routing
from loading.arguments import DataArguments, ModelArguments, RunArguments, is_knowledge, parse_arguments
from loading.base_model import (
    adapter_warnings,
    build_model,
    check_attention,
    check_base_model,
    check_lengths,
    check_packing,
    load_tokenizer,
    with_adapter,
)
from loading.command_line import listed
from loading.run_files import RESULTS_NAME, STATE_NAME
from peft.saving import WEIGHTS_NAME
from training.checkpoint import find_checkpoint, writers, writing
from training.ending import run_process
from training.knowledge import REFERENCE_NAME, KnowledgeWatch
from training.publish import open_repository, publish
from training.replay import REPLAYED
from training.report import generate_samples, summary_lines, write_model_card
from training.run_folder import RunFolder, run_config
from training.stopping import StoppedError, StopSignals
from training.trainer import LoRAMoETrainer
from transformers_patch.auto import base_of
from transformers_patch.packing import packs_into_one_row


def main(argv: list[str] | None = None) -> None:
    """One run, from flags to results.

    Raises:
        InputError: something about the input is wrong; no weights have been read and nothing has been overwritten then.
    """
    model_args, data_args, args = parse_arguments(argv)
    folder = RunFolder(args.output_dir)
    with args.main_process_first(desc="checking the input"):
        tokenizer = load_tokenizer(model_args.tokenizer_name_or_path or model_args.model_name_or_path)
        skeleton = check_base_model(
            model_args.model_name_or_path, tokenizer, partial(with_adapter, model_args=model_args)
        )
        check_attention(skeleton, model_args.attn_implementation)
        model_args.resolve(skeleton)
        if data_args.packing:
            check_packing(skeleton)
        is_finished = (folder.path / RESULTS_NAME).is_file() and not args.restart
        is_asked = data_args.knowledge_probe != NONE and not is_finished
        facts = load_probe(data_args.knowledge_probe) if is_asked else []
        train_data, eval_data, data_sha256 = load_rows(tokenizer, model_args, data_args, args)
        check_lengths(skeleton, *filter(None, (train_data, eval_data)))
        config = run_config(model_args, data_args, args, data_sha256)
        probe = make_probe(facts, tokenizer, skeleton, train_data, config, data_args, args) if is_asked else None
    say(args, *adapter_warnings(model_args))
    repository = open_repository(args)
    with folder.held() if args.process_index == 0 else nullcontext():
        with args.main_process_first(local=False, desc="preparing the run's folder"):
            if args.process_index == 0:
                prepare_folder(folder, config, restart=args.restart)
        if args.prepare_only:
            return
        if folder.results:
            say(args, "this run is finished already; its results were:", *summary_lines(folder.path, folder.results))
        else:
            try:
                with StopSignals().handled() as stop_signals:
                    run(model_args, args, folder, config, tokenizer, train_data, eval_data, stop_signals, probe)
            except StoppedError as stop:
                say(args, str(stop))
        if repository and folder.results:
            say(args, f"uploaded to {publish(folder.path, repository, args)}")


def run(
    model_args: ModelArguments,
    args: RunArguments,
    folder: RunFolder,
    config: dict,
    tokenizer: PreTrainedTokenizerBase,
    train_data: Dataset,
    eval_data: Dataset | None,
    stop_signals: StopSignals,
    probe: Probe | None,
) -> None:
    """Train from the last checkpoint, if there is one, to the results.

    Raises:
        StoppedError: SIGTERM came; what there was to save is saved.
    """
    checkpoint, skipped = find_checkpoint(folder.path)
    say(args, *skipped)
    if skipped and not checkpoint:
        say(args, "no checkpoint is left to resume from, so the run starts from the beginning")
    capacity = config["max_seq_length"] if config["packing"] else None
    trainer = build_trainer(
        model_args, args, tokenizer, train_data, eval_data, checkpoint, stop_signals, capacity, probe
    )
    stop_signals.raise_if_terminated(args.device)
    padding = trainer.padding_share()
    line = f"{padding:.1%} of the tokens in the batches of the first epoch are padding"
    if trainer.packs:
        line = f"{len(train_data):,} rows are in {len(trainer.packs):,} packs of up to {capacity} tokens; {line}"
        line += f", without packing {trainer.padding_share(packed=False):.1%}"
    say(args, line)
    with writing(folder.path, "tensorboard"):
        results = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint)).metrics
    if stop_signals.stopped:
        step = trainer.state.global_step
        raise StoppedError(f"stopped by a signal; step {step} is saved, and the same command goes on from it")
    results |= {"train_samples": len(train_data), "padding_share": padding}
    with writing(folder.path, WEIGHTS_NAME):
        trainer.save_model()
    with writing(folder.path, RESULTS_NAME):
        if eval_data is not None:
            results |= evaluate(trainer, config["prompt_template"])
        else:
            trainer.log_knowledge()
        if trainer.knowledge:
            results["knowledge"] = trainer.knowledge.results()
        finish(trainer, folder, config, results)


def load_rows(
    tokenizer: PreTrainedTokenizerBase, model_args: ModelArguments, data_args: DataArguments, args: RunArguments
) -> tuple[Dataset, Dataset | None, dict[str, str]]:
    """Training and evaluation rows, encoded, and the hashes of their files for `run_config`. Prints what was found, and
    warns of rows that are in both.

    Raises:
        InputError: a file or a row cannot be used, there are too few rows for a single micro-batch that is kept, or
            none of the type that `--kl_weight` needs.
    """
    names = tuple(listed(model_args.task_type_names) or ())
    encoding = Encoding(
        data_args.prompt_template, data_args.max_seq_length, model_args.num_task_types, names, data_args.train_on
    )

    def load(path: str, part: Part) -> tuple[Dataset, DataStatistics]:
        cache_dir, num_proc = data_args.data_cache_dir, data_args.preprocessing_num_workers
        return load_part(path, part, tokenizer, encoding, cache_dir, num_proc)

    train_data, train_counts = load(data_args.dataset_dir, "training")
    if args.kl_weight and REPLAYED not in task_types(train_data):
        raise InputError(f"--kl_weight needs rows of task type {REPLAYED}, but {data_args.dataset_dir} has none")
    if args.dataloader_drop_last:
        check_drop_last(train_data, encoding.max_seq_length if data_args.packing else None, args)
    messages = [f"training rows    {data_args.dataset_dir}: {train_counts.summary(encoding.max_seq_length)}"]
    eval_data, data_sha256 = None, {"dataset_sha256": train_counts.sha256}
    if data_args.validation_file:
        eval_data, eval_counts = load(data_args.validation_file, "held out")
        data_sha256["validation_sha256"] = eval_counts.sha256
        messages.append(f"evaluation rows  {data_args.validation_file}: {eval_counts.summary(encoding.max_seq_length)}")
        if args.process_index == 0 and (shared := count_shared_rows(train_data, eval_data)):
            messages.append(
                f"warning: {shared} of {len(eval_data)} evaluation rows are also training rows (same prompt), so the "
                "evaluation flatters the model"
            )
        messages += unseen_task_types(train_data, eval_data, names)
    messages += ["first training row, what is learnt in [[ ]]:", marked_row(tokenizer, train_data[0])]
    if not args.prepare_only:
        say(args, *messages)
    return train_data, eval_data, data_sha256


def make_probe(
    facts: list[ProbeFact],
    tokenizer: PreTrainedTokenizerBase,
    skeleton: nn.Module,
    train_data: Dataset,
    config: dict,
    data_args: DataArguments,
    args: RunArguments,
) -> Probe | None:
    """The knowledge probe; None, with a warning, if no fact of the default one can be asked.

    Raises:
        InputError: no fact of the file that was named can be asked, or the best checkpoint is chosen by knowledge.
    """
    revealed = revealed_facts(facts, train_data, config["dataset_sha256"])
    template = resolve_template(data_args.prompt_template, tokenizer)
    try:
        probe = encode_probe(facts, tokenizer, template, skeleton, data_args.probe_facts, revealed)
    except InputError as error:
        if data_args.knowledge_probe != AUTO or is_knowledge(args.metric_for_best_model):
            raise
        say(args, f"warning: knowledge is not measured: {error}")
        return None
    if not args.prepare_only:
        say(args, f"knowledge probe  {data_args.knowledge_probe}: {probe.summary()}")
    return probe


def check_drop_last(rows: Dataset, pack_capacity: int | None, args: RunArguments) -> None:
    """Raises InputError if there are too few rows, or packs of them, for a single micro-batch over all processes."""
    count, unit = len(rows), "rows"
    if pack_capacity:
        count, unit = len(pack(row_lengths(rows), pack_capacity, seed=0)), "packs"  # as many with any seed
    micro_batch = args.per_device_train_batch_size * args.num_processes
    if count < micro_batch:
        raise InputError(
            f"--dataloader_drop_last leaves no training {unit}: there are {count}, and a micro-batch has {micro_batch} "
            "over all processes; leave it out or lower --per_device_train_batch_size"
        )


def unseen_task_types(train_data: Dataset, eval_data: Dataset, names: Sequence[str]) -> list[str]:
    """A warning for each task type of evaluation rows that no training row has."""
    unseen = sorted(task_types(eval_data) - task_types(train_data) - {-1})
    return [
        f"warning: there are evaluation rows of task type {names[kind] if names else kind}, but no training rows: no "
        "group of experts is drawn to them"
        for kind in unseen
    ]


def prepare_folder(folder: RunFolder, config: dict, restart: bool) -> None:
    """Claim the folder for this configuration, or check that it is this configuration's."""
    if restart and (archive := folder.archive()):
        print(f"--restart: what was in {folder.path} is now in {archive}")
    folder.check(config)
    folder.claim(config)


def build_trainer(
    model_args: ModelArguments,
    args: RunArguments,
    tokenizer: PreTrainedTokenizerBase,
    train_data: Dataset,
    eval_data: Dataset | None,
    checkpoint: Path | None,
    stop_signals: StopSignals,
    pack_capacity: int | None = None,
    probe: Probe | None = None,
) -> LoRAMoETrainer:
    """Base model, adapter and Trainer; with a checkpoint, made ready to resume from it."""
    set_seed(args.seed)
    model = build_model(model_args, args)
    if args.process_index == 0 and model_args.tuning == "loramoe":
        model.print_trainable_parameters()
    if checkpoint:
        say(args, f"resuming from {checkpoint}")
        if (before := writers(checkpoint)) != args.world_size:
            say(args, f"processes were {before}, now {args.world_size}: dropout masks will differ")
    args.eval_on_start = eval_data is not None
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(Path(args.output_dir) / "tensorboard"))
    collator: Collator | PackingCollator = Collator(tokenizer.pad_token_id)
    if pack_capacity:
        collator = PackingCollator(tokenizer.pad_token_id, packs_into_one_row(base_of(model).config))
    trainer = LoRAMoETrainer(
        model=model,
        args=args,
        data_collator=collator,
        train_dataset=train_data,
        eval_dataset=eval_data,
        processing_class=tokenizer,
        stop_signals=stop_signals,
        pack_capacity=pack_capacity,
        knowledge=KnowledgeWatch(probe, Path(args.output_dir), model_args.tuning, not model_args.peft_path)
        if probe
        else None,
    )
    # The weights are the same on all ranks; dropout masks must not be.
    if args.process_index:
        set_seed(args.seed + args.process_index)
    return trainer


def evaluate(trainer: LoRAMoETrainer, template: str) -> dict:
    """Held-out measurements of the trained model, next to those taken before the first step."""
    before = next(entry for entry in trainer.state.log_history if "eval_lm_loss" in entry)
    after = trainer.evaluate()
    results = {f"{name}_before": before[name] for name in ("eval_lm_loss", "eval_perplexity")}
    results |= {f"{name}_after": after[name] for name in ("eval_lm_loss", "eval_perplexity")}
    results["eval_samples"] = len(trainer.eval_dataset)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.routing:
        results["routing_table"] = routing_lines(trainer.routing, model.active_peft_config)
    results["samples"] = generate_samples(model, trainer.processing_class, trainer.eval_dataset, template)
    return results


def finish(trainer: LoRAMoETrainer, folder: RunFolder, config: dict, results: dict) -> None:
    """Write what is left; `all_results.json` comes last and marks the run as finished."""
    if not trainer.is_world_process_zero():
        return
    with atomic_files(folder.path) as temporary:
        trainer.state.save_to_json(str(temporary / STATE_NAME))
        if trainer.routing:
            adapter = trainer.accelerator.unwrap_model(trainer.model).active_peft_config
            summary = routing_summary(trainer.routing, adapter)
            summary["training"] = training_curves(folder.path.name, trainer.state.log_history, config["blc_weight"])
            write_routing(temporary, summary)
        # A run that went on without a probe has measurements, but none of the model that is saved.
        is_measured = trainer.knowledge is not None and trainer.knowledge.last is not None
        if is_measured and (curve := retention_curve(trainer.state.log_history, trainer.best_step)):
            plot_retention(temporary / "retention.png", curve, trainer.best_step)
        data = {"training": trainer.train_dataset, "evaluation": trainer.eval_dataset}
        write_model_card(temporary, config, results, {name: rows for name, rows in data.items() if rows is not None})
    write_json(folder.path / RESULTS_NAME, results)
    (folder.path / REFERENCE_NAME).unlink(missing_ok=True)
    trainer.keep_best_checkpoint()
    say(trainer.args, *filter(None, [trainer.least_kept_warning()]), *summary_lines(folder.path, results))


def say(args: RunArguments, *lines: str) -> None:
    """Print on the main process only."""
    if args.process_index == 0 and lines:
        print(*lines, sep="\n", flush=True)


if __name__ == "__main__":
    # DeepSpeed calls collectives by names that torch has deprecated; the user can do nothing about it.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    run_process(main)
