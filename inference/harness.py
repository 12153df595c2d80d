"""lm-evaluation-harness with a model of this code. Its `[hf]` extra is not needed; it would install another `peft`."""

import difflib
import logging
from itertools import takewhile
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor

from data import Conversation, InputError, encode_answer, encode_turns, show_turns
from inference.generation import left_padded
from inference.trained import TrainedModel

# It warns about omissions in its own task files, and about models that are already loaded.
logging.getLogger("lm_eval").setLevel(logging.ERROR)
OWN_TASKS = Path(__file__).resolve().parent.parent / "scripts" / "lm_eval_tasks"


class TemplateLM(HFLM):
    """The harness's model, prompted with the tokens that training would give the same conversation.

    Args:
        trained: the model.
        template: `plain` or `chat`.
        batch_size: rows per batch.
    """

    def __init__(self, trained: TrainedModel, template: str, batch_size: int):
        super().__init__(pretrained=trained.model, tokenizer=trained.tokenizer, batch_size=batch_size)
        self._template = template
        # By the text of the prompt: its turns, and the beginning of the answer, which a task may prescribe.
        self._asked: dict[str, tuple[list[dict[str, str]], str]] = {}
        trained.model.generation_config.eos_token_id = trained.end_tokens(template)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        turns = list(chat_history)
        prefix = "" if add_generation_prompt else turns.pop()["content"]
        try:
            text = show_turns(self.tokenizer, self._template, turns)
        except InputError:  # some templates do not accept a system turn
            turns = [turn for turn in turns if turn["role"] != "system"]
            text = show_turns(self.tokenizer, self._template, turns)
        self._asked[text + prefix] = turns, prefix
        return text + prefix

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs
    ) -> list[int]:
        if string not in self._asked:
            return super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)
        turns, prefix = self._asked[string]
        ids = encode_turns(self.tokenizer, self._template, turns)
        ids += self._encode_beginning(turns, prefix) if prefix else []
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **kwargs
    ) -> tuple[Tensor, Tensor]:
        prompts = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
        return left_padded(prompts, self.tokenizer.pad_token_id)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context not in self._asked:
            return super()._encode_pair(context, continuation)
        turns, prefix = self._asked[context]
        prompt, beginning = self.tok_encode(context), self._encode_beginning(turns, prefix) if prefix else []
        return prompt, self._encode_beginning(turns, prefix + continuation)[len(beginning) :]

    def _encode_beginning(self, turns: list[dict[str, str]], text: str) -> list[int]:
        """The tokens of the beginning of an answer, without those that end an answer: the ones of an empty answer."""
        ids, end = (encode_answer(self.tokenizer, self._template, Conversation(turns), each) for each in (text, ""))
        shared = takewhile(lambda pair: pair[0] == pair[1], zip(reversed(ids), reversed(end), strict=False))
        return ids[: len(ids) - len(list(shared))]


def find_tasks(names: list[str]) -> TaskManager:
    """The harness's tasks, and those in `scripts/lm_eval_tasks`.

    Raises:
        InputError: a task does not exist; the message suggests similar names.
    """
    manager = TaskManager(include_path=str(OWN_TASKS))
    problems = []
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else "; lm_eval ls tasks lists them all"
            problems.append(f"--lm_eval {name}: lm-evaluation-harness has no such task{hint}")
    if problems:
        raise InputError("\n".join(problems))
    return manager


def run_tasks(
    lm: TemplateLM, names: list[str], manager: TaskManager, num_fewshot: int | None, limit: int | None, seed: int
) -> dict[str, dict]:
    """The harness's results by task, under its own names.

    Raises:
        InputError: the data of a task cannot be loaded.
    """
    try:
        found = simple_evaluate(
            model=lm,
            tasks=names,
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=True,
            fewshot_as_multiturn=lm._template == "chat",
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except OSError as error:
        raise InputError(f"--lm_eval: the data of a task could not be loaded: {error}") from error
    return found["results"]
