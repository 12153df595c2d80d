"""Probe facts that training rows reveal: such a fact says nothing about what a model keeps."""

import hashlib
import json
import re
import string
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset

from data import turns_before_answer
from data.atomic import write_json
from data.probe import ProbeFact
from inference.metrics import normalized

RULE_VERSION = 2  # part of the names of cached results: raise it when `Contamination` finds others
ROWS_AT_ONCE = 1000
# Not after initials and "St.".
SENTENCE_END = re.compile(r"""(?<=[.!?])(?<!\b[A-Z]\.)(?<!\bSt\.)["')\]]*\s+|\n""")
POSSESSIVE = re.compile(r"'s\b")
# Symbols and counts, which occur in texts on anything ("as", "I", "8").
SHORT = re.compile(r"[a-z]{1,2}|\d{1,3}")
# Punctuation outside ASCII as what is like it in ASCII; `normalized` removes only that.
IN_ASCII = str.maketrans({**dict.fromkeys("“”„«»", '"'), **dict.fromkeys("‘’", "'"), **dict.fromkeys("–—…", " ")})
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Contamination:
    """Finds facts that a row of training data reveals.

    A row reveals a fact if one of its texts contains the fact's question, or if it names the fact's subject and an
    answer to it

    - in one sentence of its output ("The capital of Belgium is Brussels."), or
    - one in its prompt and the other in its output, in either direction: "Denmark borders Germany" reveals a neighbour
      of Germany.

    Texts are compared as whole words, `normalized`, and without the "'s" of possessives. An answer of one or two
    letters or up to three digits (a chemical symbol, a count) occurs in texts on anything. So it has to be spelt as in
    the fact, "As" and not "as", and across prompt and output it counts only if the output has a line with nothing but
    the answer, in either case, or nothing but the subject.

    The rule errs on the side of finding too much, since other facts can be asked instead. It cannot tell which of
    several things in a prompt an answer is about: "Is Belgium smaller than Peru?" with "In Haiti people speak French."
    reveals, to it, an official language of Belgium.

    Args:
        facts: to look for.
    """

    def __init__(self, facts: list[ProbeFact]):
        self._facts = [_Phrases.of(fact) for fact in facts]
        phrases = [
            (index, words)
            for index, fact in enumerate(self._facts)
            for words in (fact.question_words, fact.subject_words)
            if words
        ]
        counts = Counter(word for _, words in phrases for word in words)
        # Facts by the rarest word of their question, and by that of their subject.
        self._by_word: defaultdict[str, set[int]] = defaultdict(set)
        for index, words in phrases:
            self._by_word[min(words, key=lambda word: (counts[word], word))].add(index)

    def of(self, prompt: str, output: str) -> set[int]:
        """Indices of the facts that a row reveals.

        Args:
            prompt: all of its text that a model does not learn to write.
            output: the text that it learns to write; if there are several answers, each on a separate line.
        """
        words = _words(f"{prompt} {output}")
        candidates = set().union(*(self._by_word[word] for word in words & self._by_word.keys()))
        candidates = {index for index in candidates if self._facts[index].may_be_in(words)}
        if not candidates:
            return candidates
        row = _Row(prompt, output)
        return {index for index in candidates if row.reveals(self._facts[index])}


def revealed_facts(facts: list[ProbeFact], rows: Dataset, data_sha256: str) -> set[int]:
    """Indices of the facts that encoded rows reveal, by `Contamination`.

    The result is kept next to the rows in the cache of encoded data.

    Args:
        data_sha256: of the rows, from their `DataStatistics`.
    """
    files = [Path(each["filename"]) for each in rows.cache_files]
    # An entry of the cache is named by all that its rows depend on. Of a mix, the hash says which of them are taken.
    key = json.dumps([RULE_VERSION, data_sha256, [file.parent.name for file in files], facts], default=vars)
    name = f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.revealed.json"
    cached = files[0].parent.with_name(name) if files else None
    if cached:
        with suppress(OSError, ValueError, KeyError):
            return set(json.loads(cached.read_bytes())["revealed"])
    contamination = Contamination(facts)
    found: set[int] = set()
    for prompt, output in _texts(rows):
        found |= contamination.of(prompt, output)
    if cached:
        with suppress(OSError):  # a cache that cannot be written costs time only
            write_json(cached, {"revealed": sorted(found)})
    return found


class _Answer(NamedTuple):
    """An expected answer: as it is written, and as it is looked for."""

    text: str
    phrase: str

    @property
    def is_short(self) -> bool:
        return bool(SHORT.fullmatch(self.phrase))


class _Phrases(NamedTuple):
    """A fact as it is looked for: question and subject, empty if there is none, and the answers; and their words."""

    question: str
    subject: str
    answers: list[_Answer]
    question_words: frozenset[str]
    subject_words: frozenset[str]
    answers_words: list[frozenset[str]]

    @classmethod
    def of(cls, fact: ProbeFact) -> "_Phrases":
        question = _plain(fact.bare_question)
        subject = _plain(fact.subject or "")
        answers = [_Answer(answer.strip(), _plain(answer)) for answer in fact.answers]
        return cls(question, subject, answers, _words(question), _words(subject), [_words(each[1]) for each in answers])

    def may_be_in(self, words: frozenset[str]) -> bool:
        """False if a text with these words cannot reveal the fact."""
        if self.question_words and self.question_words <= words:
            return True
        return bool(self.subject) and self.subject_words <= words and any(each <= words for each in self.answers_words)


class _Text:
    """A text in which phrases are looked for."""

    def __init__(self, text: str):
        self._text = text
        self._padded = f" {_plain(text)} "

    def names(self, phrase: str) -> bool:
        return f" {phrase} " in self._padded

    def answers(self, answer: _Answer) -> bool:
        return self.names(answer.phrase) and (
            not answer.is_short or bool(re.search(rf"(?<!\w){re.escape(answer.text)}(?!\w)", self._text))
        )


class _Row:
    """The texts of a row, in which facts are looked for."""

    def __init__(self, prompt: str, output: str):
        self._prompt, self._output = _Text(prompt), _Text(output)
        self._lines = {_plain(line) for line in output.splitlines()}
        self._sentences = [_Text(sentence) for sentence in SENTENCE_END.split(output) if sentence]

    def reveals(self, fact: _Phrases) -> bool:
        if fact.question and (self._prompt.names(fact.question) or self._output.names(fact.question)):
            return True
        return bool(fact.subject) and any(self._relates(fact.subject, answer) for answer in fact.answers)

    def _relates(self, subject: str, answer: _Answer) -> bool:
        if any(sentence.names(subject) and sentence.answers(answer) for sentence in self._sentences):
            return True
        says = self._lines.__contains__ if answer.is_short else self._output.names
        return (self._prompt.names(subject) and says(answer.phrase)) or (self._prompt.answers(answer) and says(subject))


def _plain(text: str) -> str:
    """A text `normalized`, and without the "'s" of possessives."""
    return normalized(POSSESSIVE.sub("", text.translate(IN_ASCII)))


def _words(text: str) -> frozenset[str]:
    """The words of a text without any punctuation: all of the `_plain` text's, and a few more."""
    return frozenset(POSSESSIVE.sub("", text.lower().translate(IN_ASCII)).translate(WITHOUT_PUNCTUATION).split())


def _texts(rows: Dataset) -> Iterator[tuple[str, str]]:
    """Prompt and output of each encoded row."""
    for columns in rows.select_columns(["turns", "tools", "output"]).iter(ROWS_AT_ONCE):
        for turns, tools, output in zip(columns["turns"], columns["tools"], columns["output"], strict=True):
            messages = turns_before_answer({"turns": turns, "tools": tools}).messages
            answers = [turn["content"] or "" for turn in messages if turn["role"] == "assistant"]
            others = [turn["content"] or "" for turn in messages if turn["role"] != "assistant"]
            yield "\n".join(others), "\n".join([*answers, output])
