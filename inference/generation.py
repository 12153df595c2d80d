"""Answers of a model: from batches of prompts to tokens."""

import copy
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from data import encode_target
from inference.cuda_graph import graphed_decoding
from loading.command_line import a_seed, at_least, flag, range_problems
from transformers_patch.auto import base_of, most_positions


@dataclass
class DecodingArguments:
    """Flags of decoding."""

    max_new_tokens: int = flag(256, "maximum length of an answer in tokens")
    temperature: float = flag(0.0, "0 decodes greedily; above 0 tokens are sampled")
    top_p: float = flag(1.0, "sample from the most likely tokens that together have this probability; 1 is all")
    top_k: int = flag(0, "sample from this many of the most likely tokens; 0 is all")
    seed: int = flag(0, "seed of sampling; the same seed and batch size give the same answers")

    def problems(self) -> list[str]:
        ranges = (
            at_least(1, "max_new_tokens"),
            ("a number of at least 0", lambda value: 0 <= value < float("inf"), ("temperature",)),
            ("above 0 and at most 1", lambda value: 0 < value <= 1, ("top_p",)),
            at_least(0, "top_k"),
            a_seed("seed"),
        )
        problems = range_problems(self, ranges)
        if self.temperature == 0 and (self.top_p, self.top_k) != (1, 0):
            problems.append("--top_p and --top_k need a --temperature above 0: greedy decoding does not sample")
        return problems

    def settings(self, pad_token_id: int, end_tokens: list[int]) -> GenerationConfig:
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=self.temperature > 0,
            use_cache=True,
            pad_token_id=pad_token_id,
            eos_token_id=end_tokens,
            **(drawn if self.temperature > 0 else {}),
        )


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    """The tokens that end an answer: that of the template, and those of the base model."""
    base = model.generation_config.eos_token_id
    ends = [encode_target(tokenizer, template, "x", "", "x")[-1]]
    return sorted({*ends, *(base if isinstance(base, list) else [base])} - {None})


def drop_proposed_settings(model: nn.Module, pad_token_id: int) -> None:
    """Keep only the special tokens of the generation settings in a base model's folder.

    transformers would take from there what a call does not set: sampling, penalties, a minimum length.
    """
    base = base_of(model)
    base.generation_config = GenerationConfig(
        eos_token_id=base.generation_config.eos_token_id,
        bos_token_id=base.generation_config.bos_token_id,
        pad_token_id=pad_token_id,
    )


def generate_answers(
    model: nn.Module, prompts: list[list[int]], settings: GenerationConfig, streamer: BaseStreamer | None = None
) -> list[list[int]]:
    """Token ids of the answer to each prompt, including the end token.

    Prompts are padded on the left, so that each answer directly follows its prompt. An answer stops at the end of the
    model's table of positions. Under ZeRO-3 this is a collective: every rank calls it with the same prompts.

    Args:
        settings: needs `max_new_tokens`, `pad_token_id` and `eos_token_id`.
        streamer: shows an answer while it is generated; only for a single prompt.
    """
    by_room = defaultdict(list)
    positions = most_positions(model) or float("inf")
    for index, prompt in enumerate(prompts):
        by_room[min(settings.max_new_tokens, positions - len(prompt))].append(index)
    answers: dict[int, list[int]] = {}
    for room, members in by_room.items():
        found = _generate_batch(model, [prompts[index] for index in members], settings, room, streamer)
        answers.update(zip(members, found, strict=True))
    return [answers[index] for index in range(len(prompts))]


def left_padded(prompts: list[list[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Prompts as `input_ids` and `attention_mask`, both int64 of shape (B, T)."""
    longest = max(map(len, prompts))
    input_ids_BT = torch.full((len(prompts), longest), pad_token_id)
    mask_BT = torch.zeros_like(input_ids_BT)
    for index, ids in enumerate(prompts):
        input_ids_BT[index, longest - len(ids) :] = torch.tensor(ids)
        mask_BT[index, longest - len(ids) :] = 1
    return input_ids_BT, mask_BT


def batches_by_length(lengths: list[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar lengths, the longest first, so that a lack of memory shows immediately."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def in_batches(
    compute: Callable[[list], list], items: list, lengths: list[int], batch_size: int, progress: Callable
) -> list:
    """The results of `compute` for all items, in their order, computed in batches of similar lengths."""
    results: dict[int, object] = {}
    for batch in progress(batches_by_length(lengths, batch_size)):
        results.update(zip(batch, compute([items[index] for index in batch]), strict=True))
    return [results[index] for index in range(len(items))]


def _generate_batch(
    model: nn.Module, prompts: list[list[int]], settings: GenerationConfig, room: int, streamer: BaseStreamer | None
) -> list[list[int]]:
    """Answers of at most `room` tokens."""
    settings = copy.copy(settings)
    settings.max_new_tokens = room
    input_ids_BT, mask_BT = left_padded(prompts, settings.pad_token_id)
    with torch.no_grad(), graphed_decoding(model, settings, input_ids_BT.shape[1]):
        output_BT = model.generate(
            input_ids=input_ids_BT.to(model.device),
            attention_mask=mask_BT.to(model.device),
            generation_config=settings,
            streamer=streamer,
        )
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    return [_up_to_end(answer, ends) for answer in output_BT[:, input_ids_BT.shape[1] :].tolist()]


def _up_to_end(answer: list[int], ends: list[int]) -> list[int]:
    """An answer up to its first end token; the rest is padding."""
    return answer[: next((place + 1 for place, token in enumerate(answer) if token in ends), len(answer))]
