"""Data files: finding them, and reading their rows block by block.

Files are JSON (a list of rows), JSON Lines or Parquet; the last two are streamed, so their size does not matter. The
first two may have any Unicode encoding, which is recognised by the first bytes.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

from data.errors import InputError, reading

SUFFIXES = (".json", ".jsonl", ".parquet")
# ValueError covers what is not Unicode, RecursionError endless nesting.
NOT_JSON = (ValueError, RecursionError)
# Raised for values that Python's types cannot hold: text that is not UTF-8, years after 9999, unknown time zones.
NO_PYTHON_VALUE = (ValueError, ArithmeticError, LookupError, pyarrow.ArrowException)
# Size of a block: about so many characters of JSON Lines, so many rows of the other kinds.
CHARACTERS_OF_A_BLOCK = 2**18
ROWS_OF_A_BLOCK = 1000


class Block(NamedTuple):
    """Consecutive rows of a data file.

    Args:
        file: the data file.
        first: number of the first row (in JSON Lines, of the first line), counting from 1.
        content: for JSON Lines, the lines in UTF-8; else the rows.
    """

    file: Path
    first: int
    content: bytes | list


@dataclass(frozen=True)
class Unreadable:
    """A value of a Parquet file that has no counterpart in Python.

    Args:
        reason: why.
    """

    reason: str


def find_files(path: str | Path) -> list[Path]:
    """The data files at a path: the file itself, or every data file in the folder that is not hidden, in name order.

    Raises:
        InputError: there is nothing, or nothing of a known kind, the folder cannot be read, or what has the name of a
            data file is a folder, a pipe or the like.
    """
    path = Path(path)
    with reading(path):
        files = _of_folder(path) if path.is_dir() else _single(path)
        if odd := [str(file) for file in files if not file.is_file()]:
            raise InputError(
                f"{', '.join(odd)}: not a regular file, but a folder, a pipe, a device or a broken link with the name "
                "of a data file"
            )
    for file in files:
        if not is_unicode(str(file)):
            raise InputError(f"{str(file)!r}: the path is not valid UTF-8; rename the file or its folder")
    return files


def skipped_files(path: str | Path) -> tuple[str, ...]:
    """The names in a folder that `find_files` skips, subfolders among them; none for a file."""
    path = Path(path)
    if not path.is_dir():
        return ()
    others = [entry for entry in _entries(path) if entry.suffix.lower() not in SUFFIXES]
    names = [entry.name + "/" * entry.is_dir() for entry in others]
    return tuple(name.encode(errors="backslashreplace").decode() for name in names)


def split_files(files: list[Path]) -> Iterator[Block]:
    """The rows of the files in blocks, in order. Each file is opened once.

    Raises:
        InputError: a file is empty, cannot be read, or is not of the kind that its name says.
    """
    splitters = {".json": _split_json, ".jsonl": _split_json_lines, ".parquet": _split_parquet}
    for file in files:
        with reading(file):
            if file.stat().st_size == 0:
                raise InputError(f"{file}: the file is empty")
    for file in files:
        with reading(file):
            yield from splitters[file.suffix.lower()](file)


def read_block(block: Block) -> Iterator[tuple[int, Any]]:
    """Raw rows of a block with their numbers, counting from 1 in the file; in JSON Lines the number is the line's.

    Values that Python cannot hold are `Unreadable`.

    Raises:
        InputError: a line is not JSON.
    """
    if not isinstance(block.content, bytes):
        yield from enumerate(block.content, start=block.first)
        return
    for number, line in enumerate(block.content.split(b"\n"), start=block.first):
        if line.strip():
            yield number, _parsed(line, f"{block.file}: row {number}", encoding="utf-8-sig")


def is_unicode(text: str) -> bool:
    """Tell whether text has no half of a surrogate pair, as which Python keeps bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: object) -> str:
    """The beginning of a value, as JSON."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _of_folder(folder: Path) -> list[Path]:
    files = [entry for entry in _entries(folder) if entry.suffix.lower() in SUFFIXES]
    if not files:
        raise InputError(f"{folder}: no data files in this folder; looked for {', '.join(SUFFIXES)}")
    return files


def _single(file: Path) -> list[Path]:
    if not file.exists():
        raise InputError(f"{file}: no such file or folder")
    if file.suffix.lower() not in SUFFIXES:
        raise InputError(f"{file}: unknown kind of data file {file.suffix!r}; allowed are {', '.join(SUFFIXES)}")
    return [file]


def _entries(folder: Path) -> list[Path]:
    """What is not hidden, in name order. Systems hide their own files next to data, as macOS does `._a.jsonl`."""
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _split_json(file: Path) -> Iterator[Block]:
    rows = _parsed(file.read_bytes(), str(file), "; JSON Lines files are named .jsonl")
    if not isinstance(rows, list):
        raise InputError(f"{file}: holds {shown(rows)}, but a .json file has to be a list of rows")
    for start in range(0, len(rows), ROWS_OF_A_BLOCK):
        yield Block(file, start + 1, rows[start : start + ROWS_OF_A_BLOCK])


def _split_json_lines(file: Path) -> Iterator[Block]:
    first = 1
    with file.open("rb") as binary:
        encoding = json.detect_encoding(binary.peek(4)[:4])
        # Lines end as on any system. Bytes that are not text survive, so that the row they belong to can be named.
        stream = io.TextIOWrapper(binary, encoding, errors="surrogateescape")
        try:
            while text := stream.read(CHARACTERS_OF_A_BLOCK) + stream.readline():
                if first == 1 and text.lstrip().startswith("["):
                    raise InputError(f"{file}: starts with [, as a JSON list does; files with one are named .json")
                yield Block(file, first, text.encode(errors="surrogateescape"))
                first += text.count("\n")
        except UnicodeError as error:
            raise InputError(f"{file}: not readable text ({error})") from None


def _parsed(content: bytes, place: str, hint: str = "", encoding: str | None = None) -> object:
    """The value of some JSON, whose encoding is recognised by its first bytes if none is given.

    Raises:
        InputError: it cannot be parsed. The message begins with the place and ends, if it is not JSON, with the hint.
    """
    try:
        text = content.decode(encoding or json.detect_encoding(content), errors="surrogatepass")
        return json.loads(text, object_pairs_hook=_named_once, parse_int=_integer)
    except InputError as error:
        raise InputError(f"{place}: {error}") from None
    except NOT_JSON as error:
        raise InputError(f"{place}: not JSON ({error}){hint}") from None


def _named_once(pairs: list[tuple[str, object]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in row if names.count(name) > 1)
        raise InputError(f"the name {twice!r} occurs more than once in {shown(row)}")
    return row


def _integer(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:  # Python refuses thousands of digits, which take quadratic time.
        count = len(digits.removeprefix("-"))
        raise InputError(f"a number has {count:,} digits, which is too many: {digits[:20]}...") from None


def _split_parquet(file: Path) -> Iterator[Block]:
    first = 1
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise InputError(f"{file}: more than one column is called {twice!r}")
            for batch in table.iter_batches(ROWS_OF_A_BLOCK):
                yield Block(file, first, _rows(batch))
                first += len(batch)
    except (pyarrow.ArrowException, OSError, UnicodeError) as error:
        raise InputError(f"{file}: not a readable Parquet file ({error})") from None


def _rows(batch: pyarrow.RecordBatch) -> list[dict]:
    try:
        return batch.to_pylist()
    except NO_PYTHON_VALUE:
        columns = [map(_value, column) for column in batch.columns]
        return [dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]


def _value(scalar: pyarrow.Scalar) -> object:
    try:
        return scalar.as_py()
    except NO_PYTHON_VALUE as error:
        return Unreadable(str(error))
