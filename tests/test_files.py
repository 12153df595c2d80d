"""Data files of every kind: how they are found, read and refused."""

import csv
import gzip
import io
import json
import os
import shutil
import socket
import tracemalloc
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import example_rows
from test_data import ENCODING, GOOD, load

from data import InputError
from data.answers import unwritable_field
from data.files import TEXT_KINDS, find_files, read_block, skipped_files, split_files
from data.workers import BYTES_WORTH_A_WORKER, worker_count

COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda content: pyarrow.compress(content, codec="zstd", asbytes=True),
}
DELIMITERS = {".csv": ",", ".tsv": "\t"}


def write(file: Path, rows: list[dict]) -> Path:
    """Rows as the file's name says."""
    kind, compression = (file.suffix, "") if file.suffix in TEXT_KINDS else (Path(file.stem).suffix, file.suffix)
    text = io.StringIO()
    if kind in DELIMITERS:
        table = csv.DictWriter(text, rows[0].keys(), delimiter=DELIMITERS[kind])
        table.writeheader()
        table.writerows(rows)
    else:
        text.write(json.dumps(rows) if kind == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    file.write_bytes(COMPRESS[compression](text.getvalue().encode()))
    return file


def read(file: Path) -> list[tuple[int, dict]]:
    return [row for block in split_files(find_files(file)) for row in read_block(block)]


BAD_FILES = {
    "missing": ("rows.json", None, "no such file or folder"),
    "empty": ("rows.json", "", "the file is empty"),
    "not JSON": ("rows.json", "{instruction", "not JSON"),
    "JSON Lines by another name": ("rows.json", '{"a": 1}\n{"a": 2}', "JSON Lines files are named .jsonl"),
    "one object": ("rows.json", '{"a": 1}', "has to be a list of rows"),
    "no rows": ("rows.json", "[]", "there are no rows"),
    "a torn line": ("rows.jsonl", json.dumps(GOOD) + '\n{"instr', "row 2: not JSON"),
    "another kind": ("rows.xlsx", "a,b", "unknown kind of data file; allowed are .parquet, .json, .jsonl"),
    "nested without end": ("rows.json", "[" * 100000, "not JSON"),
    "not Parquet": ("rows.parquet", "nothing", "not a readable Parquet file"),
    "a list by another name": ("rows.jsonl", json.dumps([GOOD], indent=2), "like a JSON list; name such a file .json"),
    "digits": ("rows.json", f'[{{"id": {"7" * 5000}}}]', "a number has 5,000 digits, which is too many: 77777777"),
    "digits in a line": (
        "rows.jsonl",
        f'{json.dumps(GOOD)}\n{{"id": -{"7" * 5000}}}',
        "row 2: a number has 5,000 digits",
    ),
    "name twice": ("rows.json", '[{"output": "a", "output": "b"}]', "the name 'output' occurs more than once in"),
    "name twice in a line": ("rows.jsonl", '{"output": "a", "output": "b"}', "row 1: the name 'output' occurs more"),
    "half a character": ("rows.jsonl", b"\xff\xfe" + json.dumps(GOOD).encode("utf-16-le")[:-1], "not readable text"),
    "Latin-1": ("rows.jsonl", b'\n\n{"output": "caf\xe9"}', "row 3: byte 0xe9 is not UTF-8; save"),
    "Latin-1 list": (
        "rows.json",
        b'[\n{"output": "caf\xe9"}]',
        "byte 0xe9 in line 2 is not UTF-8; save the file as UTF-8",
    ),
    "zeros behind": ("rows.jsonl", json.dumps(GOOD).encode() + b"\n" + bytes(64), r"row 2: not JSON \(Expecting value"),
    "zeros": ("rows.jsonl", bytes(100), "row 1: not JSON"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_named(tmp_path, tokenizer, name, content, message):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        load(file, tokenizer, tmp_path)
    assert str(file) in str(caught.value)


def test_a_folder_without_data_is_named(tmp_path, tokenizer):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="no data files in this folder"):
        load(tmp_path, tokenizer, tmp_path)


def test_a_folder_is_read_whatever_the_case_of_its_names_and_what_is_skipped_is_said(tmp_path, tokenizer):
    folder = tmp_path / "folder"
    (folder / "more").mkdir(parents=True)
    (folder / "more" / "d.jsonl").write_text(json.dumps(GOOD))
    (folder / "B.JSONL").write_text(json.dumps(GOOD))
    (folder / "a.jsonl").write_text(json.dumps(GOOD))
    (folder / "c.jsonl.bz2").write_bytes(b"x")
    (folder / "._a.jsonl").write_bytes(b"\0\5\x16\7")
    rows, counts = load(folder, tokenizer, tmp_path)
    assert rows["source"][:] == ["B.JSONL row 1", "a.jsonl row 1"]
    assert counts.summary(256).endswith("; skipped (not data files): c.jsonl.bz2, more/")
    (folder / "e.txt").write_text("since then")
    assert load(folder, tokenizer, tmp_path)[1].skipped == ("c.jsonl.bz2", "e.txt", "more/")
    assert not load(folder / "B.JSONL", tokenizer, tmp_path)[1].skipped


def test_what_has_the_name_of_a_data_file_and_is_none_is_named(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD))
    (tmp_path / "x.json").mkdir()
    (tmp_path / "y.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"x\.json, .*y\.json: not a regular file, but a folder, .* or a broken link"):
        load(tmp_path, tokenizer, tmp_path)


def test_pipes_devices_and_sockets_are_named_without_waiting_for_them(tmp_path, tokenizer):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "device.json").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"/proc/self/fd/{os.open(tmp_path, os.O_PATH)}/socket.jsonl")  # whose paths have to be short
    for name in ("pipe.jsonl", "device.json", "socket.jsonl"):
        with pytest.raises(InputError, match=rf"{name}: not a regular file, but a folder, a pipe, a device or"):
            load(tmp_path / name, tokenizer, tmp_path)
    with pytest.raises(InputError, match=r"device\.json, .*pipe\.jsonl, .*socket\.jsonl: not a regular file"):
        load(tmp_path, tokenizer, tmp_path)


def test_names_that_are_not_text_can_be_shown(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD))
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("x")
    load(tmp_path, tokenizer, tmp_path / "elsewhere")[1].summary(256).encode()
    (tmp_path / os.fsdecode(b"caf\xe9.jsonl")).write_text(json.dumps(GOOD))
    with pytest.raises(InputError, match=r"caf\\udce9.jsonl': the path is not valid UTF-8; rename the file or"):
        load(tmp_path, tokenizer, tmp_path)
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    shutil.copy(tmp_path / "a.jsonl", folder)
    for path in (folder, folder / "a.jsonl"):
        with pytest.raises(InputError, match=r"caf\\udce9/a.jsonl': the path is not valid UTF-8"):
            load(path, tokenizer, tmp_path)


ENCODINGS = ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be")


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_every_encoding_of_unicode_and_every_line_end_is_read(tmp_path, tokenizer, small_blocks, suffix):
    rows = [*example_rows(20), GOOD | {"output": "\u0a0a caf\xe9 \u2028\x85 \U0001f600"}]
    for end in ("\n", "\r\n", "\r"):
        for encoding in ("utf-8", *ENCODINGS):
            texts = [json.dumps(row, ensure_ascii=False) for row in rows]
            text = end.join(texts) if suffix == ".jsonl" else f"[{f',{end}'.join(texts)}]"
            file = tmp_path / f"{encoding}{suffix}"
            file.write_bytes(text.encode(encoding))
            found = [row for block in split_files([file]) for row in read_block(block)]
            assert found == list(enumerate(rows, start=1)), (end, encoding)


NO_TEXT = pyarrow.array([b"caf\xe9", b"a"]).view(pyarrow.string())


FAR = pyarrow.array([2**40, 0], pyarrow.timestamp("s"))


TEXT = pyarrow.array(["a", "b"])


BAD_COLUMNS = {
    "no text": ("output", NO_TEXT, r"row 1: 'output' cannot be read: 'utf-8' codec can't decode byte 0xe9"),
    "no text in a list": (
        "aliases",
        pyarrow.ListArray.from_arrays([0, 1, 2], NO_TEXT),
        "row 1: 'aliases' cannot be read: 'utf-8'",
    ),
    "bytes": ("output", TEXT.cast(pyarrow.binary()), r"row 1: 'output' is \"b'a'\", but has to be a string"),
    "a far time": ("task", FAR, "row 1: 'task' cannot be read: "),
    "a time": ("task", FAR[1:].take([0, 0]), r"row 1: 'task' is \"1970-01-01 00:00:00\", but has to be a string"),
    "a fraction": ("task_type", pyarrow.array([1.0, None]), r"row 1: 'task_type' is 1.0, but has to be 0 or 1"),
    "a large number": (
        "task_type",
        pyarrow.array([2**64 - 1, 0], pyarrow.uint64()),
        "row 1: 'task_type' is 18446744073709551615, but",
    ),
}


GOOD_COLUMNS = {
    "no text": ("note", NO_TEXT),
    "no text inside": ("note", pyarrow.StructArray.from_arrays([NO_TEXT], ["inner"])),
    "a far date": ("note", pyarrow.array([2**30, 0], pyarrow.date32())),
    "a far time": ("note", FAR),
    "a time of an unknown zone": ("note", FAR.cast(pyarrow.timestamp("s", "Mars/Base"))),
    "decimals": ("note", pyarrow.array([Decimal("1.5"), None])),
    "a map": ("note", pyarrow.array([[("a", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int64()))),
    "categories": ("task", TEXT.dictionary_encode()),
    "large strings": ("task", TEXT.cast(pyarrow.large_string())),
    "small numbers": ("task_type", pyarrow.array([0, None], pyarrow.int8())),
}


def write_columns(file: Path, name: str, values: pyarrow.Array) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"instruction": TEXT, "output": TEXT} | {name: values}), file)
    return file


@pytest.mark.parametrize(("name", "values", "message"), BAD_COLUMNS.values(), ids=BAD_COLUMNS)
def test_bad_values_of_parquet_are_named_by_row_and_column(tmp_path, tokenizer, name, values, message):
    file = write_columns(tmp_path / "rows.parquet", name, values)
    with pytest.raises(InputError, match=f"rows.parquet: {message}"):
        load(file, tokenizer, tmp_path)


@pytest.mark.parametrize(("name", "values"), GOOD_COLUMNS.values(), ids=GOOD_COLUMNS)
def test_values_of_parquet_that_are_not_used_may_be_anything(tmp_path, tokenizer, name, values):
    file = write_columns(tmp_path / "rows.parquet", name, values)
    rows, counts = load(file, tokenizer, tmp_path)
    assert rows["output"][:] == ["a", "b"]
    assert counts.ignored == (("note",) if name == "note" else ())


def test_a_value_that_cannot_be_read_is_not_written_into_answers(tmp_path):
    (block,) = split_files([write_columns(tmp_path / "rows.parquet", "note", NO_TEXT)])
    (_, first), (_, second) = read_block(block)
    assert unwritable_field(first).startswith("'note' cannot be read: 'utf-8' codec")
    assert unwritable_field(second) is None


def test_columns_of_one_name_are_refused(tmp_path, tokenizer):
    table = pyarrow.Table.from_arrays([TEXT, TEXT, TEXT], names=["instruction", "output", "output"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(InputError, match=r"rows.parquet: more than one column is called 'output'"):
        load(tmp_path / "rows.parquet", tokenizer, tmp_path)


def test_blocks_of_a_file_are_all_of_its_rows(tmp_path, small_blocks):
    rows = example_rows(30)
    file = tmp_path / "rows.jsonl"
    file.write_text("\n\n".join(json.dumps(row) for row in rows))  # empty lines between, no line end at the end
    blocks = list(split_files([file]))
    assert len(blocks) > 5
    assert [row for block in blocks for _, row in read_block(block)] == rows
    assert [number for block in blocks for number, _ in read_block(block)] == list(range(1, 60, 2))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=9)
    blocks = list(split_files([tmp_path / "rows.parquet"]))
    assert blocks[0].first == 1
    assert blocks[1].first == 8
    assert [row for block in blocks for _, row in read_block(block)] == rows
    assert [number for block in blocks for number, _ in read_block(block)] == list(range(1, 31))


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_every_kind_is_read_in_blocks_and_by_several_processes(tmp_path, tokenizer, small_blocks, kind, compression):
    odd = GOOD | {"instruction": 'A "cell",\nof\ttwo\r\nlines', "output": "caf\xe9 \U0001f600", "task": "nli"}
    rows = [*example_rows(50), odd]
    file = write(tmp_path / f"rows{kind}{compression}", rows)
    assert len(list(split_files([file]))) > 5
    assert [(number, row | {"input": row["input"] or ""}) for number, row in read(file)] == list(enumerate(rows, 1))
    expected, counts = load(write(tmp_path / "plain.json", rows), tokenizer, tmp_path, num_proc=1)
    found, same_counts = load(file, tokenizer, tmp_path, num_proc=3)
    assert found.remove_columns("source").to_list() == expected.remove_columns("source").to_list()
    assert found["source"][:] == [f"{file.name} row {number}" for number in range(1, 52)]
    assert counts == same_counts


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.csv", "rows.tsv.zst", "rows.json.gz"])
def test_a_pass_opens_a_file_once(tmp_path, monkeypatch, name):
    file, opened, open_file = write(tmp_path / name, example_rows()), [], io.open
    monkeypatch.setattr(io, "open", lambda path, *others, **named: (opened.append(path), open_file(path, *others))[1])
    assert len(read(file)) == 12
    assert opened == [file]


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.csv.zst"])
def test_memory_does_not_grow_with_a_compressed_file(tmp_path, name):
    file = write(tmp_path / name, [GOOD | {"input": "a long text " * 20}] * 40_000)  # 10 MB
    tracemalloc.start()
    for block in split_files([file]):
        assert all(row["output"] == "yes" for _, row in read_block(block))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e6


def test_files_are_found_by_their_complete_suffix(tmp_path):
    data = ["a.JSONL.GZ", "b.v2.csv", "c.json.zst", "d.tsv"]
    others = ["e.parquet.gz", "f.txt.gz", "g.gz", "h.zst", "i.jsonl.bz2", "jsonl.gz"]
    for name in [*data, *others]:
        (tmp_path / name).write_bytes(b"x")
    assert [file.name for file in find_files(tmp_path)] == data
    assert list(skipped_files(tmp_path)) == others
    allowed = r"\.parquet, \.json, \.jsonl, \.csv, \.tsv, the last four also with \.gz or \.zst"
    for name in others:
        with pytest.raises(InputError, match=rf"{name}: unknown kind of data file; allowed are {allowed}$"):
            find_files(tmp_path / name)


def test_a_compressed_file_takes_more_processes(tmp_path):
    for name in ("a.jsonl", "a.jsonl.gz", "a.csv.ZST"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(BYTES_WORTH_A_WORKER)
    assert [worker_count([tmp_path / name], 8) for name in ("a.jsonl", "a.jsonl.gz", "a.csv.ZST")] == [2, 5, 5]


@pytest.mark.parametrize("encoding", ["utf-8", *ENCODINGS])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("kind", DELIMITERS)
def test_cells(tmp_path, kind, end, encoding):
    lines = [
        "instruction;input;output;task_type",
        "",
        '"two\nlines; ""quoted""";;5" of caf\xe9; 1',
        ' a ;"";\U0001f600;01',
        ";;;",
    ]
    file = tmp_path / f"rows{kind}"
    file.write_bytes(end.join(lines).replace(";", DELIMITERS[kind]).encode(encoding))
    names = ("instruction", "input", "output", "task_type")
    rows = [
        (f'two\nlines{DELIMITERS[kind]} "quoted"', None, '5" of caf\xe9', " 1"),
        (" a ", None, "\U0001f600", 1),
        (None, None, None, None),
    ]
    assert read(file) == [(number, dict(zip(names, row, strict=True))) for number, row in enumerate(rows, start=1)]


BAD_TABLES = {
    "too few cells": ("a,b\n1,2\n\n3\n", r"row 2 \(line 4\): has 1 cells, but the header has 2"),
    "too many cells": ('a,b\n"1\n",2\n3,4,5\n', r"row 2 \(line 4\): has 3 cells, but the header has 2"),
    "a quote without end": ('a,b\n"1\n,2\n3,4\n', r"row 1 \(line 2\): unexpected end of data; perhaps a quote is miss"),
    "text after a quote": ('a,b\n"1"2,3\n', r"row 1 \(line 2\): ',' expected after '\"'; perhaps a quote is missing"),
    "a long cell": (f"a,b\n1,2\n3,{'4' * 2**21}\n", r"row 2 \(line 3\): field larger than .*or use JSON Lines"),
    "no name": (",a\n0,1\n", "the header: column 1 has no name; name it, or remove it"),
    "no names": ("\n", "the header: column 1 has no name"),
    "a name twice": ("a,b,a\n1,2,3\n", "the header: more than one column is called 'a'"),
    "a header without end": ('"a,b\n1,2\n', "the header: unexpected end of data"),
    "Latin-1": (b"a,b\n1,2\n3,caf\xe9\n", r"row 2 \(line 3\): \"caf\\udce9\" is not UTF-8; save the file as UTF-8"),
    "a name in Latin-1": (b"caf\xe9,b\n1,2\n", r"the header: \"caf\\udce9\" is not UTF-8"),
    "half a character": (b"\xff\xfe" + "a,b\n1,2\n".encode("utf-16-le")[:-1], "not readable text"),
    "no header": ("Say,yes\nGo,no\n", "row 1: has no 'instruction' .*; its fields are 'Say', 'yes'"),
    "no rows": ("instruction,output\n", "there are no rows"),
    "an empty cell": ("instruction,output\nSay,\n", "row 1: 'output' is null"),
    "a fraction": ("instruction,output,task_type\na,b,1.0\n", "row 1: 'task_type' is \"1.0\", but has to be 0 or 1"),
    "a large number": ("instruction,output,task_type\na,b,2\n", "row 1: 'task_type' is 2, but has to be 0 or 1"),
    "a huge number": (f"instruction,output,task_type\na,b,{'9' * 5000}\n", "row 1: 'task_type' is \"999.*0 or 1"),
}


@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz"])
@pytest.mark.parametrize(("content", "message"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_bad_tables_are_named_by_file_and_row(tmp_path, tokenizer, content, message, name):
    csv.field_size_limit(2**30)
    file = tmp_path / name
    content = content if isinstance(content, bytes) else content.encode()
    file.write_bytes(COMPRESS[file.suffix if file.suffix in COMPRESS else ""](content))
    with pytest.raises(InputError, match=rf"^{file}: {message}"):
        load(file, tokenizer, tmp_path)


def test_a_task_type_in_a_table_may_be_a_name(tmp_path, tokenizer):
    (tmp_path / "rows.tsv").write_text("instruction\toutput\ttask_type\na\tb\tknowledge\nc\td\t0\ne\tf\t\n")
    encoding = replace(ENCODING, task_type_names=("other", "knowledge"))
    assert load(tmp_path / "rows.tsv", tokenizer, tmp_path, encoding)[0]["task_type"][:] == [1, 0, -1]


DAMAGE = {
    "cut": lambda content: content[: len(content) // 2],
    "last byte cut": lambda content: content[:-1],
    "first bytes": lambda content: content[:3],
    "not compressed": lambda content: b'{"instruction": "a", "output": "b"}\n' * 100,
    "a byte changed": lambda content: content[:40] + bytes([content[40] ^ 255]) + content[41:],
    "something behind": lambda content: content + b"something",
}


@pytest.mark.parametrize("compression", [".gz", ".zst"])
@pytest.mark.parametrize("kind", [".json", ".jsonl", ".csv"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_compressed_file_is_one_message(tmp_path, tokenizer, small_blocks, kind, compression, damage):
    file = write(tmp_path / f"rows{kind}{compression}", example_rows(100))
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError, match=rf"^{file} cannot be read: (Truncated|zlib inflate|ZSTD decompress)"):
        load(file, tokenizer, tmp_path, num_proc=2)


def test_parts_that_were_compressed_one_by_one_are_read(tmp_path):
    for compression in (".gz", ".zst"):
        parts = [write(tmp_path / f"{part}.jsonl{compression}", example_rows(5)).read_bytes() for part in range(2)]
        (tmp_path / f"both.jsonl{compression}").write_bytes(b"".join(parts))
        assert [row for _, row in read(tmp_path / f"both.jsonl{compression}")] == example_rows(5) * 2


@pytest.mark.parametrize("kind", [".json", ".jsonl"])
@pytest.mark.parametrize("number", [2**63, 2**64, -(2**70), 10**400], ids=["63", "64", "-70", "1329"])
def test_integers_beyond_64_bits(tmp_path, tokenizer, small_blocks, kind, number):
    """They are ignored where all is, and a wrong value like any other elsewhere."""
    row = GOOD | {"id": number, "more": {"numbers": [number]}}
    file = write(tmp_path / f"rows{kind}", [row] * 30)
    for processes in (1, 2):
        rows, counts = load(file, tokenizer, tmp_path / str(processes), num_proc=processes)
        assert len(rows) == 30
        assert counts.ignored == ("id", "more")
    assert unwritable_field(row) is None
    for field, value in (("task_type", number), ("output", number), ("input", number), ("aliases", [number])):
        write(file, [GOOD, row | {field: value}])
        with pytest.raises(
            InputError, match=rf"rows{kind}: row 2: '{field}' is \[?{str(number)[:10]}.*, but has to be"
        ):
            load(file, tokenizer, tmp_path)
