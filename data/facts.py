"""Real facts as closed-book questions: probe facts measure what a model knows; training facts become rows of
task type 1 (world knowledge).

A probe fact never occurs in an example for instruction tuning. The two parts have no country or chemical element in
common, so no training fact reveals a probe fact indirectly (through a city's country or a country's capital). Only
borders are symmetric: see `instruction_facts`.
"""

import json
import random
from pathlib import Path
from typing import NamedTuple

FACTS_FILE = Path(__file__).parent / "world_facts" / "facts.json"
WORLD_KNOWLEDGE = 1
TASK = "closed_book_qa"

# Several phrasings of each relation. `STATEMENTS` are for pretraining.
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
        subject: the thing asked about.
        answer: the answer that the model is taught.
        aliases: other correct answers.
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
    """Load the facts of one part (`probe` or `training`), or all; `count` limits them to a fixed random sample."""
    facts = [Fact(**item) for item in json.loads(file.read_text())]
    facts = [fact for fact in facts if split in (None, fact.split)]
    return facts if count is None else random.Random(0).sample(facts, count)


def instruction_facts() -> list[Fact]:
    """The training facts, except those whose reverse is a probe fact.

    "Denmark borders Germany" may not be taught if "Germany borders Denmark" is probed.
    """
    probe = {
        (fact.relation, fact.subject, answer) for fact in load_facts("probe") for answer in (fact.answer, *fact.aliases)
    }
    return [fact for fact in load_facts("training") if (fact.relation, fact.answer, fact.subject) not in probe]


def write_facts(file: Path, facts: list[Fact]) -> None:
    """Write one fact per line, which keeps diffs readable."""
    lines = ",\n".join(json.dumps(fact._asdict(), ensure_ascii=False) for fact in facts)
    file.write_text(f"[\n{lines}\n]\n")


def fact_row(fact: Fact, phrasing: int = 0) -> dict:
    """An instruction row that asks for a fact in one of its phrasings."""
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
