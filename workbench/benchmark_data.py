"""Measure how long checking, encoding, caching and reloading a large data set take.

    python -m workbench.benchmark_data

Writes a JSON Lines file of instruction rows, or of conversations, to a temporary folder, loads it twice, edits one row
and loads it again.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from data import Encoding, load_data
from loading.base_model import load_tokenizer
from loading.command_line import at_least, range_problems, refuse, run_verb
from loading.provenance import provenance, provenance_line

WORDS = (
    "a", "about", "after", "and", "answer", "are", "as", "at", "be", "because", "book", "but", "by", "can",
    "capital", "city", "could", "country", "day", "did", "do", "does", "each", "every", "find", "first", "for",
    "from", "had", "has", "have", "how", "in", "is", "it", "its", "just", "know", "language", "large", "like",
    "little", "long", "made", "make", "many", "may", "more", "most", "name", "never", "new", "not", "number", "of",
    "old", "on", "one", "only", "or", "other", "people", "question", "river", "said", "sentence", "small", "so",
    "some", "than", "that", "the", "their", "there", "they", "this", "time", "to", "two", "up", "use", "very",
    "was", "water", "way", "we", "were", "what", "when", "where", "which", "who", "why", "will", "with", "word",
    "world", "would", "write", "year",
)  # fmt: skip
SECONDS_BETWEEN_SAMPLES = 0.5


def main(argv: list[str] | None = None) -> None:
    """Measure and print the figures.

    Raises:
        InputError: a number is out of range, or the tokenizer cannot be loaded.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m workbench.benchmark_data", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="number of rows (default: %(default)s)")
    parser.add_argument(
        "--format", choices=ROWS, default="instruction", help="shape of the rows (default: %(default)s)"
    )
    parser.add_argument("--num_proc", type=int, default=2, help="encoding processes (default: %(default)s)")
    parser.add_argument(
        "--tokenizer", default="models/SmolLM2-135M-Instruct", help="folder or hub id (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)
    refuse(range_problems(args, [at_least(1, "rows", "num_proc")]))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(args.tokenizer)
    with tempfile.TemporaryDirectory(prefix="benchmark-data-") as folder:
        figures = measure(Path(folder), args.format, args.rows, args.num_proc, tokenizer)
    record = provenance("workbench.benchmark_data", argv)
    for name, value in figures.items():
        print(f"{name:28}{value:>16,}")
    print(provenance_line(record))
    if args.json:
        args.json.write_text(json.dumps(record | figures, indent=2) + "\n")


def measure(folder: Path, form: str, rows: int, num_proc: int, tokenizer: PreTrainedTokenizerBase) -> dict:
    """Measure the figures and return them by name."""
    file = folder / "rows.jsonl"
    write_rows(file, form, rows)
    encoding = Encoding("auto", 1024, 2)

    def load() -> tuple[float, int]:
        start = time.perf_counter()
        data, _ = load_data(file, tokenizer, encoding, folder / "cache", num_proc)
        return time.perf_counter() - start, len(data)

    with PeakMemory() as memory:
        first, count = load()
    second, _ = load()
    entries = {entry.name for entry in (folder / "cache").iterdir() if entry.is_dir()}
    edit_one_row(file)
    load()
    edited = {entry.name for entry in (folder / "cache").iterdir() if entry.is_dir()}
    return {
        "rows": count,
        "megabytes of JSON Lines": file.stat().st_size // 1_000_000,
        "seconds of the first load": round(first, 1),
        "rows per second": round(count / first),
        "peak PSS in MiB": memory.peak // 2**20,
        "seconds of the second load": round(second, 2),
        "entries after an edited row": len(edited | entries),
    }


def write_rows(file: Path, form: str, rows: int) -> None:
    """Write rows of a format, each with a last column of one letter."""
    generator = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(least, most)))

    with file.open("w") as stream:
        for index in range(rows):
            row = {**ROWS[form](index, text), "task_type": index % 2, "task": "a"}
            stream.write(json.dumps(row) + "\n")


def _instruction(index: int, text: Callable[[int, int], str]) -> dict:
    """A question of 10 to 45 words, and an answer of 1 to 30."""
    return {"instruction": f"{index}: {text(10, 45)}", "input": "", "output": text(1, 30)}


def _messages(index: int, text: Callable[[int, int], str]) -> dict:
    """A system prompt and two exchanges."""
    turns = [("system", text(5, 15)), ("user", f"{index}: {text(5, 30)}"), ("assistant", text(5, 30))]
    turns += [("user", text(5, 30)), ("assistant", text(5, 30))]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


ROWS = {"instruction": _instruction, "messages": _messages}


def edit_one_row(file: Path) -> None:
    """Change the last letter without changing the file's size."""
    with file.open("r+b") as stream:
        stream.seek(-len('a"}\n'), os.SEEK_END)
        stream.write(b"b")


class PeakMemory:
    """Context manager that samples the proportional set size of this process and its descendants.

    Attributes:
        peak: bytes, the largest sum seen.
    """

    def __init__(self):
        self.peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN_SAMPLES):
            self.peak = max(self.peak, _proportional_set_size(os.getpid()))


def _proportional_set_size(process: int) -> int:
    """Bytes of a process and its descendants; shared pages count in part. Processes that have ended count 0."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        children = [int(name) for task in Path(f"/proc/{process}/task").iterdir()
                    for name in (task / "children").read_text().split()]  # fmt: skip
    except (FileNotFoundError, ProcessLookupError):
        return 0
    own = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return own + sum(map(_proportional_set_size, children))


if __name__ == "__main__":
    run_verb(main)
