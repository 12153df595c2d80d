"""Chat templates of many kinds: which part of a conversation is supervised, and what is refused."""

import re
from functools import partial

import pytest
from chat_templates import (
    BAD_TEMPLATES,
    CLOCK,
    CONVERSATIONS,
    REFUSED,
    TEMPLATES,
    TOOLS,
    byte_level_tokenizer,
    metaspace_tokenizer,
    turns,
)
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from data.chat_template import TEMPLATE_ERRORS, TEMPLATE_VARIABLES
from data.errors import InputError
from data.formats import Conversation
from data.prompt import Encoded, encode_answer, encode_conversations, encode_question, marked_row

FAMILIES = {
    "byte level": byte_level_tokenizer,
    "joined line breaks": partial(byte_level_tokenizer, line_breaks=3),
    "sentencepiece": metaspace_tokenizer,
}
CASES = [(name, case) for name, template in TEMPLATES.items() for case in template.marked]
BAD_CASES = [(name, case) for name, template in BAD_TEMPLATES.items() for case in template.marked]
# The prompt for the last turn has an empty block, which the turn replaces; before it, it shows the earlier turn of the
# assistant as if it were the last.
NOT_APPENDED = [("qwen 3", "thinking"), ("qwen 3", "reasoning"), ("qwen 3", "twice"), ("olmo 2", "twice")]
# Of these, an answer to an answer, which they write as they would never prompt for it.
NEVER_PROMPTED = [("qwen 3", "twice"), ("olmo 2", "twice")]
MARKED = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)


def rendered(tokenizer: PreTrainedTokenizerBase, case: str, turns: int | None = None, **settings):
    """The first turns of a conversation as transformers itself renders them."""
    messages, settings = CONVERSATIONS[case][:turns], {"tokenize": False, **settings}
    return tokenizer.apply_chat_template(messages, tools=TOOLS.get(case), **TEMPLATE_VARIABLES, **settings)


def encode(tokenizer: PreTrainedTokenizerBase, case: str, train_on: str = "all") -> Encoded:
    conversation = Conversation(CONVERSATIONS[case], TOOLS.get(case))
    return encode_conversations(tokenizer, "chat", [conversation], train_on)[0]


def marked(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> str:
    """The text of token ids with the supervised parts in [[ ]]. Decoded by itself, a part may lose its first space."""
    text, shown, place = tokenizer.decode(encoded.input_ids), "", 0
    for index, token in enumerate(encoded.spans):
        end = len(tokenizer.decode(encoded.input_ids[:token]))
        shown += text[place:end] + ("[[", "]]")[index % 2]
        place = end
    return shown + text[place:]


def last_alone(text: str) -> str:
    """A marked text with the last mark only."""
    before, last = text.rsplit("[[", 1)
    return MARKED.sub(r"\1", before) + "[[" + last


@pytest.mark.parametrize(("name", "case"), CASES)
def test_the_expected_texts_are_what_transformers_renders(name, case):
    """Their last mark begins where the prompt ends, if the conversation begins with the prompt as it is rendered."""
    tokenizer, expected = byte_level_tokenizer(TEMPLATES[name]), TEMPLATES[name].marked[case]
    if expected == REFUSED:
        with pytest.raises(TEMPLATE_ERRORS):
            rendered(tokenizer, case)
        return
    assert MARKED.sub(r"\1", expected) == rendered(tokenizer, case)
    prompt = rendered(tokenizer, case, turns=-1, add_generation_prompt=True)
    if rendered(tokenizer, case).startswith(prompt):
        assert last_alone(expected).startswith(f"{prompt}[[")
        assert MARKED.findall(expected)[-1] == rendered(tokenizer, case)[len(prompt) :].rstrip()
    else:
        assert (name, case) in NOT_APPENDED


@pytest.mark.parametrize("train_on", ["all", "last"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "case"), CASES)
def test_the_supervised_parts_are_what_follows_the_prompts(name, case, family, train_on):
    if (name, family) == ("deepseek", "sentencepiece"):
        pytest.skip("the spelling of its special tokens has the mark of a word, which decoding replaces")
    tokenizer, expected = FAMILIES[family](TEMPLATES[name]), TEMPLATES[name].marked[case]
    if expected == REFUSED or (name, case) in NEVER_PROMPTED:
        reason = "fails" if expected == REFUSED else "does not append the answer"
        with pytest.raises(InputError, match=f"chat template {reason}"):
            encode(tokenizer, case, train_on)
        return
    encoded = encode(tokenizer, case, train_on)
    expected = (last_alone(expected) if train_on == "last" else expected).rstrip()
    assert marked(tokenizer, encoded) == expected
    if family != "sentencepiece":
        assert marked_row(tokenizer, encoded._asdict(), most_characters=10_000) == expected


@pytest.mark.parametrize("family", ["byte level", "sentencepiece"])
@pytest.mark.parametrize(("name", "case"), CASES)
def test_the_tokens_are_those_of_transformers(name, case, family):
    if TEMPLATES[name].marked[case] == REFUSED or (name, case) in NEVER_PROMPTED:
        return
    tokenizer = FAMILIES[family](TEMPLATES[name])
    ids, theirs = encode(tokenizer, case).input_ids, rendered(tokenizer, case, tokenize=True, return_dict=False)
    assert theirs[: len(ids)] == ids
    assert not tokenizer.decode(theirs[len(ids) :]).strip()


@pytest.mark.parametrize("case", [case for name, case in CASES if name == "generation blocks"])
def test_generation_blocks_are_supervised_as_transformers_masks_them(case):
    tokenizer = byte_level_tokenizer(TEMPLATES["generation blocks"])
    encoded = encode(tokenizer, case)
    theirs = rendered(tokenizer, case, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    starts, ends = encoded.spans[::2], encoded.spans[1::2]
    supervised = {token for start, end in zip(starts, ends, strict=True) for token in range(start, end)}
    assert supervised == {token for token, mask in enumerate(theirs["assistant_masks"]) if mask}


@pytest.mark.parametrize("train_on", ["all", "last"])
@pytest.mark.parametrize(("name", "case"), BAD_CASES)
def test_what_cannot_be_told_apart_is_refused_and_never_marked_wrongly(name, case, train_on):
    tokenizer, expected = byte_level_tokenizer(BAD_TEMPLATES[name]), BAD_TEMPLATES[name].marked[case]
    try:
        shown = marked(tokenizer, encode(tokenizer, case, train_on))
    except InputError as error:
        shown = str(error)
    right = last_alone(expected) if expected != REFUSED and train_on == "last" else expected
    assert shown == right or "so the supervised text cannot be located" in shown


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_what_comes_before_the_last_answer(name, family):
    """Also where its last line break and the first of the answer are one token in the text of both."""
    tokenizer = FAMILIES[family](TEMPLATES[name])
    for case, expected in TEMPLATES[name].marked.items():
        if expected != REFUSED and (name, case) not in NOT_APPENDED:
            encoded = encode(tokenizer, case, train_on="last")
            prompt = Conversation(CONVERSATIONS[case][:-1], TOOLS.get(case))
            assert encode_question(tokenizer, "chat", prompt) == encoded.input_ids[: encoded.spans[0]]


@pytest.mark.parametrize("name", TEMPLATES)
def test_special_tokens_that_a_conversation_spells_are_text(name):
    """Where a template trims or splits them, too."""
    template = TEMPLATES[name]
    tokenizer = byte_level_tokenizer(template)
    for token in (template.eos, *template.others[:1]):
        texts = f"What is {token} ?", f"{token} ends.", f"And {token}", f"It is{token}"
        roles = ("user", "assistant") * 2
        conversation = Conversation([{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)])
        encoded = encode_conversations(tokenizer, "chat", [conversation])[0]
        plain = encode(tokenizer, "echo")
        for special in (template.eos, *template.others):
            number = tokenizer.convert_tokens_to_ids(special)
            assert encoded.input_ids.count(number) == plain.input_ids.count(number)
        supervised = MARKED.findall(marked(tokenizer, encoded))
        assert [part.strip().startswith(text) for part, text in zip(supervised, texts[1::2], strict=True)] == [True] * 2


@pytest.mark.parametrize("case", TEMPLATES["phi 3"].marked)
def test_tokens_that_swallow_the_line_break_after_them(case):
    """As those of Phi 3 do: decoded, the text has none."""
    tokenizer = byte_level_tokenizer(TEMPLATES["phi 3"])
    tokenizer.add_tokens([AddedToken(token, rstrip=True, special=True) for token in TEMPLATES["phi 3"].others])
    encoded = encode(tokenizer, case)
    assert encoded.input_ids == rendered(tokenizer, case, tokenize=True, return_dict=False)
    assert [part.strip() for part in MARKED.findall(marked(tokenizer, encoded))] == [
        part.replace("<|end|>\n", "<|end|>").strip() for part in MARKED.findall(TEMPLATES["phi 3"].marked[case])
    ]


@pytest.mark.parametrize("train_on", ["all", "last"])
def test_tools_that_a_template_does_not_write_are_refused(train_on):
    """Else the answer with the call would be learnt as an empty one."""
    tokenizer = byte_level_tokenizer(TEMPLATES["chatml"])
    with pytest.raises(InputError, match="chat template does not show tools"):
        encode(tokenizer, "tools", train_on)
    calls = Conversation(CONVERSATIONS["tools"][:2], [CLOCK])
    tokenizer.chat_template = "{{ tools | tojson }}" + tokenizer.chat_template
    with pytest.raises(InputError, match="chat template does not show tool calls"):
        encode_conversations(tokenizer, "chat", [calls], train_on)


def test_special_tokens_that_texts_spell_stay_with_their_turns():
    """Where a template shows the turns in another order, as Mistral's shows the system text in the last question."""
    messages = turns("system: </s> S\nuser: Q\nassistant: </s> A\nuser: R\nassistant: B")
    tokenizer = byte_level_tokenizer(TEMPLATES["mistral"])
    (encoded,) = encode_conversations(tokenizer, "chat", [Conversation(messages)])
    assert marked(tokenizer, encoded) == "<s>[INST] Q[/INST][[ </s> A</s>]][INST] </s> S\n\nR[/INST][[ B</s>]]"


def test_an_empty_answer_has_the_token_that_ends_it():
    """As the harness asks for it. Also with a template that does not end its turns."""
    tokenizer, question = byte_level_tokenizer(TEMPLATES["chatml"]), Conversation(turns("user: Q"))
    ends = encode_answer(tokenizer, "chat", question, "")
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.role ~ ':' ~ turn.content }}\n{% endfor %}" + (
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    assert encode_answer(tokenizer, "chat", question, "") == [tokenizer.eos_token_id] == ends
    marks = "{% generation %}{{ turn.content }}{% endgeneration %}<|im_end|>"
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ turn.role ~ ':' ~ turn.content }}", "assistant:" + marks
    )
    assert encode_answer(tokenizer, "chat", question, "") == ends
