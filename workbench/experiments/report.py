"""The report of an experiment: `table.md` and figures of the cells that are finished."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

from training.markdown import table
from workbench.experiments.figures import draw
from workbench.experiments.frontier import Estimate, estimate
from workbench.experiments.plan import Change, Experiment, Variants
from workbench.experiments.records import BASE, read_records, write_table
from workbench.experiments.results import Method, guessed_share, main_metric, methods

LEVELS = (0.95, 0.9, 0.85, 0.8, 0.7)
# Arms that the others are compared with.
COMPARED = ("lora", "lora_kl", "loramoe_beta0", "loramoe", "loramoe_kl", "null_expert_beta0", "lora_null_beta0")
NOTHING = "-"

CONVENTIONS = """\
*Kept* is the share of the facts known to the base model that the model still recalls after the training; *knowledge*
that of all probe facts. *Task loss* is the loss per token of the answers of held-out rows and *task score* exact match
on them, each a mean over the tasks. Numbers are means over seeds ± half of the 95 % t-interval; one run alone has no
interval. The seeds are those of rows, order and initial weights: no interval speaks of other base models or facts. A
run that diverged keeps nothing and has an infinite loss."""
FRONTIERS = """\
A method's frontier is the highest share of known facts that any of its settings keeps, at each task loss, with this
loss or a lower one. *Seeds* is how many there are so far: the first has every setting, the others only *contenders*,
settings with a task loss of at most {high:g} that are within {margin:g} of the frontier of their method by the first.
*Lowest loss* is that of the settings with all seeds. *Area* is the mean of the frontier over the task losses from
{low:g} to {high:g} on a logarithmic axis, where losses below the lowest count as 0 kept: it is large for methods that
learn much. *Over* compares what two methods keep at the losses that both reach, as a mean over these on the same axis,
seed by seed; bold where the interval excludes 0, as one in 20 would by chance if nothing differed. A frontier is the
best of noisy results, so it is a little too high, and more settings can only raise it."""
ADVICE = """\
Of all settings that keep at least so much on average, the one with the lowest task loss. It is chosen by the same runs,
so the next run may keep less."""
SETTINGS = """\
*Scaling* is lora_alpha / lora_rank; rsLoRA multiplies it by the root of the rank. *Parameter change* is that of the
adapted Linears' weights, with all experts equally weighted. *Groups* is the mean weight of the last group of experts,
which the constraint draws to rows of type 1, on held-out rows of type 1 and of type 0. *Distance* is the total
variation distance between the mean weights of all experts on rows of the two types, mean over the Linears: 0 where they
are the same, 1 where no expert serves both."""
VARIANTS = """\
Changes of one arm at one setting, the ones that keep most first; differences are taken seed by seed."""
BASE_MODEL = """\
*Guessed* is what the one best answer to all questions of a relation, or of a task, gets right: only a score above it
shows knowledge or skill. At a lower task score, the task loss tells how well the form of the answers is learnt."""
HARNESS = """\
The main metric of each task, which its column names: exact_match, else acc_norm, acc or f1, else the first that the
task has."""


def report(experiment: Experiment) -> list[Path]:
    """Collect the finished cells in `cells.csv`, and write `table.md` and the figures next to it. Returns the files.

    Raises:
        InputError: see `read_records`; a cell was made with other settings than the experiment's.
    """
    results = Path(experiment.results)
    cells = read_records(results, Path(experiment.work))
    for cell in experiment.cells():
        experiment.finished(cell, is_only_read=True)
    found, unfinished = methods(experiment, cells)
    results.mkdir(parents=True, exist_ok=True)
    collected, text = write_table(results, cells), results / "table.md"
    text.write_text(markdown(experiment, cells, found, unfinished) + "\n")
    return [collected, text, *draw(found, results)]


def markdown(experiment: Experiment, cells: list[dict], found: list[Method], unfinished: list[str]) -> str:
    """All sections that have cells, each under its heading.

    Args:
        found, unfinished: see `methods`.
    """
    low, high = experiment.loss_range
    sections = {
        "The base model": (BASE_MODEL, _base(cells)),
        "Frontiers": (FRONTIERS.format(low=low, high=high, margin=experiment.margin), _frontiers(found)),
        "What to set": (ADVICE, _advice(found)),
        "Variants": (VARIANTS, _variants(cells, experiment.variants)),
        "All settings": (SETTINGS, _settings(found)),
        "lm-evaluation-harness": (HARNESS, _harness(cells)),
    }
    parts = [f"# Results on {cells[0]['model']}", CONVENTIONS]
    if unfinished:
        parts.append(f"Not shown, since not all of their settings have been run: {', '.join(unfinished)}.")
    for heading, (text, section) in sections.items():
        if section:
            parts += [f"## {heading}", text, section]
    return "\n\n".join([*parts, "## Origin", _origin(cells)])


def _base(cells: list[dict]) -> str:
    rows = [
        [
            _number(each["knowledge"]),
            f"{guessed_share(each):.3f}",
            len(each["relations"]),
            *_tasks([each]),
            f"{fmean(each['guessed_tasks'].values()):.3f}",
        ]
        for each in cells
        if each["arm"] == BASE
    ]
    header = ["knowledge", "guessed", "facts", "task loss", "task score", "guessed score"]
    return table(header, rows) if rows else ""


def _frontiers(found: list[Method]) -> str:
    rows = []
    compared = [arm for arm in COMPARED if any(method.arm == arm for method in found)]
    for method in found:
        others = [_find(found, method.knowledge_share, arm) for arm in compared]
        contenders = f"{len(method.contenders)} of {len(method.runs)}"
        lowest = min(method.place(setting)[0] for setting in method.repeated)
        area = _estimate(method.frontier.area())
        differences = [_difference(method, other) for other in others]
        rows.append([*_place(method), contenders, len(method.seeds), f"{lowest:.3f}", area, *differences])
    header = ["type 1 rows", "arm", "contenders", "seeds", "lowest loss", "area", *(f"over {arm}" for arm in compared)]
    return table(header, rows) if rows else ""


def _find(found: list[Method], share: float, arm: str) -> Method | None:
    return next((each for each in found if (each.knowledge_share, each.arm) == (share, arm)), None)


def _difference(method: Method, other: Method | None) -> str:
    """How much more is kept than by another method, in bold if the interval does not hold 0."""
    if other is None or other is method or other.seeds != method.seeds:
        return NOTHING
    found = method.frontier.kept_over(other.frontier)
    is_clear = found is not None and found.half is not None and abs(found.mean) > found.half
    return f"**{_estimate(found, '+')}**" if is_clear else _estimate(found, "+")


def _advice(found: list[Method]) -> str:
    rows = []
    for method in found:
        for level in LEVELS:
            if setting := method.best(level):
                runs = list(method.runs[setting].values())
                rows.append([*_place(method), f"{level:.0%}", *_shown(setting), len(runs), *_measured(runs)])
            else:
                rows.append([*_place(method), f"{level:.0%}", *[NOTHING] * 7])
    header = ["type 1 rows", "arm", "to keep", "learning rate", "scaling", "seeds", "kept", "knowledge", "task loss",
              "task score"]  # fmt: skip
    return table(header, rows) if rows else ""


def _settings(found: list[Method]) -> str:
    rows = [
        [*_place(method), *_shown(setting), *_run_row(list(runs.values()))]
        for method in found
        for setting, runs in method.runs.items()
    ]
    return table(["type 1 rows", "arm", "learning rate", "scaling", *RUN_COLUMNS], rows) if rows else ""


def _variants(cells: list[dict], plan: Variants | None) -> str:
    """Those that keep most first."""
    if plan is None:
        return ""
    by_name: dict[str, dict[int, dict]] = {}
    for cell in cells:
        if cell["is_variant"]:
            by_name.setdefault(cell["arm"], {})[cell["seed"]] = cell
    reference = next((by_name.get(name, {}) for name, change in plan.changes.items() if change == Change()), {})
    rows = []
    for name, by_seed in sorted(by_name.items(), key=lambda item: -fmean(map(_kept, item[1].values()))):
        run, *_ = runs = list(by_seed.values())
        gain = [_kept(by_seed[seed]) - _kept(reference[seed]) for seed in by_seed if seed in reference]
        rows.append(
            [
                name,
                _percent(run["knowledge_share"]),
                f"{run['size']:,}",
                *_shown((run["learning_rate"], run["scaling"])),
                NOTHING if by_seed is reference else _estimate(estimate(gain), "+"),
                *_run_row(runs),
            ]
        )
    header = ["change", "type 1 rows", "rows", "learning rate", "scaling", "kept, minus reference", *RUN_COLUMNS]
    return table(header, rows) if rows else ""


def _kept(run: dict) -> float:
    return run["knowledge_known"] or 0.0


RUN_COLUMNS = ("seeds", "kept", "knowledge", "task loss", "task score", "parameters", "parameter change", "groups",
               "distance")  # fmt: skip


def _run_row(runs: list[dict]) -> list[str]:
    routed = [run["routing"] for run in runs if run["routing"]]
    groups = [[shares[-1] for shares in each["group_shares"]] for each in routed]
    on_0, on_1 = (_text(values) for values in (zip(*groups, strict=True) if groups else ([], [])))
    return [
        str(len(runs)),
        *_measured(runs),
        f"{max(run['trainable_parameters'] for run in runs):,}",
        _text([run["parameter_change"] for run in runs]),
        f"{on_1}; {on_0}" if groups else NOTHING,
        _text([each["type_distance"] for each in routed]),
    ]


def _measured(runs: list[dict]) -> list[str]:
    return [_text(map(_kept, runs)), _text([run["knowledge"] for run in runs]), *_tasks(runs)]


def _tasks(runs: list[dict]) -> list[str]:
    return [_text([run[field] for run in runs]) for field in ("task_loss", "task_score")]


def _harness(cells: list[dict]) -> str:
    measured = [cell for cell in cells if cell.get("lm_eval")]
    metrics = {task: main_metric(numbers) for cell in measured for task, numbers in cell["lm_eval"].items()}
    metrics = {task: metric for task, metric in metrics.items() if metric}
    rows = [
        [cell["cell"], *(_number(cell["lm_eval"].get(task, {}).get(metric)) for task, metric in metrics.items())]
        for cell in measured
    ]
    names = [f"{task} ({metric.removesuffix(',none')})" for task, metric in metrics.items()]
    return table(["cell", *names], rows) if rows else ""


def _origin(cells: list[dict]) -> str:
    hours = sum(cell["seconds"] for cell in cells) / 3600
    lines = [f"{len(cells)} cells took {hours:.1f} hours of computing."]
    for field, name in (("commit", "Commits"), ("machine", "Machines"), ("processor", "Processor")):
        counts = Counter(cell[field] for cell in cells)
        lines.append(f"{name}: {'; '.join(f'{value} ({count} cells)' for value, count in counts.items())}.")
    return "\n\n".join(lines)


def _place(method: Method) -> list[str]:
    return [_percent(method.knowledge_share), method.arm]


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def _shown(setting: tuple[float, float | None]) -> list[str]:
    return [NOTHING if value is None else f"{value:g}" for value in setting]


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def _text(values: Iterable[float | None]) -> str:
    """Mean and interval over runs; how many have a value, if not all of them."""
    values = list(values)
    found = estimate(values)
    count = "" if found is None or found.count == len(values) else f" ({found.count} of {len(values)} runs)"
    return _estimate(found) + count


def _estimate(found: Estimate | None, sign: str = "") -> str:
    if found is None:
        return NOTHING
    interval = "" if found.half is None else f" ± {found.half:.3f}"
    return f"{found.mean:{sign}z.3f}{interval}"
