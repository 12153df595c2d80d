"""`retention.png`: the known facts that are kept, and the distance from the base model, against the held-out loss."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from inference.pictures import RED, save, styled

FIELDS = ("eval_lm_loss", "eval_knowledge_kept", "eval_knowledge_kl_text")


def retention_curve(log_history: list[dict], kept_step: int | None = None) -> list[tuple[int, float, float, float]]:
    """Step, held-out loss, share of known facts kept, and KL in neutral text, of each evaluation of a run; of several
    at one step, the last.

    Args:
        kept_step: the step of the best checkpoint, if that is the model which was evaluated after training.
    """
    lines, is_over = {}, False
    for line in log_history:
        is_over |= "train_runtime" in line
        if all(field in line for field in FIELDS):
            lines[kept_step if is_over and kept_step is not None else line["step"]] = line
    return [(step, *(line[field] for field in FIELDS)) for step, line in sorted(lines.items())]


def plot_retention(path: Path, curve: list[tuple[int, float, float, float]], kept_step: int | None = None) -> None:
    """Draw a `retention_curve`.

    Args:
        path: the PNG file.
        kept_step: the step whose model was saved; by default the last.
    """
    steps, losses, kept, divergences = zip(*curve, strict=True)
    saved = -1 if kept_step is None else steps.index(kept_step)
    with styled():
        figure = Figure(figsize=(8.3, 3.2))
        left, right = figure.subplots(1, 2)
        _draw(left, losses, [share * 100 for share in kept], steps, saved)
        left.set_ylim(-3, 103)
        left.set_ylabel("known facts that are kept (%)")
        left.set_title("Knowledge against the task, by training step")
        _draw(right, losses, divergences, steps, saved)
        left.legend()
        right.set_ylabel("KL from the base model (nats)")
        right.set_title("Distance from the base model in neutral text")
        save(figure, path)


def _draw(axes: Axes, losses: Sequence[float], values: Sequence[float], steps: Sequence[int], saved: int) -> None:
    """A line through the evaluations in their order, and a dot on the saved one; training goes to the right."""
    axes.plot(losses, values, marker=".")
    for loss, value, step in zip(losses, values, steps, strict=True):
        axes.annotate(str(step), (loss, value), xytext=(3, 4), textcoords="offset points", fontsize=7)
    axes.plot(losses[saved], values[saved], "o", color=RED, label="saved model")
    axes.invert_xaxis()
    axes.grid(True)
    axes.set_xlabel("held-out LM loss")
