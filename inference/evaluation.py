"""The evaluation of a model on one data set: every metric, for all rows, by task and by task type."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
from datasets import Dataset
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from data import InputError, answer_start, encode_answer, turns_before_answer
from inference.generation import generate_answers, in_batches
from inference.metrics import (
    CORPUS_METRICS,
    TEXT_METRICS,
    Estimate,
    corpus_estimate,
    mean_estimate,
    ratio_estimate,
)
from inference.scoring import AnswerScore, most_likely_options, score_answers
from loading.base_model import length_problem

FORCED_METRICS = ("lm_loss", "perplexity", "token_exact_match")
DECODED_METRICS = (*TEXT_METRICS, *CORPUS_METRICS)
METRICS = (*FORCED_METRICS, "accuracy", *DECODED_METRICS)
MOST_LABELS = 10


@dataclass(frozen=True)
class Plan:
    """The settings of an evaluation.

    Args:
        metrics: names from `METRICS`.
        template: prompt template, `plain` or `chat`.
        decoding: generation settings of the greedy answers.
        label_tasks: the labels of each task whose accuracy is measured.
        batch_size: rows per batch.
        seed: seed of the bootstrap.
    """

    metrics: tuple[str, ...]
    template: str
    decoding: GenerationConfig
    label_tasks: dict[str, list[str]]
    batch_size: int
    seed: int


@dataclass(frozen=True)
class RowResults:
    """The outputs of one model for the rows; None if no metric needs them.

    Args:
        scores: its scores of the expected answers.
        right_labels: by row, if the expected label is the most likely one; only rows of label tasks.
        answers: its greedy answers.
    """

    scores: list[AnswerScore] | None
    right_labels: dict[int, bool]
    answers: list[str] | None


def label_tasks(rows: Dataset) -> dict[str, list[str]]:
    """The labels of each task that has few: at most 10 different outputs, and fewer than rows."""
    outputs = defaultdict(list)
    for task, output in zip(rows["task"], rows["output"], strict=True):
        outputs[task].append(output)
    labels = {task: sorted(set(each)) for task, each in outputs.items() if task}
    return {task: each for task, each in labels.items() if len(each) <= MOST_LABELS and len(each) < len(outputs[task])}


def run_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Dataset, plan: Plan, name: str) -> RowResults:
    """Let a model score, choose and answer, as far as the plan's metrics need it.

    Args:
        name: the model's name on the progress bars.

    Raises:
        InputError: a prompt with a label is longer than the model's table of positions. Nothing has been measured.
    """

    def bar(verb: str) -> Callable[[Iterable], Iterable]:
        return partial(tqdm, desc=f"{name}: {verb}", unit="batch")

    options = _encode_options(model, tokenizer, rows, plan) if "accuracy" in plan.metrics else {}
    encoded = list(rows.select_columns(["input_ids", "spans"]))
    scores, answers = None, None
    if set(plan.metrics) & set(FORCED_METRICS):
        scores = score_answers(model, encoded, tokenizer.pad_token_id, plan.batch_size, bar("rating"))
    right = _right_labels(model, tokenizer, rows, plan, options, bar("choosing")) if options else {}
    if set(plan.metrics) & set(DECODED_METRICS):
        prompts = [row["input_ids"][: answer_start(row)] for row in encoded]
        answer = partial(generate_answers, model, settings=plan.decoding)
        tokens = in_batches(answer, prompts, [len(each) for each in prompts], plan.batch_size, bar("answering"))
        answers = [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    return RowResults(scores, right, answers)


def measure(rows: Dataset, results: RowResults, plan: Plan) -> dict:
    """The metrics of all rows, of each task and of each task type, as JSON values."""
    groups: dict[str, defaultdict[str, list[int]]] = {"task": defaultdict(list), "task_type": defaultdict(list)}
    for column, members in groups.items():
        for index, name in enumerate(rows[column]):
            members[str(name)].append(index)
    references = [[row["output"], *row["aliases"]] for row in rows.select_columns(["output", "aliases"])]

    def of_group(members: list[int]) -> dict:
        estimates = _estimates(members, references, results, plan)
        return {"rows": len(members), **{name: estimate.to_dict() for name, estimate in estimates.items()}}

    return {
        "all": of_group(list(range(len(rows)))),
        "by_task": {name: of_group(each) for name, each in sorted(groups["task"].items())},
        "by_task_type": {name: of_group(each) for name, each in sorted(groups["task_type"].items())},
    }


def _encode_options(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Dataset, plan: Plan
) -> dict[int, list[list[int]]]:
    """By row of a label task, the token ids of each label as an answer to its prompt."""
    options = {
        index: [
            encode_answer(tokenizer, plan.template, turns_before_answer(row), label)
            for label in plan.label_tasks[row["task"]]
        ]
        for index, row in enumerate(rows.select_columns(["task", "turns", "tools"]))
        if row["task"] in plan.label_tasks
    }
    prompts = [answer_start(row) for row in rows.select_columns("spans")]
    longest = max((prompts[index] + max(map(len, each)) for index, each in options.items()), default=0)
    if problem := length_problem(model, longest):
        raise InputError(
            f"accuracy measures every label after every prompt of its task, which makes {problem}; choose other "
            "--label_tasks, or remove accuracy from --metrics"
        )
    return options


def _right_labels(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    plan: Plan,
    options: dict[int, list[list[int]]],
    progress: Callable,
) -> dict[int, bool]:
    """By row, True if the expected label is the most likely one of its task. The options are the labels' token ids."""
    chosen = rows.select(list(options))
    prompts = [row["input_ids"][: answer_start(row)] for row in chosen]
    choices = list(options.values())
    places = most_likely_options(model, prompts, choices, tokenizer.pad_token_id, plan.batch_size, progress)
    return {
        index: plan.label_tasks[row["task"]][place] == row["output"]
        for index, row, place in zip(options, chosen, places, strict=True)
    }


def _estimates(members: list[int], references: list[list[str]], results: RowResults, plan: Plan) -> dict[str, Estimate]:
    """Each metric of the plan for some rows; accuracy only if some of them belong to a label task."""
    estimates = {}
    if results.scores:
        scores = [results.scores[index] for index in members]
        loss = ratio_estimate([score.nll for score in scores], [score.tokens for score in scores], plan.seed)
        estimates["lm_loss"] = loss
        estimates["perplexity"] = Estimate(*np.exp([loss.value, loss.low, loss.high]).tolist())
        estimates["token_exact_match"] = mean_estimate([score.matches for score in scores], plan.seed)
    if right := [results.right_labels[index] for index in members if index in results.right_labels]:
        estimates["accuracy"] = mean_estimate(right, plan.seed)
    if results.answers is not None:
        answers, wanted = [results.answers[index] for index in members], [references[index] for index in members]
        pairs = list(zip(answers, wanted, strict=True))
        for name, metric in TEXT_METRICS.items():
            if name in plan.metrics:
                estimates[name] = mean_estimate([metric(answer, right) for answer, right in pairs], plan.seed)
        for name in CORPUS_METRICS:
            if name in plan.metrics:
                estimates[name] = corpus_estimate(name, answers, wanted, plan.seed)
    return {name: estimate for name, estimate in estimates.items() if name in plan.metrics}
