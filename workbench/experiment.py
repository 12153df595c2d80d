"""Run an experiment, cell by cell, and write its tables and figures: what do methods learn, and what do they forget?

    python -m workbench.experiment --config workbench/experiments/frontier_small.yaml

A finished cell has a JSON file in the working folder and is not run again; the report collects them in `cells.csv`.
docs/RESULTS.md shows what came out.
"""

import math
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from data import InputError
from loading.command_line import flag, parse_flags, run_verb
from loading.provenance import processor
from workbench.experiments.cell import run_cell
from workbench.experiments.mixture import check_rows
from workbench.experiments.plan import Cell, Experiment, read_experiment
from workbench.experiments.records import BASE, finished_names
from workbench.experiments.report import report

COMMAND = "python -m workbench.experiment"
MOST_NAMES = 5  # in a message


@dataclass
class ExperimentArguments:
    """The experiment, and the part of it that is run."""

    config: str = flag(None, "YAML file of the experiment; see workbench/experiments", required=True)
    results: str | None = flag(None, "folder for cells, tables and figures, instead of the configuration's two")
    cells: list[str] = field(default_factory=list, metadata={"help": "names of the cells to run; by default all"})
    jobs: int = flag(1, "number of cells that run in parallel, each in a separate process")
    max_hours: float | None = flag(None, "do not start another cell after this many hours")
    report_only: bool = flag(False, "run nothing; write the table and figures of the finished cells")

    def problems(self) -> list[str]:
        problems = [] if self.jobs >= 1 else [f"--jobs is {self.jobs}, but has to be at least 1"]
        if self.max_hours is not None and self.max_hours <= 0:
            problems.append(f"--max_hours is {self.max_hours}, but has to be above 0")
        return problems

    def one_cell(self, cell: Cell) -> list[str]:
        """The flags that run one cell of the same experiment."""
        place = ["--results", self.results] if self.results else []
        return ["--config", self.config, *place, "--cells", cell.name]


KINDS = (ExperimentArguments,)


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then report.

    Raises:
        InputError: the flags, the configuration or a cell's file are invalid, or a training run failed.
    """
    (args,) = parse_flags(COMMAND, __doc__.splitlines()[0], KINDS, argv)
    experiment = read_experiment(args.config)
    if args.results:
        experiment = replace(experiment, results=args.results, work=args.results)
    refuse_foreign_cells(experiment)
    if not args.report_only:
        run(experiment, args, chosen_cells(experiment, args.cells))
    if not args.cells:
        print(*report(experiment), sep="\n")


def chosen_cells(experiment: Experiment, names: list[str]) -> list[Cell]:
    """Cells by name, in the experiment's order; all if none is named."""
    cells = experiment.cells()
    if unknown := sorted(set(names) - {cell.name for cell in cells}):
        raise InputError(f"--cells: unknown {', '.join(unknown)}; choose from {', '.join(c.name for c in cells)}")
    return [cell for cell in cells if not names or cell.name in names]


def run(experiment: Experiment, args: ExperimentArguments, cells: list[Cell]) -> None:
    """Run the cells that have no file yet, stage by stage."""
    if not Path(experiment.model).is_dir() and experiment.model.startswith(("models/", ".", "/")):
        raise InputError(f"the configuration's model {experiment.model}: no such folder")
    check_rows(experiment)
    if experiment.lm_eval:
        from inference.harness import find_tasks

        find_tasks(experiment.lm_eval)
    records = {cell: experiment.finished(cell) for cell in cells}
    refuse_other_processors(filter(None, map(experiment.finished, experiment.cells())))
    progress = Progress({cell: record for cell, record in records.items() if record is not None})
    deadline = time.monotonic() + 3600 * args.max_hours if args.max_hours else float("inf")
    if len(cells) == 1:
        start_cell = partial(run_here, experiment, args)
    else:
        start_cell = partial(run_in_process, experiment, args, max(1, os.cpu_count() // args.jobs))
    for stage in stages(experiment, cells):
        if time.monotonic() > deadline:
            break
        failures = []
        missing = [cell for cell in stage if records[cell] is None]
        due = [cell for cell in missing if experiment.is_due(cell)]
        if skipped := len(missing) - len(due):
            print(f"[experiment] {skipped} cells are not run: with the first seed, their settings are no contenders")
        progress.begin(due)
        for cell, done in run_all(start_cell, iter(due), args.jobs, deadline):
            try:
                progress.say(cell, done.result())
            except InputError as error:
                failures.append(str(error))
        if failures:
            raise InputError("\n".join(failures))
    if time.monotonic() > deadline:
        print(f"[experiment] --max_hours {args.max_hours:g} have passed; run the same command to continue")


def refuse_foreign_cells(experiment: Experiment) -> None:
    """Reject cells of another configuration, which the report would include.

    Raises:
        InputError: the folder for files of cells or the table has some.
    """
    if foreign := sorted(finished_names(experiment.results, experiment.work) - {c.name for c in experiment.cells()}):
        names = ", ".join(foreign[:MOST_NAMES]) + (", ..." if len(foreign) > MOST_NAMES else "")
        raise InputError(
            f"{experiment.work} and {experiment.results} have cells of another configuration: {names}; "
            "move them away, or choose another folder with --results"
        )


def refuse_other_processors(records: Iterable[dict]) -> None:
    """Reject finished cells of another processor, which rounds differently: cells are compared with each other.

    Raises:
        InputError: there is such a cell.
    """
    for record in records:
        if record["processor"] != processor():
            raise InputError(
                f"{record['cell']} was run on {record['processor']}, and this is {processor()}; run the cells of this "
                "one in another folder, with --results"
            )


def stages(experiment: Experiment, cells: list[Cell]) -> list[list[Cell]]:
    """The base model, every setting with its first seed, and the other seeds: each stage needs those before it."""
    first = experiment.seeds[0]
    kinds = [
        lambda c: c.arm == BASE,
        lambda c: c.arm != BASE and (c.is_variant or c.seed == first),
        lambda c: c.arm != BASE and not c.is_variant and c.seed != first,
    ]
    return [[cell for cell in cells if belongs(cell)] for belongs in kinds]


def run_all(start_cell, cells: Iterator[Cell], jobs: int, deadline: float) -> Iterator[tuple[Cell, Future]]:
    """Run up to `jobs` cells in parallel and start none after the deadline; yields each cell when it ends.

    A cell that fails does not stop the others.
    """
    with ThreadPoolExecutor(jobs) as pool:
        running: dict[Future, Cell] = {}
        while True:
            while len(running) < jobs and time.monotonic() < deadline and (cell := next(cells, None)):
                running[pool.submit(start_cell, cell)] = cell
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future


def run_here(experiment: Experiment, args: ExperimentArguments, cell: Cell) -> dict:
    """Run a cell in this process."""
    return run_cell(experiment, cell, args.one_cell(cell))


def run_in_process(experiment: Experiment, args: ExperimentArguments, threads: int, cell: Cell) -> dict:
    """Run a cell in a separate process, so that an interrupt ends it at once and its memory is freed."""
    command = [sys.executable, "-m", "workbench.experiment", *args.one_cell(cell)]
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        if message := re.search(r"^error: .*", done.stderr, re.MULTILINE | re.DOTALL):
            raise InputError(f"{shlex.join(command)}: {message[0].strip()}")
        raise RuntimeError(f"{shlex.join(command)}:\n{done.stderr}")
    return experiment.finished(cell)


class Progress:
    """Prints a line for each finished cell, with the estimated time left.

    Args:
        records: those of the cells that have been run before.
    """

    def __init__(self, records: dict[Cell, dict]):
        self._records: dict[Cell, dict | None] = dict(records)
        self._start = time.monotonic()
        self._seconds_run = 0.0

    def begin(self, cells: Iterable[Cell]) -> None:
        """Count cells that are now to be run; which ones come later can depend on them."""
        self._records |= dict.fromkeys(cells)

    def say(self, cell: Cell, record: dict) -> None:
        self._records[cell] = record
        self._seconds_run += record["seconds"]
        done = sum(each is not None for each in self._records.values())
        passed, left = time.monotonic() - self._start, "an unknown time"
        if (seconds := self._seconds_left()) is not None and self._seconds_run:
            # Cells that run in parallel take less time than the sum of their times.
            left = f"about {_clock(seconds * passed / self._seconds_run)}"
        outcome = f"task loss {record['task_loss']:.3f}" if math.isfinite(record["task_loss"]) else "diverged"
        if (kept := record["knowledge_known"]) is not None:
            outcome = f"{kept:.1%} kept, {outcome}"
        print(
            f"[experiment] {done} of {len(self._records)} cells, {_clock(passed)} so far, {left} left; "
            f"{cell.name}: {outcome}, {record['seconds']:.0f} s",
            flush=True,
        )

    def _seconds_left(self) -> float | None:
        """Estimate for the missing cells, from finished ones of the same size or else by the number of rows; None
        before any training run has finished."""
        finished = [(cell.size, record["seconds"]) for cell, record in self._records.items() if record and cell.size]
        if not finished:
            return None
        by_row = sum(seconds for _, seconds in finished) / sum(size for size, _ in finished)
        left = 0.0
        for cell in (cell for cell, record in self._records.items() if record is None):
            same = [seconds for size, seconds in finished if size == cell.size]
            left += sum(same) / len(same) if same else by_row * cell.size
        return left


def _clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min"


if __name__ == "__main__":
    run_verb(main)
