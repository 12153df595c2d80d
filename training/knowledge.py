"""The watch over knowledge while training: which of the facts that the base model knows are still there."""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from data import InputError, first_line
from data.atomic import atomic_file
from inference.generation import drop_proposed_settings
from inference.knowledge import Knowledge, Probe, Reference, ask_base, compare
from loading.arguments import is_knowledge
from peft import PeftModel
from peft.ranks import sum_over_ranks
from training.checkpoint import writing
from training.random_state import kept_random_state
from transformers_patch.auto import base_of

REFERENCE_NAME = "knowledge.safetensors"
WARN_BELOW = 2 / 3
WARN_FROM = 10  # known facts; of fewer, a third can be lost by chance
# Asking may take a twentieth of a run's time, and in a short run as long as in one of an hour.
TIME_SHARE = 0.05
LEAST_SECONDS = TIME_SHARE * 3600
TYPE_1_ROWS = "examples of task type 1, questions about other facts, as a fifth of the training rows"
# By tuning, what helped LoRAMoE on a small model, the most effective first: the changes in
# docs/results/frontier_small/table.md whose interval excludes 0, and then `perhaps` the others.
REMEDIES = {
    "loramoe": {
        "type_1_rows_and_kl": f"{TYPE_1_ROWS}, with --kl_weight 1 (30 in the main job of the README)",
        "lower_rate": "a third of the --learning_rate",
        "smaller_scaling": "perhaps a quarter of --lora_alpha",
        "smaller_rank": "perhaps half of --lora_rank",
    },
    "full": {"type_1_rows": TYPE_1_ROWS, "lower_rate": "a third of the --learning_rate"},
}


class KnowledgeWatch(TrainerCallback):
    """Asks the base model the facts of a probe, and later, as often as wanted, the model in training.

    What the base model answers is kept in the run's folder until the run is finished: a run that resumes compares with
    the same answers, also if all weights are trained and the base model is gone.

    Asking takes `TIME_SHARE` of the time from the beginning of training, or its resumption, to the end, or
    `LEAST_SECONDS` if that is more. If this is too little for all evaluations, some ask nothing; the others are spread
    evenly.

    Args:
        probe: the facts.
        folder: the run's.
        tuning: `loramoe` or `full`, for the advice.
        starts_as_base: the model is the base model before the first step.

    Attributes:
        last: the last measurement, the same on all ranks.
        seconds: time that this process has spent on asking.
    """

    def __init__(self, probe: Probe, folder: Path, tuning: str, starts_as_base: bool):
        self.probe = probe
        self.file = folder / REFERENCE_NAME
        self.last: Knowledge | None = None
        self.seconds = 0.0
        self._tuning = tuning
        self._starts_as_base = starts_as_base
        self._start = time.monotonic()
        self._first_step = self._last_step = 0
        self._is_main = True
        self._base_seconds = self._latest_seconds = 0.0
        self._has_skipped = False
        self._measured: object = None
        self._reference: Reference | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ):
        """Ask the base model, or read what it has answered in a run that resumes.

        Raises:
            InputError: the best checkpoint is chosen by knowledge, but the base model knows none of the facts; or what
                it has answered is lost, or was asked of other facts.
        """
        self._start = time.monotonic()
        chooses_by_knowledge = is_knowledge(args.metric_for_best_model)
        self._first_step, self._last_step = state.global_step, state.max_steps
        self._is_main = state.is_world_process_zero
        problem = None
        try:
            self._reference = self._read()
        except SafetensorError as error:
            problem = f"{self.file} is damaged ({first_line(error)})"
        if self._reference is not None:
            return
        has_trained = bool(state.global_step)
        is_lost = has_trained and not isinstance(model, PeftModel)
        is_of_others = has_trained and problem is None and self.file.is_file()
        if is_lost or is_of_others:
            problem = problem or f"{self.file} does not hold the base model's answers to this knowledge probe"
            if is_lost:
                problem += ", and the model's weights have changed since"
            if chooses_by_knowledge:
                raise InputError(
                    f"{problem}, so --metric_for_best_model {args.metric_for_best_model} cannot go on: put the file, "
                    "and that of the probe, back from a copy, or start over with --restart"
                )
        if problem and self._is_main:
            consequence = "knowledge is not measured" if is_lost else "the base model is asked again"
            consequence += ", and later measurements are of other facts" if is_of_others and not is_lost else ""
            print(f"warning: {problem}: {consequence}")
        if is_lost:
            return
        # A complete model is the base model before the first step.
        as_base = model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
        with kept_random_state(args.device), self._asking(model), as_base:
            self._reference = ask_base(model, self.probe)
        if not any(self._reference.known):
            problem = f"the base model knows none of the {len(self._reference.known)} facts of the knowledge probe"
            if chooses_by_knowledge:
                raise InputError(
                    f"{problem}, so --metric_for_best_model {args.metric_for_best_model} cannot choose: name other "
                    "facts with --knowledge_probe"
                )
            if self._is_main:
                print(f"warning: {problem}, so nothing tells what is forgotten")
        self._base_seconds = self.seconds
        self._latest_seconds *= sum(self._reference.known) / len(self._reference.known)  # only these are asked later
        if self._is_main:
            self._write(self._reference)

    def measure(self, model: nn.Module, step: int, is_final: bool, is_needed: bool) -> dict[str, float]:
        """Measurements for a log line; {} if the base model's answers are not known, or time is short. A collective.

        Args:
            step: the optimizer step; a model is asked once.
            is_final: the model is the best one of a finished run, not that of the step.
            is_needed: ask, whatever time it takes.
        """
        if self._reference is None:
            return {}
        if not step and self._starts_as_base:
            known = sum(self._reference.known)
            self.last = Knowledge(len(self.probe.prompts), self.probe.revealed, known, known, 0.0, 0.0)
        elif self._measured != (step, is_final):
            if not is_needed and self._lacks_time(step, model.device):
                return {}
            with self._asking(model):
                self.last = compare(model, self.probe, self._reference)
        assert self.last
        self._measured = step, is_final
        return {
            "knowledge_kept": self.last.share,
            "knowledge_kl_prompts": self.last.kl_prompts,
            "knowledge_kl_text": self.last.kl_text,
        }

    def results(self) -> dict[str, float]:
        """The last measurement and its cost, in seconds and as a share of the time since training began or resumed."""
        if self.last is None:
            return {}
        time_share = self.seconds / (time.monotonic() - self._start)
        return {**self.last.to_dict(), "seconds": round(self.seconds, 1), "time_share": round(time_share, 3)}

    def warning(self, step: int, log_history: list[dict]) -> str | None:
        """A warning, once in a run, if a third of the known facts is lost and there are enough to tell.

        Step 0 does not count: there, only an adapter that training continues can have lost any.
        """
        if not step or self.last is None or self.last.known < WARN_FROM or self.last.share > WARN_BELOW:
            return None
        if any(entry["step"] and entry.get("eval_knowledge_kept", 1) <= WARN_BELOW for entry in log_history):
            return None
        return (
            f"warning: of {self.last.known} facts that the base model knows, {self.last.kept} are left at step {step}. "
            f"{self.advice}"
        )

    @property
    def advice(self) -> str:
        """What to do about forgetting."""
        helped = "; ".join(REMEDIES[self._tuning].values())
        return (
            f"What helped LoRAMoE on a small model, the most effective first: {helped}. Where rows teach a new form of "
            "answer, training harder can help instead (docs/RESULTS.md)"
        )

    def _lacks_time(self, step: int, device: torch.device) -> bool:
        """Tell, alike on all ranks, if asking now and again at the end takes too long. The first time, print it."""
        progress = (step - self._first_step) / max(self._last_step - self._first_step, 1)
        if progress in (0, 1):
            return False
        allowed = max(LEAST_SECONDS, TIME_SHARE * (time.monotonic() - self._start) / progress)
        allowed_by_now = self._base_seconds + progress * (allowed - self._base_seconds)
        is_too_long = self.seconds + 2 * self._latest_seconds > allowed_by_now
        lacks_time = bool(sum_over_ranks(torch.tensor(float(is_too_long), device=device)))
        if lacks_time and not self._has_skipped and self._is_main:
            print(
                f"knowledge is not measured at some evaluations: asking takes {self._latest_seconds:.0f} s, and at all "
                f"of them more than {TIME_SHARE * 100:.0f} % of the run's time (fewer --probe_facts take less)"
            )
        self._has_skipped |= lacks_time
        return lacks_time

    @contextmanager
    def _asking(self, model: nn.Module) -> Iterator[None]:
        """A context in which a model in training can be asked; then it is as before."""
        start, was_training, base = time.monotonic(), model.training, base_of(model)
        proposed = base.generation_config
        drop_proposed_settings(model, self.probe.tokenizer.pad_token_id)
        model.eval()
        try:
            yield
        finally:
            model.train(was_training)
            base.generation_config = proposed
            self._latest_seconds = time.monotonic() - start
            self.seconds += self._latest_seconds

    @property
    def _fingerprint(self) -> str:
        content = json.dumps([self.probe.prompts, self.probe.answers, self.probe.text])
        return hashlib.sha256(content.encode()).hexdigest()

    def _read(self) -> Reference | None:
        """The answers in the file; None if it is not there or belongs to another probe.

        Raises:
            SafetensorError: it is damaged.
        """
        if not self.file.is_file():
            return None
        with safe_open(self.file, "pt") as stored:
            if (stored.metadata() or {}).get("probe") != self._fingerprint:
                return None
            known, prompts_NV, text_NV = (stored.get_tensor(name) for name in ("known", "prompts", "text"))
        return Reference(known.tolist(), prompts_NV, text_NV)

    def _write(self, reference: Reference) -> None:
        tensors = {
            "known": torch.tensor(reference.known),
            "prompts": reference.prompts_NV,
            "text": reference.text_NV,
        }
        with writing(self.file.parent, self.file.name), atomic_file(self.file) as temporary:
            save_file(tensors, temporary, metadata={"probe": self._fingerprint})
