"""What a model knows: the facts of a probe that it recalls, and how far its predictions are from its base model's.

Shape suffixes: N positions, C positions of a chunk, V vocabulary.
"""

from collections.abc import Callable, Set
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from textwrap import shorten

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from data import Collator, InputError, encode_prompt, encode_question
from data.probe import NEUTRAL_TEXT, ProbeFact, asking_order
from inference.generation import DecodingArguments, end_tokens, generate_answers, in_batches
from inference.metrics import normalized
from peft.ranks import sum_over_ranks
from transformers_patch.auto import most_positions
from transformers_patch.labels import SupervisedTokens
from transformers_patch.logits import in_chunks, kl_divergence

LONGEST_ANSWER = 24  # tokens
BATCH_SIZE = 32
COMPARED_PROMPTS = 50  # the first so many: their order is random
MOST_LISTED = 50
MOST_SHOWN = 3


@dataclass(frozen=True)
class Probe:
    """The encoded facts of a probe, and what it takes to ask them.

    Args:
        questions: as `ProbeFact.bare_question`.
        prompts: token ids of each question.
        answers: the answers that count for each.
        text: token ids of a neutral text.
        total: number of facts to choose from.
        revealed: number of those that training rows reveal, which are not asked.
        too_long: number of those that others replace, since the model has no room for question and answer.
        tokenizer: of the model.
        template: prompt template, `plain` or `chat`.
    """

    questions: list[str]
    prompts: list[list[int]]
    answers: list[list[str]]
    text: list[int]
    total: int
    revealed: int
    too_long: int
    tokenizer: PreTrainedTokenizerBase
    template: str

    def summary(self) -> str:
        left_out = [f"{self.revealed:,} that training rows reveal"] if self.revealed else []
        left_out += [f"{self.too_long:,} without room for an answer"] if self.too_long else []
        not_asked = f"; not asked: {', '.join(left_out)}" if left_out else ""
        return f"{len(self.prompts):,} of {self.total:,} facts{not_asked}"


@dataclass(frozen=True)
class Reference:
    """The base model's answers to a probe.

    Args:
        known: for each fact, whether it recalls it.
        prompts_NV: log-probabilities of the token after each of the first prompts, float32 on the CPU.
        text_NV: of the next token at each position of the neutral text.
    """

    known: list[bool]
    prompts_NV: Tensor
    text_NV: Tensor


@dataclass(frozen=True)
class Knowledge:
    """The knowledge of a model, next to that of its base model.

    Args:
        facts: number of facts asked.
        revealed: number of facts that were not asked, since training rows reveal them.
        known: facts that the base model recalls.
        kept: how many of these the model recalls.
        kl_prompts: mean KL divergence of the next token's distribution from the base model's, in nats, after the first
            `COMPARED_PROMPTS` questions.
        kl_text: likewise at the positions of a neutral text.
        lost: of the first `MOST_LISTED` facts that are known but not kept, `question`, `expected` and `answer`: an
            answer that counts, and the first line of the model's.
    """

    facts: int
    revealed: int
    known: int
    kept: int
    kl_prompts: float
    kl_text: float
    lost: list[dict[str, str]] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Share of the known facts that are kept; 1 if none was known: a model cannot forget what it never knew."""
        return self.kept / self.known if self.known else 1.0

    def to_dict(self) -> dict[str, float]:
        return asdict(self) | {"share": self.share}

    @classmethod
    def from_dict(cls, values: dict) -> "Knowledge":
        return cls(**{field.name: values[field.name] for field in fields(cls)})

    def lines(self) -> list[str]:
        """For the terminal, in the manner of a run's summary."""
        most = 100 if self.kept == self.known else 99  # which rounding must not hide
        share = f" ({min(round(100 * self.share), most)} %)" if self.known else ""
        not_asked = f"; not asked: {self.revealed:,} that training rows reveal" if self.revealed else ""
        return [
            f"world knowledge       {self.known} of {self.facts} facts known before, {self.kept} of them{share} after"
            f"{not_asked}",
            f"KL from base model    {self.kl_prompts:.4f} after the questions, {self.kl_text:.4f} in neutral text",
            *["forgotten, for example:"] * bool(self.lost),
            *map(_shown, self.lost[:MOST_SHOWN]),
        ]


def _shown(lost: dict[str, str]) -> str:
    question, expected, answer = (shorten(lost[name], 70) for name in ("question", "expected", "answer"))
    return f"  {question}  {expected}; now: {answer or '(nothing)'}"


def encode_probe(
    facts: list[ProbeFact],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    model: nn.Module,
    count: int | None = None,
    revealed: Set[int] = frozenset(),
) -> Probe:
    """Encode the first facts of the `asking_order`, except those that are revealed or have no room for an answer.

    So another number of facts, or other training rows, replace as few of them as possible.

    Args:
        template: prompt template, `plain` or `chat`.
        count: number of facts to ask; None asks all. There may be fewer.
        revealed: indices of the facts that training rows reveal.

    Raises:
        InputError: no fact is left.
    """
    positions = most_positions(model)
    count = count or len(facts)
    asked: list[ProbeFact] = []
    prompts: list[list[int]] = []
    too_long = 0
    for fact in (facts[index] for index in asking_order(len(facts), count) if index not in revealed):
        prompt = encode_question(tokenizer, template, fact.question)
        if positions and len(prompt) + LONGEST_ANSWER > positions:
            too_long += 1
            continue
        prompts.append(prompt)
        asked.append(fact)
        if len(prompts) == count:
            break
    if not prompts:
        others = f", and the model's table of positions has no room for {too_long}" if too_long else ""
        raise InputError(
            f"no fact of the knowledge probe is left: training rows reveal {len(revealed)} of {len(facts)}{others}; "
            "name other facts with --knowledge_probe, or none"
        )
    text = encode_prompt(tokenizer, "plain", NEUTRAL_TEXT, "")[:-1][:positions]  # without the end token
    questions = [fact.bare_question for fact in asked]
    answers = [fact.answers for fact in asked]
    return Probe(questions, prompts, answers, text, len(facts), len(revealed), too_long, tokenizer, template)


def greedy_answers(
    model: nn.Module, probe: Probe, members: list[int], batch_size: int = BATCH_SIZE, progress: Callable = iter
) -> list[str]:
    """The first line of the model's answer to each of some facts.

    A collective: the ranks divide the facts among them, and all get all answers.
    """
    decoding = DecodingArguments(max_new_tokens=LONGEST_ANSWER)
    tokenizer = probe.tokenizer
    settings = decoding.settings(tokenizer.pad_token_id, end_tokens(model, tokenizer, probe.template))
    part = _part_of_rank()
    prompts = [probe.prompts[index] for index in members[part]]
    answer = partial(generate_answers, model, settings=settings)
    tokens = in_batches(answer, prompts, list(map(len, prompts)), batch_size, progress)
    texts = [""] * len(members)
    texts[part] = [_first_line(tokenizer.decode(each, skip_special_tokens=True)) for each in tokens]
    if dist.is_initialized():
        by_rank = [texts] * dist.get_world_size()
        dist.all_gather_object(by_rank, texts)
        texts = [max(each) for each in zip(*by_rank, strict=True)]  # empty from the ranks that did not ask
    return texts


def recalls(answer: str, expected: list[str]) -> bool:
    """True if the first line of an answer, perhaps a sentence, contains an expected answer as separate words."""
    found = normalized(_first_line(answer))
    return any(f" {normalized(each)} " in f" {found} " for each in expected)


def ask_base(model: nn.Module, probe: Probe, batch_size: int = BATCH_SIZE, progress: Callable = iter) -> Reference:
    """The answers of the base model, which `model` is now. A collective, as `greedy_answers` is."""
    prompts_NV, text_NV = (
        torch.cat(_by_row(model, probe, rows, _log_probs, batch_size, progress)) for rows in _compared_rows(probe)
    )
    answers = greedy_answers(model, probe, list(range(len(probe.prompts))), batch_size, progress)
    known = [recalls(answer, expected) for answer, expected in zip(answers, probe.answers, strict=True)]
    return Reference(known, prompts_NV, text_NV)


def compare(
    model: nn.Module, probe: Probe, reference: Reference, batch_size: int = BATCH_SIZE, progress: Callable = iter
) -> Knowledge:
    """Measure a model against its base model. A collective, as `greedy_answers` is."""
    members = [index for index, known in enumerate(reference.known) if known]
    answers = greedy_answers(model, probe, members, batch_size, progress)
    lost = [
        {"question": probe.questions[index], "expected": probe.answers[index][0], "answer": answer}
        for index, answer in zip(members, answers, strict=True)
        if not recalls(answer, probe.answers[index])
    ]
    divergences = []
    for rows, base_NV in zip(_compared_rows(probe), (reference.prompts_NV, reference.text_NV), strict=True):
        base = base_NV.split([end - start for start, end in (row["spans"] for row in rows)])
        rows = [{**row, "base": each} for row, each in zip(rows, base, strict=True)][_part_of_rank()]
        found = _by_row(model, probe, rows, _divergence, batch_size, progress)
        sums_2 = torch.tensor([sum(found), sum(len(row["base"]) for row in rows)], dtype=torch.float32)
        total, count = sum_over_ranks(sums_2.to(model.device)).tolist()
        divergences.append(total / count)
    kl_prompts, kl_text = divergences
    kept = len(members) - len(lost)
    return Knowledge(len(probe.prompts), probe.revealed, len(members), kept, kl_prompts, kl_text, lost[:MOST_LISTED])


def _first_line(answer: str) -> str:
    return answer.strip().partition("\n")[0].strip()


def _part_of_rank() -> slice:
    """The part of a list that this rank takes. Under ZeRO-3, where all ranks compute together, that is all of it."""
    if not dist.is_initialized() or is_deepspeed_zero3_enabled():
        return slice(None)
    return slice(dist.get_rank(), None, dist.get_world_size())


def _compared_rows(probe: Probe) -> tuple[list[dict], list[dict]]:
    """Rows whose supervised tokens are predicted at the positions to compare: of the questions, and of the text."""
    end = probe.tokenizer.pad_token_id  # a place for the next token; which one it is has no effect
    prompts = probe.prompts[:COMPARED_PROMPTS]
    rows = [{"input_ids": [*prompt, end], "spans": [len(prompt), len(prompt) + 1]} for prompt in prompts]
    return rows, [{"input_ids": probe.text, "spans": [1, len(probe.text)]}]


def _by_row(
    model: nn.Module, probe: Probe, rows: list[dict], finish: Callable, batch_size: int, progress: Callable
) -> list:
    """For each row, `finish` of the row and of the logits (N, V) at its positions."""
    collate = Collator(probe.tokenizer.pad_token_id)

    def of_batch(members: list[dict]) -> list:
        batch = collate([{"task_type": -1, "source": "", **row} for row in members])
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        positions = SupervisedTokens(batch["labels"], batch["supervised_indices"])
        with torch.no_grad(), positions.only(model, may_wait=False):
            logits_1NV = model(**inputs).logits
        counts = [row["spans"][1] - row["spans"][0] for row in members]
        parts = logits_1NV[0].split(counts)
        return [finish(row, part) for row, part in zip(members, parts, strict=True)]

    return in_batches(of_batch, rows, [len(row["input_ids"]) for row in rows], batch_size, progress)


def _log_probs(row: dict, logits_NV: Tensor) -> Tensor:
    return torch.cat([F.log_softmax(logits_CV, dim=-1).cpu() for (logits_CV,) in in_chunks(logits_NV[None])])


def _divergence(row: dict, logits_NV: Tensor) -> float:
    """KL(base || model), summed over the positions."""
    total = 0.0
    for logits_CV, base_CV in in_chunks(logits_NV[None], row["base"]):
        total += kl_divergence(base_CV.to(logits_CV), F.log_softmax(logits_CV, dim=-1)).item()
    return total
