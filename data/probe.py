"""The knowledge probe: closed-book questions with all answers that count, and a text to compare models on."""

import random
import re
from pathlib import Path
from typing import NamedTuple

from data.errors import InputError
from data.facts import fact_row, load_facts
from data.files import find_files, read_block, split_files
from data.formats import Conversation
from data.rows import read_row, refuse_rows, row_problem

AUTO, NONE = "auto", "none"

# Prose on no subject of any probe or task, written for this project, so no model was trained on it.
NEUTRAL_TEXT = """\
The path to the lake begins behind the old mill. It follows the stream for a while, crosses it on a wooden bridge, \
and then climbs slowly between the trees. In spring the ground is soft there, and it is better to wear boots. After \
half an hour you reach a clearing with a bench, from which you can see the roofs of the village and, on clear days, \
the hills on the other side of the valley. Most people rest there before they go on. The last part is the steepest, \
but it is short, and at the end the water lies in front of you all at once, still and green. My grandmother used to \
say that nobody who had walked up there could stay angry for long. She went every Sunday, whatever the weather was \
like, with a bag of apples and a book that she never opened. When I asked her why she carried it, she laughed and \
told me that a person with a book is left alone.
"""


# What `fact_row` of data/facts.py writes around a question.
WRAPPER = re.compile(r"^\s*question:|\banswer:\s*$", re.IGNORECASE)


class ProbeFact(NamedTuple):
    """One question of the probe.

    Args:
        question: the conversation before the answer.
        answers: the expected answer and its aliases.
        subject: the thing asked about, if it is known: rows that name it together with an answer reveal the fact, too.
    """

    question: Conversation
    answers: list[str]
    subject: str | None = None

    @property
    def bare_question(self) -> str:
        """The last turn before the answer, without the words "Question:" and "Answer:" around it."""
        return WRAPPER.sub("", self.question.messages[-1]["content"]).strip()


def load_probe(place: str) -> list[ProbeFact]:
    """All facts of a probe, in the order of their files.

    Args:
        place: `auto` for the probe facts of `data/world_facts`; or a file or folder of rows, which may have `aliases`
            and a `subject`.

    Raises:
        InputError: a file or a row cannot be used, or there are none.
    """
    if place == AUTO:
        return [_fact(fact_row(fact) | {"subject": fact.subject}) for fact in load_facts("probe")]
    return _read(place)


def asking_order(total: int, count: int) -> list[int]:
    """Indices of all facts in a random but fixed order, of which the first `count` are the sample of `load_facts`."""
    first = random.Random(0).sample(range(total), min(count, total))
    others = sorted(set(range(total)) - set(first))
    return first + random.Random(0).sample(others, len(others))


def _read(place: str) -> list[ProbeFact]:
    facts, problems = [], []
    for block in split_files(find_files(Path(place))):
        for number, row in read_block(block):
            try:
                facts.append(_fact(row))
            except InputError as error:
                problems.append(f"{block.file}: row {number}: {error}")
    refuse_rows(problems)
    if not facts:
        raise InputError(f"{place}: there are no rows")
    return facts


def _fact(row: object) -> ProbeFact:
    """The fact of a row, whose task type does not matter. Raises InputError if the row is invalid."""
    if isinstance(row, dict):
        row = {name: value for name, value in row.items() if name != "task_type"}
    if problem := row_problem(row, num_task_types=1):
        raise InputError(problem)
    assert isinstance(row, dict)
    subject = row.get("subject")
    if subject is not None and not isinstance(subject, str):
        raise InputError(f"'subject' is {subject!r}, but has to be a string, or be left out")
    conversation = read_row(row)
    last = conversation.answers[-1]
    question = conversation.until(last)
    answers = [conversation.messages[last]["content"], *(row.get("aliases") or [])]
    if not question.messages[-1]["content"].strip():
        raise InputError("has an empty question, but a fact of a knowledge probe has to ask something")
    if not all(answer.strip() for answer in answers):  # any model gives an empty one
        raise InputError("has an empty answer or alias, but those of a knowledge probe have to be texts")
    return ProbeFact(question, answers, subject)
