"""The rows of an experiment: the mixture that a cell trains on, and what is held out from all of them."""

import json
import random
from itertools import cycle, islice
from pathlib import Path

from data import InputError
from data.facts import QUESTIONS, TASK, fact_row, load_facts
from data.tasks import TASKS, make_rows
from scripts.experiments.plan import Cell, Experiment

HELD_OUT_SEED = 0
VALIDATION_ROWS = 50


def mixture(cell: Cell, folder: str | None = None) -> list[dict]:
    """The training rows of a cell; the same for all arms.

    Args:
        folder: training rows by `scripts.prepare_data`; None generates them. Where there are fewer closed-book
            questions than the share asks for, they come again, in the same order.

    Raises:
        InputError: the folder's files have too few rows.
    """
    knowledge = round(cell.size * cell.knowledge_share)
    tasks = _files(folder) if folder else dict.fromkeys(TASKS)
    counts = _split_evenly(cell.size - knowledge, [task for task in tasks if task != TASK])
    if folder:
        return [row for task, count in {TASK: knowledge, **counts}.items() for row in _sample(tasks[task], count, cell)]
    questions = [fact_row(fact, n) for fact in load_facts("training") for n in range(len(QUESTIONS[fact.relation]))]
    random.Random(cell.seed).shuffle(questions)
    rows = list(islice(cycle(questions), knowledge))
    return rows + [row for task, count in counts.items() for row in make_rows(task, count, seed=1 + cell.seed)]


def probe_rows(experiment: Experiment) -> list[dict]:
    """The probe facts as closed-book questions."""
    return [fact_row(fact) for fact in load_facts("probe", experiment.facts)]


def task_rows(experiment: Experiment, stage: str) -> list[dict]:
    """Held-out rows of the other tasks; learning rates are tuned on other ones than the rest is measured on."""
    count = experiment.rows_per_task
    rows = {task: make_rows(task, count + VALIDATION_ROWS, HELD_OUT_SEED, "test") for task in TASKS}
    picked = slice(count, None) if stage == "tuning" else slice(count)
    return [row for task in TASKS for row in rows[task][picked]]


def write_rows(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _split_evenly(count: int, names: list[str]) -> dict[str, int]:
    each, left = divmod(count, len(names))
    return {name: each + (index < left) for index, name in enumerate(names)}


def _files(folder: str) -> dict[str, Path]:
    """The file of each kind of task."""
    return {file.stem: file for file in sorted(Path(folder).glob("*.jsonl"))}


def _sample(file: Path, count: int, cell: Cell) -> list[dict]:
    with file.open() as lines:
        total = sum(1 for _ in lines)
    if count > total:
        raise InputError(f"{file} has {total} rows, not {count}; prepare more, or ask for fewer")
    picked = set(random.Random(cell.seed).sample(range(total), count))
    with file.open() as lines:
        return [json.loads(line) for number, line in enumerate(lines) if number in picked]
