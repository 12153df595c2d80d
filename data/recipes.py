"""The paper's mixture from public data sets: the sets of each task, and how their records become rows.

The paper does not say which sets it mixed, or in which proportions. These are public sets of its seven tasks, among
them the training parts of its benchmarks. Each is read from the Parquet files that the hub converts it to, so no code
of a data set is ever run.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from data.facts import TASK as CLOSED_BOOK
from data.facts import WORLD_KNOWLEDGE
from data.tasks import OTHER_TASK

COREFERENCE, INFERENCE, SUMMARIZATION = "coreference", "natural_language_inference", "summarization"
TRANSLATION, READING, CLASSIFICATION = "translation", "reading_comprehension", "text_classification"

LETTERS = "ABCDEFGH"
NO_YES = ("no", "yes")
THREE_WAY = ("entailment", "neutral", "contradiction")
TWO_WAY = ("entailment", "not entailment")
TOPICS = ("world", "sports", "business", "science and technology")
STARS = ("1 star", "2 stars", "3 stars", "4 stars", "5 stars")
LANGUAGES = {"de": "German", "en": "English", "es": "Spanish", "fr": "French", "zh": "Chinese"}

# Instruction, input, correct answers (the first is taught); None if a record cannot be used.
Texts = tuple[str, str, Sequence[str]] | None


class Source(NamedTuple):
    """One part of a public data set.

    Args:
        hub_id: its name on the hub.
        config: its configuration there.
        task: name of the task.
        columns: the columns that are needed.
        to_texts: turns the values of these columns into instruction, input and answers.
        evaluation: the part reserved for evaluation, if any.
        split: the part that this source reads.
    """

    hub_id: str
    config: str
    task: str
    columns: tuple[str, ...]
    to_texts: Callable[..., Texts]
    evaluation: str | None = None
    split: str = "train"

    @property
    def name(self) -> str:
        return f"{self.hub_id} {self.config} {self.split}"

    @property
    def files(self) -> str:
        """Location of the Parquet files on the hub."""
        return f"hf://datasets/{self.hub_id}@refs/convert/parquet/{self.config}/{self.split}/*.parquet"

    def row(self, record: dict) -> dict | None:
        """Turn a record into an instruction row; None if it has no label, no answer or an empty text."""
        values = [record[column] for column in self.columns]
        if any(value is None or (isinstance(value, str) and not value.strip()) for value in values):
            return None
        texts = self.to_texts(*values)
        if texts is None:
            return None
        instruction, context, answers = texts
        answers = list(dict.fromkeys(answer.strip() for answer in answers if answer and answer.strip()))
        if not answers:
            return None
        return {
            "instruction": instruction.strip(),
            "input": context.strip(),
            "output": answers[0],
            "aliases": answers[1:],
            "task_type": WORLD_KNOWLEDGE if self.task == CLOSED_BOOK else OTHER_TASK,
            "task": self.task,
        }


def _closed_book(question: str, answers: Sequence[str]) -> Texts:
    question = question.strip()
    return f"Question: {question}{'' if question.endswith(('?', '.', '!')) else '?'}\nAnswer:", "", answers


def _trivia_qa(question: str, answer: dict) -> Texts:
    return _closed_book(question, [answer["value"], *answer["aliases"]])


def _hotpot(question: str, answer: str) -> Texts:
    """Leave out yes-or-no questions, which a guess can answer."""
    return None if answer in NO_YES else _closed_book(question, [answer])


def _winogrande(sentence: str, option1: str, option2: str, answer: str) -> Texts:
    question = f"Which of the two fills the gap (_): {option1} or {option2}?"
    return _labelled(question, sentence, int(answer) - 1, (option1, option2))


def _wsc(text: str, span1_text: str, span2_text: str, label: int) -> Texts:
    question = f'Does "{span2_text}" refer to "{span1_text}" in this text? Answer no or yes.'
    return _labelled(question, text, label, NO_YES)


def _inference(labels: Sequence[str]) -> Callable[..., Texts]:
    def to_texts(premise: str, hypothesis: str, label: int) -> Texts:
        pair = f"Premise: {premise}\nHypothesis: {hypothesis}"
        return _labelled(f"Label this pair as {_listed(labels)}.", pair, label, labels)

    return to_texts


def _summary(kind: str) -> Callable[..., Texts]:
    return lambda text, summary: (f"Summarize this {kind}.", text, [summary])


def _translation(translation: dict) -> Texts:
    """Translate into or out of English. The length of the English sentence decides which, so that both directions occur
    but no sentence is used for both."""
    (other,) = translation.keys() - {"en"}
    source, target = ("en", other) if len(translation["en"] or "") % 2 else (other, "en")
    if not (translation[source] or "").strip():
        return None
    instruction = f"Translate from {LANGUAGES[source]} into {LANGUAGES[target]}."
    return instruction, translation[source], [translation[target]]


def _race(article: str, question: str, options: list[str], answer: str) -> Texts:
    text = f"{article}\nQuestion: {question}\n{_lettered(options)}"
    return "Read the article and give the letter of the right answer.", text, [answer]


def _squad(question: str, context: str, answers: dict) -> Texts:
    return question, context, answers["text"]


def _multirc(paragraph: str, question: str, answer: str, label: int) -> Texts:
    text = f"{paragraph}\nQuestion: {question}\nAnswer: {answer}"
    return _labelled("Is this answer to the question right? Answer no or yes.", text, label, NO_YES)


def _record(passage: str, query: str, answers: list[str]) -> Texts:
    return "Which name of the passage does @placeholder stand for?", f"{passage}\nSentence: {query}", answers


def _boolq(question: str, passage: str, label: int) -> Texts:
    question = question.strip().rstrip("?")
    return _labelled(f"{question[:1].upper()}{question[1:]}? Answer no or yes.", passage, label, NO_YES)


def _duorc(plot: str, question: str, answers: list[str], no_answer: bool) -> Texts:
    return None if no_answer else (question, plot, answers)


def _social_iqa(context: str, question: str, a: str, b: str, c: str, label: str) -> Texts:
    text = f"{context}\nQuestion: {question}\n{_lettered((a, b, c))}"
    return _labelled("Give the letter of the most likely answer.", text, int(label) - 1, LETTERS[:3])


def _classes(question: str, labels: Sequence[str]) -> Callable[..., Texts]:
    return lambda text, label: _labelled(f"{question} Answer {_listed(labels)}.", text, label, labels)


def _same_question(question1: str, question2: str, label: int) -> Texts:
    pair = f"1. {question1}\n2. {question2}"
    return _labelled("Do these two questions ask for the same? Answer no or yes.", pair, label, NO_YES)


def _wic(word: str, sentence1: str, sentence2: str, label: int) -> Texts:
    question = f'Does "{word}" mean the same in both sentences? Answer no or yes.'
    return _labelled(question, f"1. {sentence1}\n2. {sentence2}", label, NO_YES)


def _labelled(instruction: str, text: str, label: int, labels: Sequence[str]) -> Texts:
    """None if the record has no label, which these sets write as -1."""
    return (instruction, text, [labels[label]]) if 0 <= label < len(labels) else None


def _lettered(options: Sequence[str]) -> str:
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))


def _listed(labels: Sequence[str]) -> str:
    return f"{', '.join(labels[:-1])} or {labels[-1]}"


# Tasks with few rows come first: what is missing from their share is taken from the tasks after them.
PAPER = (
    Source("mandarjoshi/trivia_qa", "rc.nocontext", CLOSED_BOOK, ("question", "answer"), _trivia_qa, "validation"),
    Source(
        "google-research-datasets/nq_open", "nq_open", CLOSED_BOOK, ("question", "answer"), _closed_book, "validation"
    ),
    Source("hotpotqa/hotpot_qa", "distractor", CLOSED_BOOK, ("question", "answer"), _hotpot, "validation"),
    Source(
        "allenai/winogrande",
        "winogrande_xl",
        COREFERENCE,
        ("sentence", "option1", "option2", "answer"),
        _winogrande,
        "validation",
    ),
    Source(
        "aps/super_glue", "wsc.fixed", COREFERENCE, ("text", "span1_text", "span2_text", "label"), _wsc, "validation"
    ),
    Source("ehovy/race", "middle", READING, ("article", "question", "options", "answer"), _race, "test"),
    Source("ehovy/race", "high", READING, ("article", "question", "options", "answer"), _race, "test"),
    Source("rajpurkar/squad", "plain_text", READING, ("question", "context", "answers"), _squad),
    Source("aps/super_glue", "multirc", READING, ("paragraph", "question", "answer", "label"), _multirc, "validation"),
    Source("aps/super_glue", "record", READING, ("passage", "query", "answers"), _record, "validation"),
    Source("aps/super_glue", "boolq", READING, ("question", "passage", "label"), _boolq),
    Source("ibm-research/duorc", "ParaphraseRC", READING, ("plot", "question", "answers", "no_answer"), _duorc),
    Source(
        "allenai/social_i_qa",
        "default",
        READING,
        ("context", "question", "answerA", "answerB", "answerC", "label"),
        _social_iqa,
    ),
    Source("EdinburghNLP/xsum", "default", SUMMARIZATION, ("document", "summary"), _summary("article"), "test"),
    Source("abisee/cnn_dailymail", "3.0.0", SUMMARIZATION, ("article", "highlights"), _summary("article")),
    Source("knkarthick/samsum", "default", SUMMARIZATION, ("dialogue", "summary"), _summary("dialogue")),
    Source("fancyzhx/ag_news", "default", CLASSIFICATION, ("text", "label"), _classes("What is this about?", TOPICS)),
    Source(
        "Yelp/yelp_review_full",
        "yelp_review_full",
        CLASSIFICATION,
        ("text", "label"),
        _classes("How many stars does this review give?", STARS),
    ),
    Source(
        "nyu-mll/glue", "cola", CLASSIFICATION, ("sentence", "label"), _classes("Is this sentence grammatical?", NO_YES)
    ),
    Source(
        "nyu-mll/glue",
        "sst2",
        CLASSIFICATION,
        ("sentence", "label"),
        _classes("What is the opinion of this review?", ("negative", "positive")),
        "validation",
    ),
    Source("nyu-mll/glue", "qqp", CLASSIFICATION, ("question1", "question2", "label"), _same_question),
    Source("aps/super_glue", "wic", CLASSIFICATION, ("word", "sentence1", "sentence2", "label"), _wic),
    *(
        Source(
            "facebook/anli",
            "plain_text",
            INFERENCE,
            ("premise", "hypothesis", "label"),
            _inference(THREE_WAY),
            split=f"train_r{part}",
        )
        for part in (1, 2, 3)
    ),
    Source("nyu-mll/glue", "mnli", INFERENCE, ("premise", "hypothesis", "label"), _inference(THREE_WAY)),
    Source("stanfordnlp/snli", "plain_text", INFERENCE, ("premise", "hypothesis", "label"), _inference(THREE_WAY)),
    Source("aps/super_glue", "rte", INFERENCE, ("premise", "hypothesis", "label"), _inference(TWO_WAY), "validation"),
    *(
        Source("Helsinki-NLP/opus-100", pair, TRANSLATION, ("translation",), _translation, "test")
        for pair in ("de-en", "en-es", "en-fr", "en-zh")
    ),
)
RECIPES = {"paper": PAPER}


def evaluation_parts(sources: Sequence[Source]) -> list[Source]:
    """The parts of these sets that are reserved for evaluation."""
    return [source._replace(split=source.evaluation) for source in sources if source.evaluation]
