"""Data sets on the hub (huggingface.co/datasets): opening them, and copying one into a file.

Tested only with a local folder of files and a README.md that describes them, which `datasets.load_dataset` reads like a
hub repository. Code in a data set is never run.
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
# Errors raised when reading from the hub. RuntimeError: the data set has code; ImportError: it needs a package.
UNREADABLE = (
    OSError, ValueError, RuntimeError, ImportError, HTTPError, pyarrow.ArrowException, datasets.exceptions.DatasetsError
)  # fmt: skip


@contextmanager
def reading_hub(failure: str, advice: str) -> Iterator[None]:
    """Turn errors of reading a data set in this context into InputError.

    Args:
        failure: beginning of the message, before the reason.
        advice: end of the message.

    Raises:
        InputError: the data set cannot be read.
    """
    try:
        yield
    except UNREADABLE as error:
        # The second line may list what is available.
        reason = " ".join(str(error).strip().splitlines()[:2]) or type(error).__name__
        raise InputError(f"{failure}: {reason}\n{advice}") from error


def shuffled(records: datasets.IterableDataset, seed: int) -> datasets.IterableDataset:
    """Shuffle a streamed data set by the seed."""
    # By row groups, so that the sample comes from all parts of the files. One group at a time: reading several takes
    # threads, which need five seconds at the end of each set to stop.
    return records.reshard().shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER, max_buffer_input_shards=1)


def fetch(source: HubSource, seed: int, cache_dir: str | Path, place: str) -> Path:
    """A JSON Lines file with the records of a data set, written unless an earlier call did so.

    With `stream` and `rows`, the file has that many rows, shuffled by the seed; little more than these and the shuffle
    buffer is read. Otherwise it has all records in order. Memory does not grow with the data set.

    Args:
        place: position of the source in the mix, for messages.

    Raises:
        InputError: the data set cannot be read, or the file cannot be written.
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
    """The records as Python values. As Arrow values, JSON of mixed types would be text."""
    failure = f"{place}: {source.name} could not be read from the hub"
    with reading_hub(failure, "correct the source, or try again later"):
        records: Iterable[dict] = datasets.load_dataset(
            source.hub, source.config, split=source.split, revision=source.revision, streaming=source.stream
        )
        if wanted:
            records = islice(shuffled(records, seed), wanted)
        yield from records
