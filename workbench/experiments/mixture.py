"""The rows of an experiment: the mixture that a cell trains on, and the held-out rows that it is measured on."""

import json
import math
import random
from collections import defaultdict
from collections.abc import Iterable
from itertools import cycle, islice
from pathlib import Path

from data import InputError
from data.facts import QUESTIONS, TASK, fact_row, instruction_facts, load_facts
from data.probe import AUTO, load_probe
from data.tasks import MOST_ROWS, TASKS, make_rows
from inference.contamination import Contamination
from scripts.prepare_data import read_rows
from workbench.experiments.plan import Cell, Experiment

HELD_OUT_SEED = 0


def mixture(cell: Cell, folder: str | None = None) -> list[dict]:
    """The training rows of a cell; the same for all arms.

    If there are fewer closed-book questions than the share needs, they are repeated in the same order.

    Args:
        folder: training rows from `scripts.prepare_data`; None generates them.

    Raises:
        InputError: the folder has too few rows of the other tasks.
    """
    knowledge = round(cell.size * cell.knowledge_share)
    if folder:
        files = _files(folder)
        questions = _without_probe_facts(read_rows(files.pop(TASK)))
        counts = _split_evenly(cell.size - knowledge, {task: _count(file) for task, file in files.items()}, folder)
        others = [row for task, file in files.items() for row in _sample(file, counts[task], cell.seed)]
    else:
        questions = [fact_row(fact, n) for fact in instruction_facts() for n in range(len(QUESTIONS[fact.relation]))]
        counts = _split_evenly(cell.size - knowledge, dict.fromkeys(TASKS, cell.size), "the generator")
        others = [row for task, count in counts.items() for row in make_rows(task, count, seed=1 + cell.seed)]
    random.Random(cell.seed).shuffle(questions)
    return [*islice(cycle(questions), knowledge), *others]


def probe_rows(experiment: Experiment) -> list[dict]:
    """The probe facts as closed-book questions."""
    return [fact_row(fact) for fact in load_facts("probe", experiment.facts)]


def task_rows(experiment: Experiment) -> list[dict]:
    """Held-out rows of the other tasks."""
    count = experiment.rows_per_task
    if experiment.rows:
        by_task = defaultdict(list)
        for file in evaluation_files(experiment.rows):
            for row in read_rows(file):
                by_task[row["task"]].append(row)
        by_task.pop(TASK, None)
        rows = {
            task: random.Random(HELD_OUT_SEED).sample(found, min(len(found), count)) for task, found in by_task.items()
        }
    else:
        rows = {task: make_rows(task, count, HELD_OUT_SEED, "test") for task in TASKS}
    return [row for found in rows.values() for row in found]


def check_rows(experiment: Experiment) -> None:
    """Check, before any training, that there are enough rows for the largest mixture and for the measurements.

    Raises:
        InputError: there are too few.
    """
    wanted = max(cell.size - round(cell.size * cell.knowledge_share) for cell in experiment.cells())
    if experiment.rows:
        if not evaluation_files(experiment.rows):
            folder = Path(experiment.rows).parent / "evaluation"
            raise InputError(f"there are no .jsonl files in {folder} to measure on")
        files = _files(experiment.rows)
        del files[TASK]
        _split_evenly(wanted, {task: _count(file) for task, file in files.items()}, experiment.rows)
        return
    each = {"train": math.ceil(wanted / len(TASKS)), "test": experiment.rows_per_task}
    problems = [
        f"{count:,} different {part} rows of each task are needed, but only {MOST_ROWS[part]:,} can be "
        f"generated: lower {name}, or use prepared rows"
        for (part, count), name in zip(each.items(), ("size", "rows_per_task"), strict=True)
        if count > MOST_ROWS[part]
    ]
    if problems:
        raise InputError("; ".join(problems))


def evaluation_files(folder: str) -> list[Path]:
    """Files of held-out rows, which `scripts.prepare_data` puts next to a folder of training rows."""
    return sorted((Path(folder).parent / "evaluation").glob("*.jsonl"))


def _split_evenly(count: int, most: dict[str, int], source: str) -> dict[str, int]:
    """Split a number of rows evenly among tasks; what a task lacks is taken from those with more.

    Args:
        most: available rows of each task.
        source: their origin, for the message.

    Raises:
        InputError: fewer than `count` rows are available.
    """
    counts: dict[str, int] = {}
    for place, task in enumerate(sorted(most, key=most.get)):
        wanted = math.ceil((count - sum(counts.values())) / (len(most) - place))
        counts[task] = min(most[task], wanted)
    if sum(counts.values()) < count:
        raise InputError(
            f"{source} has {sum(most.values()):,} rows of tasks other than {TASK}, but {count:,} are needed: "
            "prepare more, or use smaller sizes"
        )
    return counts


def _files(folder: str) -> dict[str, Path]:
    """The file of each task.

    Raises:
        InputError: it is not a folder of training rows.
    """
    files = {file.stem: file for file in sorted(Path(folder).glob("*.jsonl"))}
    if TASK not in files or len(files) < 2:
        raise InputError(
            f"{folder} has to hold {TASK}.jsonl and files of other tasks; python -m scripts.prepare_data makes them"
        )
    return files


def _without_probe_facts(rows: Iterable[dict]) -> list[dict]:
    """Drop the rows that reveal a probe fact, also by one of their aliases."""
    contamination = Contamination(load_probe(AUTO))
    return [
        row
        for row in rows
        if not contamination.of(row["instruction"], "\n".join([row["output"], *row.get("aliases", ())]))
    ]


def _count(file: Path) -> int:
    with file.open() as lines:
        return sum(1 for _ in lines)


def _sample(file: Path, count: int, seed: int) -> list[dict]:
    picked = set(random.Random(seed).sample(range(_count(file)), count))
    with file.open() as lines:
        return [json.loads(line) for number, line in enumerate(lines) if number in picked]
