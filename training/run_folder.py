"""The folder of one run: its configuration, its results, and the lock on it."""

import json
import math
from contextlib import AbstractContextManager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from data import InputError, file_hash
from data.atomic import remove_temporaries, write_json
from loading.arguments import DataArguments, ModelArguments, RunArguments, is_knowledge
from loading.lock import locked
from loading.optimization import EVALUATED
from loading.run_files import RESULTS_NAME, RUN_CONFIG_NAME, with_current_names
from peft.saving import WEIGHTS_NAME
from training.checkpoint import checkpoint_problem, writing

# Flags that decide where and how often something is written, or how fast it runs, but have no effect on the weights.
# Those of DDP, for instance, decide in which order the gradients of several processes are added.
WITHOUT_EFFECT = {
    "data_cache_dir", "dataloader_multiprocessing_context", "dataloader_num_workers", "dataloader_persistent_workers",
    "dataloader_pin_memory", "dataloader_prefetch_factor", "ddp_timeout", "debug", "disable_tqdm", "local_rank",
    "output_dir", "per_device_eval_batch_size", "prepare_only", "preprocessing_num_workers", "profile_steps", "project",
    "report_to", "restart", "resume_from_checkpoint", "run_name", "use_cpu",
}  # fmt: skip
WITHOUT_EFFECT_PREFIXES = ("do_", "eval_", "hub_", "log_", "logging_", "push_", "save_", "trackio_")
# They have an effect if evaluations do.
OF_EVALUATION = (
    "eval_delay", "eval_steps", "eval_strategy", "per_device_eval_batch_size", "save_steps", "save_strategy",
)  # fmt: skip

# How the rows of a micro-batch are divided among the processes.
DIVISION = ("num_processes", "per_device_train_batch_size")

# In the configuration for the reader: files, whose contents are compared; and what has an effect only if the best
# checkpoint is chosen by knowledge.
DESCRIPTIVE = {"dataset_dir", "validation_file", "peft_path"}
OF_KNOWLEDGE = {"knowledge_probe", "probe_facts", "least_kept"}
SECONDS_TO_WAIT = 10


class RunFolder:
    """OUTPUT_DIR/EXP_NAME.

    Args:
        path: the folder, which need not exist.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @property
    def results(self) -> dict | None:
        """Results of the finished run; None if no run has finished here."""
        file = self.path / RESULTS_NAME
        return json.loads(file.read_text()) if file.is_file() else None

    def held(self) -> AbstractContextManager[None]:
        """A context in which this process alone may train or change the folder.

        Raises:
            InputError: another process holds it.
        """
        in_use = f"{self.path} is in use by another run; wait for its end, or {_WAY_OUT}"
        return locked(self.path, in_use, SECONDS_TO_WAIT)

    def check(self, config: dict) -> None:
        """Compare the configuration with the one that the folder belongs to, if it belongs to any.

        Raises:
            InputError: they differ, the folder holds something other than a run, or a finished run is damaged.
        """
        file = self.path / RUN_CONFIG_NAME
        if not file.is_file():
            if (self.path / RESULTS_NAME).is_file() or any(self.path.glob("checkpoint-*")):
                raise InputError(f"{self.path} holds checkpoints or results but no {RUN_CONFIG_NAME}; {_WAY_OUT}")
            return
        if (self.path / RESULTS_NAME).is_file() and (problem := checkpoint_problem(self.path, finished=True)):
            raise InputError(
                f"{self.path} holds a finished run, but {problem}. Put that file back from a copy; or delete "
                f"{RESULTS_NAME} there, and the same command finishes the run again from its last checkpoint; or start "
                "over with --restart"
            )
        try:
            there = json.loads(file.read_text())
            if not isinstance(there, dict):
                raise ValueError("it holds no JSON object")
        except ValueError as error:
            raise InputError(f"{file} is damaged ({error}), so what it belongs to is not known; {_WAY_OUT}") from None
        there = with_current_names(there)
        trained, wanted = _deciding(there), _deciding(config)
        differing = [
            f"  {name}: {there.get(name)!r} there, {config.get(name)!r} now"
            for name in sorted(there.keys() | config.keys())
            if trained.get(name) != wanted.get(name) and there.get(name) != config.get(name)
        ]
        if differing:
            found = "\n".join(differing)
            raise InputError(f"{self.path} holds a run with another configuration:\n{found}\n{_WAY_OUT}")

    def claim(self, config: dict) -> None:
        """Write the configuration, unless the run is finished, and remove the temporary files of a killed run."""
        with writing(self.path, RUN_CONFIG_NAME):
            self.path.mkdir(parents=True, exist_ok=True)
            remove_temporaries(self.path)
            if self.results is None:
                write_json(self.path / RUN_CONFIG_NAME, config)

    def archive(self) -> Path | None:
        """Rename the folder, so that a new run can start; nothing is deleted. Returns its new place.

        A link to it stays, and leads to an empty folder then.

        Raises:
            InputError: it cannot be renamed.
        """
        if not self.path.exists():
            return None
        folder = self.path.resolve()
        archive = folder.with_name(f"{folder.name}.before-{datetime.now():%Y%m%d-%H%M%S}")
        try:
            folder.rename(archive)
            folder.mkdir()
        except OSError as error:
            raise InputError(f"{folder} cannot be renamed: {error.strerror}") from error
        return archive


_WAY_OUT = (
    "choose another folder (exp_name=NAME for run_loramoe.sh, --output_dir for train.py), or start over in this one "
    "with --restart, which keeps the old folder under another name"
)


def run_config(
    model_args: ModelArguments, data_args: DataArguments, args: RunArguments, data_sha256: dict[str, str]
) -> dict:
    """Everything that the result of a run depends on, as plain JSON values; files by their content.

    Args:
        data_sha256: the contents of the data files, as `dataset_sha256` and `validation_sha256`.
    """
    values = {**asdict(model_args), **asdict(data_args), **args.to_dict()}
    config = {
        name: value
        for name, value in values.items()
        if name not in WITHOUT_EFFECT and not name.startswith(WITHOUT_EFFECT_PREFIXES)
    }
    config["device"] = args.device.type
    config |= data_sha256
    if model_args.peft_path:
        config["peft_sha256"] = file_hash(Path(model_args.peft_path) / WEIGHTS_NAME)
    if args.deepspeed:
        config["deepspeed"] = json.loads(Path(args.deepspeed).read_text())
    if args.load_best_model_at_end or args.lr_scheduler_type in EVALUATED:
        config |= {name: values[name] for name in OF_EVALUATION}
    return json.loads(json.dumps(config, default=str))


def _deciding(config: dict) -> dict:
    """The part of a configuration that decides what is trained.

    If nothing belongs to one process alone, neither a part of the optimizer's state (DeepSpeed) nor a term of the loss
    (`blc_reference`, a base model's own router loss), only the rows that all processes share count, and a run can
    resume with another number of processes.
    """
    ignored = DESCRIPTIVE if is_knowledge(config.get("metric_for_best_model")) else DESCRIPTIVE | OF_KNOWLEDGE
    values = {name: value for name, value in config.items() if name not in ignored}
    if not any(config.get(name) for name in ("deepspeed", "blc_reference", "output_router_logits")):
        shared = math.prod(values.get(name) or 0 for name in DIVISION)
        values |= dict.fromkeys(DIVISION, shared)
    return values
