"""Prompts, the text that the model reads, and targets, the text that it learns to write, as token ids."""

from datetime import date
from functools import lru_cache

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from data.errors import InputError, first_line
from data.files import is_unicode

TEMPLATES = ("auto", "plain", "chat")
# Variables of chat templates. Some write an empty block of thought before an answer that has none: with thinking off
# it is part of the prompt as well, so that only the answer is learnt and generated. Others ignore the variable.
TEMPLATE_VARIABLES = {"enable_thinking": False}
# Raised by a template itself, and by Python for an expression in it. ValueError: none of several templates is the
# default.
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
PLACEHOLDER = "PLACE-OF-THE-CONTENT"
# Templates that write today's date would train with one date and answer with another. This is Llama 3's default.
TEMPLATE_DATE = date(2024, 7, 26)
DATE_CODES = "-d", "-m", *"aAbBdejmuwyYFDxcHIMSpT"


def resolve_template(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Resolve `auto` to `plain` or `chat` for this tokenizer; these two stay.

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


def with_fixed_date(chat_template: str) -> str:
    """A chat template whose `strftime_now` always gives `TEMPLATE_DATE`, here and wherever it is used."""
    codes = "".join(f"|replace('%{code}', '{TEMPLATE_DATE:%{code}}')" for code in DATE_CODES)
    macro = f"{{%- macro strftime_now(format) -%}}{{{{ format{codes} }}}}{{%- endmacro %}}\n"
    needed = "strftime_now" in chat_template and not chat_template.startswith(macro)
    return macro + chat_template if needed else chat_template


def encode_prompt(tokenizer: PreTrainedTokenizerBase, template: str, instruction: str, context: str) -> list[int]:
    """Token ids of the prompt, up to where the answer begins. Training and generation share it.

    plain (the format of the authors' code): instruction, then newline and input if there is one, end-of-sequence token.
    chat: the tokenizer's template with the same text as the user's turn.

    Only the template writes special tokens: text in a row that spells one (`</s>`) stays text.

    Raises:
        InputError: the text cannot be written as UTF-8.
    """
    return encode_turns(tokenizer, template, [{"role": "user", "content": _user_text(instruction, context)}])


def encode_turns(tokenizer: PreTrainedTokenizerBase, template: str, turns: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation, up to where the next answer begins.

    Args:
        turns: each with `role` and `content`. In `plain`, which has no turns, they are paragraphs of one prompt.

    Raises:
        InputError: a text cannot be written as UTF-8.
    """
    for turn in turns:
        if problem := encoding_problem("the prompt", turn["content"]):
            raise InputError(problem)
    if template == "plain":
        return _plain_prompts(tokenizer, [_paragraphs(turns)])[0]
    return _encode_rendered(tokenizer, _render(tokenizer, [_shown_turns(tokenizer, turns)]), [_contents(turns)])[0]


def encoding_problem(name: str, text: str | None) -> str | None:
    """A message if a text that a user has typed, which it calls `name`, is not UTF-8; else None."""
    if text is None or is_unicode(text):
        return None
    return f"{name} has a byte that is not UTF-8; type or paste it again, or convert it to UTF-8"


def show_turns(tokenizer: PreTrainedTokenizerBase, template: str, turns: list[dict[str, str]]) -> str:
    """The text that `encode_turns` encodes."""
    if template == "plain":
        return _paragraphs(turns) + tokenizer.eos_token
    return _render(tokenizer, [turns])[0]


def encode_answer(
    tokenizer: PreTrainedTokenizerBase, template: str, turns: list[dict[str, str]], answer: str
) -> list[int]:
    """Token ids of an answer to a conversation, including the token that ends it.

    Raises:
        InputError: the chat template does not simply append the answer to the prompt.
    """
    return _encode_exchanges(tokenizer, template, [turns], [answer])[1][0]


def encode_target(
    tokenizer: PreTrainedTokenizerBase, template: str, instruction: str, context: str, output: str
) -> list[int]:
    """Token ids of the answer, including the token that ends it.

    Raises:
        InputError: the chat template does not simply append the answer to the prompt.
    """
    return encode_answer(tokenizer, template, [{"role": "user", "content": _user_text(instruction, context)}], output)


def encode_rows(
    tokenizer: PreTrainedTokenizerBase, template: str, rows: list[dict]
) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and targets of many rows, as `encode_prompt` and `encode_target` give, in less time.

    Raises:
        InputError: the chat template does not simply append the answer to the prompt.
    """
    if not rows:
        return [], []
    turns = [[{"role": "user", "content": _user_text(row["instruction"], row["input"])}] for row in rows]
    return _encode_exchanges(tokenizer, template, turns, [row["output"] for row in rows])


def marked_row(tokenizer: PreTrainedTokenizerBase, row: dict, most_characters: int = 400) -> str:
    """An encoded row as text, with the supervised part in [[ ]]; long parts are shortened in the middle."""
    ids, length = list(row["input_ids"]), row["prompt_length"]
    prompt, target = (tokenizer.decode(part, skip_special_tokens=False) for part in (ids[:length], ids[length:]))
    return f"{_shortened(prompt, most_characters)}[[{_shortened(target, most_characters)}]]"


def _encode_exchanges(
    tokenizer: PreTrainedTokenizerBase, template: str, conversations: list[list[dict[str, str]]], outputs: list[str]
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of conversations as prompts, and of the answers to them."""
    if template == "plain":
        targets = [[*ids, tokenizer.eos_token_id] for ids in _tokenize(tokenizer, outputs, literal=True)]
        return _plain_prompts(tokenizer, list(map(_paragraphs, conversations))), targets
    shown = [_shown_turns(tokenizer, turns) for turns in conversations]
    rendered = _render(tokenizer, shown)
    prompts = _encode_rendered(tokenizer, rendered, list(map(_contents, conversations)))
    answers = _render_answers(tokenizer, shown, rendered, _shown(tokenizer, outputs))
    targets = _encode_rendered(tokenizer, answers, [[output] for output in outputs])
    if _marks_beginnings(tokenizer):
        in_context = _encode_in_context(tokenizer, prompts, rendered, answers, outputs)
        targets = [ids or separate for ids, separate in zip(in_context, targets, strict=True)]
    ends = set(_control_tokens(tokenizer).values())
    return prompts, [ids if ids and ids[-1] in ends else [*ids, tokenizer.eos_token_id] for ids in targets]


def _contents(turns: list[dict[str, str]]) -> list[str]:
    return [turn["content"] for turn in turns]


def _paragraphs(turns: list[dict[str, str]]) -> str:
    return "\n\n".join(_contents(turns))


def _user_text(instruction: str, context: str) -> str:
    return f"{instruction}\n{context}" if context else instruction


def _plain_prompts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    encoded = _tokenize(tokenizer, texts, literal=True, add_special_tokens=True)
    return [[*_without_end(ids, tokenizer), tokenizer.eos_token_id] for ids in encoded]


def _shown(tokenizer: PreTrainedTokenizerBase, contents: list[str]) -> list[str]:
    """Contents for the chat template: those that spell a special token are replaced by a placeholder."""
    return [PLACEHOLDER if _spells_control(tokenizer, content) else content for content in contents]


def _shown_turns(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{**turn, "content": text} for turn, text in zip(turns, _shown(tokenizer, _contents(turns)), strict=True)]


def _render(tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict[str, str]]]) -> list[str]:
    """Prompts as the chat template writes them."""
    return _apply_template(tokenizer, conversations, add_generation_prompt=True)


def _apply_template(
    tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict[str, str]]], add_generation_prompt: bool
) -> list[str]:
    """Conversations as the chat template writes them.

    Raises:
        InputError: the template is wrong, or does not accept such a conversation.
    """
    try:
        return tokenizer.apply_chat_template(
            conversations, tokenize=False, add_generation_prompt=add_generation_prompt, **TEMPLATE_VARIABLES
        )
    except TEMPLATE_ERRORS as error:
        raise InputError(
            f"the tokenizer's chat template fails ({type(error).__name__}: {first_line(error)}); fix it, or use "
            "prompt_template plain"
        ) from error


def _render_answers(
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[list[dict[str, str]]],
    prompts: list[str],
    outputs: list[str],
) -> list[str]:
    """The text that the chat template appends to the prompts for the answers, without the white space between turns."""
    turns = [
        [*conversation, {"role": "assistant", "content": output}]
        for conversation, output in zip(conversations, outputs, strict=True)
    ]
    texts = _apply_template(tokenizer, turns, add_generation_prompt=False)
    if not all(map(str.startswith, texts, prompts)):
        raise InputError(
            "the tokenizer's chat template does not append the answer to the prompt, so the supervised part cannot "
            "be told apart; use prompt_template plain"
        )
    return [text[len(prompt) :].rstrip() for text, prompt in zip(texts, prompts, strict=True)]


def _encode_rendered(
    tokenizer: PreTrainedTokenizerBase, rendered: list[str], contents: list[list[str]]
) -> list[list[int]]:
    """Token ids of rendered text. Special tokens in it count only if the template wrote them, not the contents."""
    rows = [_pieces(tokenizer, *both) for both in zip(rendered, contents, strict=True)]
    ids = {
        literal: iter(_tokenize(tokenizer, [text for row in rows for text, kind in row if kind == literal], literal))
        for literal in (False, True)
    }
    return [[token for _, literal in row for token in next(ids[literal])] for row in rows]


def _pieces(tokenizer: PreTrainedTokenizerBase, rendered: str, contents: list[str]) -> list[tuple[str, bool]]:
    """The pieces of a rendered text that are encoded separately, and for each whether its special tokens are text."""
    spelling = [content for content in contents if _spells_control(tokenizer, content)]
    if not spelling:
        return [(rendered, False)]
    first, *parts = rendered.split(PLACEHOLDER)
    if len(parts) != len(spelling):
        raise InputError(
            "a row spells a special token, and the tokenizer's chat template does not show its text exactly once, so "
            "the two cannot be told apart; use prompt_template plain"
        )
    pairs = zip(spelling, parts, strict=True)
    return [(first, False), *(piece for content, part in pairs for piece in ((content, True), (part, False)))]


def _encode_in_context(
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    rendered: list[str],
    answers: list[str],
    outputs: list[str],
) -> list[list[int]]:
    """Token ids of answers as they follow their prompts: encoded separately, they would begin with a word's mark.

    Empty for an answer that spells a special token, or with which the prompt is tokenized differently.
    """
    encoded = _tokenize(tokenizer, list(map(str.__add__, rendered, answers)), literal=False)
    return [
        ids[len(prompt) :] if ids[: len(prompt)] == prompt and not _spells_control(tokenizer, output) else []
        for ids, prompt, output in zip(encoded, prompts, outputs, strict=True)
    ]


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], literal: bool, add_special_tokens: bool = False
) -> list[list[int]]:
    """Token ids of texts.

    Args:
        literal: special tokens that a text spells are text.
        add_special_tokens: add those that the tokenizer itself adds to a text.
    """
    if not texts:
        return []
    return tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        split_special_tokens=literal,
        return_attention_mask=False,
        verbose=False,  # about texts of more tokens than the model can read: rows are cut
    )["input_ids"]


@lru_cache(maxsize=8)
def _marks_beginnings(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether the tokenizer puts the mark of a word before any text, as SentencePiece does."""
    return "".join(tokenizer.tokenize("x")) != "x"


def _spells_control(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    return any(token in text for token in _control_tokens(tokenizer))


@lru_cache(maxsize=8)
def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Every token that is not text, by its spelling. Tokenizers do not always list those that their templates use (the
    end of a turn, say) as special tokens."""
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} [...] {text[-most // 2 :]}"


def _without_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Remove the end token that some tokenizers append themselves; the template writes it where it belongs."""
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
