"""World facts and the generated tasks."""

from collections import Counter

import pytest
from conftest import ROOT

from data.facts import QUESTIONS, STATEMENTS, fact_row, instruction_facts, load_facts, statement
from data.rows import row_problem
from data.tasks import TASKS, make_rows


def test_there_are_enough_facts_of_enough_kinds():
    facts = load_facts()
    assert len(facts) >= 1500
    assert set(Counter(fact.relation for fact in facts)) == set(QUESTIONS) == set(STATEMENTS)
    assert len(load_facts("probe")) + len(load_facts("training")) == len(facts)
    assert len({(fact.relation, fact.subject) for fact in facts}) == len(facts)


def test_known_facts_are_right():
    found = {(fact.relation, fact.subject): fact for fact in load_facts()}
    assert found["capital", "Kenya"].answer == "Nairobi"
    assert found["symbol", "iron"].answer == "Fe"
    assert found["atomic_number", "gold"].answer == "79"
    assert found["continent", "Peru"].answer == "South America"
    assert "Germany" in [found["neighbour", "Poland"].answer, *found["neighbour", "Poland"].aliases]


def test_the_parts_share_no_country_and_no_element():
    groups = [{fact.group for fact in load_facts(part)} for part in ("probe", "training")]
    assert not groups[0] & groups[1]


@pytest.mark.parametrize("phrasing", range(3))
def test_facts_are_rows_of_type_1(phrasing):
    for fact in load_facts():
        row = fact_row(fact, phrasing)
        assert row_problem(row, 2) is None
        assert fact.subject in row["instruction"]
        assert row["task_type"] == 1
        assert fact.answer in statement(fact)


def training_rows() -> list[dict]:
    """Every kind of row for instruction tuning that is made from this repository."""
    rows = [fact_row(fact, phrasing) for fact in instruction_facts() for phrasing in range(3)]
    rows += [row for task in TASKS for row in make_rows(task, 2000, seed=1)]
    return rows


def test_no_row_for_instruction_tuning_holds_a_probe_fact():
    questions = {fact_row(fact, phrasing)["instruction"] for fact in load_facts("probe") for phrasing in range(3)}
    for row in training_rows():
        assert row["instruction"] not in questions
    text = {word for task in TASKS for row in make_rows(task, 2000, seed=1) for word in row["input"].split()}
    subjects = {fact.subject for fact in load_facts() if fact.relation not in ("symbol", "atomic_number")}
    assert not text & subjects


@pytest.mark.parametrize("task", TASKS)
def test_generated_rows_depend_on_the_seed_alone_and_never_on_the_part(task):
    first = make_rows(task, 300, seed=1)
    assert first == make_rows(task, 300, seed=1)
    assert first != make_rows(task, 300, seed=2)
    held_out = make_rows(task, 300, seed=1, part="test") + make_rows(task, 300, seed=3, part="test")
    texts = {row["input"] for row in first + make_rows(task, 300, seed=3)}
    assert not texts & {row["input"] for row in held_out}
    assert len(texts) > 500
    assert all(row_problem(row, 2) is None and row["task"] == task for row in first)


@pytest.mark.parametrize("task", TASKS)
def test_no_answer_of_a_generated_task_is_the_usual_one(task):
    """A model that always gives the commonest answer is right in at most about half of the rows."""
    answers = Counter(row["output"] for row in make_rows(task, 1000, seed=1))
    assert answers.most_common(1)[0][1] <= 550


def test_too_many_rows_are_refused():
    with pytest.raises(ValueError, match=r"coreference has only about .* distinct rows in its test part"):
        make_rows("coreference", 8000, seed=0, part="test")
    with pytest.raises(ValueError, match="unknown task 'poetry'"):
        make_rows("poetry", 1, seed=0)


def test_the_file_of_facts_has_a_fact_a_line():
    lines = (ROOT / "data" / "world_facts" / "facts.json").read_text().splitlines()
    assert len(lines) == len(load_facts()) + 2
