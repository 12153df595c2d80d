"""Probe facts that training rows tell: such a fact says nothing about what a model keeps."""

from collections import Counter, defaultdict
from itertools import chain

from datasets import Dataset

from data import turns_before_answer
from data.probe import ProbeFact
from inference.metrics import normalized


def told_facts(facts: list[ProbeFact], rows: Dataset) -> set[int]:
    """Indices of the facts that encoded rows tell.

    A row tells a fact if its prompt contains the fact's question; or if the prompt names the fact's subject and the
    answer names the fact's answer, or the other way round ("Denmark borders Germany" tells a neighbour of Germany).
    Texts are compared as whole words, `normalized`.
    """
    questions = [normalized(fact.question.messages[-1]["content"]) for fact in facts]
    subjects = [normalized(fact.subject) if fact.subject else "" for fact in facts]
    answers = [{normalized(answer) for answer in fact.answers} for fact in facts]
    phrases = _Phrases({*questions, *subjects, *chain(*answers)} - {""})
    asked, named = _places(questions), _places(subjects)
    told: set[int] = set()
    for row in rows.select_columns(["turns", "tools", "output"]):
        turns = [(turn["role"], turn["content"] or "") for turn in turns_before_answer(row).messages]
        prompt = phrases.of(" ".join(text for role, text in turns if role != "assistant"))
        output = phrases.of(" ".join([row["output"], *(text for role, text in turns if role == "assistant")]))
        told.update(*(asked[phrase] for phrase in prompt))
        for one, other in ((prompt, output), (output, prompt)):
            about = chain.from_iterable(named[phrase] for phrase in one)
            told.update(index for index in about if answers[index] & other)
    return told


class _Phrases:
    """Finds which of many phrases a text contains. Each is looked for only in texts with its rarest word."""

    def __init__(self, phrases: set[str]):
        counts = Counter(word for phrase in phrases for word in set(phrase.split()))
        self._by_word: defaultdict[str, list[str]] = defaultdict(list)
        for phrase in phrases:
            self._by_word[min(phrase.split(), key=lambda word: (counts[word], word))].append(phrase)

    def of(self, text: str) -> set[str]:
        words = normalized(text).split()
        padded = f" {' '.join(words)} "
        candidates = chain.from_iterable(self._by_word.get(word, ()) for word in set(words))
        return {phrase for phrase in candidates if f" {phrase} " in padded}


def _places(phrases: list[str]) -> defaultdict[str, list[int]]:
    places = defaultdict(list)
    for index, phrase in enumerate(phrases):
        if phrase:
            places[phrase].append(index)
    return places
