"""The benchmark's report: tables in Markdown and two figures."""

from pathlib import Path

from matplotlib.figure import Figure

from inference.pictures import save, styled
from loading.provenance import ROOT, provenance_line
from training.markdown import table

PICTURES = ROOT / "docs" / "pictures"
MIB = 2**20


def markdown(results: dict) -> str:
    """The tables of all sections that were measured."""
    parts = [f"Measured in {results['seconds'] / 60:.0f} minutes: {provenance_line(results)}."]
    for name, section in TABLES.items():
        if name in results:
            parts.append(section(results))
    return "\n\n".join(parts)


def _ratio(row: dict, name: str = "step_ratio") -> str:
    """Format a median and its quartiles."""
    return f"{row[name]:.2f} ({row[f'{name}_low']:.2f} to {row[f'{name}_high']:.2f})"


def _steps(results: dict) -> str:
    header = ["variant", "dropout", "step / frozen", "step, s", "saved / frozen", "saved, MiB", "FLOPs / frozen",
              "peak RSS, MiB"]  # fmt: skip
    rows = [
        [
            f"`{row['variant']}`",
            row["dropout"],
            _ratio(row),
            f"{row['step_seconds']:.2f}",
            f"{row['saved_bytes_ratio']:.2f}",
            f"{row['saved_bytes'] / MIB:.0f}",
            f"{row['flops_ratio']:.2f}",
            f"{row['peak_resident'] / MIB:.0f}",
        ]
        for row in results["rows"]
    ]
    return f"Batch {results['batch']} x {results['length']}, 8 experts of rank 4:\n\n{table(header, rows)}"


def _comparisons(results: dict) -> str:
    rows = [
        [f"`{row['variant']}` / `{row['to']}`", row["dropout"], _ratio(row, "ratio")] for row in results["comparisons"]
    ]
    return table(["step time", "dropout", "ratio"], rows)


def _scaling(results: dict, name: str) -> str:
    _, first, *_ = results[name]
    to_first = f"step / `{first['variant']}` {first['experts']} x {first['rank']}"
    header = ["variant", "experts x rank", "batch", "step / frozen", to_first, "step, s", "saved / frozen",
              "FLOPs / frozen"]  # fmt: skip
    rows = [
        [
            f"`{row['variant']}`",
            f"{row['experts']} x {row['rank']}" if row["variant"] != "frozen" else "",
            f"{row['batch']} x {row['length']}",
            _ratio(row),
            _ratio(row, "first_ratio"),
            f"{row['step_seconds']:.2f}",
            f"{row['saved_bytes_ratio']:.2f}",
            f"{row['flops_ratio']:.2f}",
        ]
        for row in results[name]
    ]
    return table(header, rows)


def _decode(results: dict) -> str:
    header = ["variant", "batch", "tokens/s", "tokens/s / base model"]
    rows = [
        [f"`{row['variant']}`", row["batch"], f"{row['tokens_per_second']:.1f}", f"{row['speed_ratio']:.2f}"]
        for row in results["decode"]
    ]
    return table(header, rows)


def _training(results: dict) -> str:
    row = results["training"]
    header = ["one epoch on the tiny data", "samples/s"]
    rows = [
        ["as users train", f"{row['samples_per_second']:.2f}"],
        ["random batches, all logits, plain autograd", f"{row['plain_samples_per_second']:.2f}"],
        ["ratio", _ratio(row, "ratio")],
    ]
    return table(header, rows)


def _packing(results: dict) -> str:
    rows = [
        [
            row["rows"],
            row["batches"],
            f"{row['tokens_per_second']:.0f}" if "ratio" in row else "",
            _ratio(row, "ratio") if "ratio" in row else "",
            f"{row['padding']:.1%}",
        ]
        for row in results["packing"]
    ]
    return table(["rows", "micro-batches", "real tokens/s", "to grouped", "padding"], rows)


TABLES = {
    "rows": _steps,
    "comparisons": _comparisons,
    "experts": lambda results: _scaling(results, "experts"),
    "lengths": lambda results: _scaling(results, "lengths"),
    "batches": lambda results: _scaling(results, "batches"),
    "decode": _decode,
    "training": _training,
    "packing": _packing,
}


def draw(results: dict, folder: Path = PICTURES) -> list[Path]:
    """Draw the figures of the sections that were measured. Returns their files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    with styled():
        for name, make in (("experts", _draw_experts), ("step_losses", _draw_losses)):
            if name in results:
                files.append(folder / f"{name}.png")
                save(make(results), files[-1])
    return files


def _draw_experts(results: dict) -> Figure:
    """Plot step time against the number of experts, stacked and looped, at the batch shape that both ran."""
    shape = next((row["batch"], row["length"]) for row in results["experts"] if row["variant"] == "loop")
    rows = [row for row in results["experts"] if (row["batch"], row["length"]) == shape]
    panels = {
        "total rank 64": lambda row: row["experts"] * row["rank"] == 64,
        "rank 4 each": lambda row: row["rank"] == 4,
    }
    figure = Figure(figsize=(9, 3.8))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (title, belongs) in zip(axes, panels.items(), strict=True):
        for variant, label, style in (("loop", "experts in a loop", "s--"), ("loramoe", "LoRAMoE, stacked", "o-")):
            points = sorted(
                (row["experts"], row["step_ratio"]) for row in rows if row["variant"] == variant and belongs(row)
            )
            axis.plot(*zip(*points, strict=True), style, label=label)
        axis.axhline(1, color="grey", linewidth=1, label="frozen backbone")
        axis.set(xscale="log", yscale="log", title=title, xlabel="experts per Linear")
        ticks = sorted({row["experts"] for row in rows})
        axis.set_xticks(ticks, map(str, ticks))
        axis.minorticks_off()
        axis.grid()
    high = max(row["step_ratio"] for row in rows)
    ticks = [value for value in (1, 2, 5, 10, 20, 50, 100) if value <= 1.2 * high]
    axes[0].set_yticks(ticks, map(str, ticks))
    axes[0].set_ylabel(f"step time / frozen, batch {shape[0]} x {shape[1]}")
    axes[0].legend()
    return figure


def _draw_losses(results: dict) -> Figure:
    curves = results["step_losses"]
    difference = max(abs(a - b) for a, b in zip(curves["loramoe"], curves["plain"], strict=True))
    figure = Figure(figsize=(6.5, 3.8))
    axis = figure.subplots()
    steps = range(1, len(curves["plain"]) + 1)
    axis.plot(steps, curves["plain"], linewidth=5, alpha=0.35, label="plain autograd, all logits")
    axis.plot(steps, curves["loramoe"], color="black", linewidth=1.2, label="as users train")
    axis.set(xlabel="step", ylabel="loss", title=f"same seed, no dropout: largest difference {difference:.1e}")
    axis.set_xticks([step for step in steps if step % 5 == 0 or step == 1])
    axis.grid()
    axis.legend()
    return figure
