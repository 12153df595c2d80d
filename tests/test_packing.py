"""Packed samples do not see each other: training and evaluation are those of the same samples in rows of their own."""

import json
import re
from itertools import chain, islice, product
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import example_rows, fill_adapter, filled_model, tiny_tokenizer
from test_architectures import ARCHITECTURES, SIZES, UNPREPARED, config_of
from test_launch import launch
from test_regimes import BETA, Case, assert_same
from test_train import Runner, interrupt_after, same_adapter, trainer_of
from transformers import AutoConfig, integrations, modeling_flash_attention_utils

from data import (
    IGNORED_LABEL,
    Collator,
    Encoding,
    GlobalBatchSampler,
    InputError,
    PackedRows,
    PackingCollator,
    load_data,
    pack,
    row_lengths,
)
from loading.base_model import check_packing
from peft import LoraConfig, TaskType, get_peft_model, sample_shares
from transformers_patch import AutoModelForCausalLM, RoutingRecorder
from transformers_patch.packing import PACKABLE

LENGTHS = [17, 9, 12, 5, 3, 20, 7, 2]
NOT_FOR_THE_MODEL = ("lengths", "sources")
ADAPTERS = {
    "default": {},
    "three types, top-k": {"num_task_types": 3, "expert_groups": [1, 2, 1], "lora_top_k": 2},
    "shared A": {"lora_shared_A": True},
    "null expert": {"lora_null_expert": True},
}


def samples(lengths: list[int] = LENGTHS) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    return [
        {
            "input_ids": torch.randint(2, 300, (length,), generator=generator).tolist(),
            "spans": [length // 2, length],
            "task_type": number % 3 - 1,
            "source": f"rows.json row {number}",
        }
        for number, length in enumerate(lengths)
    ]


def packed(rows: list[dict], capacity: int = 30, one_row: bool = False) -> dict:
    packs = pack([len(row["input_ids"]) for row in rows], capacity, seed=0)
    return PackingCollator(1, one_row).from_packs([[rows[number] for number in members] for members in packs])


def reordered(batch: dict, rows: list[dict]) -> list[dict]:
    """The rows in the order in which they are in a batch."""
    by_source = {row["source"]: row for row in rows}
    return [by_source[source] for source in batch["sources"]]


def inputs(batch: dict) -> dict:
    return {name: value for name, value in batch.items() if name not in NOT_FOR_THE_MODEL}


# ---- packs -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("capacity", [20, 64, 1000])
def test_packs_hold_every_sample_once_and_little_room(capacity):
    lengths = np.random.default_rng(0).integers(1, 21, 5000)
    packs = pack(lengths, capacity, seed=1)
    assert sorted(number for members in packs for number in members) == list(range(5000))
    assert max(lengths[members].sum() for members in packs) <= capacity
    assert len(packs) <= lengths.sum() / capacity * 1.01 + 1


def test_packs_follow_from_lengths_and_seed():
    lengths = np.random.default_rng(0).integers(1, 100, 300)
    assert pack(lengths, 100, seed=1) == pack(lengths, 100, seed=1)
    other = pack(lengths, 100, seed=2)
    assert {*map(frozenset, pack(lengths, 100, seed=1))} != {*map(frozenset, other)}
    assert len(pack(lengths, 100, seed=1)) == len(other)  # so the number of steps does not depend on the seed


def test_a_sample_goes_where_it_leaves_the_least_room():
    """9 and 8 begin packs of 10; 2 fills the pack of 8, 1 that of 9; 3 is alone."""
    assert sorted(map(sorted, pack([1, 2, 3, 8, 9], 10, seed=0))) == [[0, 4], [1, 3], [2]]


def test_a_sample_longer_than_a_pack_is_refused():
    with pytest.raises(ValueError, match="a sample of 9 tokens, but a pack has 8"):
        pack([3, 9], 8, seed=0)


# ---- batches ---------------------------------------------------------------------------------------------------------
ROWS = [
    {"input_ids": [5, 6, 7], "spans": [1, 2, 2, 3], "task_type": 1, "source": "a"},
    {"input_ids": [8, 9], "spans": [0, 2], "task_type": -1, "source": "b"},
    {"input_ids": [10, 11, 12, 13], "spans": [1, 2, 3, 4], "task_type": 0, "source": "c"},
]
__ = IGNORED_LABEL


def test_a_row_for_each_pack():
    batch = PackingCollator(pad_token_id=2).from_packs([ROWS[:2], ROWS[2:]])
    expected = {
        "input_ids": [[5, 6, 7, 8, 9], [10, 11, 12, 13, 2]],
        "position_ids": [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]],
        "sample_ids": [[0, 0, 0, 1, 1], [2, 2, 2, 2, -1]],
        "labels": [[__, 6, 7, __, 9], [__, 11, __, 13, __]],  # 8 follows a token of another sample
        "task_types": [1, -1, 0],
        "row_weights": [1, 1, 1],
        "supervised_indices": [0, 1, 3, 5, 7],
        "lengths": [3, 2, 4],
        "sources": ["a", "b", "c"],
    }
    assert {name: getattr(value, "tolist", lambda value=value: value)() for name, value in batch.items()} == expected


def test_one_row_for_all():
    batch = PackingCollator(pad_token_id=2, one_row=True).from_packs([ROWS[:2], ROWS[2:]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3]]
    assert batch["sample_ids"].tolist() == [[0, 0, 0, 1, 1, 2, 2, 2, 2]]
    assert batch["labels"].tolist() == [[__, 6, 7, __, 9, __, 11, __, 13]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 5, 9]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == 4


def test_rows_to_evaluate_keep_their_order_and_are_packed_up_to_the_longest():
    batch = PackingCollator(pad_token_id=2)([ROWS[0], ROWS[2], *ROWS[1:2] * 2])
    assert batch["sources"] == ["a", "c", "b", "b"]
    assert sorted(map(sorted, batch["sample_ids"].tolist())) == [[-1, 0, 0, 0], [1, 1, 1, 1], [2, 2, 3, 3]]


@pytest.mark.parametrize("one_row", [False, True])
def test_a_process_without_packs_gets_a_padding_example(one_row):
    batch = PackingCollator(1, one_row).from_packs([])
    assert batch["row_weights"].tolist() == [0]
    assert batch["lengths"] == batch["sources"] == batch["supervised_indices"].tolist() == []
    output = filled_model().train()(**inputs(batch) | {"cu_seq_lens_q": None, "cu_seq_lens_k": None})
    assert output.lm_loss == output.balance_loss == 0


# ---- losses and gradients of the model -------------------------------------------------------------------------------
def loss_and_gradients(model, batch: dict, part: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = getattr(model(**inputs(batch)), part)
    loss.backward()
    return loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(model, together: dict, apart: dict, tolerance: float = 1e-5) -> None:
    for part in ("lm_loss", "balance_loss"):
        expected, expected_gradients = loss_and_gradients(model, apart, part)
        found, gradients = loss_and_gradients(model, together, part)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
        assert gradients.keys() == expected_gradients.keys()
        assert any("router" in name for name in gradients)
        for name, gradient in expected_gradients.items():
            # Nothing is routed after the last layer's experts.
            assert gradient.norm() > 0 or (part == "balance_loss" and "router" not in name)
            assert (gradients[name] - gradient).norm() <= tolerance * gradient.norm(), (part, name)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
def test_packed_samples_train_as_they_do_apart(settings, attention, checkpointing):
    model = filled_model(**settings).train()
    model.get_base_model().set_attn_implementation(attention)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    together = packed(samples())
    assert len(together["input_ids"]) == 3
    assert_same_gradients(model, together, Collator(1)(reordered(together, samples())))


def test_shares_are_those_of_each_sample():
    model, together = filled_model().eval(), packed(samples())
    with torch.no_grad(), RoutingRecorder(model) as recorder:
        model(**inputs(together))
    shares_LSE = recorder.packed_shares(together["sample_ids"], len(LENGTHS))
    for number, row in enumerate(reordered(together, samples())):
        with torch.no_grad(), RoutingRecorder(model) as recorder:
            model(torch.tensor([row["input_ids"]]))
        alone_LTE = torch.stack([weights[0] for weights in recorder.weights.values()])
        torch.testing.assert_close(shares_LSE[:, number], sample_shares(alone_LTE))
        assert alone_LTE.std(dim=0).max() > 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_mask": torch.ones(3, 30)}, "sample_ids need position_ids and task_types, and no attention_mask"),
        ({"position_ids": None}, "sample_ids need position_ids"),
        ({"task_types": None}, "sample_ids need position_ids and task_types"),
        ({"task_types": torch.tensor([0, 2] * 4), "row_weights": None}, "task_types has 2 in row 1"),
    ],
)
def test_what_does_not_fit_packed_samples_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        filled_model().train()(**inputs(packed(samples())) | changes)
    with pytest.raises(ValueError, match="blc_reference counts the padding"):
        filled_model(blc_reference=True).train()(**inputs(packed(samples())))


# ---- architectures ---------------------------------------------------------------------------------------------------
# The sizes of those that test_architectures.py has no configuration of, in the names of all of them.
SMALL = SIZES | {
    "head_dim": 8, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "sliding_window": 6, "attention_chunk_size": 6,
}  # fmt: skip
# Samples see each other in these, if they share a row.
MIXING = {"opt", "biogpt", "falcon", "gpt_oss", "qwen3_5_text", "qwen3_next", "lfm2"}
CONFIGURATIONS = {name: {} for name in sorted((PACKABLE | MIXING) - ARCHITECTURES.keys() - UNPREPARED.keys())} | {
    "falcon": {"head_dim": None},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
}
each_base = pytest.mark.parametrize("name", sorted(PACKABLE | MIXING))


def base_model(name: str, attention: str):
    """A base model with random weights, large enough for the layers to matter."""
    if name in CONFIGURATIONS:
        values = SMALL | CONFIGURATIONS[name]
        config = AutoConfig.for_model(name, **{key: value for key, value in values.items() if value is not None})
    else:
        config = config_of(name)
    for field in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        if hasattr(config, field):
            setattr(config, field, 0.0)
    config.initializer_range = 0.2
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip("has no sdpa")
    model.set_attn_implementation(attention)
    return model


def difference(model, batch: dict) -> float:
    """Largest difference of the logits of samples together and apart, relative to the logits' deviation."""
    fields = {name: value for name, value in inputs(batch).items() if name not in ("labels", "supervised_indices")}
    with torch.no_grad():
        logits_BTV = model(**fields).logits
        found = []
        for number, row in enumerate(reordered(batch, samples())):
            apart_TV = model(torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
            together_TV = logits_BTV[batch["sample_ids"] == number]
            found.append((together_TV - apart_TV).abs().max() / apart_TV.std())
    return max(found).item()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@each_base
def test_the_list_of_architectures_is_exact(name, attention):
    found = difference(base_model(name, attention), packed(samples()))
    assert found < 1e-4 if name in PACKABLE else found > 0.1


@pytest.mark.parametrize("name", sorted((ARCHITECTURES.keys() | UNPREPARED.keys()) & PACKABLE))
def test_every_tested_architecture_trains_on_packed_samples_as_it_does_apart(name):
    base = base_model(name, "eager")
    base.config.output_router_logits = False
    settings = {"r": 2, "lora_alpha": 4, "lora_nums": 4, "lora_dropout": 0.0, "target_modules": None}
    if name in UNPREPARED:
        settings["target_modules"] = list(UNPREPARED[name].targets)
    model = fill_adapter(get_peft_model(base, LoraConfig(task_type=TaskType.CAUSAL_LM, **settings))).train()
    together = packed(samples())
    assert_same_gradients(model, together, Collator(1)(reordered(together, samples())), tolerance=1e-4)


def test_every_tested_architecture_is_listed_or_known_to_mix():
    assert ARCHITECTURES.keys() | UNPREPARED.keys() <= PACKABLE | MIXING
    assert not PACKABLE & MIXING


@pytest.mark.parametrize("name", sorted(MIXING))
def test_other_architectures_are_refused_by_name(name):
    with pytest.raises(InputError, match=f"--packing: base models of type '{name}' are not .* gpt2, .* qwen3,"):
        check_packing(base_model(name, "eager"))


def test_a_router_loss_that_the_base_model_asks_for_is_refused():
    model = AutoModelForCausalLM.from_config(config_of("mixtral"))
    with pytest.raises(InputError, match="--output_router_logits"):
        check_packing(model)
    model.config.output_router_logits = False
    check_packing(model)


def flash_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
                 causal=False, window_size=(-1, -1), softcap=0.0):  # fmt: skip
    """FlashAttention's function of this name, by its documentation: q, k, v of shape (tokens, heads, features)."""
    assert causal
    assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
    outputs = []
    for start, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True):
        query, key, value = (x[start:end].transpose(0, 1) for x in (q, k, v))
        key, value = (x.repeat_interleave(len(query) // len(x), dim=0) for x in (key, value))
        scores = query @ key.transpose(1, 2) * (softmax_scale or query.shape[-1] ** -0.5)
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (distance >= 0) & ((window_size[0] < 0) | (distance <= window_size[0]))
        outputs.append((scores.masked_fill(~seen, float("-inf")).softmax(dim=-1) @ value).transpose(0, 1))
    return torch.cat(outputs)


def flash(q, k, v, **kwargs):
    """FlashAttention's function for a batch of full rows."""
    length = q.shape[1]
    lengths = torch.arange(len(q) + 1, dtype=torch.int32) * length
    flat = (x.flatten(0, 1) for x in (q, k, v))
    return flash_varlen(*flat, lengths, lengths, length, length, **kwargs).view(q.shape)


@pytest.fixture
def flash_attention(monkeypatch) -> list:
    """FlashAttention's functions written in torch, behind transformers' own code that calls them.

    Returns:
        An entry for each look at the positions of tokens, which would wait for the device.
    """
    utils, looks = modeling_flash_attention_utils, []
    functions = (flash, flash_varlen, None, None, None), (utils._lazy_define_process_function(flash_varlen), dict)
    look = utils._is_packed_sequence
    monkeypatch.setattr(utils, "lazy_import_flash_attention", lambda *args, **kwargs: functions)
    monkeypatch.setattr(utils, "_is_packed_sequence", lambda *args: looks.append(args) or look(*args))
    # It has none for a model in float32 without any nn.Linear, as GPT-2 is here.
    monkeypatch.setattr(integrations.flash_attention, "get_target_dtype", lambda query, module: None)
    return looks


def use_flash_attention(model) -> None:
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "flash_attention_2"


@pytest.mark.parametrize("name", sorted(PACKABLE))
def test_in_one_row_flash_attention_keeps_samples_apart(name, flash_attention):
    model = base_model(name, "eager")
    if not model._supports_flash_attn:
        pytest.skip("has no FlashAttention")
    use_flash_attention(model)
    assert difference(model, packed(samples(), one_row=True)) < 1e-4


def test_in_one_row_samples_train_as_they_do_apart_and_nobody_looks_at_positions(flash_attention):
    model, together = filled_model().train(), packed(samples(), one_row=True)
    apart = Collator(1)(reordered(together, samples()))
    expected = {part: loss_and_gradients(model, apart, part) for part in ("lm_loss", "balance_loss")}
    use_flash_attention(model)
    found = {part: loss_and_gradients(model, together, part) for part in expected}
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not flash_attention


# ---- runs ------------------------------------------------------------------------------------------------------------
class Layout(NamedTuple):
    """How the packs of one optimizer step are cut up."""

    capacity: int
    micro_batch: int  # packs over all processes
    accumulation: int


LAYOUTS = [
    Layout(128, 8, 1),  # all packs, fewer on one process than on the other
    Layout(128, 2, 3),
    Layout(256, 2, 3),  # two micro-batches in place of three; in the second, a process without any pack
]


@pytest.fixture(scope="module")
def case(tmp_path_factory, model_dir) -> Case:
    """Runs of one step of plain SGD, whose changes of the adapter are its gradients."""
    case = Case(tmp_path_factory.mktemp("packing"), model_dir)
    (case.folder / "rows.json").write_text(json.dumps(example_rows(17)))
    case.rows = load_data(case.folder / "rows.json", tiny_tokenizer(), Encoding("auto", 128, 2), case.folder / "cache")[
        0
    ]
    return case


def micro_batches(case: Case, layout: Layout, seed: int = 42) -> list[list[int]]:
    """The rows of each micro-batch of the first step, over all processes."""
    packs = pack(row_lengths(case.rows), layout.capacity, seed)
    lengths = PackedRows(case.rows, layout.capacity, seed).lengths
    sampler = GlobalBatchSampler(lengths, "group_by_length", seed, layout.micro_batch, layout.accumulation)
    return [[row for number in batch for row in packs[number]] for batch in islice(sampler, layout.accumulation)]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_step_on_packs_is_that_of_the_same_samples_in_rows(case, processes):
    variants = list(product(LAYOUTS, ("sdpa", "eager"), (False, True)))
    assert [len(micro_batches(case, layout)) for layout in LAYOUTS] == [1, 3, 2]
    ends, _ = case.run(f"{processes}", processes, [
        {
            "dataset_dir": case.folder / "rows.json",
            "packing": True,
            "max_seq_length": layout.capacity,
            "train_sampling_strategy": "group_by_length",
            "attn_implementation": attention,
            "activation_checkpointing": checkpointing,
            "gradient_accumulation_steps": layout.accumulation,
            "per_device_train_batch_size": layout.micro_batch // processes,
            "blc_weight": beta,
        }
        for layout, attention, checkpointing in variants
        for beta in (0, BETA)
    ])  # fmt: skip
    gradients = map(case.gradients, ends)
    for layout, *_ in variants:
        lm, total = next(gradients), next(gradients)
        parts = micro_batches(case, layout)
        expected = case.expected("lm_loss", [np.concatenate(parts)])
        assert_same(lm, expected, expected)
        balance = {key: (total[key] - lm[key]) / BETA for key in lm}
        floor = {key: tensor / BETA for key, tensor in expected.items()}
        assert_same(balance, case.expected("balance_loss", parts), floor)


def test_the_samples_of_a_step_do_not_depend_on_its_division(case):
    lengths = PackedRows(case.rows, 128, 3).lengths

    def steps(micro_batch: int, accumulation: int, processes: int, epoch: int) -> list[list[int]]:
        samplers = [
            GlobalBatchSampler(lengths, "group_by_length", 3, micro_batch, accumulation, processes, rank)
            for rank in range(processes)
        ]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        batches = [[*chain(*parts)] for parts in zip(*samplers, strict=True)]
        return [sorted(chain(*batches[at : at + accumulation])) for at in range(0, len(batches), accumulation)]

    assert steps(4, 1, 1, epoch=0) == steps(1, 2, 2, epoch=0) == steps(1, 4, 1, epoch=0)
    assert steps(4, 1, 1, epoch=0) != steps(4, 1, 1, epoch=1)


@pytest.fixture
def run(tmp_path, model_dir, monkeypatch) -> Runner:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    return Runner(tmp_path, model_dir)


SETTINGS = {"packing": True, "max_seq_length": 96, "per_device_train_batch_size": 2}


def test_an_interrupted_run_on_packs_ends_the_same(run, capsys):
    """Two epochs, with dropout."""
    run(**SETTINGS, output_dir=run.folder / "undisturbed")
    printed = capsys.readouterr().out
    assert re.search(
        r"12 rows are in (\d) packs of up to 96 tokens; \d+\.\d% of the tokens in the batches of the first epoch are "
        r"padding, without packing \d+\.\d%\n",
        printed,
    )
    interrupt_after(3, run, **SETTINGS)
    run(**SETTINGS)
    assert f"resuming from {run.output / 'checkpoint-2'}" in capsys.readouterr().out
    assert same_adapter(run.output, run.folder / "undisturbed")
    assert json.loads((run.output / "run_config.json").read_text())["packing"] is True
    with pytest.raises(InputError, match=r"another configuration:\n.*packing: True there, False now"):
        run(**SETTINGS | {"packing": False})


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_on_packs_is_that_of_rows(run, tmp_path, processes):
    """Without training: the adapter stays as it is. Five rows in batches of two or four."""
    filled_model().save_pretrained(tmp_path / "adapter")
    flags = {"peft_path": tmp_path / "adapter", "lora_rank": 2, "lora_alpha": 4, "learning_rate": 0, "max_steps": 1}
    rows = run(**flags)
    routing = json.loads((run.output / "routing.json").read_text())
    run.output = tmp_path / "packed"
    settings = SETTINGS | {"per_device_eval_batch_size": 4 // processes, "output_dir": run.output}
    launch(processes, ["train.py", *run.arguments(**flags | settings)])
    packs = json.loads((run.output / "all_results.json").read_text())
    for name in ("eval_lm_loss_before", "eval_lm_loss_after", "eval_perplexity_after"):
        assert packs[name] == pytest.approx(rows[name], rel=1e-6)
    assert packs["eval_samples"] == rows["eval_samples"] == 5
    found = json.loads((run.output / "routing.json").read_text())
    for name in ("rows", "rows_by_task"):
        assert found[name] == routing[name]
    for name in ("expert_share_by_task", "expert_share_by_task_type_and_module"):
        for kind, shares in routing[name].items():
            np.testing.assert_allclose(found[name][kind], shares, rtol=0, atol=3e-6)


def test_packs_may_be_longer_than_a_table_of_positions(run, gpt2_dir, tmp_path):
    """Rows of up to 50 tokens in packs of 200, and padding of more than the table's 64 positions."""
    rows = [{"instruction": "a" * length, "output": "b"} for length in [40] * 5 + [20]]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    flags = {"model_name_or_path": gpt2_dir, "prompt_template": "plain", "max_seq_length": 200, "max_steps": 1}
    trainer = trainer_of(run, packing=True, **flags)
    assert np.ptp(trainer.packs.lengths) > 64


def test_samples_are_cut_as_without_packing(run, capsys):
    trainer = trainer_of(run, packing=True, max_seq_length=30, max_steps=1)
    assert "rows cut at 30 tokens" in capsys.readouterr().out
    assert trainer.packs.lengths.max() == row_lengths(trainer.train_dataset).max() == 30
    found = sorted(row["source"] for number in range(len(trainer.packs)) for row in trainer.packs[number])
    assert found == sorted(trainer.train_dataset["source"])


BAD_FLAGS = {
    "reference": ({"blc_reference": True}, "--packing leaves out the padding that --blc_reference counts"),
    "router loss": ({"output_router_logits": True}, "router loss of --output_router_logits would count padding"),
    "noise": ({"neftune_noise_alpha": 5}, "noise of --neftune_noise_alpha depends on the length of a row"),
    "order": ({"train_sampling_strategy": "sequential"}, "reorders the rows, against --train_sampling_strategy seq"),
    "no packs": (
        {"dataloader_drop_last": True, "per_device_train_batch_size": 9},
        r"no training packs: there are \d, and a",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_flags_that_packing_contradicts_are_refused(run, changes, message):
    with pytest.raises(InputError, match=message):
        run(**SETTINGS | changes)
    assert not run.output.exists()
