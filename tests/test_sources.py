"""`mix.yaml`: its checks, which rows are taken and held out, data sets of the hub (a stand-in), a run with one."""

import json
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from conftest import ROOT, example_rows, tiny_tokenizer
from test_train import run  # noqa: F401

from data import Encoding, InputError, count_shared_rows, hub, load_data, load_part, sources
from data.mix import read_mix
from data.sources import choose_rows, weighted_counts
from inference import rows as inference_rows
from inference.trained import InferenceArguments, load_trained
from scripts import evaluate

ENCODING = Encoding("plain", 256, num_task_types=2)
QUESTIONS = [{"prompt": f"Which number is {number}?", "completion": str(number)} for number in range(20)]
OTHERS = [
    {"instruction": f"Repeat: {number} times", "output": "word " * number, "task": "echo"} for number in range(1, 11)
]


class Folder:
    """A folder with two files and a mix of them."""

    def __init__(self, path: Path):
        self.path, self.file = path, path / "mix.yaml"
        self.write("questions.jsonl", QUESTIONS)
        self.write("more/others.jsonl", OTHERS)

    def write(self, name: str, rows: list[dict]) -> None:
        (self.path / name).parent.mkdir(exist_ok=True)
        (self.path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def mix(self, *listed: dict | str, **settings) -> Path:
        """Write the mix; a source that is a string has this path and nothing else."""
        each = [{"path": source} if isinstance(source, str) else source for source in listed]
        self.file.write_text(yaml.safe_dump({"sources": each} | settings))
        return self.file

    def load(self, *listed: dict | str, part: str = "training", encoding: Encoding = ENCODING, **settings):
        file = self.mix(*listed, **settings) if listed else self.file
        return load_part(file, part, tiny_tokenizer(), encoding, self.path / "cache", num_proc=1)

    def refusal(self, *listed: dict | str, part: str = "training", **settings) -> str:
        with pytest.raises(InputError) as caught:
            self.load(*listed, part=part, **settings)
        return str(caught.value).replace(str(self.path), "HERE")


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path)


BOTH = ({"path": "questions.jsonl", "task_type": 1, "task": "qa"}, {"path": "more/others.jsonl", "task_type": 0})


def test_rows_have_what_their_source_says(folder):
    rows, statistics = folder.load(*BOTH)
    assert len(rows) == 30
    assert Counter(zip(rows["task_type"], rows["task"], strict=True)) == {(1, "qa"): 20, (0, "echo"): 10}
    assert rows["source"][19:21] == ["questions.jsonl row 20", "more/others.jsonl row 1"]
    alone = load_data(folder.path / "more" / "others.jsonl", tiny_tokenizer(), ENCODING, folder.path / "cache")
    assert rows["input_ids"][20:] == alone[0]["input_ids"][:]
    questions = sum(map(len, rows["input_ids"][:20]))
    assert statistics.tokens == questions + alone[1].tokens
    # The answer and the end of each question; of the others what they count themselves.
    assert statistics.supervised_tokens == sum(len(str(n)) + 1 for n in range(20)) + alone[1].supervised_tokens


def test_a_mix_of_one_complete_source_is_that_source(folder):
    rows, statistics = folder.load("more/others.jsonl", held_out=0)
    alone, counts = load_data(folder.path / "more" / "others.jsonl", tiny_tokenizer(), ENCODING, folder.path / "cache")
    assert rows.remove_columns("source")[:] == alone.remove_columns("source")[:]
    assert (statistics.rows, statistics.kept, statistics.tokens) == (counts.rows, counts.kept, counts.tokens)


def test_a_row_that_says_its_task_type_keeps_it(folder):
    folder.write("own.jsonl", [OTHERS[0] | {"task_type": 1}, OTHERS[1] | {"task_type": None}, OTHERS[2]])
    rows, _ = folder.load({"path": "own.jsonl", "task_type": 0, "task": "other"})
    assert rows["task_type"][:] == [1, 0, 0]
    assert rows["task"][:] == ["echo"] * 3
    assert folder.load("own.jsonl")[0]["task_type"][:] == [1, -1, -1]


def test_task_types_have_the_names_of_the_run(folder):
    encoding = Encoding("plain", 256, 2, ("other", "knowledge"))
    rows, statistics = folder.load({"path": "questions.jsonl", "task_type": "knowledge"}, encoding=encoding)
    assert set(rows["task_type"]) == {1}
    assert statistics.table[1].split()[:2] == ["questions.jsonl", "knowledge"]


def test_columns_are_renamed(folder):
    folder.write("mine.jsonl", [{"frage": "a", "antwort": "b"}])
    rows, _ = folder.load({"path": "mine.jsonl", "columns": {"instruction": "frage", "output": "antwort"}})
    folder.write("plain.jsonl", [{"instruction": "a", "output": "b"}])
    assert rows["input_ids"][0] == folder.load("plain.jsonl")[0]["input_ids"][0]


def test_a_renamed_task_type_is_checked(folder):
    source = {"path": "kinds.jsonl", "columns": {"task_type": "kind"}}
    folder.write("kinds.jsonl", [QUESTIONS[0] | {"kind": 1}, QUESTIONS[1] | {"kind": 0}])
    assert folder.load(source)[0]["task_type"][:] == [1, 0]
    folder.write("kinds.jsonl", [QUESTIONS[0] | {"kind": 2}])
    assert "HERE/kinds.jsonl: row 1: 'task_type' is 2, but has to be 0 or 1" in folder.refusal(source)


def test_a_renamed_task_type_of_csv_is_a_number(folder):
    (folder.path / "kinds.csv").write_text("prompt,completion,kind\na,b,1\nc,d,\ne,f,0\n")
    source = {"path": "kinds.csv", "columns": {"task_type": "kind"}}
    assert folder.load(source)[0]["task_type"][:] == [1, -1, 0]


def test_a_column_that_the_first_rows_lack_may_be_renamed(folder):
    folder.write("late.jsonl", [*QUESTIONS * 500, QUESTIONS[0] | {"kind": 1}])
    rows, _ = folder.load({"path": "late.jsonl", "columns": {"task_type": "kind"}})
    assert Counter(rows["task_type"]) == {-1: 500 * len(QUESTIONS), 1: 1}


def test_a_folder_is_a_source(folder):
    folder.write("more/again.jsonl", QUESTIONS)
    rows, _ = folder.load("more", "questions.jsonl")
    assert Counter(name.rsplit(" row")[0] for name in rows["source"]) == {
        "more/again.jsonl": 20, "more/others.jsonl": 10, "questions.jsonl": 20
    }  # fmt: skip


# ---- which rows ------------------------------------------------------------------------------------------------------


def test_rows_are_taken_from_the_front_of_a_permutation():
    order = np.random.default_rng(5).permutation(8)
    assert choose_rows(8, 8, 0, 5)["training"].tolist() == [*range(8)]
    assert choose_rows(8, 3, 0, 5)["training"].tolist() == sorted(order[:3])
    # The places at which a quarter of the rows so far, rounded, grows: 0.25, 0.5 (1), 0.75, 1, 1.25, 1.5 (2), ...
    chosen = choose_rows(8, 8, 0.25, 5)
    assert chosen["held out"].tolist() == sorted(order[[1, 5]])
    assert chosen["training"].tolist() == sorted(order[[0, 2, 3, 4, 6, 7]])


@pytest.mark.parametrize(("taken", "share", "held_out"), [(10, 0.3, 3), (10, 0.05, 1), (9, 0.05, 0), (7, 0.99, 7)])
def test_the_share_held_out_is_rounded(taken, share, held_out):
    chosen = choose_rows(20, taken, share, 0)
    assert [len(chosen[part]) for part in ("training", "held out")] == [taken - held_out, held_out]
    assert len({*chosen["training"], *chosen["held out"]}) == taken


def test_taking_more_rows_moves_none_to_the_other_part():
    chosen = [choose_rows(1000, taken, 0.13, 7) for taken in (100, 101, 400, 1000)]
    for fewer, more in pairwise(chosen):
        for part in ("training", "held out"):
            assert set(fewer[part]) <= set(more[part])


def test_another_seed_takes_others():
    assert choose_rows(100, 10, 0.5, 0)["training"].tolist() != choose_rows(100, 10, 0.5, 1)["training"].tolist()


@pytest.mark.parametrize(
    ("sizes", "weights", "counts"),
    [
        ([20, 10], [1, 1], [10, 10]),
        ([20, 10], [2, 1], [20, 10]),
        ([20, 10], [1, 2], [5, 10]),  # the second, of which 10 stand for 2, is the scarcest
        ([54, 106, 1000], [1, 2, 0.5], [53, 106, 26]),  # 53 * 0.5 is rounded to even
        ([10, 1000], [0.1, 0.3], [10, 30]),
        ([10, 1000], [1e-300, 3e-300], [10, 30]),
        ([], [], []),
    ],
)
def test_weights_are_proportions_of_the_rows_taken(sizes, weights, counts):
    assert weighted_counts(sizes, weights) == counts


def test_rows_weights_and_shares_in_a_mix(folder):
    first, second = {"path": "questions.jsonl"}, {"path": "more/others.jsonl"}

    def taken(part: str = "training", **settings) -> dict:
        rows, _ = folder.load(first, second, part=part, **settings)
        return Counter(name.split(".")[0] for name in rows["source"])

    first["rows"] = 7
    assert taken() == {"questions": 7, "more/others": 10}
    second["held_out"] = 0.2
    assert taken() == {"questions": 7, "more/others": 8}
    assert taken("held out", held_out=0.4) == {"questions": 3, "more/others": 2}
    del first["rows"]
    first["weight"], second["weight"] = 3, 2
    assert taken(held_out=0.2) == {"questions": 12, "more/others": 8}
    second["weight"] = 0
    assert taken() == {"questions": 20}


def test_parts_share_no_row_and_together_have_all(folder):
    parts = [set(folder.load(*BOTH, held_out=0.3, part=part)[0]["source"]) for part in ("training", "held out")]
    assert [len(part) for part in parts] == [21, 9]
    assert len(set.union(*parts)) == 30


def test_a_part_may_have_nothing_of_a_source(folder):
    first, second = "questions.jsonl", {"path": "more/others.jsonl", "held_out": 0.5}
    rows, statistics = folder.load(first, second, part="held out")
    assert {name.split(" ")[0] for name in rows["source"]} == {"more/others.jsonl"}
    assert [line.split() for line in statistics.table[1:3]] == [
        ["questions.jsonl", "0", "0.0%", "0", "0.0%", "20"],
        ["more/others.jsonl", "none", "5", "100.0%", str(statistics.tokens), "100.0%", "5"],
    ]


def test_the_rows_of_a_source_do_not_depend_on_the_others(folder):
    one = {"path": "questions.jsonl", "rows": 8, "held_out": 0.25}
    alone = folder.load(one)[0]["source"][:]
    assert folder.load("more/others.jsonl", one)[0]["source"][10:] == alone
    assert folder.load(one, {"path": "more/others.jsonl", "rows": 3})[0]["source"][:6] == alone


def test_two_readings_of_a_file_are_told_apart(folder):
    folder.write("pairs.jsonl", [{"de": "ein Haus", "en": "a house"}, {"de": "ein Baum", "en": "a tree"}])
    there, back = ({"instruction": "de", "output": "en"}, {"instruction": "en", "output": "de"})
    rows, _ = folder.load({"path": "pairs.jsonl", "columns": there}, {"path": "pairs.jsonl", "columns": back})
    assert rows["source"][1:3] == ["sources[0] pairs.jsonl row 2", "sources[1] pairs.jsonl row 1"]


def test_the_hash_covers_what_decides_which_rows_are_used(folder):
    def sha256(*listed, part: str = "training", **settings) -> str:
        return folder.load(*listed, part=part, **settings)[1].sha256

    first, second = ({"path": name, "weight": 1, "held_out": 0.2} for name in ("questions.jsonl", "more/others.jsonl"))
    before = sha256(first, second)
    assert before == sha256({**first, "weight": 2}, {**second, "weight": 2})
    shutil.copy(folder.path / "questions.jsonl", folder.path / "copy.jsonl")
    assert before == sha256({**first, "path": "copy.jsonl"}, second)
    others = [
        sha256(first, second, part="held out"),
        sha256(second, first),
        sha256(first, second, seed=1),
        sha256({**first, "weight": 1.1}, second),
        sha256({**first, "held_out": 0.1}, second),
        sha256({**first, "task_type": 0}, second),
        sha256({**first, "task": "x"}, second),
        sha256({**first, "format": "prompt_completion"}, second),
        sha256(first),
    ]
    folder.write("questions.jsonl", [*QUESTIONS[1:], QUESTIONS[0]])
    assert len({before, *others, sha256(first, second)}) == 11


def test_the_table_shows_the_share_of_each_source(folder):
    folder.write("none.jsonl", [{"instruction": "a", "output": "b"}] * 4)
    rows, statistics = folder.load(*BOTH, "none.jsonl", held_out=0.25)
    numbers = [line.split() for line in statistics.table]
    assert numbers[0] == ["source", "task", "type", "rows", "share", "tokens", "share", "held", "out"]
    assert [line[:4] for line in numbers[1:4]] == [
        ["questions.jsonl", "1", "15", "60.0%"], ["more/others.jsonl", "0", "7", "28.0%"],
        ["none.jsonl", "none", "3", "12.0%"],
    ]  # fmt: skip
    assert [line[-1] for line in numbers[1:]] == ["5", "3", "1", "9"]
    tokens = [int(line[-3].replace(",", "")) for line in numbers[1:]]
    lengths = list(map(len, rows["input_ids"]))
    assert tokens == [sum(lengths[:15]), sum(lengths[15:22]), sum(lengths[22:]), statistics.tokens]
    assert sum(lengths) == statistics.tokens
    assert numbers[1][-2] == f"{tokens[0] / tokens[3]:.1%}"
    assert numbers[4][:3] == ["all", "25", "100.0%"]
    assert len({len(line) for line in statistics.table}) == 1
    assert statistics.summary(256).splitlines()[1:] == [*statistics.table]
    assert folder.load(part="held out")[1].table[0].split()[-1] == "training"


# ---- bad input -------------------------------------------------------------------------------------------------------

BAD = [
    ({"path": "gone.jsonl"}, "sources[0].path: HERE/gone.jsonl: no such file or folder"),
    ({"path": ""}, "sources[0].path is empty"),
    ({"path": "questions.txt"}, "sources[0].path: HERE/questions.txt: no such file or folder"),
    ({"pth": "questions.jsonl"}, "sources[0].pth: unknown key; did you mean 'path'?"),
    ({"hbu": "a/b"}, "sources[0].hbu: unknown key; did you mean 'hub'?"),
    ({"rows": 3}, "sources[0]: has neither path nor hub"),
    ({"path": "questions.jsonl", "hub": "a/b"}, "sources[0].hub: not allowed in a source with a path"),
    ({"path": "questions.jsonl", "split": "train"}, "sources[0].split: not allowed in a source with a path"),
    ({"hub": "a/b", "splt": "train"}, "sources[0].splt: unknown key; did you mean 'split'?"),
    ({"hub": "a/b", "stream": 1}, "sources[0].stream is 1, but has to be a valid boolean"),
    ({"wieght": 1}, "sources[0].wieght: unknown key; did you mean 'weight'?"),
    ({"weight": -1}, "sources[0].weight is -1, but has to be greater than or equal to 0"),
    ({"weight": float("nan")}, "sources[0].weight is NaN, but has to be a finite number"),
    ({"weight": "2"}, 'sources[0].weight is "2", but has to be a valid number'),
    ({"weight": 1, "rows": 1}, "sources[0].weight: a source has rows or a weight, not both"),
    ({"path": "questions.jsonl", "weight": 0}, "sources: all weights are 0; at least one has to be above 0"),
    ({"rows": 0}, "sources[0].rows is 0, but has to be greater than or equal to 1"),
    ({"rows": 1.5}, "sources[0].rows is 1.5, but has to be a valid integer"),
    ({"rows": True}, "sources[0].rows is true, but has to be a valid integer"),
    ({"rows": 2**63}, f"sources[0].rows is {2**63}, but has to be less than or equal to {2**63 - 1}"),
    ({"task_type": 2**64}, f"sources[0].task_type is {2**64}, but has to be 0 or 1 (a whole number), or be left out"),
    ({"task_type": 2}, "sources[0].task_type is 2, but has to be 0 or 1 (a whole number), or be left out"),
    ({"task_type": "knowledge"}, 'sources[0].task_type is "knowledge", but has to be 0 or 1'),
    ({"task_type": True}, "sources[0].task_type is true, but has to be 0 or 1"),
    ({"task": 3}, "sources[0].task is 3, but has to be a valid string"),
    ({"held_out": 1}, "sources[0].held_out is 1, but has to be less than 1"),
    ({"held_out": -0.1}, "sources[0].held_out is -0.1, but has to be greater than or equal to 0"),
    ({"format": "mesages"}, "sources[0].format: 'mesages' is not a format; did you mean 'messages'?"),
    (
        {"columns": {"outptu": "x"}},
        "sources[0].columns: 'outptu' is not a column of any format; did you mean 'output'?",
    ),
    ({"columns": {"prompt": "x"}, "format": "messages"}, "'prompt' is not a column of the format messages; available:"),
    ({"columns": ["prompt"]}, 'sources[0].columns is ["prompt"], but has to be a valid dictionary'),
    (
        {"path": "questions.jsonl", "columns": {"instruction": "promt"}},
        "sources[0].path: HERE/questions.jsonl has no column 'promt', which columns.instruction names; did you mean "
        "'prompt'?",
    ),
    ("questions.jsonl\n", "sources[0].path: HERE/questions.jsonl\n: no such file or folder"),
]


@pytest.mark.parametrize(("source", "message"), BAD, ids=[str(message)[:60] for _, message in BAD])
def test_a_bad_source_is_refused_before_anything_is_read(folder, monkeypatch, source, message):
    monkeypatch.setattr(sources, "load_data", lambda *arguments: pytest.fail("rows were read"))
    found = folder.refusal(source)
    assert message in found
    assert all(line.startswith(("HERE/mix.yaml: ", ": no such")) for line in found.splitlines())


def test_a_file_that_is_bad_itself_is_named(folder):
    (folder.path / "list.json").write_text('{"a": 1}')
    (folder.path / "latin.jsonl").write_bytes(b'{"instruction": "\xe9", "output": "b"}\n')
    (folder.path / "notes.txt").write_text("a")
    assert "HERE/latin.jsonl: row 1: " in folder.refusal("latin.jsonl")
    assert "HERE/list.json: holds" in folder.refusal("list.json")
    assert "sources[0].path: HERE/notes.txt: unknown kind of data file" in folder.refusal("notes.txt")
    assert "HERE/mix.yaml: unknown kind of data file" in folder.refusal("mix.yaml")


def test_all_problems_are_reported_together(folder):
    listed = [{"path": "gone.jsonl", "weight": 0}, {"path": "questions.jsonl", "rows": 0, "colums": {}, "task_type": 5}]
    found = folder.refusal(*listed, 3, "questions.jsonl", seed=-1, hedl_out=0.1)
    assert [line.removeprefix("HERE/mix.yaml: ").split(":")[0].split(" is")[0] for line in found.splitlines()] == [
        "sources[0].path", "sources[1].task_type", "sources[1].rows", "sources[1].colums", "sources[2]",
        "sources[3].path", "seed", "hedl_out", "sources",
    ]  # fmt: skip


def test_a_source_counts_once(folder):
    assert "sources[1].path: HERE/questions.jsonl is in another source already" in folder.refusal(
        "questions.jsonl", {"path": "./more/../questions.jsonl", "task_type": 1}
    )
    assert "sources[1].path: HERE/more/others.jsonl is in another source" in folder.refusal("more", "more/others.jsonl")
    twice = {"hub": "a/b", "split": "test"}
    assert "sources[2].hub: a/b test is in another source" in folder.refusal(twice, {**twice, "split": "dev"}, twice)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "mix.yaml: the file is null, but has to be a mapping"),
        (b"- path: a", 'mix.yaml: the file is [{"path": "a"}], but has to be a mapping'),
        (b"seed: 1", "mix.yaml: it has no sources"),
        (b"sources: []", "mix.yaml: sources is empty"),
        (b"sources: {path: questions.jsonl}", "mix.yaml: sources is {"),
        (b"sources:\n  - path: [a", "mix.yaml: line 2: not readable as YAML (expected ',' or ']'"),
        (b"seed: 1\nseed: 2\nsources: []", "mix.yaml: line 1: not readable as YAML (the key 'seed' occurs twice)"),
        (b"sources:\n  - rows: 1\n    rows: 2", "line 2: not readable as YAML (the key 'rows' occurs twice)"),
        (b"sources: \xe9", "mix.yaml: not readable as YAML ("),
        (b"sources: !!python/object/apply:os.getcwd []", "mix.yaml: line 1: not readable as YAML (could not determine"),
        (b"seed: " + b"9" * 5000, "mix.yaml: not readable as YAML (Exceeds the limit"),
        (b"seed: 2024-13-99", "mix.yaml: not readable as YAML (month must be in 1..12"),
        (b"seed: 99999999999999999999\nsources: []", "seed is 99999999999999999999, but has to be"),
        (b"sources: [&a [*a]]", "mix.yaml: sources[0] is [[...]], but has to be a mapping"),
        (b"[" * 2000, "mix.yaml: not readable as YAML ("),
        (b"1: 2\nsources: [{path: questions.jsonl}]", "mix.yaml: "),
    ],
)  # fmt: skip
def test_a_file_that_is_no_mix(folder, content, message):
    folder.file.write_bytes(content)
    assert message in folder.refusal()


def test_there_is_no_such_file(folder):
    with pytest.raises(InputError, match=r"gone\.yaml: no such file"):
        read_mix(folder.path / "gone.yaml", 2)


def test_an_exponent_needs_no_point(folder):
    folder.file.write_text("sources: [{path: questions.jsonl, weight: 1e-3, held_out: 5e-2}]")
    assert len(folder.load(part="held out")[0]) == 1


def test_numbers_of_rows_that_cannot_be(folder):
    found = folder.refusal({"path": "questions.jsonl", "rows": 21}, {"path": "more", "weight": 1})
    assert found == "HERE/mix.yaml: sources[0].rows is 21, but there are only 20 that can be used"
    found = folder.refusal({"path": "questions.jsonl", "weight": 0.01}, {"path": "more", "weight": 1})
    assert found == "HERE/mix.yaml: sources[0].weight is 0.01, which leaves none of its 20 rows"
    assert "no row is held out to evaluate on" in folder.refusal("questions.jsonl", part="held out")
    folder.write("one.jsonl", QUESTIONS[:1])
    assert "no row is left to train on" in folder.refusal({"path": "one.jsonl", "held_out": 0.9})


def test_the_message_on_a_bad_row_names_it(folder):
    folder.write("questions.jsonl", [*QUESTIONS, {"prompt": "a", "completion": 3}])
    assert "HERE/questions.jsonl: row 21: " in folder.refusal(*BOTH)


# ---- the hub ---------------------------------------------------------------------------------------------------------

CARD = """---
configs:
- config_name: qa
  data_files:
  - {split: train, path: qa/*.jsonl}
  - {split: test, path: test.jsonl}
- config_name: mixed
  data_files: mixed.jsonl
---
"""


@pytest.fixture
def stand_in(folder, monkeypatch) -> str:
    """A folder that `datasets.load_dataset` takes as it takes a repository of the hub; returns its name."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder.path / "of datasets")
    monkeypatch.setattr(hub, "SHUFFLE_BUFFER", 5)
    (folder.path / "owner" / "set").mkdir(parents=True)
    (folder.path / "owner" / "set" / "README.md").write_text(CARD)
    for name, part in (("qa/a", QUESTIONS[:12]), ("qa/b", QUESTIONS[12:]), ("test", QUESTIONS[:1]), ("mixed", [
        {"instruction": f"é {number}", "output": "x", "extra": number if number % 2 else "text"} for number in range(9)
    ])):  # fmt: skip
        folder.write(f"owner/set/{name}.jsonl", part)
    return str(folder.path / "owner" / "set")


@pytest.mark.parametrize("stream", [False, True])
def test_a_data_set_of_the_hub_is_a_source(folder, stand_in, stream):
    source = {"hub": stand_in, "config": "qa", "stream": stream, "task_type": 1}
    rows, statistics = folder.load(source, held_out=0.1)
    (file,) = (folder.path / "cache" / "hub").glob("*.jsonl")
    assert "owner-set-qa-train" in file.name
    assert [json.loads(line) for line in file.read_text().splitlines()] == QUESTIONS
    assert {name.rpartition(" row ")[0] for name in rows["source"]} == {file.name}
    assert set(rows["task_type"]) == {1}
    assert statistics.table[1].split()[:3] == [f"hub:{stand_in}", "qa", "train"]
    shutil.rmtree(stand_in)
    assert folder.load()[0][:] == rows[:]


def test_values_of_several_types_stay_what_they_are(folder, stand_in):
    """`datasets` keeps them as JSON in text."""
    folder.load({"hub": stand_in, "config": "mixed", "split": "train"})
    (file,) = (folder.path / "cache" / "hub").glob("*.jsonl")
    assert [json.loads(line)["extra"] for line in file.read_text().splitlines()][:3] == ["text", 1, "text"]
    assert "é 0" in file.read_text()


def test_of_a_stream_about_as_many_rows_are_read_as_are_wanted(folder, stand_in, monkeypatch):
    folder.write("owner/set/qa/a.jsonl", [{"prompt": str(number), "completion": "x"} for number in range(3000)])
    read = []
    shuffled = hub.shuffled

    def counted(records, seed):
        return shuffled(records.map(lambda row: read.append(row) or row), seed)

    monkeypatch.setattr(hub, "shuffled", counted)
    source = {"hub": stand_in, "config": "qa", "stream": True, "rows": 7}
    chosen = folder.load(source)[0]
    assert len(chosen) == 7
    assert len(read) <= 7 + hub.SHUFFLE_BUFFER + 1
    assert len(folder.load(source, seed=0)[0]) == 7
    assert len(read) <= 7 + hub.SHUFFLE_BUFFER + 1  # from the cache
    assert folder.load(source, seed=1)[0]["input_ids"][:] != chosen["input_ids"][:]
    assert len(list((folder.path / "cache" / "hub").glob("*.jsonl"))) == 2


def test_rows_of_a_stream_that_are_too_long_are_left_out(folder, stand_in):
    folder.write("owner/set/test.jsonl", [{"prompt": "word " * 300, "completion": "x"}, *QUESTIONS[:3]])
    source = {"hub": stand_in, "config": "qa", "split": "test", "stream": True, "rows": 4}
    rows, statistics = folder.load(source)
    assert (len(rows), statistics.dropped) == (3, 1)
    assert "sources[0].rows is 5, but there are only 4 that" in folder.refusal({**source, "rows": 5})
    assert "sources[0].rows is 4, but there are only 3 that" in folder.refusal({**source, "stream": False})


def test_what_is_wrong_with_a_data_set_of_the_hub(folder, stand_in):
    source = {"hub": stand_in, "config": "qa"}
    assert (
        "HERE/mix.yaml: sources[1]: hub:HERE/owner/set train could not be read from the hub: Config name is missing"
        in (folder.refusal("questions.jsonl", {"hub": stand_in}))
    )
    assert "['qa', 'mixed']" in folder.refusal({"hub": stand_in})
    assert "BuilderConfig 'other' not found. Available: ['qa', 'mixed']" in folder.refusal(
        {**source, "config": "other"}
    )
    assert "Unknown split" in folder.refusal({**source, "split": "dev"})
    assert "Bad split: dev" in folder.refusal({**source, "split": "dev", "stream": True})
    assert "could not be read from the hub: Couldn't reach 'nobody/nothing'" in folder.refusal(
        {"hub": "nobody/nothing"}
    )
    assert "has no column 'answer', which columns.output names" in folder.refusal(
        {**source, "columns": {"output": "answer"}}
    )
    folder.write("owner/set/mixed.jsonl", [{"instruction": "a", "output": 3}])
    assert "owner-set-mixed-train" in (found := folder.refusal({**source, "config": "mixed"}))
    assert "row 1: 'output' is 3" in found
    (folder.path / "owner" / "script").mkdir()
    (folder.path / "owner" / "script" / "script.py").write_text("raise SystemExit")
    assert "could not be read from the hub: Dataset scripts are no longer supported" in folder.refusal(
        {"hub": str(folder.path / "owner" / "script")}
    )
    assert not list((folder.path / "cache" / "hub").glob("*.tmp"))


# ---- programs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def mix(run, tmp_path) -> Path:  # noqa: F811
    """Of the rows of the run's file, half of them as prompt and completion, a quarter held out."""
    folder = Folder(tmp_path)
    rows = example_rows(24)
    folder.write(
        "a.jsonl", [{"prompt": row["instruction"] + row["input"], "completion": row["output"]} for row in rows[::2]]
    )
    folder.write("b.jsonl", [{"instruction": row["instruction"], "output": row["output"]} for row in rows[1::2]])
    return folder.mix(
        {"path": "a.jsonl", "task_type": 0, "task": "x"}, {"path": "b.jsonl", "task_type": 1}, held_out=0.25
    )


def test_a_run_trains_and_evaluates_on_a_mix(run, mix, capsys):  # noqa: F811
    results = run(dataset_dir=mix, validation_file=mix)
    assert (results["train_samples"], results["eval_samples"]) == (18, 6)
    assert results["eval_lm_loss_after"] < results["eval_lm_loss_before"]
    shown = capsys.readouterr().out
    assert "  a.jsonl  0             9   50.0%" in shown
    assert "held out\n" in shown
    config = json.loads((run.output / "run_config.json").read_text())
    assert config["dataset_sha256"] != config["validation_sha256"]
    flags = {"adapter": run.output, "metrics": "lm_loss", "data_cache_dir": run.folder / "cache"}
    flags["output"] = run.folder / "evaluation.json"
    evaluate.main([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    report = json.loads((run.folder / "evaluation.json").read_text())["data"][0]
    assert (report["rows"], report["sha256"]) == (6, config["validation_sha256"])
    trained = load_trained(InferenceArguments(adapter=str(run.output)))
    for field, count in (("dataset_dir", 18), ("validation_file", 6)):
        assert len(inference_rows.load_rows(trained, None, field, str(run.folder / "cache"))[1]) == count


def test_a_run_with_an_edited_mix_is_refused(run, mix):  # noqa: F811
    run(dataset_dir=mix, validation_file=mix, max_steps=1)
    mix.write_text("# a comment\n" + mix.read_text())
    run(dataset_dir=mix, validation_file=mix, max_steps=1)
    written = mix.read_text()
    for edited in (
        written.replace("task_type: 0", "task_type: 1"),
        written.replace("0.25", "0.3"),
        written + "seed: 9\n",
    ):
        mix.write_text(edited)
        with pytest.raises(InputError, match="dataset_sha256"):
            run(dataset_dir=mix, validation_file=mix, max_steps=1)
    mix.write_text(written)
    (mix.parent / "a.jsonl").write_text((mix.parent / "a.jsonl").read_text().replace("number 0", "number 9"))
    with pytest.raises(InputError, match="dataset_sha256"):
        run(dataset_dir=mix, validation_file=mix, max_steps=1)


def test_a_mix_of_one_file_trains_as_the_file_does(run, tmp_path):  # noqa: F811
    run(validation_file=None)
    (tmp_path / "one.yaml").write_text("sources: [{path: train.json}]")
    expected = [entry["loss"] for entry in run.log() if "loss" in entry]
    run(validation_file=None, dataset_dir=tmp_path / "one.yaml", output_dir=tmp_path / "run2")
    run.output = tmp_path / "run2"
    assert [entry["loss"] for entry in run.log() if "loss" in entry] == expected


def test_the_mix_of_the_tiny_data(tmp_path):
    parts = [
        load_part(ROOT / "data/tiny_data/mix.yaml", part, tiny_tokenizer(), Encoding("plain", 1024, 2), tmp_path)[0]
        for part in ("training", "held out")
    ]
    assert [Counter(rows["task_type"]) for rows in parts] == [{1: 48, 0: 95}, {1: 5, 0: 11}]
    assert not count_shared_rows(*parts)
    tiny = json.loads((ROOT / "data/tiny_data/train/train.json").read_text())
    texts = {(row["output"], row["task_type"], row["task"]) for row in tiny}
    for rows in parts:
        assert texts.issuperset(zip(rows["output"], rows["task_type"], rows["task"], strict=True))
