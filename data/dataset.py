"""Encoded data sets, built once and cached by content.

Not by `datasets.map`, which is as fast, since an entry here is named by the bytes of the files, not by their paths and
times, and a damaged one is rebuilt, where `datasets` fails on it or reads it as it is. Rows are checked before any is
encoded, by our own reader: an error names file and row, where `datasets` infers a column's type and converts values.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
from filelock import FileLock
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from data.atomic import atomic_folder, remove_temporaries
from data.errors import InputError, reading as reading_file, writing
from data.files import Block, find_files, skipped_files, split_files
from data.prompt import encode_rows, resolve_template
from data.rows import Reading, check_rows, complete_rows
from data.workers import map_blocks, worker_count

# Part of every cache key: raise it when the encoding of a row or the files of an entry change.
FORMAT_VERSION = 8
ROWS_NAME = "rows.arrow"
STATISTICS_NAME = "statistics.json"
MOST_NAMES_SHOWN = 5
ROWS_AT_ONCE = 10_000
# Raised for an entry of the cache that is missing or incomplete.
INCOMPLETE = (OSError, ValueError, TypeError, AttributeError, LookupError, pyarrow.ArrowException)


@dataclass(frozen=True)
class DataStatistics:
    """Counts of one encoded data set.

    Args:
        rows: rows in the files.
        kept: rows that are used.
        truncated: kept rows that were cut at `max_seq_length`.
        dropped: rows left out because their prompt alone fills `max_seq_length`.
        tokens: tokens of the kept rows.
        supervised_tokens: those of them that the model learns to write.
        ignored: names of columns that are not fields of a row.
        skipped: names in the folder that are not data files.
        table: of a mix, the lines of a table of its sources. Its `rows`, `truncated`, `dropped` and `ignored` are those
            of all rows of the sources, whether they are taken or not.
        sha256: SHA-256 over the contents of the files.
    """

    rows: int
    kept: int
    truncated: int
    dropped: int
    tokens: int
    supervised_tokens: int
    ignored: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    table: tuple[str, ...] = ()
    sha256: str = field(default="", compare=False)

    def summary(self, max_seq_length: int) -> str:
        text = f"{self.kept:,} rows, {self.tokens:,} tokens, {self.supervised_tokens:,} of them supervised"
        if self.truncated:
            text += f"; {self.truncated:,} rows cut at {max_seq_length} tokens"
        if self.dropped:
            text += f"; {self.dropped:,} rows dropped, since their prompt alone fills {max_seq_length} tokens"
        if self.ignored:
            text += f"; columns that are ignored: {_listed(map(repr, self.ignored))}"
        if self.skipped:
            text += f"; skipped (not data files): {_listed(self.skipped)}"
        return "\n".join([text, *self.table])


@dataclass(frozen=True)
class Encoding:
    """How rows become tokens: with the rows and the tokenizer, all that the result depends on.

    Args:
        template: `plain`, `chat` or `auto`.
        max_seq_length: longest row in tokens. A longer one is cut at its end, so the prompt stays complete.
        num_task_types: allowed task types are 0 to this minus 1.
        task_type_names: names that rows may use instead, in this order.
    """

    template: str
    max_seq_length: int
    num_task_types: int
    task_type_names: tuple[str, ...] = ()


def load_data(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    encoding: Encoding,
    cache_dir: str | Path,
    num_proc: int | None = None,
    reading: Reading = Reading(),  # noqa: B008
) -> tuple[datasets.Dataset, DataStatistics]:
    """Read, check and encode a file or folder, or take the result of an earlier call with the same content.

    The cache key covers the bytes of the files, the tokenizer and the encoding, so an edited row or another template
    never meets stale tokens. A new entry is written atomically; processes that want the same one wait. A damaged
    entry is rebuilt.

    A file whose rows are in the cache is opened once, to be hashed; else twice more: all rows are checked, which takes
    4 % of the time, before any is encoded, so that a mistake in the last row does not take minutes to be found.

    Args:
        num_proc: processes that check and encode; None is one for each core, up to 8. A few megabytes take one in any
            case. The result does not depend on it.

    Returns:
        The data set, with the columns `input_ids`, `prompt_length`, `prompt_hash`, `task_type` and the row's text
        fields; its counts.

    Raises:
        InputError: a file or row is bad, no row has supervised tokens within `max_seq_length`, or the cache cannot be
            written.
    """
    files = find_files(path)
    hashes = list(map(file_hash, files))
    encoding = replace(encoding, template=resolve_template(encoding.template, tokenizer))
    folder = Path(cache_dir) / _cache_key(files, hashes, tokenizer, encoding, reading)
    entry = _complete_entry(folder)
    if not entry:
        failure = f"encoded rows could not be written into {cache_dir}"
        advice = "name another folder with --data_cache_dir, or start again once this one can be written"
        with writing(failure, advice):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                entry = _complete_entry(folder)
                if not entry:
                    _build(files, tokenizer, encoding, folder, num_proc, reading)
                    entry = _read_entry(folder)
    rows, statistics = entry
    if not statistics.kept:
        raise InputError(
            f"{path}: no row has supervised tokens within max_seq_length {encoding.max_seq_length}; raise "
            "max_seq_length"
        )
    return rows, replace(statistics, skipped=skipped_files(path), sha256=_sha256("".join(hashes)))


def row_lengths(rows: datasets.Dataset) -> np.ndarray:
    """Tokens of each row of an encoded data set."""
    # In blocks: the rows of a mix are gathered from all over its files, and would all be in memory otherwise.
    blocks = rows.select_columns("input_ids").with_format("arrow").iter(ROWS_AT_ONCE)
    return np.concatenate([pyarrow.compute.list_value_length(block["input_ids"]).to_numpy() for block in blocks])


def supervised_lengths(rows: datasets.Dataset) -> np.ndarray:
    """Tokens of each row that the model learns to write."""
    return row_lengths(rows) - np.asarray(rows.with_format("numpy")["prompt_length"][:])


def task_types(rows: datasets.Dataset) -> set[int]:
    """The task types that occur."""
    return set(rows.select_columns("task_type").with_format("arrow")[:]["task_type"].unique().to_pylist())


def file_hash(file: Path) -> str:
    """SHA-256 of a file's bytes.

    Raises:
        InputError: it cannot be read.
    """
    with reading_file(file), file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def count_shared_rows(first: datasets.Dataset, second: datasets.Dataset) -> int:
    """How many rows of the second data set have the instruction and input of a row of the first."""
    first_hashes, second_hashes = (
        rows.select_columns("prompt_hash").with_format("numpy")[:]["prompt_hash"] for rows in (first, second)
    )
    return int(np.isin(second_hashes, first_hashes).sum())


def _listed(names: Iterable[str]) -> str:
    first = list(islice(names, MOST_NAMES_SHOWN + 1))
    return ", ".join([*first[:MOST_NAMES_SHOWN], *(["..."] if len(first) > MOST_NAMES_SHOWN else [])])


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _prompt_hash(row: dict) -> int:
    digest = hashlib.sha256(f"{row['instruction']}\0{row['input']}".encode()).digest()
    return int.from_bytes(digest[:8], signed=True)


def _cache_key(
    files: list[Path], hashes: list[str], tokenizer: PreTrainedTokenizerBase, encoding: Encoding, reading: Reading
) -> str:
    # Names are part of the result: how a file is read, and what its rows are called in messages.
    contents = [f"{file.name}:{file_sha256}" for file, file_sha256 in zip(files, hashes, strict=True)]
    settings = json.dumps([tokenizer.chat_template, tokenizer.special_tokens_map, asdict(encoding), asdict(reading)])
    return _sha256("".join([str(FORMAT_VERSION), *contents, tokenizer.backend_tokenizer.to_str(), settings]))[:32]


def _complete_entry(folder: Path) -> tuple[datasets.Dataset, DataStatistics] | None:
    """An entry of the cache, or None if it is missing or damaged."""
    try:
        return _read_entry(folder)
    except INCOMPLETE:
        return None


def _read_entry(folder: Path) -> tuple[datasets.Dataset, DataStatistics]:
    file = folder / ROWS_NAME
    counts = json.loads((folder / STATISTICS_NAME).read_bytes())
    # A stream that is cut between two batches of rows opens without an error.
    if (size := file.stat().st_size) != counts.pop("bytes"):
        raise ValueError(f"{file} has {size} bytes")
    statistics = DataStatistics(**counts | {"ignored": tuple(counts["ignored"])})
    return datasets.Dataset.from_file(str(file)), statistics


def _build(
    files: list[Path],
    tokenizer: PreTrainedTokenizerBase,
    encoding: Encoding,
    folder: Path,
    num_proc: int | None,
    reading: Reading,
) -> None:
    workers = worker_count(files, num_proc)
    total, ignored = check_rows(files, encoding.num_task_types, encoding.task_type_names, workers, reading)
    encode = partial(_encode_block, tokenizer=tokenizer, encoding=encoding, reading=reading)
    counts: Counter[str] = Counter()
    remove_temporaries(folder.parent, f"{folder.name}.*")
    with atomic_folder(folder) as temporary:
        with (
            pyarrow.OSFile(str(temporary / ROWS_NAME), "wb") as file,
            pyarrow.ipc.new_stream(file, _FEATURES.arrow_schema) as stream,
            tqdm(desc="encoding rows", total=total, unit=" rows", delay=1) as bar,
        ):
            for batch, of_block in map_blocks(encode, split_files(files), workers):
                stream.write_batch(batch)
                counts.update(of_block)
                bar.update(of_block["rows"])
        statistics = {**counts, "ignored": ignored, "bytes": (temporary / ROWS_NAME).stat().st_size}
        (temporary / STATISTICS_NAME).write_text(json.dumps(statistics))
        if folder.exists():  # Damaged. Processes that have its rows open keep them.
            shutil.rmtree(folder)


def _encode_block(
    block: Block, tokenizer: PreTrainedTokenizerBase, encoding: Encoding, reading: Reading
) -> tuple[pyarrow.RecordBatch, dict[str, int]]:
    """The rows of a block that have supervised tokens, and the counts of a `DataStatistics`."""
    rows = complete_rows(block, encoding.task_type_names, reading)
    kept, truncated = [], 0
    for row, prompt, target in zip(rows, *encode_rows(tokenizer, encoding.template, rows), strict=True):
        ids = (prompt + target)[: encoding.max_seq_length]
        if len(ids) > len(prompt):
            kept.append({**row, "input_ids": ids, "prompt_length": len(prompt), "prompt_hash": _prompt_hash(row)})
            truncated += len(ids) < len(prompt) + len(target)
    tokens = sum(len(row["input_ids"]) for row in kept)
    counts = {
        "rows": len(rows),
        "kept": len(kept),
        "truncated": truncated,
        "dropped": len(rows) - len(kept),
        "tokens": tokens,
        "supervised_tokens": tokens - sum(row["prompt_length"] for row in kept),
    }
    return pyarrow.RecordBatch.from_pylist(kept, schema=_FEATURES.arrow_schema), counts


_FEATURES = datasets.Features(
    {
        "instruction": datasets.Value("large_string"),
        "input": datasets.Value("large_string"),
        "output": datasets.Value("large_string"),
        "task_type": datasets.Value("int64"),
        "task": datasets.Value("string"),
        "aliases": datasets.List(datasets.Value("large_string")),
        "source": datasets.Value("string"),
        "input_ids": datasets.List(datasets.Value("int32")),
        "prompt_length": datasets.Value("int32"),
        "prompt_hash": datasets.Value("int64"),
    }
)
