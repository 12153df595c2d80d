"""Rows, prompts, encoded data sets and batches."""

import errno
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import ROOT, example_rows, full_disk

from data import (
    Collator,
    Encoding,
    InputError,
    count_shared_rows,
    encode_prompt,
    encode_target,
    load_data,
    resolve_template,
    row_lengths,
)
from data.files import split_files
from data.rows import row_problem
from data.workers import map_blocks

ENCODING = Encoding(template="plain", max_seq_length=256, num_task_types=2)
GOOD = {"instruction": "Say", "input": "", "output": "yes", "task_type": 1}


def load(path, tokenizer, tmp_path, encoding=ENCODING, **options):
    return load_data(path, tokenizer, encoding, tmp_path / "cache", **options)


def without(name: str) -> dict:
    return {key: value for key, value in GOOD.items() if key != name}


BAD_ROWS = {
    "no output": (without("output"), r"row 2: has no 'output'; its fields are 'instruction', 'input', 'task_type'"),
    "empty output": (GOOD | {"output": ""}, r"row 2: 'output' is empty"),
    "blank output": (GOOD | {"output": " \n"}, r"row 2: 'output' is empty"),
    "half a surrogate": (GOOD | {"output": "a\ud83d"}, r"row 2: 'output' holds half of a surrogate pair"),
    "number for a string": (GOOD | {"instruction": 3}, r"row 2: 'instruction' is 3, but has to be a string"),
    "list for a string": (
        GOOD | {"output": ["a"]},
        r"row 2: output\[0\] is \"a\", but has to be an object with role",
    ),
    "no object": (["Say", "yes"], r"row 2: is \[\"Say\", \"yes\"\], but has to be an object"),
    "negative type": (
        GOOD | {"task_type": -1},
        r"row 2: 'task_type' is -1, but has to be 0 or 1 \(a whole number\), or be left out",
    ),
    "fractional type": (GOOD | {"task_type": 0.5}, r"row 2: 'task_type' is 0.5, but has to be 0 or 1"),
    "type too large": (GOOD | {"task_type": 2}, r"row 2: 'task_type' is 2, but has to be 0 or 1"),
    "type as text": (GOOD | {"task_type": "1"}, r"row 2: 'task_type' is \"1\", but has to be 0 or 1"),
    "type as truth": (GOOD | {"task_type": True}, r"row 2: 'task_type' is true, but has to be 0 or 1"),
    "type without value": (GOOD | {"task_type": float("nan")}, r"row 2: 'task_type' is NaN, but has to be 0 or 1"),
    "null output": (GOOD | {"output": None}, r"row 2: 'output' is null, but has to be a string"),
    "null instruction": (GOOD | {"instruction": None}, r"row 2: 'instruction' is null, but has to be a string"),
    "null row": (None, r"row 2: is null, but has to be an object"),
    "system prompt": (GOOD | {"System_Prompt": "Be brief."}, r"row 2: has a 'System_Prompt', which is not read"),
    "history": (GOOD | {"history": [["Hello", "Bonjour"]]}, r"row 2: has a 'history', which is not read: write a"),
    "capital": (without("output") | {"Output": "a"}, r"row 2: 'Output' is not a known column: rename it to 'output'"),
    **{
        f"{name} for {field}": (without(field) | {name: value}, rf"row 2: '{name}' is not a known .* to '{field}', or")
        for name, field, value in (
            ("taskType", "task_type", 0),
            ("task-type", "task_type", 0),
            ("tasktype", "task_type", 0),
            ("Task types", "task_type", 0),
            ("inputs", "input", "text"),
            ("context", "input", "text"),
            ("ouput", "output", "a"),
            ("Task", "task", "nli"),
            ("alias", "aliases", ["a"]),
        )
    },
    **{
        name: (GOOD | {name: [["Hello", "Bonjour"]]}, rf"row 2: has a '{name}', which is not read")
        for name in ("conversation_history", "chatHistory", "dialogue", "dialog", "turns", "chat", "system_message")
    },
    **{
        f"aliases as {value}": (GOOD | {"aliases": value}, rf"row 2: 'aliases' is {shown}, but has to be a list")
        for value, shown in ((0, "0"), ("", '""'), ({}, "{}"), (False, "false"))
    },
}


@pytest.mark.parametrize(("row", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_bad_rows_are_named_by_file_and_number(tmp_path, tokenizer, row, message, suffix):
    file = tmp_path / f"rows{suffix}"
    rows = [GOOD, row, GOOD]
    file.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match=rf"rows{suffix}: {message}"):
        load(file, tokenizer, tmp_path)
    assert not list((tmp_path / "cache").glob("*/statistics.json"))


def test_several_bad_rows_are_listed_together(tmp_path, tokenizer):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([GOOD, without("output"), GOOD, without("instruction")]))
    with pytest.raises(
        InputError,
        match=r"(?s)row 2: has no 'output'.*row 4: has no 'instruction' \(formats begin with 'inst",
    ):
        load(file, tokenizer, tmp_path)


# Prints what a user without rights is told of each pair of data and cache.
WITHOUT_RIGHTS = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
from conftest import tiny_tokenizer
from data import Encoding, InputError, load_data

for path, cache in (pair.split(",") for pair in sys.argv[1:]):
    try:
        print(len(load_data(path, tiny_tokenizer(), Encoding("plain", 256, 2), cache)[0]), "rows")
    except InputError as error:
        print(*str(error).splitlines())
"""


def test_what_may_not_be_read_or_written_is_one_message(tmp_path, tokenizer):
    command = [sys.executable, "-c", WITHOUT_RIGHTS]
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("root may read everything, and setpriv is not there to change that")
        drop = "-dac_override,-dac_read_search"
        command = ["setpriv", "--bounding-set", drop, "--inh-caps", drop, *command]
    lines = json.dumps(GOOD) + "\n"
    modes = {"closed.jsonl": 0o000, "folder": 0o000, "listed": 0o444, "cache": 0o000, "full": 0o555, "own": 0o755}
    for name in ("folder", "listed", "cache", "full", "own"):
        (tmp_path / name).mkdir()
    for name in ("closed.jsonl", "open.jsonl", "folder/rows.jsonl", "listed/rows.jsonl"):
        (tmp_path / name).write_text(lines)
    load_data(tmp_path / "open.jsonl", tokenizer, ENCODING, tmp_path / "own")
    (rows,) = (tmp_path / "own").glob("*/rows.arrow")
    rows.chmod(0o000)
    pairs = [("closed.jsonl", "own"), ("folder", "own"), ("folder/rows.jsonl", "own"), ("listed", "own")]
    pairs += [("open.jsonl", "cache"), ("open.jsonl", "full"), ("open.jsonl", "own")]
    arguments = [",".join(str(tmp_path / name) for name in pair) for pair in pairs]
    for name, mode in modes.items():
        (tmp_path / name).chmod(mode)
    try:
        told = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    finally:
        for name in modes:
            (tmp_path / name).chmod(0o755)
    *messages, rebuilt = filter(None, told.splitlines())
    assert [message.split(":")[0] for message in messages] == [
        *(f"{tmp_path / name} cannot be read" for name in ("closed.jsonl", "folder", "folder/rows.jsonl")),
        f"{tmp_path / 'listed/rows.jsonl'} cannot be read",
        *(f"encoded rows could not be written into {tmp_path / name}" for name in ("cache", "full")),
    ]
    assert all("Permission denied" in message for message in messages)
    assert rebuilt == "1 rows"


@pytest.mark.parametrize("nothing", [False, 3, [[]], [["", " "]], [{"content": ""}, None]], ids=str)
def test_conversations_that_say_nothing_and_columns_of_ids_are_ignored(nothing):
    row = {"instruction": "Say", "output": "a", "history": nothing}
    others = {"input_id": 7, "input1": "x", "input_ids": [1], "InputIDs": [1], "task_type_id": 1, "alias_id": 3}
    assert row_problem(row | others, num_task_types=2) is None


def test_columns_that_are_ignored_are_named(tmp_path, tokenizer, small_blocks):
    """Those that hold something, whatever row they are in; also when the rows come from the cache."""
    rows = example_rows(40)
    rows[3] |= {"id": 3, "system": "", "history": [], "messages": None, "Input": " "}
    rows[30] |= {"task_id": 0, "\x1b": "x", "context": "known from the input", "inputs": "same", "input": "a"}
    file = write_lines(tmp_path / "rows.jsonl", rows)
    for processes in (3, 1):
        _, counts = load(file, tokenizer, tmp_path, num_proc=processes)
        assert counts.ignored == ("\x1b", "context", "id", "inputs", "task_id")
        assert counts.summary(256).endswith(r"; columns that are ignored: '\x1b', 'context', 'id', 'inputs', 'task_id'")
    many = write_lines(tmp_path / "many.jsonl", [GOOD | {f"x{number}": 1 for number in range(6)}])
    assert load(many, tokenizer, tmp_path)[1].summary(256).endswith("ignored: 'x0', 'x1', 'x2', 'x3', 'x4', ...")


def test_json_lines_parquet_and_folders_hold_the_same_rows(tmp_path, tokenizer):
    rows = example_rows()
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows[:5])) + "\n\n")
    datasets.Dataset.from_list(rows[5:]).to_parquet(folder / "b.parquet")
    one, counts = load(tmp_path / "rows.json", tokenizer, tmp_path)
    both, counts_of_folder = load(folder, tokenizer, tmp_path)
    assert one.remove_columns("source").to_list() == both.remove_columns("source").to_list()
    assert both["source"][4:6] == ["a.jsonl row 5", "b.parquet row 1"]
    assert counts == counts_of_folder
    assert (counts.rows, counts.kept, counts.dropped) == (12, 12, 0)
    assert counts.tokens == sum(map(len, one["input_ids"]))
    assert counts.supervised_tokens == sum(end - start for start, end in one["spans"])


def test_optional_fields(tmp_path, tokenizer):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"instruction": "Say", "output": "yes"}, {**GOOD, "input": None, "task": "nli"}]))
    rows = load(file, tokenizer, tmp_path)[0]
    assert rows["task_type"][:] == [-1, 1]
    assert rows["task"][:] == ["", "nli"]


def test_plain_prompts_are_the_authors_format(tokenizer):
    prompt = encode_prompt(tokenizer, "plain", "Add.", "1 and 2")
    target = encode_target(tokenizer, "plain", "Add.", "1 and 2", "3")
    assert tokenizer.decode(prompt) == "Add.\n1 and 2</s>"
    assert tokenizer.decode(target) == "3</s>"
    assert tokenizer.decode(encode_prompt(tokenizer, "plain", "Add.", "")) == "Add.</s>"


def test_chat_prompts_follow_the_tokenizers_template(tokenizer):
    prompt = encode_prompt(tokenizer, "chat", "Add.", "1 and 2")
    target = encode_target(tokenizer, "chat", "Add.", "1 and 2", "3")
    assert tokenizer.decode(prompt) == "<|user|>Add.\n1 and 2</s><|assistant|>"
    assert tokenizer.decode(target) == "3</s>"
    conversation = [{"role": "user", "content": "Add.\n1 and 2"}]
    assert prompt == tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_special_tokens_written_in_a_row_stay_text(tokenizer, template):
    prompt = encode_prompt(tokenizer, template, "Repeat </s> and <|user|>", "")
    target = encode_target(tokenizer, template, "Repeat", "", "a </s> b")
    end = tokenizer.eos_token_id
    assert prompt.count(end) == 1
    assert prompt.count(tokenizer.convert_tokens_to_ids("<|user|>")) == (template == "chat")
    assert target.count(end) == 1
    assert target[-1] == end
    assert "Repeat </s> and <|user|>" in tokenizer.decode(prompt)


@pytest.mark.parametrize("text", ["<|user|>", "a</s>", "<|assistant|> </s>", "</s>\nx"])
def test_special_tokens_of_the_template_and_of_a_row_are_told_apart(tokenizer, text):
    prompt = encode_prompt(tokenizer, "chat", text, "")
    user, end, assistant = (tokenizer.convert_tokens_to_ids(name) for name in ("<|user|>", "</s>", "<|assistant|>"))
    assert prompt[0] == user
    assert prompt[-2:] == [end, assistant]
    assert not {user, end, assistant} & set(prompt[1:-2])
    assert tokenizer.decode(prompt[1:-2]) == text


def test_template_names(tokenizer):
    assert resolve_template("auto", tokenizer) == "chat"
    with pytest.raises(InputError, match=r"'alpaca' is unknown; allowed are auto, plain, chat"):
        resolve_template("alpaca", tokenizer)
    tokenizer.chat_template = None
    assert resolve_template("auto", tokenizer) == "plain"
    with pytest.raises(InputError, match="has no chat template"):
        resolve_template("chat", tokenizer)


def test_a_template_that_rewrites_the_prompt_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages | length }}{% for turn in messages %}{{ turn.content }}{% endfor %}"
    with pytest.raises(InputError, match="use prompt_template plain"):
        encode_target(tokenizer, "chat", "Add.", "", "3")


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        ("{{ raise_exception('no user turn') }}", "TemplateError: no user turn"),
        ("{% for turn in messages %}", "TemplateSyntaxError: Unexpected end of template"),
        ("{{ messages[7].content }}", "UndefinedError: list object has no element 7"),
        ("{{ messages[0].content + 1 }}", "TypeError: can only concatenate str"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "RecursionError: maximum recursion depth"),
        ({"tool_use": "{{ messages[0].content }}"}, "ValueError: .*no default"),
    ],
)
def test_a_chat_template_that_fails_is_named(tokenizer, chat_template, message):
    tokenizer.chat_template = chat_template
    with pytest.raises(
        InputError, match=rf"chat template fails \({message}.*; change it or the row, or use prompt_template plain"
    ):
        encode_prompt(tokenizer, "chat", "the cat", "")


def test_truncation_cuts_the_end_and_is_counted(tmp_path, tokenizer):
    rows = [
        {"instruction": "ab", "input": "", "output": "c"},
        {"instruction": "ab", "input": "", "output": "c" * 20},
        {"instruction": "a" * 20, "input": "", "output": "c"},
    ]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    encoding = Encoding("plain", 8, 2)
    encoded, counts = load(file, tokenizer, tmp_path, encoding)
    assert (counts.rows, counts.kept, counts.truncated, counts.dropped) == (3, 2, 1, 1)
    assert [len(ids) for ids in encoded["input_ids"]] == [5, 8]
    assert tokenizer.decode(encoded[1]["input_ids"]) == "ab</s>ccccc"
    assert counts.summary(8) == (
        "2 rows, 13 tokens, 7 of them supervised; 1 rows cut at 8 tokens; "
        "1 rows dropped, since their prompt alone fills 8 tokens"
    )
    with pytest.raises(InputError, match="no row has supervised tokens within max_seq_length 3; raise max_seq_length"):
        load(file, tokenizer, tmp_path, Encoding("plain", 3, 2))


def test_the_cache_is_keyed_by_content(tmp_path, tokenizer, data_file):
    def entries():
        return {entry.name for entry in (tmp_path / "cache").iterdir() if entry.is_dir()}

    load(data_file, tokenizer, tmp_path)
    first = entries()
    data_file.touch()
    load(data_file, tokenizer, tmp_path)
    assert entries() == first
    load(data_file, tokenizer, tmp_path, Encoding("chat", 256, 2))
    load(data_file, tokenizer, tmp_path, Encoding("plain", 255, 2))
    assert len(entries()) == 3
    rows = example_rows()
    rows[3]["output"] = "edited"
    data_file.write_text(json.dumps(rows))
    assert load(data_file, tokenizer, tmp_path)[0]["output"][3] == "edited"
    tokenizer.add_tokens(["number"])
    load(data_file, tokenizer, tmp_path)
    assert len(entries()) == 5


def test_another_chat_template_means_other_tokens(tmp_path, tokenizer, data_file):
    encoding = Encoding("chat", 256, 2)
    before = load(data_file, tokenizer, tmp_path, encoding)[0]
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ turn.content }}", "({{ turn.content }})")
    after = load(data_file, tokenizer, tmp_path, encoding)[0]
    assert tokenizer.decode(before[0]["input_ids"]).startswith("<|user|>Say")
    assert tokenizer.decode(after[0]["input_ids"]).startswith("<|user|>(Say")


def test_another_end_token_means_other_tokens(tmp_path, tokenizer, data_file):
    """Both are in the vocabulary anyway; only the role changes."""
    load(data_file, tokenizer, tmp_path)
    vocabulary = tokenizer.backend_tokenizer.to_str()
    tokenizer.eos_token = "<s>"
    assert tokenizer.backend_tokenizer.to_str() == vocabulary
    ids = load(data_file, tokenizer, tmp_path)[0][0]["input_ids"]
    assert ids.count(tokenizer.convert_tokens_to_ids("<s>")) == 2
    assert tokenizer.convert_tokens_to_ids("</s>") not in ids


def test_an_interrupted_build_is_repeated(tmp_path, tokenizer, data_file, monkeypatch):
    import data.dataset

    def fail(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(data.dataset.Path, "write_text", fail)
    with pytest.raises(KeyboardInterrupt):
        load(data_file, tokenizer, tmp_path)
    monkeypatch.undo()
    assert not list((tmp_path / "cache").glob("*/statistics.json"))
    assert len(load(data_file, tokenizer, tmp_path)[0]) == 12
    assert not list((tmp_path / "cache").glob(".*"))


def test_what_a_killed_build_was_writing_is_removed_by_the_next_one(tmp_path, tokenizer, data_file):
    load(data_file, tokenizer, tmp_path)
    (entry,) = (folder for folder in (tmp_path / "cache").iterdir() if folder.is_dir())
    for name in (entry.name, "another"):
        (tmp_path / "cache" / f".{name}.1234abcd.tmp").mkdir()
    shutil.rmtree(entry)
    load(data_file, tokenizer, tmp_path)
    assert [path.name for path in (tmp_path / "cache").glob(".*")] == [".another.1234abcd.tmp"]


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_a_file_is_opened_to_be_hashed_checked_and_encoded_and_once_if_it_is_cached(
    tmp_path, tokenizer, monkeypatch, kind
):
    file, opened = tmp_path / f"rows.{kind}", []
    rows = example_rows()
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(file)
    else:
        file.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))

    def counted(function):
        return lambda name, *others, **named: (opened.append(name), function(name, *others, **named))[1]

    monkeypatch.setattr(io, "open", counted(io.open))
    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", counted(pyarrow.parquet.ParquetFile))
    for times in (3, 1):
        opened.clear()
        load(file, tokenizer, tmp_path)
        assert opened.count(file) == times


DAMAGE = {
    "rows cut": lambda entry: os.truncate(entry / "rows.arrow", 100),
    "last byte cut": lambda entry: os.truncate(entry / "rows.arrow", (entry / "rows.arrow").stat().st_size - 1),
    "rows emptied": lambda entry: os.truncate(entry / "rows.arrow", 0),
    "rows zeroed": lambda entry: (entry / "rows.arrow").write_bytes(bytes((entry / "rows.arrow").stat().st_size)),
    "rows lost": lambda entry: (entry / "rows.arrow").unlink(),
    "counts lost": lambda entry: (entry / "statistics.json").unlink(),
    "all lost": lambda entry: [file.unlink() for file in entry.iterdir()],
    **{
        f"counts {text!r}": lambda entry, text=text: (entry / "statistics.json").write_text(text)
        for text in ("", "{", "{}", "[]", "null", "\0" * 200, '{"bytes": 1}')
    },
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_made_again(tmp_path, tokenizer, data_file, damage):
    rows, counts = load(data_file, tokenizer, tmp_path)
    expected = rows.to_list()
    (entry,) = (folder for folder in (tmp_path / "cache").iterdir() if folder.is_dir())
    damage(entry)
    rows, again = load(data_file, tokenizer, tmp_path)
    assert rows.to_list() == expected
    assert again == counts
    assert {file.name for file in entry.iterdir()} == {"rows.arrow", "statistics.json"}
    assert {file.suffix for file in (tmp_path / "cache").iterdir()} == {"", ".lock"}


def test_processes_that_find_a_damaged_entry_make_it_once(tmp_path, tokenizer, data_file):
    """And one that has its rows open keeps them."""
    earlier, counts = load(data_file, tokenizer, tmp_path)
    expected = earlier.to_list()
    (statistics,) = (tmp_path / "cache").glob("*/statistics.json")
    statistics.unlink()
    load_again = partial(load, data_file, tokenizer, tmp_path)
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(4, mp_context=context) as pool:
        found = [future.result() for future in [pool.submit(_entry_seen, load_again) for _ in range(8)]]
    assert {counts_found for _, _, counts_found in found} == {counts}
    assert all(rows == expected for rows, _, _ in found)
    assert len({inode for _, inode, _ in found}) == 1
    assert earlier.to_list() == expected


def _entry_seen(load_again) -> tuple:
    rows, counts = load_again()
    return rows.to_list(), os.stat(rows.cache_files[0]["filename"]).st_ino, counts


@pytest.mark.parametrize("name", ["file", "file/below", "loop", "x" * 300])
def test_a_cache_that_cannot_be_a_folder_is_one_message(tmp_path, tokenizer, data_file, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(InputError, match=r"encoded rows could not be written into .*--data_cache_dir"):
        load_data(data_file, tokenizer, ENCODING, tmp_path / name)


def write_lines(file: Path, rows: list) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("size", [100, 4000], ids=["from the start", "in the middle"])
def test_a_full_disk_is_one_message_and_leaves_nothing(tmp_path, tokenizer, size):
    file = write_lines(tmp_path / "rows.jsonl", example_rows(50))
    message = rf"encoded rows could not be written into {tmp_path / 'cache'}: .*File too large.*--data_cache_dir"
    with pytest.raises(InputError, match=message), full_disk(size):
        load(file, tokenizer, tmp_path)
    assert [entry.suffix for entry in (tmp_path / "cache").iterdir()] == [".lock"]
    assert len(load(file, tokenizer, tmp_path)[0]) == 50


def test_a_cache_that_may_not_be_written_is_one_message(tmp_path, tokenizer, data_file, monkeypatch):
    def refuse(*arguments, **keywords):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError, match=r"encoded rows could not be written into .*: .*Permission denied"):
        load(data_file, tokenizer, tmp_path)


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_several_processes_encode_the_same(tmp_path, tokenizer, small_blocks, kind):
    rows = example_rows(50)
    file = tmp_path / f"rows.{kind}"
    if kind == "json":
        file.write_text(json.dumps(rows))
    elif kind == "jsonl":
        write_lines(file, rows)
    else:
        datasets.Dataset.from_list(rows).to_parquet(file)
    assert len(list(split_files([file]))) > 5
    one, counts = load(file, tokenizer, tmp_path / "one", num_proc=1)
    three, same_counts = load(file, tokenizer, tmp_path / "three", num_proc=3)
    assert one.to_list() == three.to_list()
    assert counts == same_counts
    assert [row["source"] for row in one] == [f"rows.{kind} row {number}" for number in range(1, 51)]


# Two processes at work, each of which says so.
WORKING = """
import os, time
from data.workers import map_blocks

def work(block):
    os.write(1, b"at work\\n")
    time.sleep(100)

list(map_blocks(work, range(2), 2))
"""


def test_processes_end_with_a_parent_that_is_killed():
    """They would wait for work for ever, and slow down what comes next."""
    command = [sys.executable, "-c", WORKING]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert [parent.stdout.readline() for _ in range(2)] == ["at work\n"] * 2
        parent.kill()
        parent.communicate(timeout=20)  # returns when the last process that could write there has ended


def test_a_process_that_is_killed_is_one_message():
    with pytest.raises(InputError, match="was killed, perhaps for lack of memory"):
        list(map_blocks(os._exit, range(3), 2))


def test_a_handler_of_sigterm_does_not_keep_processes_from_ending(tmp_path, tokenizer, small_blocks):
    def handler(number, frame):
        pass

    before = signal.signal(signal.SIGTERM, handler)
    try:
        file = write_lines(tmp_path / "rows.jsonl", example_rows(20))
        assert len(load(file, tokenizer, tmp_path, num_proc=3)[0]) == 20
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_bad_rows_far_behind_are_named(tmp_path, tokenizer, small_blocks):
    rows = [*example_rows(40), {"instruction": "Say"}, *example_rows(3), {"instruction": "Say", "output": 3}]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InputError) as caught:
        load(file, tokenizer, tmp_path, num_proc=2)
    assert [line.split(":")[1].strip() for line in str(caught.value).splitlines()] == ["row 41", "row 45"]


def test_a_row_that_the_template_cannot_hold_is_one_message(tmp_path, tokenizer, small_blocks):
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }}{{ turn.content }}{% endfor %}"
    rows, chat = [*example_rows(20), {"instruction": "Say </s>", "output": "it"}], Encoding("chat", 256, 2)
    for processes in (1, 2):
        with pytest.raises(InputError, match="use prompt_template plain"):
            load(write_lines(tmp_path / "rows.jsonl", rows), tokenizer, tmp_path, chat, num_proc=processes)


def test_a_row_that_is_nested_too_deeply_for_processes_is_one_message(tmp_path, tokenizer, small_blocks):
    nested = '{"instruction": "a", "output": "b", "other": ' + "[" * 500 + "]" * 500 + "}"
    file = tmp_path / "rows.json"
    file.write_text(f"[{', '.join([nested] * 8)}]")
    with pytest.raises(InputError, match=r"nested too deeply .* use --preprocessing_num_workers 1"):
        load(file, tokenizer, tmp_path, num_proc=2)
    assert len(load(file, tokenizer, tmp_path, num_proc=1)[0]) == 8


def test_an_edited_row_means_another_entry(tmp_path, tokenizer, small_blocks):
    rows = example_rows(40)
    before = load(write_lines(tmp_path / "rows.jsonl", rows), tokenizer, tmp_path)[0].to_list()
    rows[33]["output"] = rows[33]["output"].replace("33", "34")
    after = load(write_lines(tmp_path / "rows.jsonl", rows), tokenizer, tmp_path)[0].to_list()
    assert [index for index in range(40) if before[index] != after[index]] == [33]


def test_lengths_are_those_of_the_rows(tmp_path, tokenizer, data_file):
    rows = load(data_file, tokenizer, tmp_path)[0]
    assert row_lengths(rows).tolist() == [len(row["input_ids"]) for row in rows]


def test_batches_are_padded_by_length():
    rows = [
        {"input_ids": [5, 1, 6, 1], "spans": [2, 4], "task_type": 1, "source": "a"},
        {"input_ids": [7, 1], "spans": [1, 2], "task_type": -1, "source": "b"},
    ]
    batch = Collator(pad_token_id=1)(rows)
    expected = {
        "input_ids": [[5, 1, 6, 1], [7, 1, 1, 1]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]],
        "labels": [[-100, -100, 6, 1], [-100, 1, -100, -100]],
        "task_types": [1, -1],
        "row_weights": [1, 1],
        "supervised_indices": [1, 2, 4],
    }
    assert batch.pop("sources") == ["a", "b"]
    assert batch.pop("lengths") == [4, 2]
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert all(tensor.dtype is torch.int64 for tensor in batch.values())


def test_shared_rows_are_counted(tmp_path, tokenizer):
    rows = example_rows(13)
    for name, part in (("train", rows[:8]), ("test", rows[5:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    train, test = (load(tmp_path / f"{name}.json", tokenizer, tmp_path)[0] for name in ("train", "test"))
    shared = sum(
        (row["instruction"], row["input"]) in {(r["instruction"], r["input"]) for r in rows[:8]} for row in rows[5:]
    )
    assert count_shared_rows(train, test) == shared > 0


def read_tiny(name: str) -> list[dict]:
    return json.loads(Path(ROOT / "data/tiny_data" / name).read_text())


def test_the_tiny_data_set():
    train, test = read_tiny("train/train.json"), read_tiny("test.json")
    kinds = {
        "closed_book_qa",
        "coreference",
        "natural_language_inference",
        "reading_comprehension",
        "summarization",
        "text_classification",
        "translation",
    }
    for rows in (train, test):
        assert {row["task"] for row in rows} == kinds
        assert all((row["task_type"] == 1) == (row["task"] == "closed_book_qa") for row in rows)
        assert 0.3 < sum(row["task_type"] for row in rows) / len(rows) < 0.4
    assert (len(train), len(test)) == (160, 40)
    assert not {(row["instruction"], row["input"]) for row in train} & {
        (row["instruction"], row["input"]) for row in test
    }
