"""Chat templates of many kinds: which part of a conversation is supervised, and what is refused."""

import re

import pytest
from chat_templates import (
    BAD_TEMPLATES,
    CONVERSATIONS,
    REFUSED,
    TEMPLATES,
    TOOLS,
    byte_level_tokenizer,
    metaspace_tokenizer,
)
from transformers import PreTrainedTokenizerBase

from data.prompt import TEMPLATE_ERRORS, TEMPLATE_VARIABLES

FAMILIES = {"byte level": byte_level_tokenizer, "sentencepiece": metaspace_tokenizer}
CASES = [(name, case) for name, template in TEMPLATES.items() for case in template.marked]
BAD_CASES = [(name, case) for name, template in BAD_TEMPLATES.items() for case in template.marked]
# The prompt for the last turn has an empty block, which the turn replaces; before it, it shows the earlier turn of the
# assistant as if it were the last.
NOT_APPENDED = [("qwen 3", "thinking"), ("qwen 3", "twice"), ("olmo 2", "twice")]
MARKED = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)


def rendered(tokenizer: PreTrainedTokenizerBase, name: str, turns: int | None = None, **settings) -> str:
    """The first turns of a conversation as transformers itself renders them."""
    return tokenizer.apply_chat_template(
        CONVERSATIONS[name][:turns], tools=TOOLS.get(name), tokenize=False, **TEMPLATE_VARIABLES, **settings
    )


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
