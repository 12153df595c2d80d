"""Real facts as closed-book questions: probe facts measure what a model knows, training facts are rows of
task type 1 (world knowledge).

A probe fact never occurs in a row for instruction tuning. The two parts share no country and no chemical element as
their subject, so that none of the training facts tells a probe fact by another way (a city's country, a country's
capital). Borders alone go both ways: see `instruction_facts`.
"""

import json
import random
from pathlib import Path
from typing import NamedTuple

FACTS_FILE = Path(__file__).parent / "world_facts" / "facts.json"
WORLD_KNOWLEDGE = 1
TASK = "closed_book_qa"

# Several phrasings of each relation. `statement` is how a text would put it, for pretraining a model.
QUESTIONS = {
    "capital": ("What is the capital of {}?", "Which city is the capital of {}?", "Name the capital city of {}."),
    "currency": (
        "What is the currency of {} called?",
        "Which currency is used in {}?",
        "In which currency do people in {} pay?",
    ),
    "language": (
        "What is an official language of {}?",
        "Which language is official in {}?",
        "Name an official language of {}.",
    ),
    "continent": ("On which continent is {}?", "Which continent does {} belong to?", "Name the continent of {}."),
    "neighbour": ("Which country borders {}?", "Name a country that borders {}.", "What is a neighbour of {}?"),
    "demonym": (
        "What is the adjective for something from {}?",
        "What does one call a thing that comes from {}?",
        "Which adjective belongs to {}?",
    ),
    "city": ("In which country is the city of {}?", "Which country is {} in?", "Name the country of the city {}."),
    "symbol": (
        "What is the chemical symbol of {}?",
        "Which symbol does the element {} have?",
        "How is {} abbreviated in the periodic table?",
    ),
    "atomic_number": (
        "What is the atomic number of {}?",
        "Which atomic number does {} have?",
        "How many protons does an atom of {} have?",
    ),
}
STATEMENTS = {
    "capital": "The capital of {subject} is {answer}.",
    "currency": "The currency of {subject} is called {answer}.",
    "language": "An official language of {subject} is {answer}.",
    "continent": "{subject} is in {answer}.",
    "neighbour": "{subject} borders {answer}.",
    "demonym": "Something from {subject} is called {answer}.",
    "city": "The city of {subject} is in {answer}.",
    "symbol": "The chemical symbol of {subject} is {answer}.",
    "atomic_number": "The atomic number of {subject} is {answer}.",
}


class Fact(NamedTuple):
    """One fact.

    Args:
        relation: a key of `QUESTIONS`.
        subject: what is asked about.
        answer: the answer that a model is taught.
        aliases: further right answers.
        group: country code or element; facts of one group are in one part.
        split: `probe` or `training`.
    """

    relation: str
    subject: str
    answer: str
    aliases: list[str]
    group: str
    split: str = ""


def load_facts(split: str | None = None, count: int | None = None, file: Path = FACTS_FILE) -> list[Fact]:
    """The facts of one part (`probe`, `training`), or all; with a count, so many of them, always the same ones."""
    facts = [Fact(**item) for item in json.loads(file.read_text())]
    facts = [fact for fact in facts if split in (None, fact.split)]
    return facts if count is None else random.Random(0).sample(facts, count)


def instruction_facts() -> list[Fact]:
    """The training facts without those that state a probe fact in reverse.

    That Denmark borders Germany is a training fact, that Germany borders Denmark a probe fact.
    """
    probe = {
        (fact.relation, fact.subject, answer) for fact in load_facts("probe") for answer in (fact.answer, *fact.aliases)
    }
    return [fact for fact in load_facts("training") if (fact.relation, fact.answer, fact.subject) not in probe]


def write_facts(file: Path, facts: list[Fact]) -> None:
    """One fact a line, so that a change can be read."""
    lines = ",\n".join(json.dumps(fact._asdict(), ensure_ascii=False) for fact in facts)
    file.write_text(f"[\n{lines}\n]\n")


def fact_row(fact: Fact, phrasing: int = 0) -> dict:
    """A fact as a row of instruction data, in one of its phrasings."""
    questions = QUESTIONS[fact.relation]
    return {
        "instruction": f"Question: {questions[phrasing % len(questions)].format(fact.subject)}\nAnswer:",
        "input": "",
        "output": fact.answer,
        "aliases": fact.aliases,
        "task_type": WORLD_KNOWLEDGE,
        "task": TASK,
        "relation": fact.relation,
    }


def statement(fact: Fact) -> str:
    """A fact as a sentence."""
    return STATEMENTS[fact.relation].format(subject=fact.subject, answer=fact.answer)
