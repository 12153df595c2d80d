"""A trace of some training steps by torch's profiler."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

FOLDER_NAME = "profile"


class StepProfiler(TrainerCallback):
    """Profiles optimizer steps and writes a trace for each process, for chrome://tracing or ui.perfetto.dev.

    Args:
        first: number of the first step, counting from 1.
        last: number of the last step.
        folder: the run's folder; the traces go into `profile/` there.
    """

    def __init__(self, first: int, last: int, folder: str | Path):
        self.first, self.last = first, last
        self.folder = Path(folder) / FOLDER_NAME
        self._profile: profile | None = None
        self._begin = 0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self._profile is None and self.first <= state.global_step + 1 <= self.last:
            self._begin = state.global_step + 1
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
            self._profile.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if state.global_step == self.last:
            self._write(args, state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._write(args, state)

    def _write(self, args: TrainingArguments, state: TrainerState) -> None:
        if self._profile is None:
            return
        self._profile.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"steps-{self._begin}-{state.global_step}-rank-{args.process_index}.json.gz"
        self._profile.export_chrome_trace(str(file))
        self._profile = None
        print(f"profile of steps {self._begin} to {state.global_step}: {file}", flush=True)
