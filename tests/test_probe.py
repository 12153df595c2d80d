"""The knowledge probe: its facts, those that training rows tell, and what a model knows of the rest."""

import json
from copy import deepcopy

import pytest
import torch
from conftest import fill_adapter, tiny_model, tiny_tokenizer

from data import Collator, Encoding, InputError, encode_answer, load_data
from data.facts import load_facts
from data.probe import load_probe
from inference import knowledge
from inference.contamination import told_facts
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


def encoded_rows(folder, rows: list[dict]):
    file = folder / "rows.json"
    file.write_text(json.dumps(rows))
    return load_data(file, tiny_tokenizer(), Encoding("plain", 512, 2), folder / "cache")[0]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A base model that has learnt some of the facts by heart, and the probe of all."""
    file = tmp_path_factory.mktemp("probe") / "probe.jsonl"
    file.write_text("\n".join(map(json.dumps, capital_rows())))
    facts, tokenizer, model = load_probe(str(file)), tiny_tokenizer(), tiny_model().train()
    tokenizer.pad_token = tokenizer.eos_token
    probe = encode_probe(facts, tokenizer, "plain", model, None)
    rows = []
    for index in PLANTED:
        answer = encode_answer(tokenizer, "plain", facts[index].question, facts[index].answers[0])
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


def test_the_probe_is_that_of_the_published_results():
    facts = load_probe("auto", 200)
    assert [fact.subject for fact in facts] == [fact.subject for fact in load_facts("probe", 200)]
    assert len(load_probe("auto")) == len(load_facts("probe")) == len(load_probe("auto", 10**6))


def test_a_probe_of_rows_takes_every_format_and_names_bad_rows(probe_file):
    facts = load_probe(str(probe_file))
    assert {fact.subject: fact.answers for fact in facts} == {place: [city] for place, city in CAPITALS.items()}
    probe_file.write_text(json.dumps({"instruction": "?", "output": "a", "aliases": ["b"], "task_type": "any"}))
    (fact,) = load_probe(str(probe_file))
    assert (fact.answers, fact.subject) == (["a", "b"], None)
    probe_file.write_text('{"prompt": "?", "completion": "a"}\n{"prompt": "?"}\n')
    with pytest.raises(InputError, match=r"probe.jsonl: row 2: "):
        load_probe(str(probe_file))


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"instruction": "Be brief. CAPITAL of Kenya?", "output": "No idea."}, {"Kenya"}),
        ({"instruction": "Where is the government of Peru?", "output": "In Lima, of course."}, {"Peru"}),
        ({"instruction": "Muscat is a city in", "output": "Oman"}, {"Oman"}),
        ({"instruction": "Is Kenya next to Peru?", "output": "No."}, set()),
        ({"instruction": "Is it Malian?", "output": "Bamako"}, set()),
        (
            {
                "messages": [
                    {"role": "user", "content": "And in Oman?"},
                    {"role": "assistant", "content": "Muscat."},
                    {"role": "user", "content": "Thanks."},
                    {"role": "assistant", "content": "Welcome."},
                ]
            },
            {"Oman"},
        ),
    ],
)
def test_facts_that_training_rows_tell_are_found(probe_file, tmp_path, tokenizer, row, told):
    template = "chat" if "messages" in row else "plain"
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([row]))
    rows, _ = load_data(file, tokenizer, Encoding(template, 512, 2), tmp_path / "cache")
    facts = load_probe(str(probe_file))
    assert {facts[index].subject for index in told_facts(facts, rows)} == told


def test_told_facts_are_left_out_and_counted(probe_file, tmp_path, tokenizer):
    rows = encoded_rows(tmp_path, [{"instruction": "Capital of Peru?", "output": "Lima"}])
    probe = encode_probe(load_probe(str(probe_file)), tokenizer, "plain", tiny_model(), rows)
    assert probe.told == 1
    assert sorted(answer for (answer,) in probe.answers) == sorted({*CAPITALS.values()} - {"Lima"})


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


def test_figures_are_those_of_a_loop_whatever_the_batch(planted):
    base, probe = planted
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
