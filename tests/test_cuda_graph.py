"""Decoding by CUDA graph, on a CPU: the graph's place is taken by the computation that it would have recorded."""

import pytest
import torch
from conftest import filled_model
from test_architectures import ARCHITECTURES, UNPREPARED, config_of
from torch import nn
from transformers.generation import BaseStreamer, GenerationMixin

from inference import cuda_graph
from inference.generation import DecodingArguments, generate_answers
from transformers_patch import AutoModelForCausalLM

PROMPTS = [[5, 6, 7], [9, 10], list(range(20, 40)), [3]]
ENDS = [1, 37, 77, 200]
BY_GRAPH = {"llama", "qwen2", "qwen3", "phi3", "olmo2", "granite", "smollm3", "gpt2", "stablelm", "opt"}


@pytest.fixture
def replays(monkeypatch) -> list[dict]:
    """Lets a model on the CPU be captured; holds the addresses of the tensors that each replay has read."""
    found: list[dict] = []

    def capture(compute, device):
        def replay():
            found.append({name: _address(value) for name, value in compute.keywords.items()})
            return compute()

        return replay

    monkeypatch.setattr(cuda_graph, "_is_on_one_gpu", lambda model: True)
    monkeypatch.setattr(cuda_graph, "capture", capture)
    monkeypatch.setattr(
        GenerationMixin,
        "_valid_auto_compile_criteria",
        lambda self, inputs, settings: settings.cache_implementation == "static",
    )
    return found


def _address(value) -> int:
    return value.data_ptr() if isinstance(value, torch.Tensor) else id(value)


def one_by_one(model: nn.Module, prompts: list[list[int]], **flags) -> list[list[int]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAMOE_CUDA_GRAPHS", "0")
        return answers(model, prompts, **flags)


def answers(
    model: nn.Module, prompts: list[list[int]], streamer: BaseStreamer | None = None, new: int = 30, **flags
) -> list[list[int]]:
    settings = DecodingArguments(max_new_tokens=new, **flags).settings(pad_token_id=1, end_tokens=ENDS)
    torch.manual_seed(0)
    return generate_answers(model, prompts, settings, streamer)


@pytest.mark.parametrize("name", ARCHITECTURES | UNPREPARED)
@pytest.mark.parametrize("flags", [{}, {"temperature": 1.0, "top_p": 0.9}], ids=["greedy", "drawn"])
def test_the_answers_are_those_without_a_graph(replays, name, flags):
    """Prompts of several lengths, answers that end at different times; bases that cannot be captured are not."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(name)).eval()
    expected = one_by_one(model, PROMPTS, **flags)
    assert not replays
    assert answers(model, PROMPTS, **flags) == expected
    assert len(replays) == (max(map(len, expected)) - 2 if name in BY_GRAPH else 0)


def test_an_adapted_model_and_its_base_replay_their_own_steps_on_fixed_tensors(replays):
    model = filled_model().eval()
    found = {}
    for disabled in (False, True):
        replays.clear()
        with model.disable_adapter() if disabled else torch.no_grad():
            found[disabled] = answers(model, PROMPTS)
            assert found[disabled] == one_by_one(model, PROMPTS)
        assert len(replays) == max(map(len, found[disabled])) - 2 > 10
        assert all(each == replays[0] for each in replays)
        assert {"input_ids", "attention_mask", "position_ids", "past_key_values"} <= replays[0].keys()
    assert found[False] != found[True]


def test_a_call_leaves_nothing_behind(replays):
    """A second, shorter batch does not get the cache of the first: the same prompts are computed alike each time."""
    model = filled_model().eval()
    before = set(vars(model.get_base_model()))
    answers(model, PROMPTS)
    assert set(vars(model.get_base_model())) == before


def test_a_table_of_positions_ends_answers_as_it_does_without_a_graph(replays, gpt2_dir):
    model = AutoModelForCausalLM.from_pretrained(gpt2_dir).eval()
    prompts = [[5, 6, 7], list(range(4, 61)), list(range(10, 50))]
    found = answers(model, prompts)
    assert found == one_by_one(model, prompts)
    assert len(found[1]) == 64 - 57
    assert replays


def test_a_streamer_shows_the_answer(replays):
    class Shown(BaseStreamer):
        def __init__(self):
            self.tokens: list[int] = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append(-1)

    model, shown = filled_model().eval(), Shown()
    (answer,) = answers(model, PROMPTS[:1], shown)
    assert shown.tokens == [*PROMPTS[0], *answer, -1]
    assert len(replays) == len(answer) - 2


def test_answers_of_a_few_tokens_and_other_models_are_decoded_as_always(replays, monkeypatch):
    model = filled_model().eval()
    base = model.get_base_model()
    answers(model, PROMPTS, new=7)
    for changed in (
        {"_attn_implementation": "flash_attention_2"}, {"rope_parameters": {"rope_type": "longrope"}},
        {"num_experts_per_tok": 2},
    ):  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            for name, value in changed.items():
                patch.setattr(base.config, name, value, raising=False)
            assert not cuda_graph.can_be_captured(base), changed
    assert cuda_graph.can_be_captured(base)
    base.hf_quantizer = object()
    assert not cuda_graph.can_be_captured(base)
    assert not replays


def test_a_model_that_cannot_be_captured_says_so_once_and_answers(replays, monkeypatch, capsys):
    def refuse(compute, device):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    model = filled_model().eval()
    expected = one_by_one(model, PROMPTS)
    monkeypatch.setattr(cuda_graph, "capture", refuse)
    for _ in range(2):
        assert answers(model, PROMPTS) == expected
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be decoded by CUDA graph" in line
    assert "not permitted when stream is capturing)" in line
