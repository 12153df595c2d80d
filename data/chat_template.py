"""Conversations rendered by the tokenizer's chat template, and the spans of the assistant's answers in them.

Spans are found by comparing the template's renderings of the complete conversation and of its beginnings. An answer
that cannot be located this way is an error.
"""

import re
from dataclasses import replace
from datetime import date
from functools import lru_cache
from itertools import pairwise
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from data.errors import InputError, first_line
from data.formats import Conversation, Turn

# Variables of chat templates. Some write an empty block of thought before an answer that has none: with thinking off
# it is part of the prompt, so only the answer is trained on and generated. Others ignore the variable.
TEMPLATE_VARIABLES = {"enable_thinking": False}
# With these, the prompt ends before an answer's own block of thought.
THINKING_VARIABLES = {"enable_thinking": True}
# Raised by a template itself, and by Python for an expression in it. ValueError: none of several templates is the
# default.
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# Templates that write today's date would train with one date and answer with another. This is Llama 3's default.
TEMPLATE_DATE = date(2024, 7, 26)
DATE_CODES = "-d", "-m", *"aAbBdejmuwyYFDxcHIMSpT"
# Stands for the content of an answer, to see where the template writes it.
PROBE = "PLACE-OF-AN-ANSWER"

Span = tuple[int, int]


def with_fixed_date(chat_template: str) -> str:
    """A chat template whose `strftime_now` always gives `TEMPLATE_DATE`, here and wherever it is used."""
    codes = "".join(f"|replace('%{code}', '{TEMPLATE_DATE:%{code}}')" for code in DATE_CODES)
    macro = f"{{%- macro strftime_now(format) -%}}{{{{ format{codes} }}}}{{%- endmacro %}}\n"
    needed = "strftime_now" in chat_template and not chat_template.startswith(macro)
    return macro + chat_template if needed else chat_template


def render(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, add_generation_prompt: bool, **variables: Any
) -> str:
    """Render a conversation with the chat template.

    Args:
        add_generation_prompt: append the header of an answer.
        variables: of the template, instead of `TEMPLATE_VARIABLES`.

    Raises:
        InputError: the template is invalid, or does not accept the conversation.
    """
    try:
        return tokenizer.apply_chat_template(
            conversation.messages,
            tools=conversation.tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **(variables or TEMPLATE_VARIABLES),
        )
    except TEMPLATE_ERRORS as error:
        raise InputError(
            f"the tokenizer's chat template fails ({type(error).__name__}: {first_line(error)}); change it or "
            "the row, or use prompt_template plain"
        ) from error


def render_answers(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, turns: list[int]
) -> tuple[str, dict[int, Span]]:
    """Render a conversation with the chat template, and locate answers in it.

    The text of an answer begins after its prompt, which ends with the turn's header, and includes the token that ends
    the turn, but not the white space between turns. If the template marks generated text (`{% generation %}`), it is
    the marked part.

    Args:
        conversation: its last turn is an answer.
        turns: indices of the answers, in order.

    Returns:
        The text, and the start and end of each answer in it by turn.

    Raises:
        InputError: the template does not accept the conversation, or an answer cannot be located.
    """
    whole = render(tokenizer, conversation, add_generation_prompt=False)
    _check_all_is_shown(tokenizer, conversation, whole)
    spans = {turn: _answer_span(tokenizer, conversation, turn, whole) for turn in turns}
    if any(start < end for (_, end), (start, _) in pairwise(spans.values())):
        raise _indistinct("changes the order of the turns")
    # Nothing follows the last answer but white space.
    return whole.rstrip(), _marked(tokenizer, conversation, whole, spans)


def _check_all_is_shown(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, whole: str) -> None:
    """Refuse tools, tool calls or a last thought that the template ignores: it renders others the same."""
    *before, last = conversation.messages
    others = {}
    if last.get("reasoning_content"):
        others["reasoning_content"] = replace(conversation, messages=[*before, last | {"reasoning_content": PROBE}])
    if conversation.tools:
        others["tools"] = replace(conversation, tools=conversation.tools * 2)
    turns = [_renamed_calls(turn) if turn.get("tool_calls") else turn for turn in conversation.messages]
    if turns != conversation.messages:
        others["tool calls"] = replace(conversation, messages=turns)
    for name, other in others.items():
        if render(tokenizer, other, add_generation_prompt=False) == whole:
            raise InputError(f"the tokenizer's chat template does not show {name}; remove such rows")


def _renamed_calls(turn: Turn) -> Turn:
    calls = [call | {"function": call["function"] | {"name": "another"}} for call in turn["tool_calls"]]
    return turn | {"tool_calls": calls}


def _answer_span(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, turn: int, whole: str) -> Span:
    """Start and end of an answer in the rendered conversation."""
    prompts = _prompts(tokenizer, conversation.until(turn))
    start = max((len(prompt) for prompt in prompts if whole.startswith(prompt)), default=None)
    if start is None:
        start = _start_after_changes(tokenizer, conversation, turn, whole, prompts)
    if start is None:
        raise _indistinct(f"does not append the answer (turn {turn}) to the prompt")
    if turn == len(conversation.messages) - 1:
        end = max(start, len(whole.rstrip()))
    else:
        ending = render(tokenizer, conversation.until(turn + 1), add_generation_prompt=False)
        prompt = next(filter(ending.startswith, prompts), None)
        answer = "" if prompt is None else ending[len(prompt) :].rstrip()
        end = start + len(_common(tokenizer, answer, whole[start:]))
    written = conversation.messages[turn]
    if end <= start and (written["content"].strip() or written.get("tool_calls")):
        raise _indistinct(f"writes the answer (turn {turn}) differently at the end of a conversation")
    return start, end


def _start_after_changes(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, turn: int, whole: str, prompts: list[str]
) -> int | None:
    """Start of an answer if the template renders what precedes it differently in a longer conversation.

    Mistral's templates write the system text and the tools into the last user turn: they are in the prompt, but not
    before the answer in a longer conversation. The turn before the answer has to be the same in both. The answer then
    begins where its content is found with the same text before it as after the prompt.
    """
    messages = [
        each | {"content": PROBE} if index == turn else each for index, each in enumerate(conversation.messages)
    ]
    probed = replace(conversation, messages=messages)
    alone, within = (render(tokenizer, each, add_generation_prompt=False) for each in (probed.until(turn + 1), probed))
    question = conversation.messages[turn - 1]["content"].strip()
    for prompt in filter(alone.startswith, prompts):
        before, found, _ = within.partition(alone[len(prompt) :].partition(PROBE)[0] + PROBE)
        same = question in before and prompt.endswith(before[before.rfind(question) :])
        if found and same and whole.startswith(before):
            return len(before)
    return None


def _prompts(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> list[str]:
    """The prompts that a model may have been given, longest first: one with an empty block of thought begins like one
    without."""
    thinks = "enable_thinking" in tokenizer.get_chat_template(tools=conversation.tools)
    settings = (TEMPLATE_VARIABLES, THINKING_VARIABLES) if thinks else (TEMPLATE_VARIABLES,)
    rendered = (render(tokenizer, conversation, add_generation_prompt=True, **each) for each in settings)
    return sorted(rendered, key=len, reverse=True)


def _common(tokenizer: PreTrainedTokenizerBase, answer: str, following: str) -> str:
    """The beginning of `following` that is the answer; empty if it does not begin with it.

    Args:
        answer: its text at the end of a conversation. A template may write more there: the end of the text, and
            reasoning that it drops from earlier answers. White space may differ.
    """
    text = following.lstrip()
    pieces = [piece for piece in _control_pattern(tokenizer).split(answer.lstrip()) if piece]
    words = [index for index, piece in enumerate(pieces) if piece.strip() and piece not in control_tokens(tokenizer)]
    last = words[-1] + 1 if words else 0
    content, ends = "".join(pieces[:last]), pieces[last:]
    starts = (start for start in range(len(content)) if text[:1] == content[start] and content[start:].strip())
    start = next((start for start in starts if text.startswith(content[start:])), None)
    if words and (start is None or (start and ends and not text.startswith(content[start:] + ends[0]))):
        return ""
    common = content[start:]
    for piece in ends:
        if not text.startswith(piece, len(common)):
            break
        common += piece
    return (following[: len(following) - len(text)] + common).rstrip()


def _marked(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, whole: str, spans: dict[int, Span]
) -> dict[int, Span]:
    """Restrict spans to the text that the template marks as generated; unchanged if the template has no such marks."""
    template = tokenizer.get_chat_template(tools=conversation.tools)
    if not GENERATION_BLOCK.search(template):
        return spans
    _, (blocks,) = render_jinja_template(
        [conversation.messages],
        tools=conversation.tools,
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
        **TEMPLATE_VARIABLES,
    )
    marked = {}
    for turn, (start, end) in spans.items():
        parts = [(max(start, first), min(end, last)) for first, last in blocks if first < end and start < last]
        if parts:
            start, end = parts[0][0], parts[-1][1]
            marked[turn] = start, start + len(whole[start:end].rstrip())
    return marked


@lru_cache(maxsize=8)
def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """All tokens that are not text, by spelling. Tokenizers do not always list those that their templates use, such as
    the end of a turn, as special tokens."""
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


@lru_cache(maxsize=8)
def _control_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    longest_first = sorted(control_tokens(tokenizer), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})")


def _indistinct(reason: str) -> InputError:
    return InputError(
        f"the tokenizer's chat template {reason}, so the supervised text cannot be located; use prompt_template "
        "plain, or --train_on last for conversations"
    )
