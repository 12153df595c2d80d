"""Turning a row into the text that the model reads (prompt) and the text that it learns to write (target)."""

from transformers import PreTrainedTokenizerBase

from data.errors import InputError

TEMPLATES = ("auto", "plain", "chat")


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
    text = f"{instruction}\n{context}" if context else instruction
    if template == "plain":
        ids = tokenizer(text, split_special_tokens=True)["input_ids"]
        return [*_without_end(ids, tokenizer), tokenizer.eos_token_id]
    rendered = tokenizer.apply_chat_template(_turns(text), tokenize=False, add_generation_prompt=True)
    return _encode_rendered(tokenizer, rendered, text)


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
    text = f"{instruction}\n{context}" if context else instruction
    prompt = tokenizer.apply_chat_template(_turns(text), tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*_turns(text), {"role": "assistant", "content": output}], tokenize=False)
    if not whole.startswith(prompt):
        raise InputError(
            "the tokenizer's chat template does not append the answer to the prompt, so the supervised part cannot "
            "be told apart; use prompt_template plain"
        )
    ids = _encode_rendered(tokenizer, whole[len(prompt) :].rstrip(), output)
    return ids if ids and ids[-1] in tokenizer.all_special_ids else [*ids, tokenizer.eos_token_id]


def _turns(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _encode_rendered(tokenizer: PreTrainedTokenizerBase, rendered: str, content: str) -> list[int]:
    """Token ids of a rendered template, in which special tokens count only outside the user's content."""
    content = content.strip()
    if not any(token in content for token in tokenizer.all_special_tokens):
        return tokenizer(rendered, add_special_tokens=False)["input_ids"]
    before, content, after = rendered.partition(content)
    pieces = ((before, False), (content, True), (after, False))
    return [
        token
        for text, literal in pieces
        for token in tokenizer(text, add_special_tokens=False, split_special_tokens=literal)["input_ids"]
    ]


def _without_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Some tokenizers append the end token themselves; the template writes it where it belongs."""
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
