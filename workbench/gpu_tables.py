"""The report of a GPU: tables in Markdown from rows of measurements, which `workbench.grid` and `workbench.gpu_report`
write."""

from collections.abc import Callable, Iterable

from training.markdown import table
from training.throughput import peak_flops
from workbench.plan import MFU

GIB = 2**30
Rows = list[dict]


def markdown(rows: Rows) -> str:
    """All sections for which there are rows."""
    parts = ["# LoRAMoE on a GPU"]
    for title, section in SECTIONS.items():
        if text := section(rows):
            parts += [f"## {title}", text] if title else [text]
    return "\n\n".join(parts) + "\n"


def _of(rows: Rows, section: str, **fields: object) -> Rows:
    """The rows of a section with these fields."""
    return [row for row in rows if row["section"] == section and all(row.get(k) == v for k, v in fields.items())]


def _machine(rows: Rows) -> str:
    found = _of(rows, "device")
    if not found:
        return ""
    row = found[-1]
    packages = ", ".join(f"{name} {version}" for name, version in row["packages"].items() if version)
    gpu = f"{row['gpu']}, {row['gpu_bytes'] / GIB:.0f} GiB, {row['driver']}" if "gpu" in row else "no GPU"
    lines = [
        gpu,
        row["machine"],
        f"python {row['versions']['python']}, {packages}",
        f"commit {row['commit']}, {row['date']}",
    ]
    ceilings = [f"{each['name']}: {each['value']:.3g}" for each in _of(rows, "ceiling")]
    return "\n".join(f"- {line}" for line in lines + ceilings)


def _stages(rows: Rows) -> str:
    found = list({row["name"]: row for row in _of(rows, "stage")}.values())
    lines = [
        [row["name"], row["state"], f"{row['seconds']:.0f}", (row["detail"].splitlines() or [""])[-1][:100]]
        for row in found
    ]
    lines += [[row["name"], "LEFT OUT", "0", "no time was left"] for row in _of(rows, "left out")]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    parts = [table(["stage", "state", "seconds", "last line"], escaped)] if lines else []
    longer = [row for row in found if "\n" in row["detail"]]
    return "\n\n".join(parts + [f"{row['name']}:\n\n```text\n{row['detail']}\n```" for row in longer])


def _peak(row: dict) -> int:
    """Bytes: of tensors on a GPU, resident on a CPU."""
    return row.get("peak_allocated", row.get("peak_resident", 0))


def _label(row: dict) -> str:
    """The variant's name, with its kernels or the version of PyPI's `peft`."""
    more = row["kernels"] or (f"peft {row['peft']}" if "peft" in row else "")
    return f"{row['variant']}, {more}" if more else row["variant"]


def _setting(row: dict) -> str:
    return f"{row['batch']} x {row['length']}, {'with' if row['checkpointing'] else 'without'} checkpointing"


def _steps(rows: Rows) -> str:
    header = ["variant", "experts x rank", "dropout", "step / frozen", "step, ms", "tokens/s", "peak, GiB", "rounds"]
    parts = [
        "A step is a forward and a backward pass in bf16, with a bf16 adapter and no optimizer. Ratios are medians "
        "over rounds, with quartiles in brackets. Rows with a version are from the process of PyPI's peft, "
        "and their ratios refer to its frozen model. The peak is that of weights, adapter and step."
    ]
    for setting in dict.fromkeys(_setting(row) for row in _of(rows, "step")):
        lines = []
        for row in _of(rows, "step"):
            if _setting(row) != setting:
                continue
            size = "" if row["variant"] == "frozen" else f"{row['experts']} x {row['rank']}"
            line = [f"`{_label(row)}`", size, "" if row["variant"] == "frozen" else row["dropout"]]
            line += [row["error"], "", "", "", ""] if "error" in row else [
                f"{row['step_ratio']:.3f} ({row['step_ratio_low']:.3f} to {row['step_ratio_high']:.3f})",
                f"{1e3 * row['step_seconds']:.1f}",
                f"{row['tokens_per_second']:.0f}",
                f"{_peak(row) / GIB:.2f}",
                row["rounds"],
            ]  # fmt: skip
            lines.append(line)
        parts.append(f"{setting}:\n\n{table(header, lines)}")
    return "\n\n".join(parts) if len(parts) > 1 else ""


def _kernels(rows: Rows) -> str:
    header = ["variant", "dropout", "setting", "kernels", "copies and fills", "kernels' ms", "of the step"]
    lines = [
        [
            f"`{_label(row)}`",
            row["dropout"],
            _setting(row),
            row["launches"],
            row["copies"],
            f"{1e3 * row['busy_seconds']:.1f}",
            f"{row['busy_seconds'] / row['step_seconds']:.0%}",
        ]
        for row in _of(rows, "step")
        if "launches" in row and "error" not in row
    ]
    return f"Counted by torch's profiler in one step.\n\n{table(header, lines)}" if lines else ""


def _decode(rows: Rows) -> str:
    header = ["variant", "batch", "tokens", "tokens/s", "tokens/s / base"]
    lines = [
        [
            f"`{row['variant']}`",
            row["batch"],
            f"{row['prompt_tokens']} + {row['new_tokens']}",
            f"{row['tokens_per_second']:.1f}",
            f"{row['speed_ratio']:.3f}",
        ]
        for row in _of(rows, "decode")
    ]
    text = "Greedy, with a KV cache, on a GPU by CUDA graph: tokens of each prompt and new ones."
    return f"{text}\n\n{table(header, lines)}" if lines else ""


def _plan(rows: Rows) -> str:
    header = [
        "setting",
        "peak predicted, GiB",
        "measured",
        "error",
        "step predicted, ms",
        "measured",
        "error",
        "TFLOP/s",
    ]
    lines = []
    for plan in _of(rows, "plan"):
        row = _step(rows, **{name: plan[name] for name in ("batch", "length", "checkpointing")})
        predicted = _predicted_seconds(rows, plan)
        line = [
            _setting(plan),
            f"{plan['peak'] / GIB:.2f}",
            "",
            "",
            f"{1e3 * predicted:.0f}" if predicted else "",
            "",
            "",
            "",
        ]
        if row:
            line[2:4] = f"{_peak(row) / GIB:.2f}", f"{plan['peak'] / _peak(row) - 1:+.1%}"
            line[5] = f"{1e3 * row['step_seconds']:.0f}"
            line[6] = f"{predicted / row['step_seconds'] - 1:+.0%}" if predicted else ""
            line[7] = f"{plan['flops'] / row['step_seconds'] / 1e12:.0f}"
        lines.append(line)
    text = (
        f"8 experts of rank 4, dropout 0.05, without an optimizer. Times assume {MFU:.0%} of the data sheet's TFLOP/s."
    )
    return f"{text}\n\n{table(header, lines)}" if lines else ""


def _train(rows: Rows) -> str:
    found = _of(rows, "train")
    if not found:
        return ""
    lines = [[name.replace("_", " "), f"{value:.4g}"] for name, value in found[-1].items() if name != "section"]
    return "`train.py` with ZeRO-2 on 4 x 1024 tokens, 8 experts of rank 4, as its last log line says.\n\n" + table(
        ["figure", "value"], lines
    )


def _predicted_seconds(rows: Rows, plan: dict) -> float | None:
    """Seconds of a step at the planner's utilisation; None on a device whose data sheet it does not know."""
    names = [row["gpu"] for row in _of(rows, "device") if "gpu" in row]
    peak = peak_flops(names[-1]) if names else None
    return plan["flops"] / (peak * MFU) if peak else None


def _step(rows: Rows, variant: str = "loramoe", **fields: object) -> dict | None:
    """The step of a variant at dropout 0.05; by default of 8 experts of rank 4, in the first setting and kernels that
    were measured. None if it failed."""
    steps = _of(rows, "step")
    if not steps:
        return None
    first = {name: steps[0][name] for name in ("batch", "length", "checkpointing")}
    sizes = {"experts": 8, "rank": 4, "dropout": 0.05} if variant in ("loramoe", "loop") else {"dropout": 0.05}
    found = _of(rows, "step", variant=variant, **first | sizes | fields)
    return next((row for row in found if "error" not in row), None)


def _targets(rows: Rows) -> str:
    """The figures of a step that users compare, for each of the measured kernels."""
    lines = []
    for kernels in dict.fromkeys(row["kernels"] for row in _of(rows, "step", variant="loramoe")):
        lines += [
            [f"{name}{f', {kernels}' if kernels else ''}", *cells] for name, *cells in _target_lines(rows, kernels)
        ]
    header = ["figure, at dropout 0.05", "must reach", "aim", "measured", ""]
    return table(header, lines) if lines else ""


def _target_lines(rows: Rows, kernels: str) -> Iterable[list]:
    ours, peft = _step(rows, kernels=kernels), _step(rows, "peft_lora")
    loop = _step(rows, "loop") or _step(rows, "loop", checkpointing=True)
    beside = loop and _step(rows, kernels=kernels, checkpointing=loop["checkpointing"])
    wide, thin = (_step(rows, kernels=kernels, experts=n, rank=r) for n, r in ((8, 8), (64, 1)))
    seconds: Callable[[dict], float] = lambda row: row["step_seconds"]  # noqa: E731
    yield _target("step / frozen backbone", 1.2, 1.08, ours["step_ratio"] if ours else None)
    yield _target("step / PyPI's LoRA of rank 32", 1.0, 0.85, _quotient(ours, peft, seconds))
    yield _target("authors' loop / step", 3, 5, _quotient(loop, beside, seconds), more=True)
    yield _target("peak memory / PyPI's LoRA", 1.0, 0.85, _quotient(ours, peft, _peak))
    yield _target("64 experts of rank 1 / 8 of rank 8", 1.1, 1.02, _quotient(thin, wide, seconds))
    label = f"loramoe, {kernels}" if kernels else "loramoe"
    for row in _of(rows, "decode", variant=label):
        yield _target(f"decoding / base, batch {row['batch']}", 0.8, 0.95, row["speed_ratio"], more=True)
    memory, times = [], []
    for plan in _of(rows, "plan"):
        setting = {name: plan[name] for name in ("batch", "length", "checkpointing")}
        step, predicted = _step(rows, kernels=kernels, **setting), _predicted_seconds(rows, plan)
        memory += [abs(plan["peak"] / _peak(step) - 1)] if step else []
        times += [abs(predicted / step["step_seconds"] - 1)] if step and predicted else []
    yield _target("planner's memory, largest error", 0.1, 0.05, max(memory, default=None))
    yield _target("planner's time, largest error", 0.25, 0.1, max(times, default=None))


def _quotient(row: dict | None, reference: dict | None, value: Callable[[dict], float]) -> float | None:
    return value(row) / value(reference) if row and reference else None


def _target(name: str, must: float, aim: float, value: float | None, more: bool = False) -> list:
    """A line: the figure, both limits, what was measured, and which limit it reaches; with `more`, from above."""
    if value is None:
        return [name, must, aim, "not measured", ""]
    reached = [value >= limit if more else value <= limit for limit in (must, aim)]
    return [name, must, aim, f"{value:.3f}", "aim" if reached[1] else "reached" if reached[0] else "**missed**"]


SECTIONS: dict[str, Callable[[Rows], str]] = {
    "": _machine,
    "Figures": _targets,
    "What ran": _stages,
    "Steps": _steps,
    "Kernels of a step": _kernels,
    "Decoding": _decode,
    "The planner": _plan,
    "Training": _train,
}
