"""The rows of a run: from a file, a folder, or the sources of a mix.

Each source is encoded and cached separately. A mix selects rows by index from the memory-mapped files, without copies.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Literal, NamedTuple

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from data.dataset import DataStatistics, Encoding, count_supervised, load_data, row_lengths, task_types
from data.errors import InputError
from data.files import find_files
from data.hub import fetch
from data.mix import FileSource, HubSource, Mix, check_columns, is_mix, read_mix

Part = Literal["training", "held out"]
NO_ROWS: dict[Part, str] = {
    "training": "no row is left to train on; lower held_out, or take more rows",
    "held out": "no row is held out to evaluate on; raise held_out, or set another validation file or none",
}


class _Source(NamedTuple):
    """A source and its rows.

    Args:
        place: its position in the mix file: `sources[0]`.
        rows: all of its rows.
        taken: indices of the rows in each part.
    """

    place: str
    source: FileSource | HubSource
    rows: datasets.Dataset
    statistics: DataStatistics
    taken: dict[Part, np.ndarray]


def load_part(
    path: str | Path,
    part: Part,
    tokenizer: PreTrainedTokenizerBase,
    encoding: Encoding,
    cache_dir: str | Path,
    num_proc: int | None = None,
) -> tuple[datasets.Dataset, DataStatistics]:
    """Load the rows of a data file or folder, or a part of a mix, as `load_data` does.

    Args:
        part: part of a mix to load; ignored for a file or folder.

    Returns:
        The rows and their counts. The counts of a mix include a table of its sources, and a hash of the contents of the
        sources, how they are read, and which of their rows are taken.

    Raises:
        InputError: as for `read_mix` and `load_data`; or the part is empty, or a source has fewer rows than requested.
    """
    if not is_mix(path):
        return load_data(path, tokenizer, encoding, cache_dir, num_proc)
    mix = read_mix(path, encoding.num_task_types, encoding.task_type_names)
    sources = _take(Path(path), mix, _load(Path(path), mix, tokenizer, encoding, cache_dir, num_proc))
    if not any(len(each.taken[part]) for each in sources):
        raise InputError(f"{path}: {NO_ROWS[part]}")
    rows = datasets.concatenate_datasets([each.rows.select(each.taken[part]) for each in sources])
    return rows, _statistics(sources, part, encoding.task_type_names)


def choose_rows(size: int, taken: int, held_out: float, seed: int) -> dict[Part, np.ndarray]:
    """Choose `taken` of `size` rows and split them: sorted indices by part.

    They are the first of a permutation, of which rows at regular intervals are held out. So of two calls with the same
    seed, size and share, the one that takes more rows takes all rows of the other, each in the same part.

    Args:
        held_out: share of the taken rows; half a row is rounded up.
    """
    order = np.random.default_rng(seed).permutation(size)[:taken]
    is_held_out = np.diff(np.floor(np.arange(len(order) + 1) * held_out + 0.5)) > 0
    return {"training": np.sort(order[~is_held_out]), "held out": np.sort(order[is_held_out])}


def weighted_counts(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """The largest numbers of rows in proportion to weights (above 0) that take no row twice."""
    if not weights:
        return []
    scale = min(Fraction(size) / Fraction(weight) for size, weight in zip(sizes, weights, strict=True))
    return [round(scale * Fraction(weight)) for weight in weights]


def _load(
    file: Path,
    mix: Mix,
    tokenizer: PreTrainedTokenizerBase,
    encoding: Encoding,
    cache_dir: str | Path,
    num_proc: int | None,
) -> list[_Source]:
    """Load all rows of the sources, except those with a weight of 0."""
    used = [(f"sources[{number}]", source) for number, source in enumerate(mix.sources) if source.weight != 0]
    paths = [_find(source, file, place, mix.seed, cache_dir) for place, source in used]
    files = [{each.resolve() for each in find_files(path)} for path in paths]
    readers = Counter(each for several in files for each in several)
    sources = []
    for (place, source), path, own in zip(used, paths, files, strict=True):
        # File and number identify a row, unless two sources read the same file in different ways.
        prefix = f"{place} " if any(readers[each] > 1 for each in own) else ""
        if isinstance(source, FileSource):
            folder = Path(source.path) if path.is_dir() else Path(source.path).parent
            prefix += f"{folder.as_posix()}/" if folder != Path() else ""
        rows, statistics = load_data(path, tokenizer, encoding, cache_dir, num_proc, source.reading(prefix))
        sources.append(_Source(place, source, rows, statistics, {}))
    return sources


def _find(source: FileSource | HubSource, file: Path, place: str, seed: int, cache_dir: str | Path) -> Path:
    """The file or folder with a source's rows."""
    if isinstance(source, FileSource):
        return file.parent / source.path
    path = fetch(source, seed, cache_dir, f"{file}: {place}")
    if source.columns:
        check_columns(path, source.columns)
    return path


def _take(file: Path, mix: Mix, sources: list[_Source]) -> list[_Source]:
    """Choose the rows of each source.

    Raises:
        InputError: a source has fewer rows than requested, or its weight is so small that no row is taken.
    """
    weights = {each.place: each.source.weight for each in sources if each.source.weight}
    sizes = [len(each.rows) for each in sources if each.place in weights]
    counts = dict(zip(weights, weighted_counts(sizes, list(weights.values())), strict=True))
    problems, taken = [], []
    for each in sources:
        wanted, size = each.source.rows, len(each.rows)
        # The file of a streamed source is the sample itself, of which rows may have been dropped.
        there = each.statistics.rows if isinstance(each.source, HubSource) and each.source.stream else size
        if wanted and wanted > there:
            problems.append(f"{each.place}.rows is {wanted}, but there are only {there} that can be used")
        if not (count := counts.get(each.place, min(wanted or size, size))):
            problems.append(f"{each.place}.weight is {each.source.weight}, which leaves none of its {size} rows")
        held_out = mix.held_out if each.source.held_out is None else each.source.held_out
        taken.append(each._replace(taken=choose_rows(size, count, held_out, mix.seed)))
    if problems:
        raise InputError("\n".join(f"{file}: {problem}" for problem in problems))
    return taken


def _statistics(sources: list[_Source], part: Part, names: Sequence[str]) -> DataStatistics:
    """Counts of a part, with a table of its sources."""
    other: Part = "held out" if part == "training" else "training"
    tokens = [int(row_lengths(each.rows)[each.taken[part]].sum()) for each in sources]
    counts = [each.statistics for each in sources]
    table = [
        (each.source.name, _types(each, part, names), len(each.taken[part]), of_source, len(each.taken[other]))
        for each, of_source in zip(sources, tokens, strict=True)
    ]
    return DataStatistics(
        rows=sum(each.rows for each in counts),
        kept=sum(len(each.taken[part]) for each in sources),
        truncated=sum(each.truncated for each in counts),
        dropped=sum(each.dropped for each in counts),
        tokens=sum(tokens),
        supervised_tokens=sum(count_supervised(each.rows.select(each.taken[part])) for each in sources),
        ignored=tuple(sorted({name for each in counts for name in each.ignored})),
        skipped=tuple(name for each in counts for name in each.skipped),
        table=_table_lines(table, other),
        sha256=_sha256(sources, part),
    )


def _types(source: _Source, part: Part, names: Sequence[str]) -> str:
    """The task types of a source's rows."""
    types = sorted(task_types(source.rows.select(source.taken[part])))
    return ", ".join("none" if kind < 0 else names[kind] if names else str(kind) for kind in types)


def _table_lines(sources: list[tuple[str, str, int, int, int]], other: Part) -> tuple[str, ...]:
    """A line per source, given name, task types, rows, tokens and rows in the other part; and one for the total."""
    all_rows, all_tokens, all_others = (sum(column) for column in list(zip(*sources, strict=True))[2:])
    cells: list[tuple[str, ...]] = [("source", "task type", "rows", "share", "tokens", "share", other)]
    for name, types, rows, tokens, others in [*sources, ("all", "", all_rows, all_tokens, all_others)]:
        shares = f"{rows / all_rows:.1%}", f"{tokens / all_tokens:.1%}"
        cells.append((name, types, f"{rows:,}", shares[0], f"{tokens:,}", shares[1], f"{others:,}"))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return tuple(
        "  ".join(["", *map(str.ljust, line[:2], widths[:2]), *map(str.rjust, line[2:], widths[2:])]) for line in cells
    )


def _sha256(sources: list[_Source], part: Part) -> str:
    """Hash everything that determines the rows of a part: contents, how they are read, which are taken."""
    digest = hashlib.sha256()
    for each in sources:
        settings = each.source.model_dump(include={"format", "columns", "task_type", "task"})
        digest.update(json.dumps([each.statistics.sha256, settings], sort_keys=True).encode())
        digest.update(each.taken[part].astype("<i8").tobytes())
    return digest.hexdigest()
