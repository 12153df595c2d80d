"""Tokenizers of both families, with their conventions, through prompt and answer."""

import datetime
import json

import pytest
import sentencepiece
from conftest import THINKING, tiny_tokenizer
from tokenizers import processors
from transformers import AutoTokenizer, CTRLTokenizer, PreTrainedTokenizerBase

from data import (
    InputError,
    encode_conversations,
    encode_prompt,
    encode_target,
    marked_row,
    with_fixed_date,
)
from data.formats import FORMATS, to_conversation
from loading.base_model import load_tokenizer

TEXT = ["the cat sat on the mat and the dog lay in the sun", "what is the capital of kenya ? nairobi", "[INST] [/INST]"]
LLAMA_2 = (
    "{{ bos_token }}{% for turn in messages %}{% if turn.role == 'user' %}[INST] {{ turn.content | trim }} [/INST]"
    "{% else %} {{ turn.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
WITH_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|user|>You are kind.</s>{% endif %}"
    "{% for turn in messages %}<|{{ turn.role }}|>{{ turn.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}{{ bos_token }}"
    "{% for turn in messages %}<|user|>{{ 'model' if turn.role == 'assistant' else turn.role }}\n"
    "{{ turn.content | trim }}<|assistant|>\n{% endfor %}{% if add_generation_prompt %}<|user|>model\n{% endif %}"
)


@pytest.fixture(scope="module")
def sentencepiece_dir(tmp_path_factory):
    """A folder with a Llama tokenizer as it was published: `tokenizer.model` and a configuration, no padding token."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text.txt").write_text("\n".join(TEXT * 50))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=300, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, unk_id=0, bos_id=1,
        eos_id=2, pad_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings |= {"add_bos_token": True, "add_eos_token": False, "legacy": False, "chat_template": LLAMA_2}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def with_bos() -> PreTrainedTokenizerBase:
    """The tokenizer of the fixtures, but one that puts BOS before every text by itself, as Llama 3's does."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def test_a_missing_padding_token_is_the_end_token_and_the_vocabulary_stays(sentencepiece_dir):
    size = len(AutoTokenizer.from_pretrained(sentencepiece_dir))
    tokenizer = load_tokenizer(str(sentencepiece_dir))
    assert tokenizer.pad_token == tokenizer.eos_token
    assert len(tokenizer) == size


def test_sentencepiece_plain_prompts_begin_with_bos_and_end_with_eos(sentencepiece_dir):
    tokenizer = load_tokenizer(str(sentencepiece_dir))
    prompt = encode_prompt(tokenizer, "plain", "the cat sat", "on the mat")
    assert prompt[0] == 1
    assert prompt[-1] == 2
    assert prompt.count(1) == 1
    assert tokenizer.decode(prompt[1:-1]) == "the cat sat\non the mat"
    target = encode_target(tokenizer, "plain", "the cat sat", "on the mat", "nairobi")
    assert target == [*tokenizer("nairobi", add_special_tokens=False)["input_ids"], 2]


@pytest.mark.parametrize("answer", ["nairobi", "the mat", "</s> is text"])
def test_sentencepiece_answers_follow_the_prompt_as_in_one_text(sentencepiece_dir, answer):
    """Encoded apart, an answer would begin with the word mark that a text has at its start: one token too many."""
    tokenizer = load_tokenizer(str(sentencepiece_dir))
    ids = encode_prompt(tokenizer, "chat", "the cat", "") + encode_target(tokenizer, "chat", "the cat", "", answer)
    assert ids.count(1) == 1
    assert ids[0] == 1
    assert ids[-1] == 2
    assert ids.count(2) == 1
    if "</s>" not in answer:
        assert ids == tokenizer(f"<s>[INST] the cat [/INST] {answer} </s>", add_special_tokens=False)["input_ids"]


def test_a_tokenizer_that_adds_bos_itself_adds_it_once():
    tokenizer = with_bos()
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    assert encode_prompt(tokenizer, "plain", "the cat", "").count(tokenizer.bos_token_id) == 1
    ids = encode_prompt(tokenizer, "chat", "the cat", "") + encode_target(tokenizer, "chat", "the cat", "", "sat")
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("template", [WITH_SYSTEM, NO_SYSTEM], ids=["puts a system turn", "refuses a system turn"])
def test_templates_with_system_quirks(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    ids = encode_prompt(tokenizer, "chat", "the cat", "") + encode_target(tokenizer, "chat", "the cat", "", "sat")
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert tokenizer.decode(ids).rstrip() in whole
    assert ids[-1] in tokenizer.all_special_ids


def test_the_empty_block_of_a_template_that_thinks_is_no_part_of_the_answer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKING
    prompt = encode_prompt(tokenizer, "chat", "the cat", "")
    assert tokenizer.decode(prompt) == "<|user|>the cat</s><|assistant|>(thought: )"
    assert tokenizer.decode(encode_target(tokenizer, "chat", "the cat", "", "sat")) == "sat</s>"


def test_the_token_that_ends_a_turn_need_not_be_listed_among_the_special_ones():
    """Gemma's `<end_of_turn>` is such a token: the answer ends with it, and a row that spells it does not write it."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens("<turn>", special_tokens=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("</s>", "<turn>")
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    assert turn not in tokenizer.all_special_ids
    assert encode_target(tokenizer, "chat", "the cat", "", "sat").count(turn) == 1
    assert encode_target(tokenizer, "chat", "the cat", "", "sat")[-1] == turn
    assert encode_target(tokenizer, "chat", "the cat", "", "<turn> sat").count(turn) == 1
    assert encode_prompt(tokenizer, "chat", "the <turn> cat", "").count(turn) == 1


# Among rows without, a row that spells a special token in its prompt, one that does in its answer, one in both.
ROWS = [
    {"instruction": "the cat", "input": "", "output": "sat"},
    {"instruction": "repeat </s>", "input": "on the mat", "output": "the mat"},
    {"instruction": "what is the capital of kenya ?", "input": "", "output": "nairobi </s> and <s>"},
    {"instruction": "<s> the dog", "input": "lay </s>", "output": "</s>"},
    {"instruction": "the cat sat on the mat " * 30, "input": "and", "output": " in the sun\n"},
]


@pytest.mark.parametrize("template", ["plain", "chat"])
@pytest.mark.parametrize("family", ["byte level", "byte level with bos", "sentencepiece"])
def test_many_rows_are_encoded_as_each_by_itself(sentencepiece_dir, family, template):
    tokenizer = load_tokenizer(str(sentencepiece_dir)) if family == "sentencepiece" else tiny_tokenizer()
    if family == "byte level with bos":
        tokenizer = with_bos()
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    texts = [(row["instruction"], row["input"], row["output"]) for row in ROWS]
    rows = [to_conversation(row, FORMATS["instruction"]) for row in ROWS]
    encoded = encode_conversations(tokenizer, template, rows)
    prompts = [each.input_ids[: each.spans[0]] for each in encoded]
    targets = [each.input_ids[each.spans[0] :] for each in encoded]
    assert all(each.spans[1:] == [len(each.input_ids)] and each.turns == [1] for each in encoded)
    assert prompts == [encode_prompt(tokenizer, template, *text[:2]) for text in texts]
    assert targets == [encode_target(tokenizer, template, *text) for text in texts]
    for row, prompt, target in zip(ROWS, prompts, targets, strict=True):
        assert row["instruction"].strip() in tokenizer.decode(prompt)
        assert row["output"].strip() in tokenizer.decode(target)
    assert encode_conversations(tokenizer, template, []) == []


def test_a_row_is_shown_with_what_is_learnt_marked():
    tokenizer = tiny_tokenizer()
    prompt = encode_prompt(tokenizer, "chat", "the cat", "")
    ids = prompt + encode_target(tokenizer, "chat", "the cat", "", "sat")
    shown = marked_row(tokenizer, {"input_ids": ids, "spans": [len(prompt), len(ids)]})
    assert shown == "<|user|>the cat</s><|assistant|>[[sat</s>]]"
    assert len(marked_row(tokenizer, {"input_ids": ids * 500, "spans": [len(prompt), len(ids) * 500]})) < 900


def test_a_tokenizer_without_a_fast_backend_is_refused(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"<unk>": 0, "a</w>": 1}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    CTRLTokenizer(tmp_path / "vocab.json", tmp_path / "merges.txt", eos_token="a").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is a CTRLTokenizer, which has no fast backend"):
        load_tokenizer(str(tmp_path))


TODAY = "{{ strftime_now('%d %b %Y') }}|{% set today = strftime_now('%Y-%m-%d') %}{{ today }}|"


def test_a_template_that_writes_the_date_writes_the_same_one_every_day(tmp_path):
    """Also where stock transformers uses the tokenizer that a run has saved."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if strftime_now is defined %}" + TODAY + "{% endif %}" + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "base")
    turns = [{"role": "user", "content": "the cat"}]
    date, plain = "26 Jul 2024|2024-07-26|", "<|user|>the cat</s><|assistant|>"
    ours = load_tokenizer(str(tmp_path / "base"))
    ours.save_pretrained(tmp_path / "run")
    again, stock = load_tokenizer(str(tmp_path / "run")), AutoTokenizer.from_pretrained(tmp_path / "run")
    for each in (ours, again, stock):
        assert each.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == date + plain
    assert ours.decode(encode_prompt(ours, "chat", "the cat", "")) == date + plain
    assert again.chat_template == ours.chat_template
    assert with_fixed_date(plain) == plain
    codes = "aAbBdejmuwyYFDxcHIMSpT"
    for code in (*codes, "-d", "-m"):
        ours.chat_template = with_fixed_date(f"{{{{ strftime_now('%{code}') }}}}")
        assert ours.apply_chat_template(turns, tokenize=False) == datetime.date(2024, 7, 26).strftime(f"%{code}")
