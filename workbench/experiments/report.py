"""The report of an experiment: `table.md` and figures of the cells that are finished."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise
from operator import itemgetter
from pathlib import Path

from training.markdown import table
from workbench.experiments.figures import draw
from workbench.experiments.plan import best_rate
from workbench.experiments.records import BASE, MIXTURE, read_records, write_table
from workbench.experiments.results import (
    MEASURES,
    by_arm,
    by_place,
    estimate,
    guessed_share,
    largest_common,
    main_metric,
    matching_targets,
    outcome,
    paired_differences,
    paired_growth,
    runs_over_sizes,
)

PAIRS = (("loramoe", "loramoe_beta0"), ("loramoe", "lora"), ("loramoe", "full"), ("lora", "full"))
NOTHING = "-"

CONVENTIONS = """\
Numbers are means over seeds ± half of the 95 % t-interval; one run alone has no interval. The seeds are those of rows,
order and initial weights: base model, facts that are asked, and learning rates are the same in all of them, so no
interval speaks of other ones. Where some of the runs lack a value, the number of those that have it follows."""
SCORES = """\
*Knowledge* is the share of the probe facts that the model recalls after the training, *of the known* that of the facts
which the base model recalls. *Task score* is exact match on held-out rows and *task loss* the loss per token of their
answers, each a mean over the tasks.

*Knowledge at the target score*: for one share of type 1 rows and one number of rows, the target score is the lowest,
over the runs of all arms and seeds, of the highest task score that a run reaches along its checkpoints. The knowledge
of each run is interpolated linearly between the checkpoints around the first crossing of the target. Where some run has
learned nothing there is no such score. *Knowledge at the target loss* is the same with the highest of the lowest
losses: where scores are still near 0, losses already tell apart who has learned more. A run that is beyond a target by
its first checkpoint has no value there: between the base model and that checkpoint nothing was measured."""
DIFFERENCES = """\
First arm minus second, for each seed that both have. Bold: the interval does not hold 0; where there is no difference,
one in twenty is bold by chance."""
GROWTH = """\
What a run ends with, minus what one with the next smaller number of rows ends with, for each seed that both have; 0
rows is the base model."""
ALONG_RUNS = """\
Knowledge at the first checkpoint of each training, at its end, and the second minus the first. *Lost* is the share of
the facts known to the base model that the first checkpoint does not recall, *back* the share of these that the end
recalls, although no row holds any of them: beyond what guessing gets, these had not been lost but could not be brought
out."""
OVER_SIZES = """\
As the comparison at targets above, but along the numbers of rows instead of along one training, in which the learning
rate falls as well: each run here is the base model and the ends of the runs of one arm and seed, up to that many
rows."""
RELATIONS = """\
Share of the probe facts that the model recalls, by relation, at the largest number of rows that all arms have.
*Guessed* is what the one best answer to all questions of a relation gets right: rows about other facts teach such
answers, so only what is above it is knowledge."""
TASKS = """\
Exact match of each task at the largest size that all arms have: what the one best answer to all rows of a task gets
(*guessed*), of the base model, at the first checkpoint of the training (*first*, without an interval), and at its end
(*trained*)."""
HARNESS = """\
The main metric of each task, which its column names: exact_match, else acc_norm, acc or f1, else the first that the
task has."""
ABLATIONS = """\
Columns as in the first table, with all arms of the grid that were trained on as many rows. The targets are those of
the runs in this table."""
GROUPS = """\
Mean weight of the second group of experts, which the constraint draws to rows of type 1, by the type of held-out rows;
the first group has the rest. Without the constraint it is chance which experts come to serve which rows, and in which
group they are. *Distance* notices them wherever they are: for each Linear the total variation distance between the mean
weights on rows of the two types, 0 where they are the same and 1 where no expert serves both; mean over the Linears."""
TUNING = """\
Validation loss per answer token at the end of a trial, mean over the tasks. The lowest one's learning rate is that of
the arm; knowledge has no part in the choice, and shows what it costs."""


def report(results: Path, work: Path) -> list[Path]:
    """Collect the finished cells in `cells.csv`, and write `table.md` and the figures next to it. Returns the files.

    Raises:
        InputError: see `read_records`.
    """
    cells = read_records(results, work)
    results.mkdir(parents=True, exist_ok=True)
    collected, text = write_table(results, cells), results / "table.md"
    text.write_text(markdown(cells) + "\n")
    return [collected, text, *draw(cells, results)]


def markdown(cells: list[dict]) -> str:
    """All sections that have cells, each under its heading."""
    parts = [f"# Results on {cells[0]['model']}", CONVENTIONS]
    for heading, (text, make) in SECTIONS.items():
        if section := make(cells):
            parts += [f"## {heading}", text, section]
    return "\n\n".join([*parts, "## Origin", _origin(cells)])


def _grid(cells: list[dict]) -> str:
    grid = _of_stage(cells, "grid")
    return _scores(grid) if grid else ""


def _scores(cells: list[dict]) -> str:
    header = ["type 1 rows", "rows", "arm", "seeds", "learning rate", "trained parameters", "knowledge", "of the known",
              "task score", "target score", "knowledge at target score", "task loss", "target loss",
              "knowledge at target loss", "parameter change"]  # fmt: skip
    rows = []
    for place, here in by_place(cells).items():
        targets = matching_targets(here)
        rows += [[*_place(place), arm, *_score_row(runs, targets)] for arm, runs in by_arm(here).items()]
    return table(header, rows)


def _score_row(runs: list[dict], targets: dict[str, float]) -> list[str]:
    outcomes = [outcome(run, targets) for run in runs]
    texts = {field: _text([each[field] for each in outcomes]) for field in outcomes[0]}
    return [
        str(len(runs)),
        _all(f"{run['learning_rate']:g}" for run in runs if run["learning_rate"] is not None),
        _all(f"{run['trainable_parameters']:,}" for run in runs),
        texts["knowledge"],
        texts["knowledge_known"],
        texts["task_score"],
        _text([targets.get("task_score")]),
        texts["matched_task_score"],
        texts["task_loss"],
        _text([targets.get("task_loss")]),
        texts["matched_task_loss"],
        texts["parameter_change"],
    ]


def _differences(cells: list[dict]) -> str:
    return _difference_table(_of_stage(cells, "grid"), PAIRS)


def _difference_table(cells: list[dict], pairs: Iterable[tuple[str, str]]) -> str:
    fields = {
        "knowledge": "knowledge",
        "knowledge_known": "of the known",
        "matched_task_score": "knowledge at target score",
        "matched_task_loss": "knowledge at target loss",
        "task_score": "task score",
        "task_loss": "task loss",
    }
    rows = []
    for place, runs in by_place(cells).items():
        targets = matching_targets(runs)
        rows += [[*_place(place), *row] for row in _paired(runs, pairs, fields, targets)]
    return table(["type 1 rows", "rows", "arms", "seeds", *fields.values()], rows) if rows else ""


def _paired(
    runs: list[dict], pairs: Iterable[tuple[str, str]], fields: Iterable[str], targets: dict[str, float]
) -> Iterator[list]:
    """Names, number of seeds and differences of each pair of arms that have a seed in common."""
    for arms in pairs:
        values = [paired_differences(runs, arms, field, targets) for field in fields]
        if values[0]:
            yield [" - ".join(arms), len(values[0]), *map(_difference, values)]


def _growth(cells: list[dict]) -> str:
    fields = {"knowledge": "knowledge", "knowledge_known": "of the known"}
    fields |= {"task_score": "task score", "task_loss": "task loss"}
    grid = _of_stage(cells, "grid")
    base = [cell for cell in grid if cell["size"] == 0]
    places = by_place(cell for cell in grid if cell["size"])
    rows = []
    for share in sorted({share for share, _ in places}):
        for arm, runs in by_arm(run for place, here in places.items() if place[0] == share for run in here).items():
            for sizes in pairwise(sorted({run["size"] for run in [*base, *runs]})):
                values = [paired_growth([*base, *runs], sizes, field) for field in fields]
                step = "{:,} to {:,}".format(*sizes)
                rows.append([_percent(share), arm, step, len(values[0]), *map(_difference, values)])
    return table(["type 1 rows", "arm", "rows", "seeds", *fields.values()], rows) if rows else ""


def _along_runs(cells: list[dict]) -> str:
    base, rows = _base(cells), []
    for place, here in by_place(_trained(cells) if base else []).items():
        for arm, runs in by_arm(here).items():
            ends = [(run["checkpoints"][1], run["checkpoints"][-1]) for run in runs]
            knowledge = [(first["knowledge"], last["knowledge"]) for first, last in ends]
            changes = [last - first for first, last in knowledge]
            known = base["checkpoints"][0]["recalled"]
            lost_and_back = [_lost_and_back(known, *pair) for pair in ends]
            rows_seen = _all(f"{first['rows']:,}" for first, _ in ends)
            texts = [_columns(knowledge), [_difference(changes)], _columns(lost_and_back)]
            rows.append([*_place(place), arm, len(runs), rows_seen, *chain(*texts)])
    header = ["type 1 rows", "rows", "arm", "seeds", "first, after rows", "first", "end", "difference", "lost", "back"]
    return table(header, rows) if rows else ""


def _columns(by_run: list[tuple]) -> list[str]:
    return [_text(values) for values in zip(*by_run, strict=True)]


def _lost_and_back(known: str, first: dict, last: dict) -> tuple[float | None, float | None]:
    """Shares of the known facts that a checkpoint does not recall, and of these that a later one does; None if
    there are none to lose, or none were lost."""
    if "1" not in known:
        return None, None
    lost = [number for number, fact in enumerate(known) if fact == "1" and first["recalled"][number] == "0"]
    back = sum(last["recalled"][number] == "1" for number in lost)
    return len(lost) / known.count("1"), back / len(lost) if lost else None


def _over_sizes(cells: list[dict]) -> str:
    fields = {f"matched_{measure}": f"knowledge at target {measure.removeprefix('task_')}" for measure, *_ in MEASURES}
    rows = []
    for place, runs in runs_over_sizes(_of_stage(cells, "grid")).items():
        targets = matching_targets(runs)
        reached = [_text([targets.get(measure)]) for measure, *_ in MEASURES]
        for arm, same in by_arm(runs).items():
            found = [_text([outcome(run, targets)[field] for run in same]) for field in fields]
            rows.append([*_place(place), arm, len(same), *reached, *found])
        for name, seeds, *differences in _paired(runs, PAIRS, fields, targets):
            rows.append([*_place(place), name, seeds, *reached, *differences])
    header = ["type 1 rows", "rows up to", "arm", "seeds", "target score", "target loss", *fields.values()]
    return table(header, rows) if rows else ""


def _relations(cells: list[dict]) -> str:
    base, trained = _base(cells), _trained(cells)
    if not (base and trained):
        return ""
    guessed = base["guessed"] | {"all": guessed_share(base)}
    facts: dict[str, list[int]] = {relation: [] for relation in guessed}
    for number, relation in enumerate(base["relations"]):
        facts[relation].append(number)
        facts["all"].append(number)
    arms, rows = by_arm(trained), []
    for place, runs in largest_common(trained, arms).items():
        for relation, chance in guessed.items():
            shares = [[_recalled(run, facts[relation]) for run in same] for same in [[base], *by_arm(runs).values()]]
            rows.append([*_place(place), relation, len(facts[relation]), f"{chance:.3f}", *map(_text, shares)])
    return table(["type 1 rows", "rows", "relation", "facts", "guessed", "base", *arms], rows) if rows else ""


def _recalled(run: dict, facts: list[int]) -> float:
    digits = run["checkpoints"][-1]["recalled"]
    return sum(digits[fact] == "1" for fact in facts) / len(facts)


def _tasks(cells: list[dict]) -> str:
    base, trained = _base(cells), _trained(cells)
    if not (base and trained):
        return ""
    arms, rows = by_arm(trained), []
    for place, runs in largest_common(trained, arms).items():
        for task, untrained in base["checkpoints"][0]["tasks"].items():
            progress = [text for same in by_arm(runs).values() for text in _progress(same, task)]
            rows.append([*_place(place), task, f"{base['guessed_tasks'][task]:.3f}", f"{untrained:.3f}", *progress])
    stages = [f"{arm}, {stage}" for arm in arms for stage in ("first", "trained")]
    return table(["type 1 rows", "rows", "task", "guessed", "base", *stages], rows) if rows else ""


def _progress(runs: list[dict], task: str) -> list[str]:
    """Exact match at the first checkpoint after the base model's, and at the last one."""
    few, trained = ([run["checkpoints"][index]["tasks"].get(task) for run in runs] for index in (1, -1))
    return [_text(few, with_interval=False), _text(trained)]


def _harness(cells: list[dict]) -> str:
    measured = [cell for cell in cells if cell["stage"] != "tuning" and cell.get("lm_eval")]
    metrics = {task: main_metric(numbers) for cell in measured for task, numbers in cell["lm_eval"].items()}
    metrics = {task: metric for task, metric in metrics.items() if metric}
    rows = []
    for place, here in by_place(measured).items():
        for arm, runs in by_arm(here).items():
            found = [[run["lm_eval"].get(task, {}).get(metric) for run in runs] for task, metric in metrics.items()]
            rows.append([*_place(place), arm, len(runs), *map(_text, found)])
    names = [f"{task} ({metric.removesuffix(',none')})" for task, metric in metrics.items()]
    return table(["type 1 rows", "rows", "arm", "seeds", *names], rows) if rows else ""


def _groups(cells: list[dict]) -> str:
    rows = []
    for place, here in by_place(cell for cell in cells if cell["routing"]).items():
        for arm, runs in by_arm(here).items():
            by_type = [[shares[1] for shares in run["routing"]["group_shares"]] for run in runs]
            shares = [_text([on_1 for _, on_1 in by_type]), _text([on_0 for on_0, _ in by_type])]
            difference = _difference([on_1 - on_0 for on_0, on_1 in by_type])
            distance = _text([run["routing"].get("type_distance") for run in runs])
            rows.append([*_place(place), arm, len(runs), *shares, difference, distance])
    header = ["type 1 rows", "rows", "arm", "seeds", "on rows of type 1", "on rows of type 0", "difference", "distance"]
    return table(header, rows) if rows else ""


def _tuning(cells: list[dict]) -> str:
    rows = []
    for arm, trials in by_arm(_of_stage(cells, "tuning")).items():
        by_rate = {trial["learning_rate"]: trial for trial in sorted(trials, key=itemgetter("learning_rate"))}
        best = best_rate(by_rate)
        rows += [
            [arm, f"{rate:g}", f"{end['task_loss']:.3f}", _text([end["knowledge"]]), "chosen" if rate == best else ""]
            for rate, end in ((rate, trial["checkpoints"][-1]) for rate, trial in by_rate.items())
        ]
    return table(["arm", "learning rate", "validation loss", "knowledge", ""], rows) if rows else ""


def _ablations(cells: list[dict]) -> str:
    return _scores(_with_ablations(cells)) if _of_stage(cells, "ablation") else ""


def _ablation_differences(cells: list[dict]) -> str:
    changes = by_arm(_of_stage(cells, "ablation"))
    return _difference_table(_with_ablations(cells), [(MIXTURE, change) for change in changes])


def _with_ablations(cells: list[dict]) -> list[dict]:
    """The cells of the grid that were trained on as many rows as the ablations, followed by the ablations."""
    changed = _of_stage(cells, "ablation")
    places = by_place(changed)
    return [cell for cell in _of_stage(cells, "grid") if (cell["knowledge_share"], cell["size"]) in places] + changed


def _origin(cells: list[dict]) -> str:
    hours = sum(cell["seconds"] for cell in cells) / 3600
    lines = [f"{len(cells)} cells took {hours:.1f} hours."]
    for field, name in (("commit", "Commits"), ("machine", "Machines")):
        counts = Counter(cell[field] for cell in cells)
        lines.append(f"{name}: {'; '.join(f'{value} ({count} cells)' for value, count in counts.items())}.")
    return "\n\n".join(lines)


SECTIONS = {
    "World knowledge and task scores": (SCORES, _grid),
    "Differences between arms": (DIFFERENCES, _differences),
    "Growing numbers of rows": (GROWTH, _growth),
    "Along the trainings": (ALONG_RUNS, _along_runs),
    "Matched over numbers of rows": (OVER_SIZES, _over_sizes),
    "Knowledge by relation": (RELATIONS, _relations),
    "The tasks one by one": (TASKS, _tasks),
    "lm-evaluation-harness": (HARNESS, _harness),
    "Expert groups": (GROUPS, _groups),
    "Ablations": (ABLATIONS, _ablations),
    "Differences from ablations": (DIFFERENCES, _ablation_differences),
    "Learning rates": (TUNING, _tuning),
}


def _of_stage(cells: list[dict], stage: str) -> list[dict]:
    return [cell for cell in cells if cell["stage"] == stage]


def _base(cells: list[dict]) -> dict | None:
    return next((cell for cell in cells if cell["arm"] == BASE), None)


def _trained(cells: list[dict]) -> list[dict]:
    return [cell for cell in _of_stage(cells, "grid") if cell["arm"] != BASE]


def _place(place: tuple[float, int]) -> list[str]:
    share, size = place
    return [_percent(share), f"{size:,}"]


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def _all(texts: Iterable[str]) -> str:
    """The distinct texts: usually one, since the runs of an arm share their settings."""
    return ", ".join(dict.fromkeys(texts)) or NOTHING


def _text(values: list[float | None], sign: str = "", with_interval: bool = True) -> str:
    """Mean and interval over runs."""
    found = estimate(values)
    if found is None:
        return NOTHING
    interval = f" ± {found.half:.3f}" if with_interval and found.half is not None else ""
    count = "" if found.count == len(values) else f" ({found.count} of {len(values)} runs)"
    return f"{found.mean:{sign}z.3f}{interval}{count}"


def _difference(values: list[float | None]) -> str:
    """Mean and interval with a sign, in bold if the interval does not contain 0."""
    found = estimate(values)
    is_clear = found and found.half is not None and abs(found.mean) > found.half
    return f"**{_text(values, '+')}**" if is_clear else _text(values, "+")
