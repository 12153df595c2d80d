"""Make the paper's mixture from public data sets on the hub: `python -m scripts.prepare_data --output data/paper`.

Sets are streamed and sampled with a seed, so little is downloaded beyond the rows that are used, and memory does not
grow with the sets. Duplicate training rows and those whose question occurs in an evaluation set are left out. The
folder has

    train/                       JSON Lines, one file per task
    evaluation/                  one file per evaluation set
    evaluation_without_overlap/  the closed-book rows whose answers do not occur in training
    counts.json                  rows wanted, found and left out of each set

The folder gets its name only when it is complete. Until then it is called NAME.incomplete, and the same command
continues there with the tasks that are not finished.
"""

import hashlib
import json
import logging
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice, takewhile
from pathlib import Path

import datasets
from filelock import FileLock, Timeout
from tqdm import tqdm

from data import InputError
from data.atomic import atomic_file
from data.errors import writing
from data.facts import TASK as CLOSED_BOOK
from data.hub import reading_hub, shuffled
from data.recipes import RECIPES, Source, evaluation_parts
from inference.metrics import normalized
from loading.command_line import at_least, flag, parse_flags, range_problems, run_verb
from loading.provenance import provenance

COMMAND = "python -m scripts.prepare_data"
COUNTS_NAME = "counts.json"
UNITS = {"": 1, "k": 1_000, "m": 1_000_000}


@dataclass
class PrepareArguments:
    """The recipe, the amount of data and the output folder."""

    output: str | None = flag(None, "folder to create")
    recipe: str = flag("paper", f"which data sets to mix: {', '.join(RECIPES)}")
    size: str = flag("100K", "total number of training rows; K and M are thousands and millions")
    knowledge_share: float = flag(0.2, "share of closed-book questions (world knowledge); other tasks share the rest")
    max_words: int = flag(600, "most words in a prompt; training rows with longer ones are left out")
    evaluation_rows: int = flag(1000, "rows kept of each evaluation set; training rows avoid all of its questions")
    without: list[str] = field(
        default_factory=list, metadata={"help": "hub ids of sets to leave out, such as one that cannot be read"}
    )
    seed: int = flag(41, "random seed of the sampling")

    def problems(self) -> list[str]:
        problems = [] if self.output else ["--output is missing: give the folder to create"]
        if self.recipe not in RECIPES:
            return [*problems, f"--recipe {self.recipe} is unknown; choose from {', '.join(RECIPES)}"]
        if not re.fullmatch(r"[1-9]\d*[kKmM]?", self.size):
            problems.append(f"--size is {self.size!r}, but has to be a number such as 20000, 100K or 3M")
        if not 0 <= self.knowledge_share < 1:
            problems.append(f"--knowledge_share is {self.knowledge_share}, but has to be at least 0 and below 1")
        problems += range_problems(self, [at_least(1, "max_words", "evaluation_rows")])
        known = {source.hub_id for source in RECIPES[self.recipe]}
        return problems + [
            f"--without {name}: no such set; choose from {', '.join(sorted(known))}"
            for name in self.without
            if name not in known
        ]

    @property
    def rows(self) -> int:
        number, unit = re.findall(r"(\d+)(\D?)", self.size)[0]
        return int(number) * UNITS[unit.lower()]

    @property
    def sources(self) -> list[Source]:
        return [source for source in RECIPES[self.recipe] if source.hub_id not in self.without]

    def settings(self) -> dict:
        """The values that determine the rows of a task, apart from the list of sets."""
        names = ("recipe", "rows", "knowledge_share", "max_words", "evaluation_rows", "seed")
        return {name: getattr(self, name) for name in names}


KINDS = (PrepareArguments,)


def main(argv: list[str] | None = None) -> None:
    """Read the command line, write the folder, print the number of rows from each set.

    Raises:
        InputError: a flag is invalid, a set cannot be read, the folder cannot be written, or another process is
            writing it.
    """
    argv = sys.argv[1:] if argv is None else argv
    (args,) = parse_flags(COMMAND, __doc__.splitlines()[0], KINDS, argv)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # reading_hub() reports errors, once
    folder = Path(args.output)
    with writing(f"{folder} cannot be written", "once that is fixed, run the same command to continue"), alone(folder):
        partial, counts = begin(folder, args, argv)
        save(partial, counts)
        parts = evaluation_parts(args.sources)
        every = tqdm([*args.sources, *parts], "finding sets", leave=False)
        opened = {part: open_part(part, args.seed) for part in every}
        asked = write_evaluation(partial, {part: opened[part] for part in parts}, args, counts)
        write_training(partial, {source: opened[source] for source in args.sources}, asked, args, counts)
        write_without_overlap(partial, counts)
        partial.rename(folder)
    print(*table_lines(counts), sep="\n")
    print(f"{rows_so_far(counts):,} of {args.rows:,} training rows are in {folder}/train")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """A context that keeps other processes from writing the folder.

    Raises:
        InputError: another process is writing it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f"{folder.name}.incomplete.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"--output {folder} is being written by another process; wait for it, or stop it") from None
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def begin(folder: Path, args: PrepareArguments, argv: list[str]) -> tuple[Path, dict]:
    """The unfinished folder and its counts, new or left by an interrupted call.

    Raises:
        InputError: the folder exists, or the unfinished one has other settings or is corrupt.
    """
    if folder.exists():
        raise InputError(f"--output {folder} exists already; choose another folder, or delete it")
    partial = folder.with_name(f"{folder.name}.incomplete")
    file = partial / COUNTS_NAME
    settings = args.settings()
    if not file.exists():
        made_by = provenance("scripts.prepare_data", argv)
        made_by["versions"]["datasets"] = datasets.__version__
        return partial, {"settings": settings, **made_by, "train": {}, "evaluation": {}}
    try:
        counts = json.loads(file.read_bytes())
    except ValueError:
        raise InputError(f"{file} is corrupt; delete {partial} to start over") from None
    differing = [
        f"  {name}: {counts['settings'].get(name)!r} there, {value!r} now"
        for name, value in settings.items()
        if counts["settings"].get(name) != value
    ]
    if differing:
        found = "\n".join(differing)
        raise InputError(
            f"{partial} holds part of another mixture:\n{found}\ndelete it to start over, or choose another --output"
        )
    # The share of each task depends on those before it, so all tasks after a missing file are made again.
    kept = takewhile(
        lambda item: not item[1]["got"] or training_file(partial, item[0]).exists(), counts["train"].items()
    )
    counts["train"] = dict(kept)
    return partial, counts


def open_part(source: Source, seed: int) -> datasets.IterableDataset:
    """Open a part of a set, shuffled by the seed; rows are read lazily.

    Raises:
        InputError: it cannot be read, or columns are missing.
    """
    with reading_hub(*in_words(source)):
        records = datasets.load_dataset(
            "parquet", data_files=source.files, split="train", streaming=True, columns=list(source.columns)
        )
        opened = shuffled(records, seed)
        if missing := set(source.columns) - set(records.column_names):
            raise ValueError(f"it has no column {', '.join(sorted(missing))}")
    return opened


def read(source: Source, records: datasets.IterableDataset) -> Iterator[dict]:
    """The records of a set.

    Raises:
        InputError: it can no longer be read.
    """
    with reading_hub(*in_words(source)):
        yield from records


def in_words(source: Source) -> tuple[str, str]:
    """What is said if a set cannot be read: that it cannot, and what to do."""
    return (
        f"{source.name} could not be read from the hub ({source.files})",
        f"once that is fixed, run the same command to continue; or leave the set out with --without {source.hub_id}",
    )


def write_evaluation(partial: Path, opened: dict[Source, Iterable], args: PrepareArguments, counts: dict) -> set[int]:
    """Write a sample of every evaluation set. Returns the keys of all their questions, sampled or not."""
    shutil.rmtree(partial / "evaluation", ignore_errors=True)  # it may have sets that are left out now
    counts["evaluation"] = {}
    asked: set[int] = set()
    for source, records in tqdm(opened.items(), "evaluation sets", unit="set"):
        kept: dict[int, dict] = {}
        for row in filter(None, map(source.row, read(source, records))):
            key = question_key(row)
            asked.add(key)
            if len(kept) < args.evaluation_rows:
                kept.setdefault(key, row)
        with reading_hub(*in_words(source)):
            if not kept:
                raise ValueError("none of its records can be used")
        write_rows(partial / "evaluation" / f"{file_name(source)}.jsonl", kept.values())
        counts["evaluation"][file_name(source)] = {"rows": len(kept)}
    return asked


def write_training(
    partial: Path, opened: dict[Source, Iterable], asked: set[int], args: PrepareArguments, counts: dict
) -> None:
    """Write the tasks that are not finished, one after the other, and count the rows from each set."""
    for file in (partial / "train").glob("*.jsonl"):
        if file.stem not in counts["train"]:  # incomplete, and possibly from sets that are left out now
            file.unlink()
    tasks = list(dict.fromkeys(source.task for source in opened))
    with tqdm(total=args.rows, initial=rows_so_far(counts), unit="row") as bar:
        for place, task in enumerate(tasks):
            if task in counts["train"]:
                continue
            bar.set_description(task)
            wanted = args.rows - rows_so_far(counts)
            wanted = round(args.rows * args.knowledge_share) if task == CLOSED_BOOK else wanted // (len(tasks) - place)
            found: dict[Source, Counter[str]] = {source: Counter() for source in opened if source.task == task}
            seen: set[int] = set()
            streams = [new_rows(source, opened[source], asked, seen, args.max_words, found[source]) for source in found]
            write_rows(training_file(partial, task), counting(bar, islice(in_turn(streams), wanted)))
            counts["train"][task] = task_counts(wanted, found)
            save(partial, counts)


def new_rows(
    source: Source, records: Iterable, asked: set[int], seen: set[int], max_words: int, found: Counter
) -> Iterator[dict]:
    """The rows of a set whose questions are neither in `asked` nor in `seen`; adds them to `seen`.

    Args:
        found: counts the yielded rows, as `got`, and the others by reason.
    """
    for record in read(source, records):
        row = source.row(record)
        if row is None:
            found["unusable"] += 1
        elif len(row["instruction"].split()) + len(row["input"].split()) > max_words:
            found["too_long"] += 1
        elif (key := question_key(row)) in asked:
            found["in_evaluation"] += 1
        elif key in seen:
            found["repeated"] += 1
        else:
            seen.add(key)
            found["got"] += 1
            yield row


def in_turn(streams: list[Iterator[dict]]) -> Iterator[dict]:
    """Take a row from each stream in turn until all are exhausted."""
    while streams:
        for stream in list(streams):
            row = next(stream, None)
            if row is None:
                streams.remove(stream)
            else:
                yield row


def task_counts(wanted: int, found: dict[Source, Counter]) -> dict:
    """Numbers of rows wanted and found, for a task and each of its sets. A set that gave fewer has no more."""
    each, left = divmod(wanted, len(found))
    reasons = ("got", "unusable", "too_long", "in_evaluation", "repeated")
    sets = {
        source.name: {"wanted": each + (place < left)} | {reason: counter[reason] for reason in reasons}
        for place, (source, counter) in enumerate(found.items())
    }
    return {"wanted": wanted, "got": sum(counter["got"] for counter in found.values()), "sets": sets}


def write_without_overlap(partial: Path, counts: dict) -> None:
    """Write the rows of closed-book evaluation sets that share no correct answer with any training row."""
    sets = {name: list(read_rows(partial / "evaluation" / f"{name}.jsonl")) for name in counts["evaluation"]}
    sets = {name: rows for name, rows in sets.items() if rows[0]["task"] == CLOSED_BOOK}
    shutil.rmtree(partial / "evaluation_without_overlap", ignore_errors=True)
    right = {key for rows in sets.values() for row in rows for key in answer_keys(row)}
    taught: set[int] = set()  # only answers of the evaluation sets, so that memory does not grow with the training rows
    for row in read_rows(training_file(partial, CLOSED_BOOK)):
        taught |= right & answer_keys(row)
    for name, rows in sets.items():
        new = [row for row in rows if taught.isdisjoint(answer_keys(row))]
        write_rows(partial / "evaluation_without_overlap" / f"{name}.jsonl", new)
        counts["evaluation"][name]["without_overlap"] = len(new)
    save(partial, counts)


def answer_keys(row: dict) -> set[int]:
    return {text_key(answer) for answer in (row["output"], *row["aliases"])}


def question_key(row: dict) -> int:
    return text_key(f"{row['instruction']} {row['input']}")


def text_key(text: str) -> int:
    """A 64-bit hash of the words, ignoring case, punctuation and articles."""
    return int.from_bytes(hashlib.blake2b(normalized(text).encode(), digest_size=8).digest())


def training_file(partial: Path, task: str) -> Path:
    return partial / "train" / f"{task}.jsonl"


def file_name(source: Source) -> str:
    return f"{source.hub_id.split('/')[1]}_{source.config}"


def rows_so_far(counts: dict) -> int:
    return sum(count["got"] for count in counts["train"].values())


def counting(bar: tqdm, rows: Iterable[dict]) -> Iterator[dict]:
    for row in rows:
        bar.update()
        yield row


def write_rows(file: Path, rows: Iterable[dict]) -> None:
    """Write JSON Lines; no file if there are no rows, since a data file may not be empty."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        is_empty = not stream.tell()
    if is_empty:
        file.unlink()


def read_rows(file: Path) -> Iterator[dict]:
    if file.exists():
        with file.open(encoding="utf-8") as stream:
            yield from map(json.loads, stream)


def save(partial: Path, counts: dict) -> None:
    partial.mkdir(parents=True, exist_ok=True)
    with atomic_file(partial / COUNTS_NAME) as temporary:
        temporary.write_text(json.dumps(counts, indent=2) + "\n")


def table_lines(counts: dict) -> list[str]:
    """One line per set, followed by one for its task."""

    def line(count: dict, name: str) -> str:
        return f"{count['wanted']:10,}{count['got']:10,}  {name}"

    lines = [f"{'wanted':>10}{'got':>10}  set"]
    for task, count in counts["train"].items():
        for name, each in count["sets"].items():
            lines.append(line(each, name + (" (has no more)" if each["got"] < each["wanted"] else "")))
        lines.append(line(count, f"all of {task}"))
    return lines


if __name__ == "__main__":
    run_verb(main)
