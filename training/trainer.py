"""The Trainer: two losses logged separately, a correctly averaged balance term, evaluation per token.

Shape suffixes: B samples, T tokens, L adapted Linears, E experts.
"""

import math
import shutil
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, ProgressCallback, Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import nested_gather
from transformers.trainer_utils import SaveStrategy, TrainOutput, rotate_checkpoints, sort_checkpoints

from data import EpochDataLoader, GlobalBatchSampler, PackedRows, row_lengths
from data.atomic import atomic_files
from inference.routing import Routing
from loading.arguments import LOSS_IF_KEPT, is_knowledge, parse_steps
from loading.run_files import STATE_NAME
from peft import LoraConfig, PeftModel
from training.checkpoint import TEMPORARY_NAME, put_in_place, writing
from training.knowledge import KnowledgeWatch
from training.profiling import StepProfiler
from training.random_state import kept_random_state
from training.replay import count_replayed, divergence
from training.routing_watch import RoutingWatch
from training.stopping import DUE, SKIPPED_STEPS, StoppedError, StopSignals
from training.throughput import Throughput
from transformers_patch.labels import SupervisedTokens
from transformers_patch.recorder import RoutingRecorder

PENALTY = 1e6  # above any loss


class LoRAMoETrainer(Trainer):
    """Hugging Face's Trainer for a model with the mixin.

    - Trainer sums the losses of an optimizer step over micro-batches and multiplies them by the number of processes,
      which is right for the LM loss (normalised by all supervised tokens of the step) but would multiply the balance
      term. The model is told to scale the term so that it counts as the mean over the actual micro-batches; the last
      step of an epoch may have fewer.
    - With `kl_weight`, the weighted KL divergence from the base model is added (`training/replay.py`): the mean over
      the tokens of type 1 of the optimizer step, in all micro-batches and processes.
    - Which rows share an optimizer step depends on seed, epoch and global batch size alone (`data/sampler.py`), and the
      last rows of an epoch are shared evenly; Trainer's samplers repeat rows to fill the last batch.
    - With `pack_capacity`, batches are made of packs (`data/packing.py`) of at most so many tokens, in place of rows,
      and evaluation packs the rows of each batch. The `data_collator` is then a `PackingCollator`.
    - Each log line holds `lm_loss` and `balance_loss` (unweighted) next to `loss`, `kl_loss` (unweighted) if it has
      weight, `aux_loss` (unweighted) if the base model is a mixture of experts whose own router loss is added, with
      routers `routing_entropy`, `routing_cv` and `group_share_type_K`, and `tokens_per_second`; on GPUs
      `peak_memory_gib` and `mfu`. There is one warning if a group of experts dies out.
    - With `knowledge`, an evaluation also asks what the model still knows, unless that takes too long, and there is one
      warning if a third of it is lost.
    - Evaluation weighs every supervised token equally, whatever the batches and processes, and never contains the
      balance term. `routing` then holds the shares of the last evaluation; None if nothing is routed.
    """

    def __init__(
        self,
        *args,
        stop_signals: StopSignals,
        pack_capacity: int | None = None,
        knowledge: KnowledgeWatch | None = None,
        **kwargs,
    ):
        super().__init__(*args, compute_metrics=self._metrics, **kwargs)
        self.packs = PackedRows(self.train_dataset, pack_capacity, self._data_seed) if pack_capacity else None
        self.stop_signals = stop_signals
        self.add_callback(self.stop_signals)
        adapted = isinstance(self.model, PeftModel)
        config = self.model.active_peft_config if adapted else LoraConfig(lora_nums=1)
        self.routing_watch = RoutingWatch(config.num_task_types, config.group_sizes, config.null_expert)
        self.add_callback(self.routing_watch)
        self.knowledge = knowledge
        if knowledge:
            self.add_callback(knowledge)
        self.throughput = Throughput(self.model, self.args.device)
        if steps := parse_steps(self.args.profile_steps or ""):
            self.add_callback(StepProfiler(*steps, self.args.output_dir))
        self.routing: Routing | None = None
        self._temporary: Path | None = None
        self._routed_modules: list[str] = []
        self._losses_since_log = torch.zeros(1, 4, dtype=torch.float64, device=self.args.device)
        self._steps_since_log = 0.0

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            self._end_progress_bars()

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        try:
            return super().training_step(*args, **kwargs)
        except Exception as error:
            # Of DeepSpeed, which cannot lower the loss scale of fp16 any further.
            if "loss scale already at minimum" in str(error):
                step, skipped = self.state.global_step, self.state.stateful_callbacks.get(SKIPPED_STEPS, 0)
                self.stop_signals.raise_skipped(self.args, step + 1, skipped + 1)
            raise

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        """As Trainer's; but an evaluation that SIGTERM interrupts is left, and the checkpoint is written."""
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except StoppedError:
            self.stop_signals.stop(self.args, self.state, self.control)
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def _evaluate(
        self, trial, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False
    ) -> dict[str, float]:
        """As Trainer's. Before training, where Trainer asks for no step of the schedule, a run that resumes from a
        checkpoint makes up for the evaluation that was due there, if one was.

        The checkpoint stays as it is, with that evaluation due: an evaluation can change the schedule and the learning
        rate, and they cannot be replaced together in one step.
        """
        if skip_scheduler and self.state.global_step:
            if due := self.state.stateful_callbacks.get(DUE):
                is_best = self._determine_best_metric(self._evaluate(trial, ignore_keys_for_eval), trial)
                if is_best and (due["save"] or self.args.save_strategy == SaveStrategy.BEST):
                    checkpoint = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
                    self.state.best_model_checkpoint = str(checkpoint)
            return {}
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        self.state.stateful_callbacks.pop(DUE, None)
        return metrics

    def _run_epoch(self, *args, **kwargs) -> None:
        """As Trainer's, which checks `max_steps` after a step only: a resumed run may have made all of them."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args, **kwargs) -> TrainOutput:
        """As Trainer's, but the last checkpoint is kept: a run that is not finished yet resumes from it."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def keep_best_checkpoint(self) -> None:
        """Delete all others of a finished run, if `save_total_limit` is 1 and there is a best one."""
        best = self.state.best_model_checkpoint
        if best and self.args.save_total_limit == 1:
            for checkpoint in map(Path, sort_checkpoints(self.args.output_dir)):
                if checkpoint.name != Path(best).name:
                    shutil.rmtree(checkpoint, ignore_errors=True)

    def _end_progress_bars(self) -> None:
        """Close the progress bars, so that messages after an interrupted training begin on a new line."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback):
                for bar in (callback.prediction_bar, callback.training_bar):
                    if bar is not None:
                        bar.close()

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def train_sampler(self, packed: bool = True) -> GlobalBatchSampler:
        """The micro-batches of this process, of packs if there are any; without `packed`, of rows in any case."""
        args = self.args
        return GlobalBatchSampler(
            self.packs.lengths if packed and self.packs else row_lengths(self.train_dataset),
            args.train_sampling_strategy,
            self._data_seed,
            self._train_batch_size,
            args.gradient_accumulation_steps,
            self.accelerator.num_processes,
            self.accelerator.process_index,
            args.dataloader_drop_last,
        )

    def padding_share(self, packed: bool = True) -> float:
        """Share of the tokens in the first epoch's batches that are padding; without `packed`, if they were of rows."""
        if packed and self.packs and self.data_collator.one_row:
            return 0.0
        return self.train_sampler(packed).padding_share()

    def get_train_dataloader(self) -> EpochDataLoader:
        args = self.args
        return EpochDataLoader(
            self.packs or self.train_dataset,
            batch_sampler=self.train_sampler(),
            collate_fn=self.data_collator.from_packs if self.packs else self.data_collator,
            num_workers=args.dataloader_num_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
            persistent_workers=args.dataloader_persistent_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type != "cpu",
            # A separate one, so that an epoch's beginning does not move the random state that dropout draws from.
            generator=torch.Generator(),
        )

    def num_examples(self, dataloader: DataLoader) -> int:
        """As Trainer's, but the examples in packs, not the packs: `train_samples_per_second` depends on it."""
        packed = self.packs is not None and dataloader.dataset is self.packs
        return len(self.train_dataset) if packed else super().num_examples(dataloader)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """As Trainer's, but with the last rows even under `dataloader_drop_last`, which concerns training."""
        drops_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drops_last

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """As Trainer's, but training continues as if there had been no evaluation."""
        with self.throughput.paused(), kept_random_state(self.args.device):
            return super().evaluate(*args, **kwargs)

    def measure_knowledge(self) -> dict[str, float]:
        """Measurements of what the model still knows; {} without a probe, or where time is short. A collective."""
        if not self.knowledge:
            return {}
        return self.knowledge.measure(
            self.accelerator.unwrap_model(self.model),
            self.state.global_step,
            is_final=self.args.load_best_model_at_end and not self.is_in_train,
            is_needed=not self.is_in_train or is_knowledge(self.args.metric_for_best_model),
        )

    def log_knowledge(self) -> None:
        """A log line of what the model still knows, for a run without evaluation rows. A collective."""
        if measured := self.measure_knowledge():
            self.log({f"eval_{name}": value for name, value in measured.items()})

    def least_kept_warning(self) -> str | None:
        """A warning if the best model was to keep `least_kept` of what it knew, and none does."""
        state, wanted = self.state, self.args.least_kept
        is_wanted = (self.args.metric_for_best_model or "").endswith(LOSS_IF_KEPT)
        if not (self.knowledge and is_wanted and state.best_global_step) or state.best_metric < PENALTY:
            return None
        kept = wanted + 1 - state.best_metric / PENALTY
        return (
            f"warning: no evaluated model keeps --least_kept {wanted} of the known facts; the most is {kept:.3g}, at "
            f"step {state.best_global_step}. Lower --least_kept, or train more gently. {self.knowledge.advice}"
        )

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint, if its model replaces the last one after training."""
        best = self.args.load_best_model_at_end and self.state.best_model_checkpoint
        return int(Path(best).name.removeprefix("checkpoint-")) if best else None

    def get_batch_samples(self, *args, **kwargs) -> tuple[list, torch.Tensor | int | None]:
        """As Trainer's, which counts the supervised tokens of the step; here the replayed ones, too."""
        batches, supervised_tokens = super().get_batch_samples(*args, **kwargs)
        if self.args.kl_weight:
            counts = torch.as_tensor(sum(map(count_replayed, batches)), device=self.args.device)
            self._replayed_tokens = self.accelerator.gather(counts).sum().clamp(min=1)
        return batches, supervised_tokens

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **kwargs):
        micro_batches = self.current_gradient_accumulation_steps
        balance_scale = 1 / (micro_batches * self.accelerator.num_processes)
        # Nothing here reads the logits, which accelerate would copy to float32 under autocast.
        inputs = {**inputs, "balance_scale": balance_scale, "return_logits": False}
        sources = inputs.pop("sources")
        self.throughput.watch(inputs.pop("lengths"), len(inputs["supervised_indices"]))
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        kl_loss = loss.new_zeros(())
        if self.args.kl_weight:
            kl_loss = divergence(self.accelerator.unwrap_model(model), inputs) / self._replayed_tokens
            loss = loss + self.args.kl_weight * self.accelerator.num_processes * kl_loss
        self.stop_signals.watch(loss, sources)
        if outputs.routing_shares is not None:
            self.routing_watch.watch(outputs.routing_shares, inputs["task_types"], inputs["row_weights"])
        auxiliary = loss.new_zeros(()) if outputs.aux_loss is None else outputs.aux_loss
        losses = [outputs.lm_loss, outputs.balance_loss / micro_batches, auxiliary / micro_batches, kl_loss]
        self._losses_since_log += torch.stack([value.detach().to(self._losses_since_log) for value in losses])
        self._steps_since_log += 1 / micro_batches
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | float | None = None):
        self.stop_signals.gradient_norm = super()._get_grad_norm(model, grad_norm)
        return self.stop_signals.gradient_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            # One row a rank: its part of the LM loss, the balance term (the same on all), the base model's own router
            # loss (of the rank's rows), its part of the divergence.
            sums_W4 = nested_gather(self._losses_since_log, self.args.parallel_mode) / self._steps_since_log
            lm_loss_W, balance_loss_W, aux_loss_W, kl_loss_W = sums_W4.T
            logs["lm_loss"] = lm_loss_W.sum().item()
            logs["balance_loss"] = balance_loss_W.mean().item()
            if getattr(self.model.config, "output_router_logits", False):
                logs["aux_loss"] = aux_loss_W.mean().item()
            if self.args.kl_weight:
                logs["kl_loss"] = kl_loss_W.sum().item()
            self._losses_since_log.zero_()
            self._steps_since_log = 0.0
            logs |= self.routing_watch.scalars(self.args) | self.throughput.scalars(self.args)
            warning = self.routing_watch.collapse(self.args, self.state.global_step)
            if warning and self.is_world_process_zero():
                print(warning, flush=True)
        if self.knowledge and "eval_knowledge_kept" in logs:
            warning = self.knowledge.warning(self.state.global_step, self.state.log_history)
            if warning and self.is_world_process_zero():
                print(warning, flush=True)
        super().log(logs, start_time)

    def prediction_step(self, model: nn.Module, inputs: dict, prediction_loss_only: bool, ignore_keys=None):
        """Per sample: summed negative log-likelihood, number of supervised tokens, and routing shares.

        The model gets no labels: with them it would compute losses of the batch, which nobody reports.
        """
        inputs = self._prepare_inputs(inputs)
        sources, sample_ids = inputs["sources"], inputs.get("sample_ids")
        positions = SupervisedTokens(inputs["labels"], inputs["supervised_indices"], sample_ids, len(sources))
        fields = {name: value for name, value in inputs.items() if name not in ("labels", "lengths", "sources")}
        plain_model = self.accelerator.unwrap_model(model)
        recorder = RoutingRecorder(plain_model)
        with torch.no_grad(), self.compute_loss_context_manager(), recorder, positions.only(plain_model):
            logits_1NV = model(**fields).logits
        predictions = [positions.scores(logits_1NV)[:, :2]]
        if recorder.weights:
            self._routed_modules = list(recorder.weights)
            if sample_ids is None:
                shares_LBE = recorder.sample_shares(inputs["attention_mask"])
            else:
                shares_LBE = recorder.packed_shares(sample_ids, len(sources))
            predictions.append(shares_LBE.transpose(0, 1).contiguous())
        tasks = torch.tensor([self._task_numbers.get(source, -1) for source in sources], device=logits_1NV.device)
        return None, tuple(predictions), torch.stack([inputs["task_types"], tasks], dim=1)

    @cached_property
    def _task_names(self) -> list[str]:
        """The tasks of the evaluation rows."""
        return sorted({task for task in self.eval_dataset["task"] if task})

    @cached_property
    def _task_numbers(self) -> dict[str, int]:
        """The number of an evaluation row's task, by the row's source.

        Processes exchange tensors, not text, and the order of the evaluated rows depends on the sampler.
        """
        number = {task: index for index, task in enumerate(self._task_names)}
        rows = zip(self.eval_dataset["source"], self.eval_dataset["task"], strict=True)
        return {source: number[task] for source, task in rows if task}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's, but of an adapted model only the adapter is gathered, not the base model."""
        if not isinstance(self.model, PeftModel):
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            self._save(output_dir)
        else:
            self.model.save_pretrained(output_dir or self.args.output_dir, is_main_process=False)

    def _get_output_dir(self, trial) -> str:
        return str(self._temporary or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        """Write the checkpoint to a temporary folder and rename it: a run that is killed leaves no incomplete one.

        Raises:
            InputError: it could not be written (the disk is full, say); earlier checkpoints are as they were.
        """
        run_folder = Path(self.args.output_dir)
        temporary, name = run_folder / TEMPORARY_NAME, f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero():
            shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._temporary = temporary
        try:
            with self.throughput.paused(), writing(run_folder, name):
                super()._save_checkpoint(model, trial)
                if self.state.best_model_checkpoint == str(temporary / name):
                    self.state.best_model_checkpoint = str(run_folder / name)
                self.accelerator.wait_for_everyone()
                if self.is_world_process_zero():
                    self.state.save_to_json(str(temporary / name / STATE_NAME))
                    put_in_place(temporary, name)
                    # A later one is incomplete, and would be kept in place of this one.
                    if sort_checkpoints(str(run_folder))[-1] == str(run_folder / name):
                        rotate_checkpoints(
                            str(run_folder), self.args.save_total_limit, self.state.best_model_checkpoint
                        )
        finally:
            self._temporary = None
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        with atomic_files(Path(output_dir or self.args.output_dir)) as temporary:
            super()._save(str(temporary), state_dict)
            # A pickle with this machine's paths; everything in it is in run_config.json.
            (temporary / TRAINING_ARGS_NAME).unlink()

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        likelihood_B2, *shares = prediction.predictions
        if shares:
            task_types_B, tasks_B = prediction.label_ids.T
            names = np.array([*self._task_names, ""])  # -1, no task, is the last
            self.routing = Routing(self._routed_modules, shares[0], task_types_B, names[tasks_B])
        nll, tokens = likelihood_B2.astype(np.float64).sum(axis=0)
        lm_loss = nll / tokens
        metrics = {"loss": lm_loss, "lm_loss": lm_loss, "perplexity": math.exp(min(lm_loss, 700))}
        knowledge = self.measure_knowledge()
        if knowledge and (self.args.metric_for_best_model or "").endswith(LOSS_IF_KEPT):
            # A model that keeps too little is worse than any that keeps enough, and the better the more it keeps.
            missing = self.args.least_kept - knowledge["knowledge_kept"]
            metrics[LOSS_IF_KEPT] = lm_loss if missing <= 0 else PENALTY * (1 + missing)
        return metrics | knowledge
