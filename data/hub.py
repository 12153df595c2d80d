"""Data sets of the hub (huggingface.co/datasets): opening them, and copying one into a file.

Tested on a stand-in alone: a folder with files and a README.md that describes them, which `datasets.load_dataset` takes
as it takes a repository of the hub. Code that a data set brings along is never run.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import datasets
import pyarrow
from filelock import FileLock
from huggingface_hub.errors import HTTPError
from tqdm import tqdm

from data.atomic import atomic_file, remove_temporaries
from data.errors import InputError, writing
from data.mix import HubSource

SHUFFLE_BUFFER = 10_000
# Errors raised when reading from the hub. RuntimeError refuses code of a data set, ImportError says what it needs.
UNREADABLE = (
    OSError, ValueError, RuntimeError, ImportError, HTTPError, pyarrow.ArrowException, datasets.exceptions.DatasetsError
)  # fmt: skip


@contextmanager
def reading_hub(failure: str, advice: str) -> Iterator[None]:
    """A context in which a data set is read.

    Args:
        failure: what the message says has failed; the reason follows it.
        advice: what to do about it.

    Raises:
        InputError: it cannot be read.
    """
    try:
        yield
    except UNREADABLE as error:
        # The second line may say what there is instead of what was asked for.
        reason = " ".join(str(error).strip().splitlines()[:2]) or type(error).__name__
        raise InputError(f"{failure}: {reason}\n{advice}") from error


def shuffled(records: datasets.IterableDataset, seed: int) -> datasets.IterableDataset:
    """A streamed data set in an order that the seed decides."""
    # By row groups, so that the sample comes from all parts of the files. One group at a time: reading several takes
    # threads, which need five seconds at the end of each set to stop.
    return records.reshard().shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER, max_buffer_input_shards=1)


def fetch(source: HubSource, seed: int, cache_dir: str | Path, place: str) -> Path:
    """The file of JSON Lines with a data set's records, written now or by an earlier call.

    A data set that is streamed and of which only some rows are wanted is shuffled by the seed, and has only about these
    rows read (and the buffer that they are shuffled in); of any other, the file has all records in their order. Memory
    does not grow with it.

    Args:
        place: of the source, for messages.

    Raises:
        InputError: it cannot be read, or the file not be written.
    """
    wanted = source.rows if source.stream else None
    settings = [source.hub, source.config, source.split, source.revision, wanted, seed if wanted else None]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    parts = filter(None, (source.hub, source.config, source.split, source.revision))
    name = re.sub(r"[^\w.]+", "-", "-".join(parts)).strip("-.")[-100:]
    file = Path(cache_dir) / "hub" / f"{name}-{key}.jsonl"
    with writing(f"{file} cannot be written", "name another folder with --data_cache_dir, or make this one writable"):
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            if not file.exists():
                remove_temporaries(file.parent, f"{file.name}.*")
                with atomic_file(file) as temporary, temporary.open("w", encoding="utf-8") as stream:
                    for record in tqdm(
                        _records(source, wanted, seed, place), f"reading {source.name}", unit=" rows", delay=1
                    ):
                        stream.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
    return file


def _records(source: HubSource, wanted: int | None, seed: int, place: str) -> Iterator[dict]:
    """The records as Python's values: in Arrow's, JSON of mixed types is text."""
    failure = f"{place}: {source.name} could not be read from the hub"
    with reading_hub(failure, "correct the source, or start again once it can be read"):
        records: Iterable[dict] = datasets.load_dataset(
            source.hub, source.config, split=source.split, revision=source.revision, streaming=source.stream
        )
        if wanted:
            records = islice(shuffled(records, seed), wanted)
        yield from records
