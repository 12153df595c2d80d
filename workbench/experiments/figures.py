"""Figures of an experiment: forgetting, learning and routing."""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import LogLocator

from inference.pictures import BLUE, GREEN, ORANGE, RED, save, styled
from workbench.experiments.records import BASE
from workbench.experiments.results import (
    Place,
    by_arm,
    by_place,
    estimate,
    guessed_share,
    largest_common,
    matching_targets,
)

PANEL = 3.3, 3.4  # inches
# Markers and dashes tell the arms apart without the colours.
STYLES = {
    "full": {"label": "full fine-tuning", "color": RED, "marker": "s", "linestyle": ":"},
    "lora": {"label": "LoRA", "color": ORANGE, "marker": "^", "linestyle": "-."},
    "loramoe_beta0": {"label": "LoRAMoE without the constraint", "color": GREEN, "marker": "D", "linestyle": "--"},
    "loramoe": {"label": "LoRAMoE", "color": BLUE, "marker": "o", "linestyle": "-"},
}
# The labels of each arm are at a different corner, since points of different arms lie close together.
RATE_LABELS = {
    "full": {"xytext": (-5, 5), "ha": "right", "va": "bottom"},
    "lora": {"xytext": (5, -5), "ha": "left", "va": "top"},
    "loramoe_beta0": {"xytext": (5, 5), "ha": "left", "va": "bottom"},
    "loramoe": {"xytext": (-5, -5), "ha": "right", "va": "top"},
}
ROUTED = ("loramoe_beta0", "loramoe")
DODGE = 1.06  # factor between the arms along the axis of sizes, so that interval bars do not cover each other
MAX_NUMBERED_EXPERTS = 8


def draw(cells: list[dict], folder: Path) -> list[Path]:
    """Draw the figures for which there are enough cells. Returns their files."""
    files = []
    with styled():
        for name, (stage, make) in FIGURES.items():
            if figure := make([cell for cell in cells if cell["stage"] == stage]):
                files.append(folder / f"{name}.png")
                save(figure, files[-1])
    return files


def _knowledge(grid: list[dict]) -> Figure | None:
    guesses = [guessed_share(cell) for cell in grid if cell["arm"] == BASE]
    return _against_rows(grid, "knowledge", "probe facts recalled", guesses)


def _tasks(grid: list[dict]) -> Figure | None:
    return _against_rows(grid, "task_score", "exact match, mean over tasks")


def _against_rows(grid: list[dict], field: str, name: str, guesses: Iterable[float] = ()) -> Figure | None:
    """A field at the end of each run against the number of instruction rows, mean and interval over seeds.

    Args:
        guesses: scores of guessing, drawn in addition to the base model's value.
    """
    trained = _trained(grid)
    shares = sorted({run["knowledge_share"] for run in trained})
    sizes = sorted({run["size"] for run in trained})
    if not shares:
        return None
    figure, panels = _panels(len(shares))
    for axes, share in zip(panels, shares, strict=True):
        runs = [run for run in trained if run["knowledge_share"] == share]
        for base in (cell for cell in grid if cell["arm"] == BASE):
            axes.axhline(base["checkpoints"][-1][field], color="grey", linewidth=1, label="base model")
        for guess in guesses:
            axes.axhline(guess, color="grey", linewidth=1, linestyle=":", label="best guess for each relation")
        for arm, same in by_arm(runs).items():
            _draw_means(axes, arm, same, field)
        axes.set(xscale="log", title=_share(share), xlabel="instruction rows")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        axes.margins(x=0.15)
    _keep_within_shares(panels[0])
    panels[0].set_ylabel(name)
    _legend(figure, panels, "Bars: 95 % t-interval over seeds")
    return figure


def _draw_means(axes: Axes, arm: str, runs: list[dict], field: str) -> None:
    shift = DODGE ** (list(STYLES).index(arm) - (len(STYLES) - 1) / 2)
    points = {
        size: estimate(run["checkpoints"][-1][field] for run in same) for (_, size), same in by_place(runs).items()
    }
    axes.errorbar(
        [size * shift for size in points],
        [point.mean for point in points.values()],
        yerr=[math.nan if point.half is None else point.half for point in points.values()],
        capsize=3,
        markersize=5,
        **STYLES[arm],
    )


def _trade_off(grid: list[dict]) -> Figure | None:
    return _against_learning(grid, "task_score", "exact match, mean over tasks")


def _trade_off_by_loss(grid: list[dict]) -> Figure | None:
    return _against_learning(grid, "task_loss", "loss per answer token, mean over tasks")


def _against_learning(grid: list[dict], measure: str, name: str) -> Figure | None:
    """Knowledge against a measure of the tasks along the checkpoints of every run, with the best value on the right."""
    trained = _trained(grid)
    places = largest_common(trained, by_arm(trained))
    if not places:
        return None
    figure, panels = _panels(len(places))
    for axes, (place, runs) in zip(panels, places.items(), strict=True):
        if (target := matching_targets(runs).get(measure)) is not None:
            axes.axvline(target, color="grey", linewidth=1, label="where runs are compared")
        for arm, same in by_arm(runs).items():
            for run in same:
                points = [(point[measure], point["knowledge"]) for point in run["checkpoints"]]
                axes.plot(*zip(*points, strict=True), markersize=4, linewidth=1, **STYLES[arm])
        axes.set(title=_place(place), xlabel=name)
    if measure == "task_loss":
        _show_losses(panels[0])
    _keep_within_shares(panels[0])
    panels[0].set_ylabel("probe facts recalled")
    _legend(figure, panels)
    return figure


def _rates(trials: list[dict]) -> Figure | None:
    """Knowledge against task loss at the end of trials, along the learning rates of each arm."""
    if not trials:
        return None
    figure, (axes,) = _panels(1)
    for arm, runs in by_arm(trials).items():
        ends = {run["learning_rate"]: run["checkpoints"][-1] for run in runs}
        points = {rate: (ends[rate]["task_loss"], ends[rate]["knowledge"]) for rate in sorted(ends)}
        axes.plot(*zip(*points.values(), strict=True), markersize=5, linewidth=1, **STYLES[arm])
        for rate, point in points.items():
            if math.isfinite(point[0]):
                style = {"color": STYLES[arm]["color"], "fontsize": 7} | RATE_LABELS[arm]
                axes.annotate(f"{rate:g}", point, textcoords="offset points", **style)
    axes.margins(0.12)
    place = trials[0]["knowledge_share"], trials[0]["size"]
    axes.set(title=_place(place), xlabel="validation loss per answer token", ylabel="probe facts recalled")
    _show_losses(axes)
    _legend(figure, [axes], "Numbers: learning rates")
    return figure


def _show_losses(axes: Axes) -> None:
    """Make the horizontal axis one of losses, with the lowest on the right."""
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def _balance(grid: list[dict]) -> Figure | None:
    """How unevenly the experts are used over the training, with and without the constraint."""
    places = largest_common([run for run in grid if _curve(run)], ROUTED)
    if not places:
        return None
    figure, panels = _panels(len(places))
    for axes, (place, runs) in zip(panels, places.items(), strict=True):
        for arm, same in by_arm(runs).items():
            for run in same:
                axes.plot(*zip(*_curve(run), strict=True), **(STYLES[arm] | {"marker": None}))
        axes.set(title=_place(place), xlabel="training step")
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("coefficient of variation\nof the experts' weights")
    _legend(figure, panels)
    return figure


def _curve(run: dict) -> list[tuple[int, float]]:
    return [(entry["step"], entry["routing_cv"]) for entry in run["log"] if "routing_cv" in entry]


def _experts(grid: list[dict]) -> Figure | None:
    """Mean weight of each expert by task, one run of each arm: expert numbers differ in meaning between seeds."""
    places = largest_common([run for run in grid if run["routing"]], ROUTED)
    if not places:
        return None
    runs = [min(same, key=lambda run: run["seed"]) for each in places.values() for same in by_arm(each).values()]
    weights = [list(run["routing"]["experts_by_task"].values()) for run in runs]
    scale = {"vmin": min(map(np.min, weights)), "vmax": max(map(np.max, weights))}
    height = 0.6 + len(places) * (0.7 + 0.27 * len(weights[0]))
    figure = Figure(figsize=(9, height))
    panels = figure.subplots(len(places), len(ROUTED), squeeze=False, sharex=True, sharey=True)
    for axes, run in zip(panels.flat, runs, strict=True):
        image = _draw_weights(axes, run["routing"]["experts_by_task"], scale)
        place = _place((run["knowledge_share"], run["size"]))
        axes.set_title(f"{STYLES[run['arm']]['label']}\n{place}, seed {run['seed']}")
    for axes in panels[-1]:
        axes.set_xlabel("expert")
    figure.colorbar(image, ax=panels, label="mean weight")
    return figure


def _draw_weights(axes: Axes, by_task: dict[str, list[float]], scale: dict[str, float]) -> AxesImage:
    weights = np.array(list(by_task.values()))
    experts = weights.shape[1]
    image = axes.imshow(weights, aspect="auto", **scale)
    axes.axvline(experts / 2 - 0.5, color="white", linewidth=3)  # between the groups
    axes.set_yticks(range(len(by_task)), [task.replace("_", " ") for task in by_task])
    axes.set_xticks(range(experts))
    if experts <= MAX_NUMBERED_EXPERTS:
        middle = (scale["vmin"] + scale["vmax"]) / 2
        for (task, expert), weight in np.ndenumerate(weights):
            colour = "white" if weight < middle else "black"
            axes.text(expert, task, f"{weight:.2f}", ha="center", va="center", color=colour, fontsize=7)
    return image


FIGURES = {
    "knowledge": ("grid", _knowledge),
    "tasks": ("grid", _tasks),
    "trade_off": ("grid", _trade_off),
    "trade_off_by_loss": ("grid", _trade_off_by_loss),
    "rates": ("tuning", _rates),
    "experts": ("grid", _experts),
    "balance": ("grid", _balance),
}


def _trained(grid: list[dict]) -> list[dict]:
    return [cell for cell in grid if cell["arm"] in STYLES]


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """A row of panels with common axes, and room for a legend below."""
    width, height = PANEL
    figure = Figure(figsize=(max(count, 2) * width, height + 0.6))
    panels = figure.subplots(1, count, sharex=True, sharey=True, squeeze=False)[0]
    for axes in panels:
        axes.grid()
    return figure, list(panels)


def _legend(figure: Figure, panels: Iterable[Axes], title: str | None = None) -> None:
    """One entry for each label of any panel, below all of them."""
    handles: dict[str, object] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, handlelength=4, title=title)


def _keep_within_shares(axes: Axes) -> None:
    """Limit the vertical axis if wide intervals would stretch it beyond 0 and 1."""
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -0.03), min(high, 1.03))


def _share(share: float) -> str:
    return f"{100 * share:g} % rows of type 1"


def _place(place: Place) -> str:
    share, size = place
    return f"{_share(share)}, {size:,} rows"
