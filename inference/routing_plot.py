"""`routing.png`: one page that shows what `routing.json` holds."""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from data.atomic import write_json
from inference.pictures import save, styled

WIDTH = 8.3  # inches, an A4 page
MAX_TOKENS = 48
MAX_TASKS = 16
LINE_STYLES = ("-", "--", "-.", ":")


def write_routing(folder: Path, summary: dict) -> None:
    """`routing.json` and its picture `routing.png`, from a summary of `routing_summary`."""
    write_json(folder / "routing.json", summary)
    plot_routing(folder / "routing.png", summary)


def plot_routing(path: Path, summary: dict) -> None:
    """Draw a summary of `routing_summary`, with `training` and `prompt` where it has them.

    Args:
        path: the PNG file.
        summary: what `routing.json` holds.
    """
    sections = list(_sections(summary))
    heights = [height for height, _ in sections]
    with styled():
        figure = Figure(figsize=(WIDTH, sum(heights)))
        parts = figure.subfigures(len(sections), 1, height_ratios=heights, squeeze=False)
        for part, (_, draw) in zip(parts.flat, sections, strict=True):
            draw(part, summary)
        save(figure, path)


def _sections(summary: dict) -> Iterator[tuple[float, Callable[[SubFigure, dict], None]]]:
    """Height in inches and function of each part of the page."""
    rows = len(summary["expert_share_by_task_type"]) + min(len(summary["expert_share_by_task"]), MAX_TASKS)
    layers = len({layer for layer, _ in map(_place, summary["modules"])})
    yield max(3.2, 1.2 + 0.25 * rows), _draw_overview
    yield 0.8 + len(summary["expert_share_by_task_type"]) * (0.7 + 0.06 * min(layers, 40)), _draw_modules
    if summary.get("training"):
        yield 2.6, _draw_training
    if summary.get("prompt"):
        yield 2.8, _draw_prompt


def _draw_overview(part: SubFigure, summary: dict) -> None:
    left, right = part.subfigures(1, 2, width_ratios=[1.4, 1])
    _draw_tasks(left, summary)
    top, bottom = right.subplots(2, 1, sharex=True)
    for axes, field, name in (
        (top, "entropy_by_module", "relative entropy"),
        (bottom, "coefficient_of_variation_by_module", "coefficient of\nvariation"),
    ):
        for number, (projection, places) in enumerate(_by_projection(summary["modules"]).items()):
            values = [summary[field][index] for _, index in places]
            axes.plot([layer for layer, _ in places], values, LINE_STYLES[number % 4], marker=".", label=projection)
        axes.set_ylabel(name)
    top.set_title("Evenness of the routing by layer")
    top.legend(fontsize=7)
    bottom.set_xlabel("layer")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_tasks(part: SubFigure, summary: dict) -> None:
    """The paper's figure: mean weight of each expert for each task type and each task."""
    types = {_type_name(kind): shares for kind, shares in summary["expert_share_by_task_type"].items()}
    tasks = dict(list(summary["expert_share_by_task"].items())[:MAX_TASKS])
    counts = [*summary["rows"].values(), *(summary["rows_by_task"][task] for task in tasks)]
    shares = np.array([*types.values(), *tasks.values()]) * 100
    axes = part.subplots()
    image = axes.imshow(shares, aspect="auto")
    axes.axhline(len(types) - 0.5, color="white", linewidth=3)
    names = [f"{name} ({count})" for name, count in zip([*types, *tasks], counts, strict=True)]
    axes.set_yticks(range(len(names)), names)
    _label_experts(axes, summary)
    if summary["num_experts"] <= 8:
        middle = (shares.max() + shares.min()) / 2
        for (row, expert), share in np.ndenumerate(shares):
            colour = "white" if share < middle else "black"
            axes.text(expert, row, f"{share:.1f}", ha="center", va="center", color=colour, fontsize=7)
    axes.set_title("Mean weight of each expert, all Linears")
    part.colorbar(image, ax=axes, label="weight (%)")


def _draw_modules(part: SubFigure, summary: dict) -> None:
    """Mean weight of each expert by layer: a row of maps for each task type, a column for each projection."""
    projections = _by_projection(summary["modules"])
    shares = {kind: np.array(value) * 100 for kind, value in summary["expert_share_by_task_type_and_module"].items()}
    grid = part.subplots(len(shares), len(projections), squeeze=False, sharex=True, sharey="col")
    low, high = np.percentile(list(shares.values()), (1, 99))  # one odd Linear would take the colour from all others
    for row, (kind, values_LE) in zip(grid, shares.items(), strict=True):
        for axes, (projection, places) in zip(row, projections.items(), strict=True):
            picked = values_LE[[index for _, index in places]]
            image = axes.imshow(picked, aspect="auto", vmin=low, vmax=high, origin="lower")
            step = math.ceil(len(places) / 8)
            axes.set_yticks(range(0, len(places), step), [layer for layer, _ in places[::step]])
            axes.set_title(f"{projection}, {_type_name(kind)}")
            _label_experts(axes, summary)
        row[0].set_ylabel("layer")
    for axes in grid[:-1].flat:
        axes.set_xlabel("")
    part.colorbar(image, ax=grid, label="weight (%)", aspect=30, extend="both")


def _draw_training(part: SubFigure, summary: dict) -> None:
    panels = part.subplots(1, 2)
    names = (("coefficient_of_variation", "coefficient of variation"), ("entropy", "relative entropy"))
    for axes, (field, name) in zip(panels, names, strict=True):
        for number, (run, curves) in enumerate(summary["training"].items()):
            axes.plot(curves["step"], curves[field], LINE_STYLES[number % 4], marker=".", label=run)
        axes.set_xlabel("training step")
        axes.set_title(f"{name[0].upper()}{name[1:]} over training")
        axes.ticklabel_format(axis="y", useOffset=False)
    panels[0].legend(fontsize=7)


def _draw_prompt(part: SubFigure, summary: dict) -> None:
    """Weight of each expert for each token of one prompt, mean over the Linears."""
    tokens = summary["prompt"]["tokens"]
    weights_ET = np.array(summary["prompt"]["expert_weights"][:MAX_TOKENS]).T * 100
    axes = part.subplots()
    image = axes.imshow(weights_ET, aspect="auto", origin="lower")
    axes.set_xticks(range(weights_ET.shape[1]), [_visible(token) for token in tokens[:MAX_TOKENS]], rotation=90)
    axes.set_yticks(range(summary["num_experts"]), _expert_names(summary))
    axes.set_ylabel("expert")
    shown = f", the first {MAX_TOKENS} of {len(tokens)} tokens" if len(tokens) > MAX_TOKENS else ""
    axes.set_title(f"Weight of each expert by token of one prompt, all Linears{shown}")
    part.colorbar(image, ax=axes, label="weight (%)")


def _label_experts(axes: Axes, summary: dict) -> None:
    names = _expert_names(summary)
    step = math.ceil(len(names) / 16)
    first = 0 if summary["null_expert"] is None else summary["null_expert"] % step  # so that the last one is named
    axes.set_xticks(range(first, len(names), step), names[first::step])
    axes.set_xlabel("expert")


def _expert_names(summary: dict) -> list[str]:
    return ["null" if expert == summary["null_expert"] else str(expert) for expert in range(summary["num_experts"])]


def _by_projection(modules: list[str]) -> dict[str, list[tuple[int, int]]]:
    """Layer and index of every adapted Linear, by the last part of its name, in the order of the layers."""
    found: dict[str, list[tuple[int, int]]] = {}
    for index, (layer, projection) in enumerate(map(_place, modules)):
        found.setdefault(projection, []).append((layer, index))
    return {projection: sorted(places) for projection, places in found.items()}


def _place(module: str) -> tuple[int, str]:
    """Layer number and projection in a module's name; 0 for what is in no layer."""
    number = re.search(r"\.(\d+)\.", module)
    return int(number[1]) if number else 0, module.rsplit(".", 1)[-1]


def _type_name(kind: str) -> str:
    return "no task type" if int(kind) < 0 else f"task type {kind}"


def _visible(token: str) -> str:
    """A token as text that fits under its column and that matplotlib takes literally."""
    text = token.replace("\n", "\\n").replace("$", r"\$").strip() or "␣"
    return text if len(text) <= 14 else f"{text[:13]}…"
