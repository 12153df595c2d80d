"""Metrics of texts against hand-made values and the packages' own numbers; intervals."""

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu, corpus_chrf

from inference.metrics import (
    corpus_estimate,
    exact_match,
    mean_estimate,
    normalized,
    ratio_estimate,
    rouge_l,
    token_f1,
)

ANSWERS = ["the cat sat on the mat today", "a dog lay in the warm sun", "it rains again in London"]
REFERENCES = [
    ["the cat sat on the mat"],
    ["the dog lay in the sun", "a dog lay in the sun"],
    ["it is raining in London"],
]


def test_the_normalisation_is_squads():
    assert normalized("  The U.S., and  a Theory!") == "us and theory"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("", "A"), ("The", "A"), ("B", "A, B"), ("B", "A and B"), ("Answer:", "Answer: A"), ("-", "+"), ("<", ">"),
        ("15", "1.5"), ("5", "-5"), ("+5", "-5"), ("5", ".5"), ("12", "1,2"), ("330", "3:30"), ("12", "1/2"),
        ("x < y", "x > y"), ("C", "C++"), ("C#", "C++"), ("A", "A-"), ("3 2", "3 - 2"), ("Paris", "A) Paris"),
        ("Paris", "(A) Paris"), ("Paris", "A. Paris"), ("B) Paris", "A) Paris"), ("Is it? Yes", "Is it A? Yes"),
        ("Paris", "An: Paris"),
    ],
)  # fmt: skip
def test_labels_and_numbers_stay_apart(answer, expected):
    assert exact_match(answer, [expected]) == 0
    assert token_f1(answer, [expected]) < 1
    assert exact_match(f" {expected}\n", [expected]) == exact_match(expected.lower(), [expected]) == 1


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("(a)", "A"), ("A.", "A"), ("a dog", "dog"), ("1,234,567", "1234567"), ("+5", "5"), ("$5.", "5"), ("50%", "50"),
        ("Paris--", "Paris"), ('"The Nile"', "nile"), ("rock'n'the roll", "rocknthe roll"),
        ("COVID-19", "covid19"), ("'tis well-known", "tis wellknown"), ("a -- dash", "dash"), ("one--two", "onetwo"),
    ],
)  # fmt: skip
def test_other_punctuation_and_articles_are_removed_as_in_squad(answer, expected):
    assert exact_match(answer, [expected]) == token_f1(answer, [expected]) == 1


@pytest.mark.parametrize(
    ("answer", "references", "exact", "f1"),
    [
        ("The Nile.", ["nile"], 1, 1),
        ("nile", ["Amazon", "the Nile"], 1, 1),
        ("the river Nile", ["Nile"], 0, 2 / 3),
        ("Nile Nile", ["Nile"], 0, 2 / 3),
        ("", ["Nile"], 0, 0),
        ("the", ["an"], 0, 0),
    ],
)
def test_exact_match_and_f1(answer, references, exact, f1):
    assert exact_match(answer, references) == exact
    assert token_f1(answer, references) == pytest.approx(f1)


def test_rouge_l_is_the_packages_number_for_the_best_reference():
    scorer = RougeScorer(["rougeL"])
    for answer, references in zip(ANSWERS, REFERENCES, strict=True):
        expected = max(scorer.score(reference, answer)["rougeL"].fmeasure for reference in references)
        assert 0 < rouge_l(answer, references) == pytest.approx(expected)


def test_chrf_and_bleu_are_the_packages_numbers():
    streams = [["the cat sat on the mat", "the dog lay in the sun", "it is raining in London"],
               [None, "a dog lay in the sun", None]]  # fmt: skip
    chrf, bleu = (corpus_estimate(name, ANSWERS, REFERENCES, seed=0) for name in ("chrf", "bleu"))
    assert chrf.value == pytest.approx(corpus_chrf(ANSWERS, streams).score)
    assert bleu.value == pytest.approx(corpus_bleu(ANSWERS, streams).score)
    for estimate in (chrf, bleu):
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 100
    assert corpus_estimate("chrf", ANSWERS, REFERENCES, seed=0) == chrf


def test_bleu_of_answers_that_share_nothing_with_what_was_expected():
    estimate = corpus_estimate("bleu", ["one", "two"], [["three"], ["two"]], seed=0)
    assert (estimate.low, estimate.value) == (0, pytest.approx(corpus_bleu(["one", "two"], [["three", "two"]]).score))


def test_a_ratio_weighs_rows_by_their_size():
    assert ratio_estimate([6, 1], [2, 1], seed=0).value == pytest.approx(7 / 3)


def test_the_interval_is_seeded_and_of_the_right_width():
    values = np.random.default_rng(0).normal(size=400).tolist()
    estimate = mean_estimate(values, seed=3)
    assert estimate == mean_estimate(values, seed=3) != mean_estimate(values, seed=4)
    assert estimate.value == pytest.approx(np.mean(values))
    expected = 2 * 1.96 * np.std(values) / 400**0.5
    assert estimate.high - estimate.low == pytest.approx(expected, rel=0.1)


def test_one_row_has_an_interval_of_no_width():
    estimate = mean_estimate([1], seed=0)
    assert (estimate.low, estimate.value, estimate.high) == (1, 1, 1)
