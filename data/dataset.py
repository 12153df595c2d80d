"""Encoded data sets, built once and cached by content.

Not by `datasets.map`, which is as fast, since an entry here is named by the bytes of the files, not by their paths and
times, and a damaged one is rebuilt, where `datasets` fails on it or reads it as it is. Rows are checked before any is
encoded, by our own reader: an error names file and row, where `datasets` infers a column's type and converts values.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
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
from data.errors import InputError, reading, writing
from data.files import Block, find_files, skipped_files, split_files
from data.formats import Conversation
from data.prompt import Encoded, TrainOn, encode_conversations, resolve_template
from data.rows import RECOGNISED, Reading, check_rows, complete_rows
from data.segments import span_pairs
from data.workers import map_blocks, worker_count

# Part of every cache key: raise it when the encoding of a row or the files of an entry change.
FORMAT_VERSION = 10
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
        train_on: the answers of a conversation that are supervised: `all`, or the `last`.
    """

    template: str
    max_seq_length: int
    num_task_types: int
    task_type_names: tuple[str, ...] = ()
    train_on: TrainOn = "all"


def load_data(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    encoding: Encoding,
    cache_dir: str | Path,
    num_proc: int | None = None,
    reading: Reading = RECOGNISED,
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
        reading: how rows are read.

    Returns:
        The data set, with the columns of `_FEATURES`; its counts.

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
                    _build(files, tokenizer, encoding, reading, folder, num_proc)
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
    return np.concatenate([pyarrow.compute.list_value_length(ids).to_numpy() for ids in _blocks(rows, "input_ids")])


def count_supervised(rows: datasets.Dataset) -> int:
    """Tokens of an encoded data set that the model learns to write."""
    spans = (pyarrow.compute.list_flatten(block).to_numpy() for block in _blocks(rows, "spans"))
    return sum(int(each[1::2].sum() - each[::2].sum()) for each in spans)


def task_types(rows: datasets.Dataset) -> set[int]:
    """The task types that occur."""
    return set(rows.select_columns("task_type").with_format("arrow")[:]["task_type"].unique().to_pylist())


def file_hash(file: Path) -> str:
    """SHA-256 of a file's bytes.

    Raises:
        InputError: it cannot be read.
    """
    with reading(file), file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def answer_start(row: dict) -> int:
    """Where the last supervised answer of an encoded row begins: what comes before is its prompt."""
    return row["spans"][-2]


def turns_before_answer(row: dict) -> Conversation:
    """The conversation before the last supervised answer of an encoded row."""
    return Conversation(json.loads(row["turns"]), json.loads(row["tools"] or "null"))


def count_shared_rows(first: datasets.Dataset, second: datasets.Dataset) -> int:
    """How many rows of the second data set have the prompt of a row of the first."""
    first_hashes, second_hashes = (
        rows.select_columns("prompt_hash").with_format("numpy")[:]["prompt_hash"] for rows in (first, second)
    )
    return int(np.isin(second_hashes, first_hashes).sum())


def _blocks(rows: datasets.Dataset, column: str) -> Iterator[pyarrow.ChunkedArray]:
    """A column in blocks: the rows of a mix are gathered from all over its files, and all at once would fill memory."""
    return (block[column] for block in rows.select_columns(column).with_format("arrow").iter(ROWS_AT_ONCE))


def _listed(names: Iterable[str]) -> str:
    first = list(islice(names, MOST_NAMES_SHOWN + 1))
    return ", ".join([*first[:MOST_NAMES_SHOWN], *(["..."] if len(first) > MOST_NAMES_SHOWN else [])])


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _hash(*texts: str) -> int:
    """64 bits of a hash."""
    digest = hashlib.sha256("\0".join(texts).encode()).digest()
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
    reading: Reading,
    folder: Path,
    num_proc: int | None,
) -> None:
    workers = worker_count(files, num_proc)
    names, plain = encoding.task_type_names, encoding.template == "plain"
    total, ignored = check_rows(files, encoding.num_task_types, names, workers, reading, plain)
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
    for row, encoded in zip(rows, _encode_rows(rows, tokenizer, encoding), strict=True):
        ids, spans = encoded.input_ids[: encoding.max_seq_length], _cut(encoded.spans, encoding.max_seq_length)
        if spans:
            truncated += len(ids) < len(encoded.input_ids)
            last = encoded.turns[len(spans) // 2 - 1]
            kept.append({**row, "input_ids": ids, "spans": spans, **_texts(row.pop("conversation"), last)})
    counts = {
        "rows": len(rows),
        "kept": len(kept),
        "truncated": truncated,
        "dropped": len(rows) - len(kept),
        "tokens": sum(len(row["input_ids"]) for row in kept),
        "supervised_tokens": sum(end - start for row in kept for start, end in span_pairs(row["spans"])),
    }
    return pyarrow.RecordBatch.from_pylist(kept, schema=_FEATURES.arrow_schema), counts


def _encode_rows(rows: list[dict], tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> list[Encoded]:
    """Raises InputError, which names the first row that cannot be encoded."""
    conversations = [row["conversation"] for row in rows]
    settings = encoding.train_on, encoding.max_seq_length
    try:
        return encode_conversations(tokenizer, encoding.template, conversations, *settings)
    except InputError:
        for row in rows:
            try:
                encode_conversations(tokenizer, encoding.template, [row["conversation"]], *settings)
            except InputError as error:
                raise InputError(f"{row['source']}: {error}") from error
        raise


def _cut(spans: list[int], most: int) -> list[int]:
    """The supervised parts of the first `most` tokens."""
    return [place for start, end in span_pairs(spans) if start < most for place in (start, min(end, most))]


def _texts(conversation: Conversation, last: int) -> dict[str, str | int]:
    """The text fields of an encoded row, whose last supervised answer is the turn `last`."""
    turns, tools = (json.dumps(each, ensure_ascii=False) for each in (conversation.messages[:last], conversation.tools))
    answer = conversation.messages[last]
    return {
        "turns": turns,
        "tools": tools if conversation.tools else "",
        "output": answer["content"] or json.dumps(answer["tool_calls"], ensure_ascii=False),
        "prompt_hash": _hash(turns, tools),
    }


_FEATURES = datasets.Features(
    {
        "turns": datasets.Value("large_string"),  # JSON of those before the last supervised answer
        "tools": datasets.Value("large_string"),  # JSON, or empty
        "output": datasets.Value("large_string"),
        "task_type": datasets.Value("int64"),
        "task": datasets.Value("string"),
        "aliases": datasets.List(datasets.Value("large_string")),
        "source": datasets.Value("string"),
        "input_ids": datasets.List(datasets.Value("int32")),
        "spans": datasets.List(datasets.Value("int32")),  # start and end of each supervised part, in turn
        "prompt_hash": datasets.Value("int64"),
    }
)
