"""Turning a row into the text that the model reads (prompt) and the text that it learns to write (target)."""

from collections.abc import Callable
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from data.errors import InputError

TEMPLATES = ("auto", "plain", "chat")
PLACEHOLDER = "PLACE-OF-THE-CONTENT"


def resolve_template(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """`plain` or `chat`: what `auto` means for this tokenizer.

    Raises:
        InputError: the name is unknown, or `chat` is asked of a tokenizer without a chat template.
    """
    if name not in TEMPLATES:
        raise InputError(f"prompt template {name!r} is unknown; allowed are {', '.join(TEMPLATES)}")
    if name == "chat" and not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template; use prompt_template plain or auto")
    if name == "auto":
        return "chat" if tokenizer.chat_template else "plain"
    return name


def encode_prompt(tokenizer: PreTrainedTokenizerBase, template: str, instruction: str, context: str) -> list[int]:
    """Token ids of the prompt, up to the place where the answer begins. Training and generation share it.

    plain (the format of the authors' code): instruction, then newline and input if there is one, end-of-sequence token.
    chat: the tokenizer's own template with the same text as the user's turn.

    Special tokens come from the template alone: text in a row that spells one (`</s>`) stays text.
    """
    text = _user_text(instruction, context)
    if template == "plain":
        ids = tokenizer(text, split_special_tokens=True)["input_ids"]
        return [*_without_end(ids, tokenizer), tokenizer.eos_token_id]
    return _encode_chat(tokenizer, text, lambda content: _render(tokenizer, content))


def encode_target(
    tokenizer: PreTrainedTokenizerBase, template: str, instruction: str, context: str, output: str
) -> list[int]:
    """Token ids of the answer, the token that ends it included.

    Raises:
        InputError: the chat template does not simply append the answer to the prompt.
    """
    if template == "plain":
        ids = tokenizer(output, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [*ids, tokenizer.eos_token_id]
    text = _user_text(instruction, context)
    ids = None
    if _marks_beginnings(tokenizer) and not _spells_control(tokenizer, output):
        prompt_ids = encode_prompt(tokenizer, template, instruction, context)
        ids = _encode_behind(prompt_ids, _render(tokenizer, text), _render_answer(tokenizer, text, output), tokenizer)
    if ids is None:
        ids = _encode_chat(tokenizer, output, lambda content: _render_answer(tokenizer, text, content))
    return ids if ids and ids[-1] in _control_tokens(tokenizer).values() else [*ids, tokenizer.eos_token_id]


def marked_row(tokenizer: PreTrainedTokenizerBase, row: dict, most_characters: int = 400) -> str:
    """An encoded row as text, what is learnt of it in [[ ]]; long parts are shortened in the middle."""
    ids, length = list(row["input_ids"]), row["prompt_length"]
    prompt, target = (tokenizer.decode(part, skip_special_tokens=False) for part in (ids[:length], ids[length:]))
    return f"{_shortened(prompt, most_characters)}[[{_shortened(target, most_characters)}]]"


def _user_text(instruction: str, context: str) -> str:
    return f"{instruction}\n{context}" if context else instruction


def _render(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    turns = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def _render_answer(tokenizer: PreTrainedTokenizerBase, text: str, output: str) -> str:
    """What the template puts behind the prompt for an answer, without the white space between turns."""
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": output}]
    prompt, whole = _render(tokenizer, text), tokenizer.apply_chat_template(turns, tokenize=False)
    if not whole.startswith(prompt):
        raise InputError(
            "the tokenizer's chat template does not append the answer to the prompt, so the supervised part cannot "
            "be told apart; use prompt_template plain"
        )
    return whole[len(prompt) :].rstrip()


def _encode_chat(tokenizer: PreTrainedTokenizerBase, content: str, render: Callable[[str], str]) -> list[int]:
    """Token ids of `render(content)`, in which special tokens count only where the template wrote them.

    Where the content spells one, the template is rendered around a placeholder and the content encoded apart.
    """
    if not _spells_control(tokenizer, content):
        return tokenizer(render(content), add_special_tokens=False)["input_ids"]
    parts = render(PLACEHOLDER).split(PLACEHOLDER)
    if len(parts) != 2:
        raise InputError(
            "a row spells a special token, and the tokenizer's chat template does not show its text exactly once, so "
            "the two cannot be told apart; use prompt_template plain"
        )
    pieces = ((parts[0], False), (content, True), (parts[1], False))
    return [
        token
        for text, literal in pieces
        for token in tokenizer(text, add_special_tokens=False, split_special_tokens=literal)["input_ids"]
    ]


def _encode_behind(
    prompt_ids: list[int], prompt: str, answer: str, tokenizer: PreTrainedTokenizerBase
) -> list[int] | None:
    """Token ids of an answer as they follow the prompt; None where the prompt's tokens differ without the answer.

    Encoded apart, the answer would begin with a mark of its own.
    """
    ids = tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
    return ids[len(prompt_ids) :] if ids[: len(prompt_ids)] == prompt_ids else None


@lru_cache(maxsize=8)
def _marks_beginnings(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts the mark of a word before any text, as SentencePiece does."""
    return "".join(tokenizer.tokenize("x")) != "x"


def _spells_control(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    return any(token in text for token in _control_tokens(tokenizer))


@lru_cache(maxsize=8)
def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Every token that is not text, by its spelling. Tokenizers do not always list those that their templates use
    (the end of a turn, say) among their special tokens."""
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} [...] {text[-most // 2 :]}"


def _without_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Some tokenizers append the end token themselves; the template writes it where it belongs."""
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
