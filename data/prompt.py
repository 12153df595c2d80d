"""Prompts, the text that the model reads, and answers, the text that it learns to write, as token ids."""

from typing import Literal

from transformers import PreTrainedTokenizerBase

from data.chat_template import control_tokens, render, render_answers
from data.errors import InputError
from data.files import is_unicode
from data.formats import Conversation, Turn
from data.segments import Encoded, Segment, encode_segments, span_pairs, split_rendered, tokenize, with_placeholders

TEMPLATES = ("auto", "plain", "chat")
# A conversation with more answers is encoded in steps, each of twice as many.
ANSWERS_AT_FIRST = 16
TrainOn = Literal["all", "last"]


def resolve_template(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Resolve `auto` to `plain` or `chat` for this tokenizer; other names are returned unchanged.

    Raises:
        InputError: the name is unknown, or `chat` is given for a tokenizer without a chat template.
    """
    if name not in TEMPLATES:
        raise InputError(f"prompt template {name!r} is unknown; allowed are {', '.join(TEMPLATES)}")
    if name == "chat" and not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template; use prompt_template plain or auto")
    if name == "auto":
        return "chat" if tokenizer.chat_template else "plain"
    return name


def encode_prompt(tokenizer: PreTrainedTokenizerBase, template: str, instruction: str, context: str) -> list[int]:
    """Token ids of a prompt, up to the start of the answer. Training and generation share this function.

    plain (the format of the authors' code): instruction, then newline and input if there is one, end-of-sequence token.
    chat: the tokenizer's template with the same text as the user's turn.

    Only the template writes special tokens: one in the text of a row (`</s>`) stays text.

    Raises:
        InputError: the text cannot be written as UTF-8.
    """
    return encode_turns(tokenizer, template, [{"role": "user", "content": _user_text(instruction, context)}])


def encode_turns(tokenizer: PreTrainedTokenizerBase, template: str, turns: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation, up to the start of the next answer.

    Args:
        turns: each with `role` and `content`. In `plain`, which has no turns, they are paragraphs of one prompt.

    Raises:
        InputError: a text cannot be written as UTF-8.
    """
    return encode_question(tokenizer, template, Conversation(turns))


def encode_question(tokenizer: PreTrainedTokenizerBase, template: str, conversation: Conversation) -> list[int]:
    """Like `encode_turns`, for a conversation that may have tools."""
    for turn in conversation.messages:
        if problem := encoding_problem("the prompt", turn["content"]):
            raise InputError(problem)
    if template == "plain":
        return _plain_prompts(tokenizer, [_paragraphs(conversation.messages)])[0]
    rendered = render(tokenizer, with_placeholders(tokenizer, conversation), add_generation_prompt=True)
    return encode_segments(tokenizer, [split_rendered(tokenizer, conversation, rendered, {})])[0].input_ids


def encoding_problem(name: str, text: str | None) -> str | None:
    """A message if text that the user typed is not UTF-8, calling it `name`; else None."""
    if text is None or is_unicode(text):
        return None
    return f"{name} has a byte that is not UTF-8; type or paste it again, or convert it to UTF-8"


def show_turns(tokenizer: PreTrainedTokenizerBase, template: str, turns: list[dict[str, str]]) -> str:
    """The text that `encode_turns` encodes."""
    if template == "plain":
        return _paragraphs(turns) + tokenizer.eos_token
    return render(tokenizer, Conversation(turns), add_generation_prompt=True)


def encode_answer(tokenizer: PreTrainedTokenizerBase, template: str, question: Conversation, answer: str) -> list[int]:
    """Token ids of an answer to a conversation, including the token that ends it.

    Raises:
        InputError: the chat template does not simply append the answer to the prompt.
    """
    turns = [*question.messages, {"role": "assistant", "content": answer}]
    (encoded,) = encode_conversations(tokenizer, template, [Conversation(turns, question.tools)], train_on="last")
    # An empty one may have no part that the template marks.
    start = encoded.spans[0] if encoded.spans else len(encode_question(tokenizer, template, question))
    return encoded.input_ids[start:]


def encode_target(
    tokenizer: PreTrainedTokenizerBase, template: str, instruction: str, context: str, output: str
) -> list[int]:
    """Token ids of the answer, including the token that ends it.

    Raises:
        InputError: the chat template does not simply append the answer to the prompt.
    """
    question = Conversation([{"role": "user", "content": _user_text(instruction, context)}])
    return encode_answer(tokenizer, template, question, output)


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    conversations: list[Conversation],
    train_on: TrainOn = "all",
    most: int | None = None,
) -> list[Encoded]:
    """Encode conversations that end with an answer. Prompts have the tokens of `encode_turns`.

    Args:
        train_on: supervise all answers of a conversation, or the last one, including the token that ends each.
        most: rows will be cut to so many tokens: answers after them may be left out of the spans.

    Raises:
        InputError: the chat template does not accept a conversation, or an answer cannot be located.
    """
    if template == "plain":
        return _encode_plain(tokenizer, conversations)
    rows, last = [], []
    for conversation in conversations:
        turns = conversation.answers[-1 if train_on == "last" else 0 :]
        rows.append(_answered(tokenizer, conversation, turns, most))
        last.append(turns[-1])
    ends = set(control_tokens(tokenizer).values())
    encoded = encode_segments(tokenizer, rows)
    for row, turn in zip(encoded, last, strict=True):
        # If the template does not end its turns, the end-of-sequence token ends the last answer.
        if row.turns[-1:] == [turn] and row.spans[-1] == len(row.input_ids) and row.input_ids[-1] not in ends:
            row.input_ids.append(tokenizer.eos_token_id)
            row.spans[-1] += 1
    return encoded


def marked_row(tokenizer: PreTrainedTokenizerBase, row: dict, most_characters: int = 400) -> str:
    """An encoded row as text, with the supervised parts in [[ ]]; long parts are shortened in the middle."""
    ids, text, place = list(row["input_ids"]), "", 0
    for start, end in span_pairs(row["spans"]):
        parts = ids[place:start], ids[start:end]
        before, answer = (tokenizer.decode(part, skip_special_tokens=False) for part in parts)
        text += f"{_shortened(before, most_characters)}[[{_shortened(answer, most_characters)}]]"
        place = end
    return text + _shortened(tokenizer.decode(ids[place:], skip_special_tokens=False), most_characters)


def _encode_plain(tokenizer: PreTrainedTokenizerBase, conversations: list[Conversation]) -> list[Encoded]:
    """Prompts of one or more paragraphs, and answers that end with the end-of-sequence token."""
    prompts = _plain_prompts(tokenizer, [_paragraphs(each.messages[:-1]) for each in conversations])
    answers = tokenize(tokenizer, [each.messages[-1]["content"] for each in conversations], literal=True)
    lasts = [len(each.messages) - 1 for each in conversations]
    return [
        Encoded([*prompt, *answer, tokenizer.eos_token_id], [len(prompt), len(prompt) + len(answer) + 1], [turn])
        for prompt, answer, turn in zip(prompts, answers, lasts, strict=True)
    ]


def _paragraphs(turns: list[Turn]) -> str:
    return "\n\n".join(turn["content"] for turn in turns)


def _user_text(instruction: str, context: str) -> str:
    return f"{instruction}\n{context}" if context else instruction


def _plain_prompts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    encoded = tokenize(tokenizer, texts, literal=True, add_special_tokens=True)
    return [[*_without_end(ids, tokenizer), tokenizer.eos_token_id] for ids in encoded]


def _answered(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, turns: list[int], most: int | None
) -> list[Segment]:
    """The segments of a conversation with those of its answers that begin within the first `most` tokens.

    To find an answer takes renderings of all turns before it: of thousands of answers, minutes.
    """
    shown = with_placeholders(tokenizer, conversation)
    count = ANSWERS_AT_FIRST if most else len(turns)
    while True:
        row = split_rendered(tokenizer, conversation, *render_answers(tokenizer, shown, turns[:count]))
        if count >= len(turns):
            return row
        spans = encode_segments(tokenizer, [row])[0].spans
        if most and spans and spans[-1] >= most:
            return row
        count *= 2


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} [...] {text[-most // 2 :]}"


def _without_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Remove the end token that some tokenizers append themselves; the template writes it where it belongs."""
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
