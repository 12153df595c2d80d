"""The paper's mixture: how records of each set become rows, and the verb that mixes them, on stand-ins of the sets."""

import json
from collections import Counter
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from conftest import full_disk, tiny_tokenizer
from filelock import FileLock, Timeout

from data import Encoding, InputError, load_data
from data.facts import TASK as CLOSED_BOOK
from data.recipes import PAPER, RECIPES, Source, evaluation_parts
from data.rows import row_problem
from data.tasks import TASKS
from scripts.prepare_data import alone, main, question_key

# Of every set a record with all its columns, and the row that it becomes: instruction, input, output, aliases.
EXAMPLES = {
    "mandarjoshi/trivia_qa rc.nocontext": (
        {
            "question": "Which novelist wrote Emma?",
            "question_id": "tc_1",
            "question_source": "http://www.triviacountry.com/",
            "entity_pages": {"doc_source": [], "filename": [], "title": [], "wiki_context": []},
            "search_results": {
                "description": [],
                "filename": [],
                "rank": [],
                "title": [],
                "url": [],
                "search_context": [],
            },
            "answer": {
                "aliases": ["Austen", "Jane Austen", "Miss Austen"],
                "normalized_aliases": ["austen", "jane austen", "miss austen"],
                "matched_wiki_entity_name": "",
                "normalized_matched_wiki_entity_name": "",
                "normalized_value": "jane austen",
                "type": "WikipediaEntity",
                "value": "Jane Austen",
            },
        },
        ("Question: Which novelist wrote Emma?\nAnswer:", "", "Jane Austen", ["Austen", "Miss Austen"]),
    ),
    "google-research-datasets/nq_open nq_open": (
        {"question": "when did the war end ", "answer": ["1945", "2 September 1945"]},
        ("Question: when did the war end?\nAnswer:", "", "1945", ["2 September 1945"]),
    ),
    "hotpotqa/hotpot_qa distractor": (
        {
            "id": "5a7a",
            "question": "Who directed the film about the river?",
            "answer": "Jean Renoir",
            "type": "bridge",
            "level": "hard",
            "supporting_facts": {"title": ["The River"], "sent_id": [0]},
            "context": {"title": ["The River"], "sentences": [["A film."]]},
        },
        ("Question: Who directed the film about the river?\nAnswer:", "", "Jean Renoir", []),
    ),
    "allenai/winogrande winogrande_xl": (
        {
            "sentence": "Ann thanked Bea since _ had helped.",
            "option1": "Ann",
            "option2": "Bea",
            "answer": "2",
        },
        ("Which of the two fills the gap (_): Ann or Bea?", "Ann thanked Bea since _ had helped.", "Bea", []),
    ),
    "aps/super_glue wsc.fixed": (
        {
            "text": "Mark told Pete lies and he was angry.",
            "span1_index": 0,
            "span2_index": 5,
            "span1_text": "Mark",
            "span2_text": "he",
            "idx": 0,
            "label": 0,
        },
        (
            'Does "he" refer to "Mark" in this text? Answer no or yes.',
            "Mark told Pete lies and he was angry.",
            "no",
            [],
        ),
    ),
    "ehovy/race middle": (
        {
            "example_id": "middle1.txt",
            "article": "Tom has a dog.",
            "answer": "B",
            "question": "What does Tom have?",
            "options": ["A cat", "A dog", "A bird", "A fish"],
        },
        (
            "Read the article and give the letter of the right answer.",
            "Tom has a dog.\nQuestion: What does Tom have?\nA. A cat\nB. A dog\nC. A bird\nD. A fish",
            "B",
            [],
        ),
    ),
    "ehovy/race high": (
        {
            "example_id": "high1.txt",
            "article": "It rained.",
            "answer": "A",
            "question": "The weather was _ .",
            "options": ["wet", "dry", "hot", "cold"],
        },
        (
            "Read the article and give the letter of the right answer.",
            "It rained.\nQuestion: The weather was _ .\nA. wet\nB. dry\nC. hot\nD. cold",
            "A",
            [],
        ),
    ),
    "rajpurkar/squad plain_text": (
        {
            "id": "57",
            "title": "Rivers",
            "context": "The Nile flows north.",
            "question": "Which way does the Nile flow?",
            "answers": {"text": ["north"], "answer_start": [15]},
        },
        ("Which way does the Nile flow?", "The Nile flows north.", "north", []),
    ),
    "aps/super_glue multirc": (
        {
            "paragraph": "Ida sold the boat.",
            "question": "What was sold?",
            "answer": "A boat",
            "idx": {"paragraph": 0, "question": 0, "answer": 0},
            "label": 1,
        },
        (
            "Is this answer to the question right? Answer no or yes.",
            "Ida sold the boat.\nQuestion: What was sold?\nAnswer: A boat",
            "yes",
            [],
        ),
    ),
    "aps/super_glue record": (
        {
            "passage": "Rome beat Paris.\n@highlight\nIt was close",
            "query": "The fans of @placeholder cheered",
            "entities": ["Paris", "Rome"],
            "entity_spans": {"text": ["Paris", "Rome"], "start": [10, 0], "end": [15, 4]},
            "answers": ["AS Rome", "Rome"],
            "idx": {"passage": 0, "query": 0},
        },
        (
            "Which name of the passage does @placeholder stand for?",
            "Rome beat Paris.\n@highlight\nIt was close\nSentence: The fans of @placeholder cheered",
            "AS Rome",
            ["Rome"],
        ),
    ),
    "aps/super_glue boolq": (
        {"question": "is water wet", "passage": "Water -- Water is wet.", "idx": 0, "label": 1},
        ("Is water wet? Answer no or yes.", "Water -- Water is wet.", "yes", []),
    ),
    "ibm-research/duorc ParaphraseRC": (
        {
            "plot_id": "/m/1",
            "plot": "A boy finds a map.",
            "title": "Map",
            "question_id": "q1",
            "question": "What is found?",
            "answers": ["a map", "map"],
            "no_answer": False,
        },
        ("What is found?", "A boy finds a map.", "a map", ["map"]),
    ),
    "allenai/social_i_qa default": (
        {
            "context": "Kai fell.",
            "question": "How does Kai feel?",
            "answerA": "glad",
            "answerB": "rich",
            "answerC": "hurt",
            "label": "3",
        },
        (
            "Give the letter of the most likely answer.",
            "Kai fell.\nQuestion: How does Kai feel?\nA. glad\nB. rich\nC. hurt",
            "C",
            [],
        ),
    ),
    "EdinburghNLP/xsum default": (
        {"document": "The bridge was closed today.", "summary": "A bridge closed.", "id": "1"},
        ("Summarize this article.", "The bridge was closed today.", "A bridge closed.", []),
    ),
    "abisee/cnn_dailymail 3.0.0": (
        {"article": "(CNN) -- It snowed.", "highlights": "Snow fell .\nRoads closed .", "id": "1"},
        ("Summarize this article.", "(CNN) -- It snowed.", "Snow fell .\nRoads closed .", []),
    ),
    "knkarthick/samsum default": (
        {"id": "1", "dialogue": "Ann: Tea?\r\nBea: Yes!", "summary": "They have tea."},
        ("Summarize this dialogue.", "Ann: Tea?\r\nBea: Yes!", "They have tea.", []),
    ),
    "fancyzhx/ag_news default": (
        {"text": "Stocks fell.", "label": 2},
        (
            "What is this about? Answer world, sports, business or science and technology.",
            "Stocks fell.",
            "business",
            [],
        ),
    ),
    "Yelp/yelp_review_full yelp_review_full": (
        {"label": 4, "text": "Lovely place."},
        (
            "How many stars does this review give? Answer 1 star, 2 stars, 3 stars, 4 stars or 5 stars.",
            "Lovely place.",
            "5 stars",
            [],
        ),
    ),
    "nyu-mll/glue cola": (
        {"sentence": "The cat sat.", "label": 1, "idx": 0},
        ("Is this sentence grammatical? Answer no or yes.", "The cat sat.", "yes", []),
    ),
    "nyu-mll/glue sst2": (
        {"sentence": "a fine film ", "label": 1, "idx": 0},
        ("What is the opinion of this review? Answer negative or positive.", "a fine film", "positive", []),
    ),
    "nyu-mll/glue qqp": (
        {"question1": "How old is he?", "question2": "What is his age?", "label": 1, "idx": 0},
        (
            "Do these two questions ask for the same? Answer no or yes.",
            "1. How old is he?\n2. What is his age?",
            "yes",
            [],
        ),
    ),
    "aps/super_glue wic": (
        {
            "word": "bank",
            "sentence1": "By the bank.",
            "sentence2": "A rich bank.",
            "start1": 7,
            "start2": 7,
            "end1": 11,
            "end2": 11,
            "idx": 0,
            "label": 0,
        },
        (
            'Does "bank" mean the same in both sentences? Answer no or yes.',
            "1. By the bank.\n2. A rich bank.",
            "no",
            [],
        ),
    ),
    "facebook/anli plain_text": (
        {"uid": "u", "premise": "It is wet.", "hypothesis": "It is dry.", "label": 2, "reason": ""},
        (
            "Label this pair as entailment, neutral or contradiction.",
            "Premise: It is wet.\nHypothesis: It is dry.",
            "contradiction",
            [],
        ),
    ),
    "nyu-mll/glue mnli": (
        {"premise": "He runs.", "hypothesis": "He moves.", "label": 0, "idx": 0},
        (
            "Label this pair as entailment, neutral or contradiction.",
            "Premise: He runs.\nHypothesis: He moves.",
            "entailment",
            [],
        ),
    ),
    "stanfordnlp/snli plain_text": (
        {"premise": "A man eats.", "hypothesis": "He is hungry.", "label": 1},
        (
            "Label this pair as entailment, neutral or contradiction.",
            "Premise: A man eats.\nHypothesis: He is hungry.",
            "neutral",
            [],
        ),
    ),
    "aps/super_glue rte": (
        {"premise": "Oil rose.", "hypothesis": "Oil fell.", "idx": 0, "label": 1},
        (
            "Label this pair as entailment or not entailment.",
            "Premise: Oil rose.\nHypothesis: Oil fell.",
            "not entailment",
            [],
        ),
    ),
    "Helsinki-NLP/opus-100 de-en": (
        {"translation": {"de": "Guten Tag.", "en": "Good day."}},
        ("Translate from English into German.", "Good day.", "Guten Tag.", []),
    ),
    "Helsinki-NLP/opus-100 en-es": (
        {"translation": {"en": "Thank you.", "es": "Gracias."}},
        ("Translate from Spanish into English.", "Gracias.", "Thank you.", []),
    ),
    "Helsinki-NLP/opus-100 en-fr": (
        {"translation": {"en": "Good day.", "fr": "Bonjour."}},
        ("Translate from English into French.", "Good day.", "Bonjour.", []),
    ),
    "Helsinki-NLP/opus-100 en-zh": (
        {"translation": {"en": "Good day!", "zh": "你好！"}},
        ("Translate from English into Chinese.", "Good day!", "你好！", []),
    ),
}
ROWS_OF_A_PART = 12


def set_name(source: Source) -> str:
    return f"{source.hub_id} {source.config}"


def source_of(name: str) -> Source:
    return next(source for source in PAPER if set_name(source) == name)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_record_becomes_a_row(name):
    record, (instruction, context, output, aliases) = EXAMPLES[name]
    row = source_of(name).row(record)
    assert row == {
        "instruction": instruction,
        "input": context,
        "output": output,
        "aliases": aliases,
        "task_type": int(source_of(name).task == CLOSED_BOOK),
        "task": source_of(name).task,
    }
    assert row_problem(row, 2) is None


def test_the_recipe_is_what_is_tested_and_has_the_seven_kinds():
    assert {set_name(source) for source in PAPER} == set(EXAMPLES)
    assert {source.task for source in PAPER} == {CLOSED_BOOK, *TASKS}
    assert {source.task for source in evaluation_parts(PAPER)} == {CLOSED_BOOK, *TASKS}
    parts = [*PAPER, *evaluation_parts(PAPER)]
    assert len({part.files for part in parts}) == len(parts)
    for source in PAPER:
        assert set(source.columns) <= set(EXAMPLES[set_name(source)][0])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("stanfordnlp/snli plain_text", {"label": -1}),
        ("nyu-mll/glue cola", {"label": None}),
        ("aps/super_glue wsc.fixed", {"label": -1}),
        ("allenai/winogrande winogrande_xl", {"answer": ""}),
        ("allenai/social_i_qa default", {"label": ""}),
        ("google-research-datasets/nq_open nq_open", {"answer": []}),
        ("google-research-datasets/nq_open nq_open", {"answer": [" "]}),
        ("mandarjoshi/trivia_qa rc.nocontext", {"answer": {"value": "", "aliases": []}}),
        ("hotpotqa/hotpot_qa distractor", {"answer": "yes"}),
        ("rajpurkar/squad plain_text", {"answers": {"text": [], "answer_start": []}}),
        ("ibm-research/duorc ParaphraseRC", {"no_answer": True}),
        ("aps/super_glue record", {"answers": []}),
        ("knkarthick/samsum default", {"dialogue": None}),
        ("EdinburghNLP/xsum default", {"document": "\n"}),
        ("Helsinki-NLP/opus-100 de-en", {"translation": {"de": "", "en": "Good day."}}),
        ("Helsinki-NLP/opus-100 de-en", {"translation": {"de": "Guten Tag.", "en": ""}}),
    ],
)
def test_a_record_without_a_label_an_answer_or_a_text_is_dropped(name, change):
    assert source_of(name).row(EXAMPLES[name][0] | change) is None


def test_questions_that_differ_in_case_punctuation_and_articles_are_one():
    def key(question: str) -> int:
        return question_key({"instruction": question, "input": ""})

    assert key("Question: Who wrote the Iliad?\nAnswer:") == key("Question: who wrote Iliad\nAnswer:")
    assert key("Question: Who wrote the Iliad?\nAnswer:") != key("Question: Who wrote the Odyssey?\nAnswer:")


def records(source: Source, count: int = ROWS_OF_A_PART) -> list[dict]:
    """Different records of a part, after its example."""
    record, _ = EXAMPLES[set_name(source)]
    first = source.columns[0]
    if first == "translation":
        return [
            {first: {language: f"{text} {source.split} {number}" for language, text in record[first].items()}}
            for number in range(count)
        ]
    return [record | {first: f"{record[first]} {source.split} {number}"} for number in range(count)]


class Hub:
    """Stand-in for the hub: Parquet files in a folder, where `datasets.load_dataset` looks for them."""

    def __init__(self, folder: Path):
        self.folder, self.load = folder, datasets.load_dataset

    def write(self, source: Source, rows: list[dict]) -> None:
        file = Path(source.files.replace("hf://datasets", str(self.folder)).replace("*", "0000"))
        file.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=5)

    def load_dataset(self, kind: str, data_files: str, **settings) -> datasets.IterableDataset:
        local = data_files.replace("hf://datasets", str(self.folder))
        return self.load(kind, data_files=local, **settings)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    for part in [*PAPER, *evaluation_parts(PAPER)]:
        hub.write(part, records(part))
    monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
    return hub


def rows_in(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def files_in(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in sorted(folder.glob("*/*.jsonl"))}


def prepare(folder: Path, *flags: str) -> dict:
    main(["--output", str(folder), *flags])
    return json.loads((folder / "counts.json").read_text())


TRIVIA, NQ, HOTPOT = PAPER[:3]
KEPT = {NQ.hub_id, "allenai/winogrande", "stanfordnlp/snli"}
FEW = ["--without", *sorted({source.hub_id for source in PAPER} - KEPT)]


def test_the_verb_gives_every_kind_its_share_and_counts_every_set(hub, tmp_path, capsys):
    counts = prepare(tmp_path / "mix", "--size", "140", "--knowledge_share", "0.15")
    shown = capsys.readouterr().out
    assert {task: count["wanted"] for task, count in counts["train"].items()} == {
        CLOSED_BOOK: 21, "coreference": 19, "reading_comprehension": 20, "summarization": 20,
        "text_classification": 20, "natural_language_inference": 20, "translation": 20,
    }  # fmt: skip
    for task, count in counts["train"].items():
        rows = rows_in(tmp_path / "mix" / "train" / f"{task}.jsonl")
        assert len(rows) == count["got"] == count["wanted"] == sum(each["got"] for each in count["sets"].values())
        assert {row["task"] for row in rows} == {task}
        assert {row["task_type"] for row in rows} == {int(task == CLOSED_BOOK)}
        assert {each["got"] - each["wanted"] for each in count["sets"].values()} == {0}
    assert "140 of 140 training rows are in" in shown
    assert "         7         7  mandarjoshi/trivia_qa rc.nocontext train" in shown
    assert not (tmp_path / "mix.incomplete").exists()


def test_the_folder_is_read_by_the_trainers_own_loader(hub, tmp_path):
    prepare(tmp_path / "mix", "--size", "70")
    encoding = Encoding("plain", 256, num_task_types=2)
    rows, statistics = load_data(tmp_path / "mix" / "train", tiny_tokenizer(), encoding, tmp_path / "cache", num_proc=1)
    assert statistics.kept == 70
    assert set(rows["task"]) == {CLOSED_BOOK, *TASKS}
    assert Counter(rows["task_type"]) == {0: 56, 1: 14}
    held_out, _ = load_data(tmp_path / "mix" / "evaluation", tiny_tokenizer(), encoding, tmp_path / "cache", num_proc=1)
    assert set(held_out["task"]) == {CLOSED_BOOK, *TASKS}
    trivia = next(row for row in held_out if row["source"].startswith("trivia_qa"))
    assert (trivia["output"], trivia["aliases"]) == ("Jane Austen", ["Austen", "Miss Austen"])


def test_training_rows_avoid_the_questions_of_evaluation_and_repetitions(hub, tmp_path):
    """Also those of another set, and those that the sample of evaluation rows does not have."""
    asked = [{"question": f"who is number {number}", "answer": [f"name {number}"]} for number in range(6)]
    spelt_otherwise = [each | {"question": f"Who is the number {number}?"} for number, each in enumerate(asked)]
    free = {"question": "who is free", "answer": ["nobody"]}
    hub.write(NQ._replace(split="validation"), asked)
    hub.write(NQ, [*spelt_otherwise, free, free])
    hub.write(HOTPOT, [EXAMPLES[set_name(HOTPOT)][0] | {"question": asked[0]["question"]}])
    counts = prepare(tmp_path / "mix", "--size", "70", "--knowledge_share", "0.5", "--evaluation_rows", "2")
    questions = {row["instruction"] for row in rows_in(tmp_path / "mix" / "train" / f"{CLOSED_BOOK}.jsonl")}
    assert "Question: who is free?\nAnswer:" in questions
    assert not [question for question in questions if "number" in question]
    assert len(rows_in(tmp_path / "mix" / "evaluation" / "nq_open_nq_open.jsonl")) == 2
    sets = counts["train"][CLOSED_BOOK]["sets"]
    assert sets[NQ.name] == {
        "wanted": 12, "got": 1, "unusable": 0, "too_long": 0, "in_evaluation": 6, "repeated": 1,
    }  # fmt: skip
    assert sets[HOTPOT.name]["in_evaluation"] == 1


def test_rows_without_overlap_share_no_answer_with_training(hub, tmp_path):
    hub.write(NQ, [{"question": "who is it", "answer": ["The Queen", "Elizabeth"]}])
    held_out = [
        {"question": "who rules", "answer": ["queen"]},
        {"question": "who else", "answer": ["Anne", "elizabeth."]},
        {"question": "who sings", "answer": ["Adele"]},
    ]
    hub.write(NQ._replace(split="validation"), held_out)
    counts = prepare(tmp_path / "mix", *FEW, "--size", "12")
    (kept,) = rows_in(tmp_path / "mix" / "evaluation_without_overlap" / "nq_open_nq_open.jsonl")
    assert kept["output"] == "Adele"
    assert counts["evaluation"]["nq_open_nq_open"] == {"rows": 3, "without_overlap": 1}
    assert [file.name for file in (tmp_path / "mix" / "evaluation_without_overlap").iterdir()] == [
        "nq_open_nq_open.jsonl"
    ]


def test_what_a_set_lacks_is_said_and_taken_from_the_others(hub, tmp_path, capsys):
    hub.write(NQ, records(NQ, 2))
    hub.write(TRIVIA, [*records(TRIVIA, 3), EXAMPLES[set_name(TRIVIA)][0] | {"answer": None}])
    counts = prepare(tmp_path / "mix", "--size", "100", "--knowledge_share", "0.3")
    shown = capsys.readouterr().out
    got = {name: (each["wanted"], each["got"]) for name, each in counts["train"][CLOSED_BOOK]["sets"].items()}
    assert got == {TRIVIA.name: (10, 3), NQ.name: (10, 2), HOTPOT.name: (10, 12)}
    assert counts["train"][CLOSED_BOOK]["sets"][TRIVIA.name]["unusable"] == 1
    assert (counts["train"][CLOSED_BOOK]["wanted"], counts["train"][CLOSED_BOOK]["got"]) == (30, 17)
    assert f"        10         2  {NQ.name} (has no more)\n        10        12  {HOTPOT.name}\n" in shown
    assert "100 of 100 training rows" in shown


def test_long_rows_are_left_out(hub, tmp_path):
    summaries = source_of("EdinburghNLP/xsum default")
    hub.write(summaries, [EXAMPLES[set_name(summaries)][0] | {"document": "word " * 30}])
    counts = prepare(tmp_path / "mix", "--size", "70", "--max_words", "29")
    assert counts["train"]["summarization"]["sets"][summaries.name]["too_long"] == 1


def test_the_rows_depend_on_the_seed_alone(hub, tmp_path):
    flags = [*FEW, "--size", "12", "--evaluation_rows", "5"]
    prepare(tmp_path / "first", *flags)
    prepare(tmp_path / "again", *flags)
    prepare(tmp_path / "other", *flags, "--seed", "42")
    assert files_in(tmp_path / "first") == files_in(tmp_path / "again")
    other = files_in(tmp_path / "other")
    assert all(text != other[name] for name, text in files_in(tmp_path / "first").items())


def test_an_interrupted_program_is_gone_on_with(hub, tmp_path, monkeypatch):
    flags = [*FEW, "--size", "15"]
    prepare(tmp_path / "undisturbed", *flags)

    def interrupted(instruction: str, text: str, label: int, labels: tuple) -> tuple:
        if instruction.startswith("Label this pair"):
            raise KeyboardInterrupt
        return instruction, text, [labels[label]]

    with monkeypatch.context() as patch:
        patch.setattr("data.recipes._labelled", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "mix", *flags)
    unfinished = json.loads((tmp_path / "mix.incomplete" / "counts.json").read_text())
    assert list(unfinished["train"]) == [CLOSED_BOOK, "coreference"]
    assert not (tmp_path / "mix").exists()
    with pytest.raises(InputError, match=r"mix.incomplete holds part of another mixture:\n  seed: 41 there, 3 now\n"):
        prepare(tmp_path / "mix", *flags, "--seed", "3")
    hub.write(NQ, records(NQ, 1))  # Its kind is finished: what it has now does not matter.
    prepare(tmp_path / "mix", *flags)
    assert files_in(tmp_path / "mix") == files_in(tmp_path / "undisturbed")


def test_an_unfinished_folder_that_has_lost_a_file_is_completed(hub, tmp_path, monkeypatch):
    flags = [*FEW, "--size", "15"]
    prepare(tmp_path / "mix", *flags)
    finished = files_in(tmp_path / "mix")
    unfinished = tmp_path / "mix.incomplete"
    (tmp_path / "mix").rename(unfinished)
    (unfinished / "train" / "coreference.jsonl").unlink()
    prepare(tmp_path / "mix", *flags)
    assert files_in(tmp_path / "mix") == finished
    (tmp_path / "mix").rename(unfinished)
    (unfinished / "counts.json").write_bytes(bytes(100))
    with pytest.raises(InputError, match=r"counts.json is corrupt; delete .*mix.incomplete to start over"):
        prepare(tmp_path / "mix", *flags)


def test_a_kind_that_is_left_out_after_an_interruption_leaves_no_rows(hub, tmp_path, monkeypatch):
    """Interrupted in the first kind, all of whose sets are then left out."""
    flags = [*FEW, "--size", "15"]

    def interrupted(question: str, answers: list) -> tuple:
        if question.endswith("train 5"):
            raise KeyboardInterrupt
        return question, "", answers

    with monkeypatch.context() as patch:
        recipe = [source._replace(to_texts=interrupted) if source == NQ else source for source in PAPER]
        patch.setitem(RECIPES, "paper", recipe)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "mix", *flags)
    assert (tmp_path / "mix.incomplete" / "train" / f"{CLOSED_BOOK}.jsonl").exists()
    with pytest.raises(InputError, match="seed: 41 there, 3 now"):
        prepare(tmp_path / "mix", *flags, "--seed", "3")
    counts = prepare(tmp_path / "mix", *flags, "--without", *FEW[1:], NQ.hub_id)
    files = {file.stem: len(rows_in(file)) for file in (tmp_path / "mix" / "train").iterdir()}
    assert files == {task: count["got"] for task, count in counts["train"].items()}
    assert CLOSED_BOOK not in files


def test_a_second_start_of_the_same_command_is_refused(hub, tmp_path):
    with FileLock(tmp_path / "mix.incomplete.lock"), pytest.raises(InputError, match="mix is being written by another"):
        prepare(tmp_path / "mix", *FEW, "--size", "10")
    assert not (tmp_path / "mix.incomplete").exists()
    prepare(tmp_path / "mix", *FEW, "--size", "10")
    assert {path.name for path in tmp_path.iterdir()} == {"hub", "mix"}


def test_other_locks_and_a_lock_that_is_gone_are_no_second_start(tmp_path):
    with pytest.raises(Timeout, match=r"other\.lock"), alone(tmp_path / "mix"):
        raise Timeout("other.lock")
    with alone(tmp_path / "mix"):
        (tmp_path / "mix.incomplete.lock").unlink()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_message(hub, tmp_path):
    with full_disk(1000), pytest.raises(InputError, match="mix cannot be written: File too large; once that is fixed"):
        prepare(tmp_path / "mix", *FEW, "--size", "10")
    prepare(tmp_path / "mix", *FEW, "--size", "10")


def test_a_set_that_cannot_be_read_is_named(hub, tmp_path):
    snli = source_of("stanfordnlp/snli plain_text")
    file = next(hub.folder.glob("stanfordnlp/*/*/*/*/train/*.parquet"))
    hub.write(snli, [{"premise": "It rains.", "hypothesis": "It is wet."}])
    with pytest.raises(InputError, match=f"{snli.name} could not be read .* it has no column label\n.*--without stanf"):
        prepare(tmp_path / "mix", *FEW, "--size", "10")
    file.write_bytes(b"no Parquet")
    with pytest.raises(InputError, match=f"{snli.name} could not be read from the hub"):
        prepare(tmp_path / "mix", *FEW, "--size", "10")
    file.unlink()
    with pytest.raises(InputError, match=f"{snli.name} could not be read from the hub"):
        prepare(tmp_path / "mix", *FEW, "--size", "10")
    prepare(tmp_path / "mix", *FEW, "stanfordnlp/snli", "--size", "10")


def test_a_hub_out_of_reach_is_one_message(tmp_path):
    with pytest.raises(InputError, match=r"mandarjoshi/trivia_qa rc\.nocontext train could not be read from the hub"):
        prepare(tmp_path / "mix")


def test_mistakes_are_told_before_anything_is_read(tmp_path):
    with pytest.raises(InputError, match=f"--output {tmp_path} exists already"):
        main(["--output", str(tmp_path)])
    wrong = ["--size", "3G", "--knowledge_share", "1.5", "--max_words", "0", "--without", "snli"]
    with pytest.raises(InputError) as caught:
        main(wrong)
    for part in ("--output is missing", "'3G'", "1.5, but", "--max_words is 0", "--without snli: no such set"):
        assert part in str(caught.value)
    with pytest.raises(InputError, match="--recipe soup is unknown; choose from paper"):
        main(["--recipe", "soup", "--output", str(tmp_path / "mix")])
