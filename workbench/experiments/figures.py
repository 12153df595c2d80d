"""Figures of an experiment: what is kept against what is learnt."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, PercentFormatter

from inference.pictures import BLUE, GREEN, ORANGE, RED, save, styled
from workbench.experiments.results import Method

PANEL = 3.3, 3.4  # inches
KEPT_TICKS = (0, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
# Markers and dashes tell the arms apart without the colours.
STYLES: dict[str, dict] = {
    "full": {"label": "full fine-tuning", "color": RED, "marker": "s", "linestyle": ":"},
    "lora": {"label": "LoRA", "color": ORANGE, "marker": "^", "linestyle": "-."},
    "rslora": {"label": "LoRA, rsLoRA scaling", "color": "#8c564b", "marker": "<", "linestyle": (0, (1, 1))},
    "lora_kl": {"label": "LoRA, KL", "color": "#7f7f7f", "marker": "v", "linestyle": (0, (5, 1))},
    "loramoe_beta0": {"label": "LoRAMoE, no constraint", "color": GREEN, "marker": "D", "linestyle": "--"},
    "loramoe": {"label": "LoRAMoE", "color": BLUE, "marker": "o", "linestyle": "-"},
    "loramoe_kl": {"label": "LoRAMoE, KL", "color": "#17becf", "marker": "p", "linestyle": (0, (5, 1))},
    "null_expert_beta0": {
        "label": "LoRAMoE, null expert, no constraint", "color": "#c49c00", "marker": "P", "linestyle": "--",
    },
    "null_expert": {"label": "LoRAMoE, null expert", "color": "#c49c00", "marker": "P", "linestyle": "-"},
    "lora_null_beta0": {
        "label": "LoRA, null expert, no constraint", "color": "#9467bd", "marker": "X", "linestyle": "--",
    },
    "lora_null": {"label": "LoRA, null expert", "color": "#9467bd", "marker": "X", "linestyle": "-"},
    "lora_null_kl": {"label": "LoRA, null expert, KL", "color": "#e377c2", "marker": "*", "linestyle": (0, (5, 1))},
}  # fmt: skip
FIGURES = {
    "frontier": ("full", "lora", "rslora", "lora_kl", "loramoe_beta0", "loramoe", "loramoe_kl"),
    "null_expert": (
        "lora",
        "loramoe",
        "loramoe_kl",
        "null_expert_beta0",
        "null_expert",
        "lora_null_beta0",
        "lora_null",
        "lora_null_kl",
    ),
}


def draw(found: list[Method], folder: Path) -> list[Path]:
    """Draw the figures that have at least two arms, and one that no figure before has. Returns their files."""
    files: list[Path] = []
    drawn: set[str] = set()
    with styled():
        for name, arms in FIGURES.items():
            shown = [method for method in found if method.arm in arms]
            own = {method.arm for method in shown}
            if len(own) > 1 and own - drawn:
                drawn |= own
                files.append(folder / f"{name}.png")
                save(_frontiers(shown), files[-1])
    return files


def _frontiers(shown: list[Method]) -> Figure:
    """A panel for each share of type 1 rows: what every setting keeps, and the frontiers with their bands."""
    shares = sorted({method.knowledge_share for method in shown})
    figure, panels = _panels(len(shares))
    for axes, share in zip(panels, shares, strict=True):
        for method in shown:
            if method.knowledge_share == share:
                _draw(axes, method)
        axes.set(title=f"{100 * share:g} % rows of type 1", xlabel="task loss per answer token")
    lowest, highest = shown[0].loss_range
    reached = min(method.place(setting)[0] for method in shown for setting in method.runs)
    _show_losses(panels[0], max(lowest, 0.95 * reached), highest)
    _show_kept(panels[0], max(method.frontier.kept_by_seed.max() for method in shown))
    bands = ". Bands: bootstrap over seeds, about their range" if any(len(method.seeds) > 1 for method in shown) else ""
    _legend(figure, panels, f"Points: settings{bands}")
    return figure


def _draw(axes: Axes, method: Method) -> None:
    style, frontier = dict(STYLES[method.arm]), method.frontier
    marker, label, color = style.pop("marker"), style.pop("label"), style["color"]
    loss, kept = zip(*map(method.place, method.runs), strict=True)
    axes.plot(loss, kept, marker, markersize=3, alpha=0.5, color=color)
    reached = frontier.kept > 0
    axes.plot(frontier.losses[reached], frontier.kept[reached], **style)
    axes.plot([], [], marker=marker, markersize=4, label=label, **style)
    if len(method.seeds) > 1:
        axes.fill_between(frontier.losses, *frontier.band(), color=color, alpha=0.15, linewidth=0)


def _show_losses(axes: Axes, lowest: float, highest: float) -> None:
    """Make the horizontal axis one of losses, with the lowest on the right."""
    axes.set_xscale("log")
    axes.set_xlim(highest, lowest)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 2.5, 3, 3.5, 5, 7)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def _show_kept(axes: Axes, most: float) -> None:
    """Make the vertical axis one of shares kept, with the shares lost on a logarithmic scale, up to a tick above
    `most`."""
    least_lost = 1 - KEPT_TICKS[-1]

    def stretched(kept: np.ndarray) -> np.ndarray:
        return -np.log(np.maximum(1 - kept, least_lost))

    axes.set_yscale("function", functions=(stretched, lambda height: 1 - np.exp(-height)))
    axes.set_ylim(-0.05, min((tick for tick in KEPT_TICKS if tick > most), default=KEPT_TICKS[-1]))
    axes.yaxis.set_major_locator(FixedLocator(KEPT_TICKS))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylabel("known facts kept")


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """A row of panels with common axes, and room for a legend below."""
    width, height = PANEL
    figure = Figure(figsize=(max(count, 2) * width, height + 0.6))
    panels = figure.subplots(1, count, sharex=True, sharey=True, squeeze=False)[0]
    for axes in panels:
        axes.grid()
    return figure, list(panels)


def _legend(figure: Figure, panels: Iterable[Axes], title: str) -> None:
    """One entry for each label of any panel, below all of them."""
    handles: dict[str, object] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, handlelength=4, title=title)
