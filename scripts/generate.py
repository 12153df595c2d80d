"""Answer with a trained adapter: one prompt, a file of prompts, or a conversation.

Run as ``python -m scripts.generate --adapter DIR`` with ``--prompt``, ``--input`` and ``--output``, or ``--chat``, from
the repository root. Prompts are formatted with the template that the adapter was trained with. Answers are greedy, and
so always the same, unless a temperature is given.
"""

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import GenerationConfig, TextStreamer

from data import (
    TEMPLATES,
    AnswerFile,
    Conversation,
    InputError,
    encode_question,
    encode_turns,
    encoding_problem,
    file_hash,
)
from data.answers import unwritable_field
from data.files import find_files, read_block, split_files
from data.rows import MOST_PROBLEMS_SHOWN, plain_problem, read_row, refuse_rows
from inference.generation import DecodingArguments, batches_by_length, generate_answers
from inference.trained import InferenceArguments, TrainedModel, load_trained
from loading.command_line import flag, one_of, output_problem, parse_flags, range_problems, run_verb
from loading.lock import locked
from peft.saving import WEIGHTS_NAME
from transformers_patch.auto import context_length

COMMAND = "python -m scripts.generate"


@dataclass
class GenerateArguments:
    """The prompts, and the place of the answers."""

    prompt: str | None = flag(None, "one prompt; the answer is printed")
    input: str | None = flag(None, "file or folder of rows in any format of docs/DATA.md; existing answers are ignored")
    output: str | None = flag(
        None, "file for the rows with their answers, .json or .jsonl; rerunning an interrupted command resumes it"
    )
    chat: bool = flag(False, "have a conversation on the terminal")
    template: str | None = flag(None, f"prompt template: {', '.join(TEMPLATES)}; by default the run's")
    compare_base: bool = flag(False, "also show the base model's answer")

    def problems(self) -> list[str | None]:
        problems = [
            encoding_problem("--prompt", self.prompt),
            output_problem(self.output, [self.input], endings=(".json", ".jsonl")),
            *range_problems(self, [one_of(TEMPLATES, "template")]),
        ]
        if sum((self.prompt is not None, self.input is not None, self.chat)) != 1:
            problems.append("give exactly one of --prompt, --input and --chat")
        if (self.input is None) != (self.output is None):
            problems.append("--input and --output belong together")
        if self.chat and self.compare_base:
            problems.append("--chat cannot show two answers; use --prompt with --compare_base")
        return problems


KINDS = (InferenceArguments, DecodingArguments, GenerateArguments)


class Answerer:
    """A trained model with all settings of its answers.

    Args:
        trained: the model.
        decoding: flags of decoding.
        args: the template, and if the base model also answers.
    """

    def __init__(self, trained: TrainedModel, decoding: DecodingArguments, args: GenerateArguments):
        self.trained, self.tokenizer, self.seed = trained, trained.tokenizer, decoding.seed
        self.template = trained.template(args.template)
        self.settings: GenerationConfig = decoding.settings(
            trained.tokenizer.pad_token_id, trained.end_tokens(self.template)
        )
        self.voices: dict[str, Callable[[], AbstractContextManager]] = {"generated": nullcontext}
        if args.compare_base:
            self.voices["generated_by_base"] = trained.as_base

    def encode(self, conversation: Conversation) -> list[int]:
        """Token ids of a prompt.

        Raises:
            InputError: the template cannot show it, or it is too long for an answer to fit into the model's context.
        """
        if self.template == "plain" and (problem := plain_problem(conversation)):
            raise InputError(f"a prompt {problem}")
        ids = encode_question(self.tokenizer, self.template, conversation)
        if not self.has_room(ids):
            most, text = context_length(self.trained.model) - 1, conversation.messages[-1]["content"]  # type: ignore[operator]
            raise InputError(f"a prompt has {len(ids)} tokens, but the model reads at most {most}: {text[:60]!r}...")
        return ids

    def has_room(self, prompt: list[int], answer: int = 1) -> bool:
        """True if a prompt and an answer of this many tokens fit into the model's context."""
        context = context_length(self.trained.model)
        return context is None or len(prompt) + answer <= context

    def answers(self, prompts: list[list[int]], offset: int = 0) -> list[dict[str, str]]:
        """For each prompt, the answers by their field in the output."""
        texts = {}
        for field, voice in self.voices.items():
            torch.manual_seed(self.seed + offset)
            with voice():
                tokens = generate_answers(self.trained.model, prompts, self.settings)
            texts[field] = [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
        return [dict(zip(texts, each, strict=True)) for each in zip(*texts.values(), strict=True)]


def main(argv: list[str] | None = None) -> None:
    """Read the command line and answer.

    Raises:
        InputError: flags, rows, adapter or output file cannot be used.
    """
    inference, decoding, args = parse_flags(COMMAND, __doc__.splitlines()[0], KINDS, argv)
    rows = load_prompts(args.input) if args.input else []
    trained = load_trained(inference)
    answerer = Answerer(trained, decoding, args)
    if args.chat:
        chat(answerer)
    elif args.prompt is not None:
        (answer,) = answerer.answers([answerer.encode(one_turn(args.prompt))])
        print(*answer_lines(answer), sep="\n")
    else:
        settings = answer_settings(inference, answerer)
        in_use = f"--output {args.output} is being written by another process; wait for its end, or choose another"
        with locked(Path(args.output), in_use):
            answer_rows(answerer, rows, AnswerFile(args.output, rows, settings), inference.batch_size)
        print(f"{len(rows)} answers are in {args.output}")


def load_prompts(path: str) -> list[dict]:
    """The unchanged rows of a file or folder; only prompts are checked, the rest has to be JSON.

    Raises:
        InputError: a file or row is invalid, or there are no rows.
    """
    rows: list[dict] = []
    problems: list[str] = []
    for block in split_files(find_files(path)):
        for number, row in read_block(block):
            if problem := prompt_problem(row) or unwritable_field(row):
                problems.append(f"{block.file}: row {number}: {problem}")
            rows.append(row)
        refuse_rows(problems, at_least=MOST_PROBLEMS_SHOWN + 1)
    refuse_rows(problems)
    if not rows:
        raise InputError(f"{path} does not contain any rows")
    return rows


def prompt_problem(row: object) -> str | None:
    """The reason why a row is not a prompt, or None; fields that only training and evaluation read are ignored."""
    try:
        read_row(row, answered=False)
    except InputError as error:
        return str(error)
    return None


def one_turn(text: str) -> Conversation:
    return Conversation([{"role": "user", "content": text}])


def answer_settings(inference: InferenceArguments, answerer: Answerer) -> dict:
    """Everything that answers depend on except the rows: an incomplete file with other values is not resumed."""
    # Not batch_size, although padding changes answers within rounding, and sampling depends on it: a user has to lower
    # it to continue after memory ran out.
    weights = Path(inference.adapter) / WEIGHTS_NAME
    decoding = answerer.settings.to_diff_dict()
    return {
        "adapter": file_hash(weights) if weights.is_file() else inference.adapter,
        "base_model": answerer.trained.base_model,
        "dtype": str(inference.torch_dtype),
        "load_in_kbits": inference.load_in_kbits,
        "template": answerer.template,
        "fields": list(answerer.voices),
        **{name: decoding.get(name) for name in ("max_new_tokens", "temperature", "top_p", "top_k")},
        "seed": answerer.seed,
    }


def answer_rows(answerer: Answerer, rows: list[dict], file: AnswerFile, batch_size: int) -> None:
    """Answer the rows that do not have an answer yet, batch by batch, and complete the file."""
    prompts = []
    for number, row in enumerate(rows, start=1):
        try:
            prompts.append(answerer.encode(read_row(row, answered=False)))
        except InputError as error:
            raise InputError(f"--input: row {number}: {error}") from error
    batches = batches_by_length([len(prompt) for prompt in prompts], batch_size)
    with tqdm(total=len(rows), desc="answers", unit="row") as bar:
        for batch in batches:
            # If any row of a batch is missing, all of it is answered again, so that sampling does not depend on it.
            if not file.answers.keys() >= set(batch):
                answers = answerer.answers([prompts[index] for index in batch], offset=batch[0])
                file.append(dict(zip(batch, answers, strict=True)))
            bar.update(len(batch))
    file.finish()


def chat(answerer: Answerer) -> None:
    """Hold a conversation, with each answer shown while it is generated, until /exit or the end of the input."""
    tokenizer, model = answerer.tokenizer, answerer.trained.model
    keeps = answerer.template == "chat"
    memory = "/reset forgets the conversation, " if keeps else "each line is a separate prompt (template plain), "
    print(f"Type a message; {memory}/exit ends.")
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    turns: list[dict[str, str]] = []
    torch.manual_seed(answerer.seed)
    for line in _typed_lines():
        if line == "/reset" or not keeps:
            turns.clear()
        if line in ("", "/reset"):
            continue
        try:
            turns, ids = encode_conversation(answerer, [*turns, {"role": "user", "content": line}])
        except InputError as error:
            print(f"not sent: {error}")
            continue
        (tokens,) = generate_answers(model, [ids], answerer.settings, streamer)
        turns.append({"role": "assistant", "content": tokenizer.decode(tokens, skip_special_tokens=True)})


def encode_conversation(answerer: Answerer, turns: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[int]]:
    """The conversation and its token ids. Its oldest exchanges are dropped as far as the model's context requires it.

    Raises:
        InputError: the last turn alone is too long.
    """
    wanted = answerer.settings.max_new_tokens
    # The maximum length of an answer may exceed the context: half of the context is kept for the conversation.
    room = min(wanted, (context_length(answerer.trained.model) or 2 * wanted) // 2)
    while len(turns) > 1:
        ids = encode_turns(answerer.tokenizer, answerer.template, turns)
        if answerer.has_room(ids, room):
            return turns, ids
        turns = turns[2:]
    return turns, answerer.encode(Conversation(turns))


def answer_lines(answer: dict[str, str]) -> list[str]:
    """The lines of one answer, or of both with headings."""
    if len(answer) == 1:
        return list(answer.values())
    return ["--- base", answer["generated_by_base"], "--- adapter", answer["generated"]]


def _typed_lines() -> Iterator[str]:
    prompt = "> " if sys.stdin.isatty() else ""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # an invalid byte is an error of its line only
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line == "/exit":
            return
        yield line


if __name__ == "__main__":
    run_verb(main)
