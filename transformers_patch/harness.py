"""lm-evaluation-harness on a model of this code. Its `[hf]` extra would bring another `peft`: it is not needed."""

import difflib
import logging
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from data import TEMPLATE_VARIABLES, InputError
from transformers_patch.inference import TrainedModel

# It warns of what its own task files leave out, and of a model that is loaded already.
logging.getLogger("lm_eval").setLevel(logging.ERROR)
OWN_TASKS = Path(__file__).resolve().parent.parent / "scripts" / "lm_eval_tasks"


class TemplateLM(HFLM):
    """The harness's model, whose requests go through the prompt template that the adapter was trained with.

    Args:
        trained: the model.
        template: `chat` is the tokenizer's own; with `plain`, the end-of-sequence token follows the harness's text, as
            it followed every prompt in training.
        batch_size: rows at once.
    """

    def __init__(self, trained: TrainedModel, template: str, batch_size: int):
        super().__init__(
            pretrained=trained.model,
            tokenizer=trained.tokenizer,
            batch_size=batch_size,
            chat_template_args=TEMPLATE_VARIABLES,
        )
        self._template = template
        trained.model.generation_config.eos_token_id = trained.end_tokens(template)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if self._template == "chat":
            return super().apply_chat_template(chat_history, add_generation_prompt)
        text = "\n\n".join(turn["content"] for turn in chat_history)
        return text + self.tokenizer.eos_token if add_generation_prompt else text


def find_tasks(names: list[str]) -> TaskManager:
    """The harness's tasks, and those in `scripts/lm_eval_tasks`.

    Raises:
        InputError: there is no task of such a name; the message has the nearest ones.
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
    """The harness's numbers by task, in its own names.

    Raises:
        InputError: the data of a task cannot be had.
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
