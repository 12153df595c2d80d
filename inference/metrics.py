"""Metrics of answers, and their confidence intervals.

A row's references are its expected answer and the aliases of it; the best match among them counts.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache

import numpy as np

RESAMPLES = 1000
CONFIDENCE = 0.95

PUNCTUATION = f"[{re.escape(string.punctuation)}]"
# Commas between thousands, and the plus sign of a number: the number is the same without them.
SURPLUS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))|(?<![\w+])\+(?=\$?\.?\d)")
# Punctuation that distinguishes answers, by its context.
TELLING = re.compile(
    rf"""(?<=\d){PUNCTUATION}(?=\d)      # within a number, a time or a range: 1.5, 3:30, 2010-12
    | (?<![\w-])-(?=\$?\.?\d)           # the sign of a number: -5
    | (?<![\w.])\.(?=\d)                # a decimal point without a zero before it: .5
    | (?<=\w)([+\#]+|-)(?![\w+\#-])    # the end of a name: C++, C#, A-
    | (?<=\d\ )-(?=\ \$?\.?\d)         # a minus between numbers
    | (?<!\S)[<>=+*/^]+(?!\S)          # an operator that stands alone""",
    re.VERBOSE,
)
# "a" is a label unless it is followed by a word that it could be the article of.
ARTICLE = re.compile(r"\b(an|the)\b|\ba\b(?=\s+(?!(and|or|[a-z])\b)\w)")


@dataclass(frozen=True)
class Estimate:
    """A measured value with the bounds of its confidence interval (95 %)."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def normalized(text: str) -> str:
    """A text in lower case, without punctuation, articles and extra white space.

    This is SQuAD's normalisation, except that it keeps what distinguishes short answers: `TELLING` punctuation, labels
    that are spelt like articles, and texts of only punctuation or articles, so that no answer becomes empty.
    """
    text = " ".join(SURPLUS.sub("", text.lower()).split())
    telling = {match.start() + offset for match in TELLING.finditer(text) for offset in range(len(match[0]))}
    kept = [place for place, character in enumerate(text) if place in telling or character not in string.punctuation]

    def without_article(match: re.Match) -> str:
        """A space for an article; a word followed by punctuation is a label, and is kept."""
        end = kept[match.end() - 1] + 1
        return match[0] if text[end : end + 1].strip() else " "

    words = "".join(text[place] for place in kept)
    without_articles = ARTICLE.sub(without_article, words)
    return next(filter(None, (" ".join(each.split()) for each in (without_articles, words, text))), "")


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the normalised texts are equal, else 0."""
    return float(any(normalized(answer) == normalized(reference) for reference in references))


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over the words of the normalised texts, counted with repetitions."""
    return max(_f1(normalized(answer).split(), normalized(reference).split()) for reference in references)


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """F-measure of the longest common subsequence of words, from the package rouge-score without stemming."""
    return _rouge().score_multi(references, answer)["rougeL"].fmeasure


TEXT_METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "f1": token_f1,
    "rouge_l": rouge_l,
}
CORPUS_METRICS = ("chrf", "bleu")
# The packages of some metrics; they are imported only for these.
PACKAGE_OF = {"rouge_l": "rouge-score", "chrf": "sacrebleu", "bleu": "sacrebleu"}


def corpus_estimate(name: str, answers: Sequence[str], references: Sequence[Sequence[str]], seed: int) -> Estimate:
    """chrF or BLEU of all answers together, from sacreBLEU with its defaults, on its scale of 0 to 100."""
    from sacrebleu.metrics import BLEU, CHRF

    most = max(map(len, references))
    streams = [[each[place] if place < len(each) else None for each in references] for place in range(most)]
    metric = {"chrf": CHRF, "bleu": BLEU}[name]()
    # sacreBLEU's public bootstrap mixes Python's floats with numpy's, and fails if a resample scores 0.
    counts_NC = np.array(metric._extract_corpus_statistics(answers, streams))
    return _estimate(counts_NC, lambda sums_C: metric._compute_score_from_stats(sums_C.tolist()).score, seed)


def ratio_estimate(numerators: Sequence[float], denominators: Sequence[float], seed: int) -> Estimate:
    """The sum of the numerators over the sum of the denominators."""
    values_N2 = np.array([numerators, denominators], dtype=np.float64).T
    return _estimate(values_N2, lambda sums_2: sums_2[0] / sums_2[1], seed)


def mean_estimate(values: Sequence[float], seed: int) -> Estimate:
    """The mean over rows."""
    return ratio_estimate(values, [1.0] * len(values), seed)


def _estimate(counts_NC: np.ndarray, score: Callable[[np.ndarray], float], seed: int) -> Estimate:
    """A score computed from sums over rows, with its interval from the percentile bootstrap over rows."""
    generator = np.random.default_rng(seed)
    rows = len(counts_NC)
    scores = [score(counts_NC[generator.integers(rows, size=rows)].sum(axis=0)) for _ in range(RESAMPLES)]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(scores, [tail, 1 - tail])
    return Estimate(float(score(counts_NC.sum(axis=0))), float(low), float(high))


def _f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    shared = sum((Counter(answer) & Counter(reference)).values())
    return 2 * shared / (len(answer) + len(reference))


@cache
def _rouge():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"])
