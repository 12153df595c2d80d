"""One style for all pictures: fonts, colours, and files of a third of the size."""

from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

# Of Okabe and Ito, which the colour-blind can tell apart.
BLUE, GREEN, RED, ORANGE = "#0072B2", "#009E73", "#D55E00", "#E69F00"
COLOURS = (BLUE, RED, GREEN, ORANGE)  # in the order in which they are used
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "grid.alpha": 0.3,
    "image.cmap": "viridis",
    "image.interpolation": "nearest",
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
}


def styled() -> AbstractContextManager:
    """A context to make and save figures in."""
    return matplotlib.rc_context(STYLE)


def save(figure: Figure, file: Path) -> None:
    """Write a PNG with a palette of 256 colours."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize().save(file, format="PNG", optimize=True)
