"""Generated instruction rows of the paper's six other tasks: any number, offline, without world facts.

Each answer follows from its text by a rule that a small model has to learn: copying the first name or always giving the
most common label does not work. A hash of its text assigns every row to the training or the test part, so the two never
share a text, whatever the seeds and the questions.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Literal

Part = Literal["train", "test"]
OTHER_TASK = 0
TEST_SHARE = 10  # one row in this many belongs to the test part
DRAWS_PER_ROW = 40  # before a task counts as exhausted
# Number of distinct rows that every task has with any seed; coreference has hardly more.
MOST_ROWS: dict[Part, int] = {"train": 54_000, "test": 5_500}

PEOPLE = (
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Henry", "Ida", "Jonas", "Kate", "Leo", "Maria", "Noah",
    "Olga", "Paul", "Rosa", "Simon", "Tara", "Victor",
)  # fmt: skip
ROLES = (
    "nurse", "teacher", "farmer", "baker", "pilot", "lawyer", "singer", "driver", "painter", "tailor", "doctor",
    "clerk", "gardener", "sailor", "plumber", "writer", "judge", "waiter", "cook", "guard",
)  # fmt: skip
OBJECTS = ("book", "key", "apple", "cup", "letter", "ball", "lamp", "coat", "map", "rope", "hat", "clock")
PLACES = ("kitchen", "garden", "office", "hall", "cellar", "library", "garage", "attic", "bedroom", "workshop")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

# Verb, reasons that refer to its subject, reasons that refer to its object.
BECAUSE = (
    ("thanked", ("had received help", "was grateful for the gift"), ("had helped with the move", "had lent the tools")),
    ("apologised to", ("had come too late", "had broken the window"), ("had waited in the rain", "felt offended")),
    ("praised", ("liked the result", "admired good work"), ("had worked so hard", "had won the prize")),
    ("warned", ("had seen the danger", "knew about the ice"), ("was about to slip", "drove too fast")),
    ("paid", ("owed the money", "had ordered the work"), ("had done the work", "had sent the bill")),
    ("blamed", ("needed someone to accuse", "was angry about it"), ("had caused the damage", "had lost the key")),
    ("called", ("wanted to ask something", "needed advice"), ("had left a message", "was known to have the answer")),
    ("envied", ("wished for such luck", "had never won"), ("had won the lottery", "owned a beautiful house")),
    ("comforted", ("had a kind heart", "could not bear the tears"), ("had lost the match", "was crying")),
    ("taught", ("knew the craft well", "had learned it long ago"), ("wanted to learn the craft", "was a beginner")),
)  # fmt: skip
MEASURES = (("taller", "shorter"), ("older", "younger"), ("faster", "slower"), ("richer", "poorer"))
COLOURS = ("red", "green", "blue", "white", "black", "yellow")
GROUPS = ("town council", "school board", "sports club", "reading circle", "village choir", "shop owners' union")
PLANS = (
    ("build a new playground", "playground"), ("repair the old bridge", "bridge"), ("plant fifty trees", "planting"),
    ("open a second library", "library"), ("buy a new bus", "bus"), ("restore the tower", "tower"),
    ("hold a summer festival", "festival"), ("paint the market hall", "paint work"),
)  # fmt: skip
THINGS = ("phone", "hotel", "film", "restaurant", "bicycle", "concert", "jacket", "course")
GOOD = ("wonderful", "excellent", "a delight", "very well made", "worth every coin")
BAD = ("terrible", "a disappointment", "badly made", "far too expensive", "a waste of time")

# English, German, gender. German adjectives are inflected for case and gender.
NOUNS = (
    ("man", "Mann", "m"), ("dog", "Hund", "m"), ("table", "Tisch", "m"), ("tree", "Baum", "m"), ("bird", "Vogel", "m"),
    ("woman", "Frau", "f"), ("cat", "Katze", "f"), ("flower", "Blume", "f"), ("lamp", "Lampe", "f"),
    ("bag", "Tasche", "f"),
    ("child", "Kind", "n"), ("house", "Haus", "n"), ("book", "Buch", "n"), ("horse", "Pferd", "n"),
    ("picture", "Bild", "n"),
)  # fmt: skip
ADJECTIVES = (
    ("old", "alt"), ("small", "klein"), ("big", "groß"), ("new", "neu"), ("beautiful", "schön"), ("quiet", "still"),
    ("good", "gut"), ("young", "jung"), ("strange", "seltsam"), ("white", "weiß"),
)  # fmt: skip
VERBS = (
    ("sees", "sieht"), ("looks for", "sucht"), ("finds", "findet"), ("loves", "liebt"), ("knows", "kennt"),
    ("needs", "braucht"), ("carries", "trägt"), ("paints", "malt"),
)  # fmt: skip
TIMES = (("today", "heute"), ("often", "oft"), ("again", "wieder"), ("every day", "jeden Tag"), ("now", "jetzt"))
ARTICLES = {"m": ("der", "den"), "f": ("die", "die"), "n": ("das", "das")}


def make_rows(task: str, count: int, seed: int, part: Part = "train") -> list[dict]:
    """Make `count` distinct rows of a task; the same arguments give the same rows.

    Args:
        task: a key of `TASKS`.
        seed: random seed.
        part: training or test rows; no row is in both.

    Raises:
        ValueError: the task is unknown or does not have that many distinct rows; every task has `MOST_ROWS`.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; choose from {', '.join(TASKS)}")
    found: dict[str, dict] = {}
    for row in islice(_rows(task, seed), DRAWS_PER_ROW * count):
        if len(found) == count:
            break
        if _part_of(row) == part:
            found.setdefault(row["instruction"] + row["input"], row)
    if len(found) < count:
        raise ValueError(f"{task} has only about {len(found)} distinct rows in its {part} part, not {count}")
    return list(found.values())


def _rows(task: str, seed: int) -> Iterator[dict]:
    generator = random.Random(f"{task} {seed}")
    while True:
        instruction, text, answer = TASKS[task](generator)
        yield {"instruction": instruction, "input": text, "output": answer, "task_type": OTHER_TASK, "task": task}


def _part_of(row: dict) -> Part:
    digest = hashlib.sha256(row["input"].encode()).digest()
    return "test" if digest[0] % TEST_SHARE == 0 else "train"


def _coreference(r: random.Random) -> tuple[str, str, str]:
    """The reason determines which of two people the pronoun refers to."""
    first, second = r.sample(ROLES, 2)
    verb, of_first, of_second = r.choice(BECAUSE)
    is_first, pronoun = r.random() < 0.5, r.choice(("he", "she"))
    text = f"The {first} {verb} the {second} because {pronoun} {r.choice(of_first if is_first else of_second)}."
    question = r.choice(('Who does "{}" refer to in this sentence?', 'To whom does the word "{}" refer?'))
    return question.format(pronoun), text, f"the {first if is_first else second}"


def _inference(r: random.Random) -> tuple[str, str, str]:
    """A chain of two comparisons, or a statement about all or some things in a place."""
    label = r.choice(("entailment", "contradiction", "neutral"))
    premise, hypothesis = r.choice((_comparison, _quantifier))(r, label)
    question = "Does the premise entail the hypothesis, contradict it, or neither (neutral)?"
    return question, f"Premise: {premise}\nHypothesis: {hypothesis}", label


def _comparison(r: random.Random, label: str) -> tuple[str, str]:
    most, middle, least, other = r.sample(PEOPLE, 4)
    more, less = r.sample(r.choice(MEASURES), 2)
    links = [f"{most} is {more} than {middle}.", f"{middle} is {more} than {least}."]
    r.shuffle(links)
    if label == "neutral":
        return " ".join(links), f"{r.choice((most, least))} is {r.choice((more, less))} than {other}."
    words = (more, less) if label == "entailment" else (less, more)
    first, second, word = r.choice(((most, least, words[0]), (least, most, words[1])))
    return " ".join(links), f"{first} is {word} than {second}."


def _quantifier(r: random.Random, label: str) -> tuple[str, str]:
    thing, place = r.choice(OBJECTS), r.choice(PLACES)
    colour, other = r.sample(COLOURS, 2)
    if label == "neutral":
        return f"Some {thing}s in the {place} are {colour}.", f"All {thing}s in the {place} are {colour}."
    premise = f"All {thing}s in the {place} are {colour}."
    true = (f"There is no {other} {thing} in the {place}.", f"Every {thing} in the {place} is {colour}.")
    false = (f"Some {thing}s in the {place} are {other}.", f"No {thing} in the {place} is {colour}.")
    return premise, r.choice(true if label == "entailment" else false)


def _summarization(r: random.Random) -> tuple[str, str, str]:
    """A decision, its date and its cost, from a report that also mentions a rejected plan."""
    group, day = r.choice(GROUPS), r.choice(DAYS)
    (plan, name), (rejected, _) = r.sample(PLANS, 2)
    cost, hours = r.randrange(2, 99) * 100, r.randrange(2, 9)
    sentences = [
        f"Some members had asked to {rejected} instead, but most were against it.",
        f"The {name} will cost {cost} coins.",
        f"It had been raining all week, and only {r.randrange(12, 90)} people came to listen.",
    ]
    r.shuffle(sentences)
    opening = f"The {group} met on {day}. After {hours} hours of talks, a majority voted to {plan}."
    return "Summarize the report in one sentence.", " ".join([opening, *sentences]), (
        f"The {group} decided on {day} to {plan} for {cost} coins."
    )  # fmt: skip


def _translation(r: random.Random) -> tuple[str, str, str]:
    """English to German: articles and adjectives agree in case and gender; the adverb follows the verb."""
    (subject, subject_de, gender), (thing, thing_de, thing_gender) = r.sample(NOUNS, 2)
    (kind, kind_de), (quality, quality_de) = r.sample(ADJECTIVES, 2)
    (verb, verb_de), (time, time_de) = r.choice(VERBS), r.choice(TIMES)
    english = f"The {kind} {subject} {verb} the {quality} {thing} {time}."
    accusative = f"{quality_de}en" if thing_gender == "m" else f"{quality_de}e"
    german = (
        f"{ARTICLES[gender][0].capitalize()} {kind_de}e {subject_de} {verb_de} {time_de} "
        f"{ARTICLES[thing_gender][1]} {accusative} {thing_de}."
    )
    return "Translate into German.", english, german


def _reading_comprehension(r: random.Random) -> tuple[str, str, str]:
    """Two people move around and hand over a thing; the question is where it is or who has it."""
    giver, taker = r.sample(PEOPLE, 2)
    thing, other = r.sample(OBJECTS, 2)
    start, meeting, end = r.sample(PLACES, 3)
    story = [f"{giver} took the {thing} in the {start}.", f"{taker} was in the {meeting} with the {other}."]
    r.shuffle(story)
    story.append(f"Then {giver} went to the {meeting}.")
    handed_over = r.random() < 0.5
    if handed_over:
        story.append(f"{giver} gave the {thing} to {taker}.")
    mover = r.choice((giver, taker))
    story.append(f"After that {mover} walked to the {end}.")
    holder = taker if handed_over else giver
    if r.random() < 0.5:
        return f"Who has the {thing} at the end?", " ".join(story), holder
    return f"Where is the {thing} at the end?", " ".join(story), f"the {end if mover == holder else meeting}"


def _classification(r: random.Random) -> tuple[str, str, str]:
    """A reviewer's own opinion, expressed through a contrast or a negation."""
    thing, likes = r.choice(THINGS), r.random() < 0.5
    good, bad = r.choice(GOOD), r.choice(BAD)
    friend, day = r.choice(PEOPLE), r.choice(DAYS)
    judged, denied = (good, bad) if likes else (bad, good)
    text = r.choice(
        (
            f"{friend} told me the {thing} was {denied}, but when I tried it on {day}, I found it {judged}.",
            f"I had expected the {thing} to be {denied}. On {day} it turned out to be {judged}.",
            f"Although {friend} called the {thing} {denied} on {day}, to me it was {judged}.",
            f"To me the {thing} was {judged}, whatever {friend}, who thinks it is {denied}, said on {day}.",
            f"On {day} {friend} asked about the {thing}. It was certainly not {denied}.",
        )
    )
    return "Is the writer's own opinion positive or negative?", text, "positive" if likes else "negative"


TASKS: dict[str, Callable[[random.Random], tuple[str, str, str]]] = {
    "coreference": _coreference,
    "natural_language_inference": _inference,
    "summarization": _summarization,
    "translation": _translation,
    "reading_comprehension": _reading_comprehension,
    "text_classification": _classification,
}
