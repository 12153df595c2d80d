"""Data files: finding them, and reading their rows block by block.

Files are JSON (a list of rows), JSON Lines, CSV, TSV or Parquet; all but JSON are streamed, so their size does not
matter. All but Parquet are text: in any Unicode encoding, which is recognised by the first bytes, and optionally
compressed by gzip or Zstandard.

CSV is what spreadsheets and pandas write: the first line names the columns, a cell in quotes may contain separators and
line ends, and quotes in it are doubled. TSV differs only in its separator. An empty cell is None; all others are text,
except that a numeric task type is an integer. Row numbers start after the header and leave out blank lines.
"""

import csv
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import pyarrow
import pyarrow.parquet

from data.errors import InputError, reading

TEXT_KINDS = (".json", ".jsonl", ".csv", ".tsv")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SUFFIXES = (".parquet", *TEXT_KINDS, *(kind + compression for kind in TEXT_KINDS for compression in COMPRESSIONS))
ALLOWED = f".parquet, {', '.join(TEXT_KINDS)}, the last four also with {' or '.join(COMPRESSIONS)}"
# ValueError covers what is not Unicode, RecursionError endless nesting.
NOT_JSON = (ValueError, RecursionError)
# Raised for values that Python's types cannot hold: text that is not UTF-8, years after 9999, unknown time zones.
NO_PYTHON_VALUE = (ValueError, ArithmeticError, LookupError, pyarrow.ArrowException)
# Size of a block: approximate characters of JSON Lines, rows of the other kinds.
CHARACTERS_OF_A_BLOCK = 2**18
ROWS_OF_A_BLOCK = 1000
# A cell of CSV whose closing quote is missing would hold the rest of the file.
CHARACTERS_OF_A_CELL = 2**20


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
        InputError: there is no file, or none of a known kind, the folder cannot be read, or something with the name
            of a data file is a folder, a pipe or the like.
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
    """The names in a folder that `find_files` skips, including subfolders; none for a file."""
    path = Path(path)
    if not path.is_dir():
        return ()
    others = [entry for entry in _entries(path) if not _is_data(entry)]
    names = [entry.name + "/" * entry.is_dir() for entry in others]
    return tuple(name.encode(errors="backslashreplace").decode() for name in names)


def split_files(files: list[Path]) -> Iterator[Block]:
    """The rows of the files in blocks, in order. Each file is opened once.

    Raises:
        InputError: a file is empty, cannot be read, or is not of the kind that its name says.
    """
    splitters = {
        ".json": _split_json,
        ".jsonl": _split_json_lines,
        ".csv": _split_table,
        ".tsv": _split_table,
        ".parquet": _split_parquet,
    }
    for file in files:
        with reading(file):
            if file.stat().st_size == 0:
                raise InputError(f"{file}: the file is empty")
    for file in files:
        with reading(file):
            yield from splitters[_kind(file)](file)


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
    """Tell whether text can be written as UTF-8. If not, half of a surrogate pair stands for an invalid byte."""
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
    files = [entry for entry in _entries(folder) if _is_data(entry)]
    if not files:
        raise InputError(f"{folder}: no data files in this folder; looked for {ALLOWED}")
    return files


def _single(file: Path) -> list[Path]:
    if not file.exists():
        raise InputError(f"{file}: no such file or folder")
    if not _is_data(file):
        raise InputError(f"{file}: unknown kind of data file; allowed are {ALLOWED}")
    return [file]


def _is_data(file: Path) -> bool:
    return file.name.lower().endswith(SUFFIXES)


def _kind(file: Path) -> str:
    """The suffix of a data file's name, before that of its compression."""
    return Path(file.stem if file.suffix.lower() in COMPRESSIONS else file.name).suffix.lower()


def _entries(folder: Path) -> list[Path]:
    """The entries that are not hidden, in name order. Systems put hidden files next to data: macOS, `._a.jsonl`."""
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


@contextmanager
def _opened(file: Path) -> Iterator[io.BufferedReader]:
    """Open a file for reading bytes, decompressed if need be."""
    with file.open("rb") as stream:
        if compression := COMPRESSIONS.get(file.suffix.lower()):
            yield io.BufferedReader(pyarrow.CompressedInputStream(stream, compression))
        else:
            yield stream


@contextmanager
def _opened_text(file: Path, newline: str | None = None) -> Iterator[TextIO]:
    """Open a file for reading text. Bytes that are not UTF-8 are kept, so that an error can name their row.

    Args:
        newline: as for `open`.

    Raises:
        InputError: it is not text.
    """
    with _opened(file) as binary:
        encoding = json.detect_encoding(binary.peek(4)[:4])
        try:
            yield io.TextIOWrapper(binary, encoding, errors="surrogateescape", newline=newline)
        except UnicodeError as error:
            raise InputError(f"{file}: not readable text ({error})") from None


def _split_json(file: Path) -> Iterator[Block]:
    with _opened(file) as binary:
        rows = _parsed(binary.read(), str(file), "; JSON Lines files are named .jsonl")
    if not isinstance(rows, list):
        raise InputError(f"{file}: holds {shown(rows)}, but a .json file has to be a list of rows")
    for start in range(0, len(rows), ROWS_OF_A_BLOCK):
        yield Block(file, start + 1, rows[start : start + ROWS_OF_A_BLOCK])


def _split_json_lines(file: Path) -> Iterator[Block]:
    first = 1
    with _opened_text(file) as stream:
        while text := stream.read(CHARACTERS_OF_A_BLOCK) + stream.readline():
            if first == 1 and text.lstrip().startswith("["):
                raise InputError(f"{file}: starts with [, like a JSON list; name such a file .json")
            yield Block(file, first, text.encode(errors="surrogateescape"))
            first += text.count("\n")


def _parsed(content: bytes, place: str, hint: str = "", encoding: str | None = None) -> object:
    """Parse JSON. Without an encoding, it is recognised by the first bytes.

    Raises:
        InputError: it cannot be parsed. The message begins with the place and ends, if it is not JSON, with the hint.
    """
    try:
        text = content.decode(encoding or json.detect_encoding(content), errors="surrogatepass")
        return json.loads(text, object_pairs_hook=_named_once, parse_int=_integer)
    except InputError as error:
        raise InputError(f"{place}: {error}") from None
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        byte = f"byte 0x{error.object[error.start]:02x}" + ("" if encoding else f" in line {line}")
        name = error.encoding.upper()
        raise InputError(f"{place}: {byte} is not {name}; save the file as UTF-8") from None
    except NOT_JSON as error:
        raise InputError(f"{place}: not JSON ({error}){hint}") from None


def _named_once(pairs: list[tuple[str, object]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = _repeated([name for name, _ in pairs])
        raise InputError(f"the name {twice!r} occurs more than once in {shown(row)}")
    return row


def _repeated(names: list[str]) -> str | None:
    """The first name that occurs more than once."""
    return next((name for name in names if names.count(name) > 1), None)


def _integer(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:  # Python refuses thousands of digits, which take quadratic time.
        count = len(digits.removeprefix("-"))
        raise InputError(f"a number has {count:,} digits, which is too many: {digits[:20]}...") from None


def _split_table(file: Path) -> Iterator[Block]:
    first = 1
    with _opened_text(file, newline="") as stream:
        rows = _table_rows(file, stream)
        while block := list(islice(rows, ROWS_OF_A_BLOCK)):
            yield Block(file, first, block)
            first += len(block)


def _table_rows(file: Path, stream: TextIO) -> Iterator[dict]:
    """The rows of a CSV or TSV file.

    Raises:
        InputError: the header does not name each column once, a row has more or fewer cells, or something is not CSV.
    """
    records = _records(file, stream)
    place, names = next(records, (f"{file}: the header", [""]))
    if not all(names):
        hint = "name it, or remove it (pandas: index=False)"
        raise InputError(f"{place}: column {names.index('') + 1} has no name; {hint}")
    if twice := _repeated(names):
        raise InputError(f"{place}: more than one column is called {twice!r}")
    for place, cells in records:
        if len(cells) != len(names):
            raise InputError(f"{place}: has {len(cells)} cells, but the header has {len(names)}")
        yield {name: _cell_value(name, cell) for name, cell in zip(names, cells, strict=True)}


def _cell_value(name: str, cell: str) -> str | int | None:
    return int(cell) if name == "task_type" and re.fullmatch("[0-9]{1,9}", cell) else cell or None


def _records(file: Path, stream: TextIO) -> Iterator[tuple[str, list[str]]]:
    """The records of a CSV or TSV file, the header first, each with its place for messages."""
    csv.field_size_limit(CHARACTERS_OF_A_CELL)  # a setting of the process, which libraries change
    reader = csv.reader(stream, delimiter="\t" if _kind(file) == ".tsv" else ",", strict=True)
    number = 0
    cells: list[str] | None = []
    while cells is not None:
        place = f"{file}: row {number} (line {reader.line_num + 1})" if number else f"{file}: the header"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            hint = "perhaps a quote is missing or not doubled, or use JSON Lines"
            raise InputError(f"{place}: {error}; {hint}") from None
        if cells:
            if broken := next((cell for cell in cells if not is_unicode(cell)), None):
                raise InputError(f"{place}: {shown(broken)} is not UTF-8; save the file as UTF-8")
            yield place, cells
            number += 1


def _split_parquet(file: Path) -> Iterator[Block]:
    first = 1
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            if twice := _repeated(table.schema_arrow.names):
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
