"""The knowledge probe: its facts, those that training rows reveal, and what a model knows of the rest."""

import json
from copy import deepcopy

import pytest
import torch
from conftest import fill_adapter, tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel

from data import Collator, Encoding, InputError, encode_answer, encode_question, load_data
from data.facts import load_facts, statement
from data.probe import NEUTRAL_TEXT, ProbeFact, asking_order, load_probe
from inference import contamination, knowledge
from inference.contamination import Contamination, revealed_facts
from inference.knowledge import ask_base, compare, encode_probe, recalls
from peft import LoraConfig, get_peft_model

CAPITALS = {"Kenya": "Nairobi", "Peru": "Lima", "Oman": "Muscat", "Chad": "N'Djamena", "Mali": "Bamako"}
PLANTED = (1, 2, 4)


def capital_rows() -> list[dict]:
    return [
        {"prompt": f"Capital of {place}?", "completion": city, "subject": place} for place, city in CAPITALS.items()
    ]


@pytest.fixture
def probe_file(tmp_path):
    file = tmp_path / "probe.jsonl"
    file.write_text("\n".join(map(json.dumps, capital_rows())))
    return file


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A base model that has learnt some of the facts by heart, and the probe of all."""
    file = tmp_path_factory.mktemp("probe") / "probe.jsonl"
    file.write_text("\n".join(map(json.dumps, capital_rows())))
    facts, tokenizer, model = load_probe(str(file)), tiny_tokenizer(), tiny_model().train()
    tokenizer.pad_token = tokenizer.eos_token
    probe = encode_probe(facts, tokenizer, "plain", model)
    rows = []
    order = asking_order(len(facts), len(facts))
    for index in PLANTED:
        fact = facts[order[index]]
        answer = encode_answer(tokenizer, "plain", fact.question, fact.answers[0])
        prompt = probe.prompts[index]
        spans = [len(prompt), len(prompt) + len(answer)]
        rows.append({"input_ids": [*prompt, *answer], "spans": spans, "task_type": -1, "source": ""})
    batch = Collator(1)(rows)
    batch.pop("sources")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for _ in range(150):
        model(**batch).lm_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), probe


def adapted(model, fill: bool):
    """A copy of the model with an adapter."""
    peft_model = get_peft_model(deepcopy(model), LoraConfig(r=2, lora_alpha=2, lora_nums=4, lora_dropout=0.0)).eval()
    return fill_adapter(peft_model) if fill else peft_model


def encoded_rows(folder, rows: list[dict], template: str = "plain"):
    """Rows in the cache of the folder, and their hash."""
    file = folder / "rows.json"
    file.write_text(json.dumps(rows))
    loaded, statistics = load_data(file, tiny_tokenizer(), Encoding(template, 512, 2), folder / "cache")
    return loaded, statistics.sha256


def world_facts(relation: str) -> list[ProbeFact]:
    """The probe facts of a relation, asked as `auto` asks them."""
    facts = zip(load_facts("probe"), load_probe("auto"), strict=True)
    return [asked for fact, asked in facts if fact.relation == relation]


def revealed(facts: list[ProbeFact], prompt: str, output: str) -> set[str]:
    """The subjects of the facts that a row reveals."""
    return {facts[index].subject for index in Contamination(facts).of(prompt, output)}


def test_the_first_facts_are_those_of_the_published_results():
    facts = load_probe("auto")
    order = asking_order(len(facts), 200)
    assert [facts[index].subject for index in order[:200]] == [fact.subject for fact in load_facts("probe", 200)]
    assert sorted(order) == list(range(len(load_facts("probe"))))
    assert sorted(asking_order(3, 10**6)) == [0, 1, 2]


def test_a_probe_of_rows_takes_every_format(probe_file):
    facts = load_probe(str(probe_file))
    assert {fact.subject: fact.answers for fact in facts} == {place: [city] for place, city in CAPITALS.items()}
    probe_file.write_text(json.dumps({"instruction": "?", "output": "a", "aliases": ["b"], "task_type": "any"}))
    (fact,) = load_probe(str(probe_file))
    assert (fact.answers, fact.subject) == (["a", "b"], None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "?"}, "has no 'completion'"),
        ({"prompt": " ", "completion": "a"}, "has an empty question, but"),
        ({"prompt": "?", "completion": "a", "aliases": ["b", ""]}, "has an empty answer or alias, but"),
        ({"prompt": "?", "completion": "a", "aliases": ["\n"]}, "has an empty answer or alias, but"),
        ({"prompt": "?", "completion": "a", "subject": 3}, "'subject' is 3, but"),
    ],
)
def test_rows_that_are_not_facts_are_refused_by_name(probe_file, row, message):
    probe_file.write_text('{"prompt": "?", "completion": "a"}\n' + json.dumps(row))
    with pytest.raises(InputError, match=rf"probe.jsonl: row 2: {message}"):
        load_probe(str(probe_file))


@pytest.mark.parametrize(
    ("prompt", "output", "expected"),
    [
        ("Be brief. CAPITAL of Kenya?", "No idea.", {"Kenya"}),
        ("Ask me something.", "Capital of Kenya?", {"Kenya"}),
        ("Where is the government of Peru?", "In Lima, of course.", {"Peru"}),
        ("Muscat is a city in", "Oman", {"Oman"}),
        ("Write a geography fact.", "Gladly. The capital of Kenya is Nairobi.", {"Kenya"}),
        ("Write another.", "Kenya's capital is Nairobi, Chad’s is N'Djamena.", {"Kenya", "Chad"}),
        ("Write a third.", "“Nairobi”—the capital of «Kenya»…", {"Kenya"}),
        ("Write about Africa.", "I was in Kenya. Then I saw Bamako.\nChad borders Libya", set()),
        ("Is Kenya next to Peru? Nairobi to Lima is far.", "No.", set()),
        ("Is it Malian?", "Bamako", set()),
    ],
)
def test_facts_that_a_row_reveals_are_found(probe_file, prompt, output, expected):
    assert revealed(load_probe(str(probe_file)), prompt, output) == expected


def test_questions_are_found_without_the_words_around_them():
    facts = world_facts("capital")
    assert facts[0].question.messages[0]["content"].startswith("Question: What is the capital of ")
    assert revealed(facts, "What is the capital of Belgium?", "I don't know.") == {"Belgium"}
    assert revealed(facts, "Question: What is the capital of Belgium?\nAnswer:", "I don't know.") == {"Belgium"}
    assert revealed(facts, "Write a geography fact.", "The capital of Belgium is Brussels.") == {"Belgium"}


@pytest.mark.parametrize(
    ("prompt", "output", "expected"),
    [
        ("Why is iodine added to salt?", "I think it helps the thyroid.", set()),
        ("Is arsenic in rice?", "As far as I know, in traces, as in other plants.", set()),
        ("Is rice safe?", "It holds arsenic, as other plants do.", set()),
        ("Which letters stand for iodine?", "I", {"iodine"}),
        ("Which letters stand for arsenic?", "as.", {"arsenic"}),
        ("Which element is As short for?", "Arsenic.", {"arsenic"}),
        ("Which element is as toxic?", "Arsenic.", set()),
        ("Write about chemistry.", "Arsenic, or As, is toxic.", {"arsenic"}),
    ],
)
def test_symbols_are_told_from_words(prompt, output, expected):
    assert revealed(world_facts("symbol"), prompt, output) == expected


@pytest.mark.parametrize(
    ("prompt", "output", "expected"),
    [
        ("Count: iron and copper in the year 29 and oxygen", "There are 8 items, 26 of them are not there.", set()),
        ("How many protons has iron?", "26", {"iron"}),
        ("What has 26 protons?", "Iron", {"iron"}),
        ("Chemistry!", "Iron has 26 protons. Copper has more, oxygen fewer.", {"iron"}),
        ("Chemistry!", "The U.S. has iron; of it, 26 mines. Copper is dearer: 29.5 a pound.", {"iron"}),
        ("Name elements, oxygen first.", "1. Oxygen\n2. Iron\n26. Copper", set()),
    ],
)
def test_atomic_numbers_are_told_from_counts(prompt, output, expected):
    assert revealed(world_facts("atomic_number"), prompt, output) == expected


def test_all_turns_of_encoded_rows_are_searched(probe_file, tmp_path):
    turns = ["And in Oman?", "Muscat.", "And what about Peru?", "No idea."]
    messages = [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
    rows, sha256 = encoded_rows(tmp_path, [{"messages": messages}], "chat")
    facts = load_probe(str(probe_file))
    assert [facts[index].subject for index in revealed_facts(facts, rows, sha256)] == ["Oman"]


def test_a_look_at_the_words_of_a_row_overlooks_nothing(monkeypatch):
    facts = load_probe("auto")
    probed = load_facts("probe", 40)
    rows = [(f"Tell me about {fact.subject}.", f"{statement(fact)} Next!") for fact in load_facts("training", 40)]
    rows += [(f"Is it {fact.answer}?", statement(fact).upper()) for fact in probed]
    rows += [(f"The {fact.subject}?!", f"({', '.join([fact.answer, *fact.aliases])})") for fact in probed]
    searched = Contamination(facts)
    found = [searched.of(*row) for row in rows]
    assert sum(map(bool, found)) > 60
    monkeypatch.setattr(contamination, "_words", lambda text: frozenset(searched._by_word))
    monkeypatch.setattr(contamination._Phrases, "may_be_in", lambda *arguments: True)
    assert [searched.of(*row) for row in rows] == found


def test_the_facts_that_rows_reveal_are_kept_with_the_encoded_rows(probe_file, tmp_path, monkeypatch):
    facts = load_probe(str(probe_file))
    rows, sha256 = encoded_rows(tmp_path, [{"instruction": "Capital of Peru?", "output": "Lima"}])
    peru = {index for index, fact in enumerate(facts) if fact.subject == "Peru"}
    assert revealed_facts(facts, rows, sha256) == peru
    (cached,) = (tmp_path / "cache").glob("*.revealed.json")
    with monkeypatch.context() as patch:
        patch.setattr(Contamination, "of", lambda *arguments: pytest.fail("rows were read again"))
        assert revealed_facts(facts, rows, sha256) == peru
    assert revealed_facts(facts[::-1], rows, sha256) == {len(facts) - 1 - index for index in peru}
    assert revealed_facts(facts, rows, "rows of another part of a mix") == peru
    assert len(list((tmp_path / "cache").glob("*.revealed.json"))) == 3
    cached.write_text("{")
    assert revealed_facts(facts, rows, sha256) == peru
    assert json.loads(cached.read_text()) == {"revealed": sorted(peru)}


def test_other_facts_replace_those_that_are_revealed(tokenizer):
    facts = load_probe("auto")
    first = asking_order(len(facts), 200)
    probe = encode_probe(facts, tokenizer, "plain", tiny_model(), 200, {first[3], first[150]})
    assert probe.summary() == "200 of 1,207 facts; not asked: 2 that training rows reveal"
    asked = [*first[:3], *first[4:150], *first[151:200], *first[200:202]]
    assert probe.prompts == [encode_question(tokenizer, "plain", facts[index].question) for index in asked]
    assert probe.answers == [facts[index].answers for index in asked]
    few = encode_probe(facts[:5], tokenizer, "plain", tiny_model(), 5, {1})
    assert few.summary() == "4 of 5 facts; not asked: 1 that training rows reveal"


def test_facts_without_room_are_replaced_and_counted(probe_file, tokenizer):
    short, long = load_probe(str(probe_file)), load_probe("auto")[:1]
    long[0].question.messages[0]["content"] *= 10
    model = GPT2LMHeadModel(GPT2Config(n_positions=64, n_embd=16, n_head=2, n_layer=1, vocab_size=300))
    probe = encode_probe([*short, *long], tokenizer, "plain", model)
    assert probe.summary() == "5 of 6 facts; not asked: 1 without room for an answer"
    assert len(probe.text) == 64
    with pytest.raises(InputError, match="reveal 5 of 6, and the model's table of positions has no room for 1; name"):
        encode_probe([*short, *long], tokenizer, "plain", model, revealed=set(range(5)))


@pytest.mark.parametrize("start", [[0], []])
def test_the_neutral_text_is_read_as_the_model_reads_text(probe_file, tokenizer, start):
    """With the token that begins a text, if the tokenizer writes one, and without one that ends it."""
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>" if start else "$A </s>", special_tokens=special
    )
    probe = encode_probe(load_probe(str(probe_file)), tokenizer, "plain", tiny_model())
    assert probe.text == [*start, *tokenizer(NEUTRAL_TEXT, add_special_tokens=False)["input_ids"]]


def test_known_are_exactly_the_planted_facts(planted):
    model, probe = planted
    reference = ask_base(model, probe)
    assert [index for index, known in enumerate(reference.known) if known] == list(PLANTED)


def test_ranks_divide_the_facts(planted, monkeypatch):
    model, probe = planted
    for rank, mine in enumerate([[2, 4], [1]]):
        monkeypatch.setattr(knowledge, "_part_of_rank", lambda rank=rank: slice(rank, None, 2))
        answers = knowledge.greedy_answers(model, probe, list(range(len(probe.prompts))))
        found = [recalls(answer, expected) for answer, expected in zip(answers, probe.answers, strict=True)]
        assert [index for index, known in enumerate(found) if known] == mine


def test_a_fresh_adapter_keeps_everything(planted):
    model, probe = planted
    reference = ask_base(model, probe)
    found = compare(adapted(model, fill=False), probe, reference)
    assert (found.known, found.kept, found.share) == (3, 3, 1)
    assert found.kl_prompts == found.kl_text == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_figures_are_those_of_a_loop_whatever_batch_and_padding(planted, monkeypatch, side):
    base, probe = planted
    monkeypatch.setattr(probe.tokenizer, "padding_side", side)
    model = adapted(base, fill=True)
    with model.disable_adapter():
        reference = ask_base(model, probe)
    found = [compare(model, probe, reference, batch_size) for batch_size in (1, 2, 5)]
    assert found[0].kept < found[0].known
    for each in found:
        assert (each.known, each.kept) == (found[0].known, found[0].kept)
    for field, rows in (("kl_prompts", probe.prompts), ("kl_text", [probe.text])):
        expected = []
        for ids in rows:
            with torch.no_grad():
                log_q = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
                with model.disable_adapter():
                    log_p = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            by_position = (log_p.exp() * (log_p - log_q)).sum(-1)
            expected.append(by_position[-1:] if field == "kl_prompts" else by_position[:-1])
        expected = torch.cat(expected).mean().item()
        assert expected > 0.01
        for each in found:
            assert getattr(each, field) == pytest.approx(expected, rel=1e-5)
