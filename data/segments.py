"""Text of a conversation in segments that are tokenized separately.

Special tokens that a turn contains are plain text, unlike those that the chat template writes: the template renders a
placeholder in place of such a turn, and the turn's text is a segment.
"""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from data.chat_template import control_tokens
from data.errors import InputError
from data.formats import Conversation

PLACEHOLDER = "PLACE-OF-CONTENT-{}-"
PLACEHOLDERS = re.compile(PLACEHOLDER.format(r"(\d+)"))


class Encoded(NamedTuple):
    """A conversation as tokens.

    Args:
        input_ids: token ids.
        spans: flat list of the start and end of each supervised part.
        turns: index of each part's turn in the conversation.
    """

    input_ids: list[int]
    spans: list[int]
    turns: list[int]


def span_pairs(spans: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Start and end of each supervised part, from the flat list of an encoded row."""
    return zip(spans[::2], spans[1::2], strict=True)


class Segment(NamedTuple):
    """Text that is tokenized separately.

    Args:
        literal: special tokens in it are plain text.
        turn: index of its turn if it is supervised.
    """

    text: str
    literal: bool
    turn: int | None


def with_placeholders(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> Conversation:
    """The conversation for the chat template, with a placeholder for each content that contains a special token.

    Raises:
        InputError: something else contains one.
    """
    messages = [
        turn | {"content": PLACEHOLDER.format(index)} if _spells_control(tokenizer, turn["content"]) else turn
        for index, turn in enumerate(conversation.messages)
    ]
    others = [[value for name, value in turn.items() if name != "content"] for turn in messages]
    if any(_spells_control(tokenizer, text) for text in _strings([others, conversation.tools])):
        raise InputError("a tool, a tool call or reasoning contains a special token of the tokenizer; reword it")
    return Conversation(messages, conversation.tools)


def _strings(value: Any) -> Iterator[str]:
    """All text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from _strings(each)


def split_rendered(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, rendered: str, spans: dict[int, tuple[int, int]]
) -> list[Segment]:
    """Split a rendered conversation into segments. Only special tokens that the template wrote count as such.

    Args:
        spans: start and end of each supervised answer in the text, by turn.
    """
    contents = [turn["content"] for turn in conversation.messages]
    spelling = [index for index, content in enumerate(contents) if _spells_control(tokenizer, content)]
    # A template may show them in another order.
    if sorted(map(int, PLACEHOLDERS.findall(rendered))) != spelling:
        raise InputError(
            "a turn contains a special token, and the tokenizer's chat template does not show the turn exactly once, "
            "so the token cannot be told from the template's own; use prompt_template plain"
        )
    segments, place = [], 0
    for turn, (start, end) in spans.items():
        segments += [*_split(rendered[place:start], contents, None), *_split(rendered[start:end], contents, turn)]
        place = end
    return [*segments, *_split(rendered[place:], contents, None)]


def _split(text: str, contents: list[str], turn: int | None) -> Iterator[Segment]:
    """Split a part into segments, with contents of turns in place of their placeholders."""
    for place, piece in enumerate(PLACEHOLDERS.split(text)):
        yield Segment(contents[int(piece)], True, turn) if place % 2 else Segment(piece, False, turn)


def encode_segments(tokenizer: PreTrainedTokenizerBase, rows: list[list[Segment]]) -> list[Encoded]:
    """Tokenize the segments of rows."""
    segments = [segment for row in rows for segment in row]
    ids = {
        literal: iter(tokenize(tokenizer, [each.text for each in segments if each.literal == literal], literal))
        for literal in (False, True)
    }
    encoded = [[next(ids[segment.literal]) for segment in row] for row in rows]
    if _depends_on_context(tokenizer):
        encoded = [_in_context(tokenizer, row, parts) for row, parts in zip(rows, encoded, strict=True)]
    return [_joined(row, parts) for row, parts in zip(rows, encoded, strict=True)]


def _joined(row: list[Segment], parts: list[list[int]]) -> Encoded:
    encoded = Encoded([], [], [])
    for segment, ids in zip(row, parts, strict=True):
        start = len(encoded.input_ids)
        encoded.input_ids.extend(ids)
        if segment.turn is None:
            continue
        if encoded.turns[-1:] == [segment.turn]:
            encoded.spans[-1] += len(ids)
        else:
            encoded.spans.extend((start, start + len(ids)))
            encoded.turns.append(segment.turn)
    return encoded


def _in_context(tokenizer: PreTrainedTokenizerBase, row: list[Segment], parts: list[list[int]]) -> list[list[int]]:
    """Token ids of segments, each in the context of the one before; separately, each would begin with a word's mark.

    They are those of `parts` if a segment changes the tokens of the one before, or if one of the two is literal.
    """
    places = [place for place in range(1, len(row)) if not (row[place - 1].literal or row[place].literal)]
    pairs = tokenize(tokenizer, [row[place - 1].text + row[place].text for place in places], literal=False)
    following = list(parts)
    for place, pair in zip(places, pairs, strict=True):
        before = parts[place - 1]
        if pair[: len(before)] == before:
            following[place] = pair[len(before) :]
    return following


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], literal: bool, add_special_tokens: bool = False
) -> list[list[int]]:
    """Token ids of texts.

    Args:
        literal: special tokens in a text are plain text.
        add_special_tokens: add those that the tokenizer itself adds to a text.
    """
    if not texts:
        return []
    return tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        split_special_tokens=literal,
        return_attention_mask=False,
        verbose=False,  # no warning about texts that are too long for the model: rows are truncated
    )["input_ids"]


@lru_cache(maxsize=8)
def _depends_on_context(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether text is tokenized differently after other text: the tokenizer puts the mark of a word before any
    text, as SentencePiece does, or has special tokens that swallow the white space after them, as Phi 3's do."""
    marks_beginnings = "".join(tokenizer.tokenize("x")) != "x"
    return marks_beginnings or any(token.rstrip for token in tokenizer.added_tokens_decoder.values())


def _spells_control(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    return any(token in text for token in control_tokens(tokenizer))
