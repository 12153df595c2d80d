"""One cell of an experiment: training by `train.py`, measurements of its checkpoints, and the record as JSON."""

import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from datasets import Dataset, concatenate_datasets
from filelock import FileLock, Timeout
from huggingface_hub import snapshot_download

from data import InputError
from data.atomic import write_json
from inference.evaluation import Plan, run_model
from inference.generation import DecodingArguments
from inference.knowledge import LONGEST_ANSWER, recalls
from inference.metrics import normalized
from inference.routing import Routing, group_shares
from inference.rows import load_rows
from inference.trained import InferenceArguments, TrainedModel, load_trained
from loading.provenance import ROOT, processor, provenance
from loading.run_files import RESULTS_NAME
from peft import PeftModel
from scripts.plot_routing import route
from scripts.prepare_data import write_rows
from training.run_folder import RunFolder
from workbench.experiments.mixture import mixture, probe_rows, task_rows
from workbench.experiments.parameters import equal_rank, num_trainable, parameter_change
from workbench.experiments.plan import EQUAL, Cell, Experiment
from workbench.experiments.records import BASE, IDENTITY, MIXTURE, cell_file

ROUTED_FACTS = 300
DIVERGED = re.compile(r" of step \d+ is not finite")  # said by training/stopping.py
# Fields of a cell without a trained model, and of one whose training diverged.
UNTRAINED: dict = {"trainable_parameters": 0, "parameter_change": None, "routing": None}
UNMEASURED: dict = {"knowledge": None, "knowledge_known": None, "recalled": None, "task_score": None, "tasks": None}


@dataclass(frozen=True)
class HeldOut:
    """Encoded rows that every cell is measured on: probe facts, and rows of the other tasks."""

    facts: Dataset
    tasks: Dataset


def run_cell(experiment: Experiment, cell: Cell, argv: list[str]) -> dict:
    """Train and measure one cell, and write its file. The files of an interrupted attempt are removed.

    Args:
        argv: the command line that runs this cell.

    Raises:
        InputError: the training failed (the message names its log), or another process runs this cell.
    """
    folder = Path(experiment.work) / cell.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{folder}.lock", timeout=0):
            return _run_cell(experiment, cell, argv, folder)
    except Timeout:
        raise InputError(f"{cell.name} is being run by another process; wait for it, or end it") from None


def _run_cell(experiment: Experiment, cell: Cell, argv: list[str], folder: Path) -> dict:
    start = time.monotonic()
    with RunFolder(folder / "run").held():  # refused while the training of a killed attempt is still running
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    record = provenance("workbench.experiment", argv)
    record |= {"cell": cell.name, "model": experiment.model, "processor": processor()}
    record |= {"settings": experiment.settings(cell)}
    record |= {field: getattr(cell, field) for field in (*IDENTITY[1:], "is_variant")}
    record |= (_measure_base if cell.arm == BASE else _measure_run)(experiment, cell, folder)
    shutil.rmtree(folder)
    record = _rounded(record | {"seconds": round(time.monotonic() - start, 1)})
    file = cell_file(experiment.work, cell.name)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, record)
    return record


def _measure_base(experiment: Experiment, cell: Cell, folder: Path) -> dict:
    trained = load(experiment, experiment.model)
    measured = measure(trained, held_out(experiment, trained, folder), experiment.batch_size)
    facts, tasks = probe_rows(experiment), task_rows(experiment)
    asked = {"relations": [fact["relation"] for fact in facts]}
    asked |= {"guessed": guessed(facts, "relation"), "guessed_tasks": guessed(tasks, "task")}
    return UNTRAINED | measured | {"knowledge_known": 1.0} | asked | harness(experiment, trained)


def _measure_run(experiment: Experiment, cell: Cell, folder: Path) -> dict:
    base = experiment.finished(experiment.cells()[0])
    if base is None:
        raise InputError(f"{cell.name} is compared with the cell {BASE}, which is still to be run")
    run = train(experiment, cell, folder)
    if run is None:
        return UNTRAINED | UNMEASURED | {"task_loss": math.inf}
    trained = load(experiment, run)
    rows = held_out(experiment, trained, folder)
    measured = measure(trained, rows, experiment.batch_size)
    if not math.isfinite(measured["task_loss"]):
        return UNTRAINED | UNMEASURED | {"task_loss": math.inf}
    return {
        **measured,
        "knowledge_known": share_kept(measured["recalled"], base["recalled"]),
        "trainable_parameters": num_trainable(trained.model),
        "parameter_change": parameter_change(trained.model, experiment.model),
        "routing": routing(trained, rows, experiment.batch_size),
        **harness(experiment, trained),
    }


def train(experiment: Experiment, cell: Cell, folder: Path) -> Path | None:
    """Run `train.py` in a separate process. Returns the run's folder; None if the training has diverged.

    Raises:
        InputError: the training failed.
    """
    write_rows(folder / "rows.jsonl", mixture(cell, experiment.rows))
    command = [sys.executable, *experiment.launcher, str(ROOT / "train.py")]
    command += train_flags(experiment, cell, folder)
    environment = dict(os.environ)
    if experiment.launcher:
        environment.pop("OMP_NUM_THREADS", None)  # meant for this process, not for those that the launcher starts
    log, run = folder / "train.log", folder / "run"
    with log.open("w") as stream:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, check=False)
    if done.returncode == 0 and (run / RESULTS_NAME).is_file():
        return run
    if DIVERGED.search(log.read_text()):
        return None
    raise InputError(f"the training of {cell.name} failed with exit code {done.returncode}; see {log}")


def train_flags(experiment: Experiment, cell: Cell, folder: Path) -> list[str]:
    """The flags of a cell's training, whose rows are in `folder`."""
    own_flags = cell.flags
    if own_flags.get("lora_rank") == EQUAL:
        rank = equal_rank(experiment.model, own_flags, experiment.flags(MIXTURE))
        own_flags = own_flags | {"lora_rank": rank}
    if cell.scaling is not None:
        own_flags = own_flags | {"lora_alpha": cell.scaling * own_flags["lora_rank"]}
    flags = {
        "model_name_or_path": experiment.model,
        "dataset_dir": folder / "rows.jsonl",
        "data_cache_dir": folder / "data",
        "output_dir": folder / "run",
        "learning_rate": cell.learning_rate,
        "seed": cell.seed,
        "knowledge_probe": "none",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **own_flags,
    }
    return [f"--{name}={value}" for name, value in flags.items()]


def load(experiment: Experiment, place: str | Path) -> TrainedModel:
    """Load the model of a folder or, if it does not exist, of a hub id."""
    folder = place if Path(place).is_dir() else snapshot_download(str(place))
    is_adapter = Path(folder, "adapter_config.json").is_file()
    base = experiment.model if is_adapter else None
    return load_trained(InferenceArguments(str(folder), base_model=base, batch_size=experiment.batch_size))


def held_out(experiment: Experiment, trained: TrainedModel, folder: Path) -> HeldOut:
    """The held-out rows, encoded with this model's tokenizer."""
    encoded = []
    for name, rows in (("facts", probe_rows(experiment)), ("tasks", task_rows(experiment))):
        write_rows(folder / f"{name}.jsonl", rows)
        encoded.append(load_rows(trained, str(folder / f"{name}.jsonl"), "validation_file", str(folder / "data"))[1])
    return HeldOut(*encoded)


def measure(trained: TrainedModel, rows: HeldOut, batch_size: int) -> dict:
    """Measure which probe facts the model recalls, and its score and loss on the other tasks.

    `recalled` has a digit for each of `probe_rows`, 1 if the fact is recalled.

    A fact is recalled if `recalls` finds the expected answer, or an alias of it, in the greedy answer. A task is solved
    if greedy decoding gives exactly the expected tokens.
    """
    template = trained.template()
    settings = DecodingArguments(max_new_tokens=LONGEST_ANSWER).settings(
        trained.tokenizer.pad_token_id, trained.end_tokens(template)
    )
    plan = Plan(("exact_match",), template, settings, {}, batch_size, seed=0)
    answers = run_model(trained.model, trained.tokenizer, rows.facts, plan, "facts").answers
    references = [[row["output"], *row["aliases"]] for row in rows.facts.select_columns(["output", "aliases"])]
    recalled = [recalls(answer, expected) for answer, expected in zip(answers, references, strict=True)]
    plan = Plan(("token_exact_match",), template, settings, {}, batch_size, seed=0)
    scores = run_model(trained.model, trained.tokenizer, rows.tasks, plan, "tasks").scores
    by_task: dict[str, list] = {}
    for task, score in zip(rows.tasks["task"], scores, strict=True):
        by_task.setdefault(task, []).append(score)
    tasks = {task: fmean([score.matches for score in each]) for task, each in by_task.items()}
    losses = [sum(score.nll for score in each) / sum(score.tokens for score in each) for each in by_task.values()]
    return {
        "knowledge": fmean(recalled),
        "recalled": "".join(str(int(fact)) for fact in recalled),
        "tasks": tasks,
        "task_score": fmean(tasks.values()),
        "task_loss": fmean(losses),
    }


def share_kept(recalled: str, known: str) -> float | None:
    """Of the facts whose digit is 1 in `known`, the share whose digit is 1 in `recalled`; None if there are none."""
    kept = [int(now) for now, before in zip(recalled, known, strict=True) if before == "1"]
    return fmean(kept) if kept else None


def guessed(rows: Iterable[dict], kind: str) -> dict[str, float]:
    """By relation or task, the share of rows that are right if all of them get the same, best answer.

    This takes neither knowledge nor skill, and training teaches which answers are frequent.

    Args:
        kind: the field by which rows are grouped, `relation` or `task`.
    """
    accepted: dict[str, list[set[str]]] = {}
    for row in rows:
        answers = {normalized(each) for each in (row["output"], *row.get("aliases", ()))}
        accepted.setdefault(row[kind], []).append(answers)
    best = {name: Counter(chain(*answers)).most_common(1)[0][1] for name, answers in accepted.items()}
    return {name: count / len(accepted[name]) for name, count in best.items()}


def routing(trained: TrainedModel, rows: HeldOut, batch_size: int) -> dict | None:
    """Group weights by task type, and the distance of the types; None without a router."""
    model = trained.model
    if not isinstance(model, PeftModel) or model.active_peft_config.routed_experts == 1:
        return None
    facts = rows.facts.select(range(min(ROUTED_FACTS, len(rows.facts))))
    found = route(trained, concatenate_datasets([rows.tasks, facts]), batch_size)
    by_type = group_shares(found, model.active_peft_config.group_sizes)
    return {
        "group_shares": [by_type[kind].tolist() for kind in sorted(by_type)],
        "type_distance": type_distance(found),
    }


def type_distance(found: Routing) -> float:
    """Total variation distance between the expert weights on rows of the two task types, mean over the Linears.

    It detects experts that serve one type, whichever group they are in: 0 for equal weights, 1 for no common expert.
    """
    other_LE, knowledge_LE = (shares_LE for _, shares_LE in sorted(found.by_task_type().items()))
    return float(abs(knowledge_LE - other_LE).sum(axis=1).mean() / 2)


def harness(experiment: Experiment, trained: TrainedModel) -> dict[str, dict]:
    """The results of lm-evaluation-harness by task, as `lm_eval`; empty if the experiment does not name a task."""
    if not experiment.lm_eval:
        return {}
    from inference.harness import TemplateLM, find_tasks, run_tasks

    manager = find_tasks(experiment.lm_eval)
    lm = TemplateLM(trained, trained.template(), experiment.batch_size)
    return {"lm_eval": run_tasks(lm, experiment.lm_eval, manager, num_fewshot=None, limit=None, seed=0)}


def _rounded(value: Any) -> Any:
    """A JSON value whose numbers have as many digits as mean something, which keeps the table small."""
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
