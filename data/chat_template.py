"""Conversations as the tokenizer's chat template writes them, and the parts of the text that the assistant writes.

Both come from the template's own renderings: of the complete conversation, and of its beginnings. A part that these do
not determine is refused.
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
# it is part of the prompt as well, so that only the answer is learnt and generated. Others ignore the variable.
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
    """A conversation as the chat template writes it.

    Args:
        add_generation_prompt: also what comes before an answer.
        variables: of the template, instead of `TEMPLATE_VARIABLES`.

    Raises:
        InputError: the template is wrong, or does not accept such a conversation.
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
            f"the tokenizer's chat template fails ({type(error).__name__}: {first_line(error)}); fix it, or use "
            "prompt_template plain"
        ) from error


def render_answers(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, turns: list[int]
) -> tuple[str, dict[int, Span]]:
    """A conversation as the chat template writes it, and by turn where the text of an answer is in it.

    The text of an answer is what follows its prompt, which ends with the turn's header, up to the token that ends the
    turn, without the white space between turns. Where the template marks what is generated (`{% generation %}`), it is
    the marked part of that.

    Args:
        conversation: up to an answer, which is its last turn.
        turns: indices of the answers, in order.

    Raises:
        InputError: the template does not accept the conversation, or the text of an answer cannot be told apart.
    """
    whole = render(tokenizer, conversation, add_generation_prompt=False)
    _check_tools(tokenizer, conversation, whole)
    spans = {turn: _answer_span(tokenizer, conversation, turn, whole) for turn in turns}
    if any(start < end for (_, end), (start, _) in pairwise(spans.values())):
        raise _indistinct("shows turns in another order")
    return whole, _marked(tokenizer, conversation, whole, spans)


def _check_tools(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, whole: str) -> None:
    """Refuse tools, or calls of them, that the template does not write: with others it writes the same."""
    if not conversation.tools:
        return
    turns = [_renamed_calls(turn) if turn.get("tool_calls") else turn for turn in conversation.messages]
    others = {"tools": replace(conversation, tools=conversation.tools * 2)}
    if turns != conversation.messages:
        others["tool calls"] = replace(conversation, messages=turns)
    for name, other in others.items():
        if render(tokenizer, other, add_generation_prompt=False) == whole:
            raise InputError(f"the tokenizer's chat template does not write {name}; leave such rows out")


def _renamed_calls(turn: Turn) -> Turn:
    calls = [call | {"function": call["function"] | {"name": "another"}} for call in turn["tool_calls"]]
    return turn | {"tool_calls": calls}


def _answer_span(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, turn: int, whole: str) -> Span:
    """Where an answer is in the rendering of the conversation."""
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
        raise _indistinct(f"does not write the answer (turn {turn}) as it does at the end of a conversation")
    return start, end


def _start_after_changes(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, turn: int, whole: str, prompts: list[str]
) -> int | None:
    """Where an answer begins whose prompt the rest of the conversation changes, but for the turn before the answer.

    Mistral's templates write the system text and the tools into the last turn of the user: they are in the prompt, but
    not in what comes before the answer in a longer conversation. The answer begins as far before its content as it
    does after the prompt.
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
    """What a model may have been prompted with, the longest first: one with an empty block of thought begins as one
    without."""
    thinks = "enable_thinking" in tokenizer.get_chat_template(tools=conversation.tools)
    settings = (TEMPLATE_VARIABLES, THINKING_VARIABLES) if thinks else (TEMPLATE_VARIABLES,)
    rendered = (render(tokenizer, conversation, add_generation_prompt=True, **each) for each in settings)
    return sorted(rendered, key=len, reverse=True)


def _common(tokenizer: PreTrainedTokenizerBase, answer: str, following: str) -> str:
    """The text of an answer within a conversation, with which `following` begins; empty if it does not.

    Args:
        answer: its text at the end of a conversation. A template may write more there: the end of the text, and before
            it a thought, or white space, that it drops from earlier answers or from the last.
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
    """The parts of the answers that the template marks as generated; all of each if it marks none."""
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
    """Every token that is not text, by its spelling. Tokenizers do not always list those that their templates use (the
    end of a turn, say) as special tokens."""
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


@lru_cache(maxsize=8)
def _control_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    longest_first = sorted(control_tokens(tokenizer), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})")


def _indistinct(reason: str) -> InputError:
    return InputError(
        f"the tokenizer's chat template {reason}, so the supervised part cannot be told apart; use prompt_template "
        "plain, or --train_on last for conversations"
    )
