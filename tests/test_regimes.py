"""Gradients do not depend on how a global batch is computed.

Each case is a `train.py` run of one plain SGD step with a huge learning rate, so that the change of every saved
tensor is its gradient (times the rate) to float32 accuracy, in every regime and through the code that users run. The
expected gradients come from calling the model directly on one process, without any Trainer.
"""

import json
from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT, deepspeed_file, example_rows, filled_model, tiny_config, tiny_tokenizer
from safetensors.torch import load_file
from test_launch import launch
from transformers import LlamaForCausalLM

from data import Collator, Encoding, load_data
from peft import get_peft_model_state_dict

RATE = 1e4
BETA = 10.0
REGIMES = {
    "one process": (1, None),
    "DDP": (2, None),
    "ZeRO-2": (2, "zero2.json"),
    "ZeRO-3": (2, "zero3.json"),
    "ZeRO-3 offload": (2, "zero3_offload.json"),
}
# What rounding to bf16 may change in a gradient, in relative L2 norm.
BF16 = 16 * torch.finfo(torch.bfloat16).eps


class Layout(NamedTuple):
    """How the rows of one optimizer step are cut up."""

    rows: int
    micro_batch: int  # rows over all processes
    accumulation: int
    checkpointing: bool = False
    reference: bool = False  # the authors' statistic

    def micro_batches(self, processes: int) -> list[np.ndarray]:
        """Rows that share one balance term."""
        shared = [
            np.arange(start, min(start + self.micro_batch, self.rows))
            for start in range(0, self.rows, self.micro_batch)
        ]
        return [part for rows in shared for part in np.array_split(rows, processes if self.reference else 1)]


WHOLE = [Layout(8, 8 // count, count, checkpointing) for count, checkpointing in product((1, 2, 4), (False, True))]
RAGGED = [
    Layout(3, 4, 1),  # two rows on one process, one on the other
    Layout(1, 4, 1),  # one row, and a process without any
    Layout(5, 4, 2),  # a full micro-batch, then one row
    Layout(7, 4, 4),  # a window of two micro-batches in place of four, the second of three rows
]
REFERENCE = [Layout(8, 8, 1, reference=True), Layout(8, 4, 2, reference=True)]
HALF = [Layout(8, 8, 1), Layout(8, 2, 4, checkpointing=True), Layout(7, 4, 4)]


class Case:
    """Runs of one step from the same adapter, and what their gradients have to be."""

    def __init__(self, folder, model_dir):
        self.folder = folder
        self.model = filled_model().train()
        self.model.save_pretrained(folder / "adapter")
        self.start = load_file(folder / "adapter" / "adapter_model.safetensors")
        for count in {layout.rows for layout in WHOLE + RAGGED + REFERENCE}:
            (folder / f"{count} rows.json").write_text(json.dumps(example_rows(count)))
        equal = [{"instruction": f"Count from {index}", "output": f"{index + 1}"} for index in range(1, 9)]
        (folder / "equal rows.json").write_text(json.dumps(equal))
        self.rows = load_data(folder / "8 rows.json", tiny_tokenizer(), Encoding("auto", 256, 2), folder / "cache")[0]
        self.flags = {
            "model_name_or_path": model_dir,
            "peft_path": folder / "adapter",
            "data_cache_dir": folder / "cache",
            "lora_nums": 4,
            "lora_rank": 2,
            "lora_alpha": 4,
            "lora_dropout": 0,
            "optim": "sgd",
            "learning_rate": RATE,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "max_grad_norm": 0,
            "max_steps": 1,
            "train_sampling_strategy": "sequential",
            "save_strategy": "no",
            "report_to": "none",
            "knowledge_probe": "none",
            "use_cpu": "true",
        }

    def run(
        self, name: str, processes: int, changes: list[dict]
    ) -> tuple[list[dict[str, torch.Tensor]], list[list[dict]]]:
        """Runs with these changes of flags, all in one launch.

        Returns:
            The adapter that each ends with; for each rank, the record of each run.
        """
        outputs = [self.folder / f"{name} {index}" for index in range(len(changes))]
        commands = [
            [
                text
                for pair in (self.flags | change | {"output_dir": output}).items()
                for text in (f"--{pair[0]}", str(pair[1]))
            ]
            for change, output in zip(changes, outputs, strict=True)
        ]
        (self.folder / "commands.json").write_text(json.dumps(commands))
        launch(processes, [str(ROOT / "tests" / "regimes.py"), str(self.folder / "commands.json")])
        ends = [load_file(output / "adapter_model.safetensors") for output in outputs]
        assert {tensor.dtype for end in ends for tensor in end.values()} == {torch.float32}
        return ends, [json.loads((self.folder / f"record-{rank}.json").read_text()) for rank in range(processes)]

    def gradients(self, end: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The gradients of the step from the start to an adapter."""
        return {key: (self.start[key].double() - end[key].double()) / RATE for key in end}

    def expected(self, part: str, micro_batches: list[np.ndarray], reference: bool = False) -> dict[str, torch.Tensor]:
        """Mean over the micro-batches of the gradients of `lm_loss` or `balance_loss`."""
        self.model.zero_grad()
        self.model.active_peft_config.blc_reference = reference
        for rows in micro_batches:
            batch = Collator(pad_token_id=1)([self.rows[int(index)] for index in rows])
            del batch["lengths"], batch["sources"]
            (getattr(self.model(**batch), part) / len(micro_batches)).backward()
        tensors = {name: parameter.grad for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        gradients = {name: torch.zeros(()) if grad is None else grad.double() for name, grad in tensors.items()}
        return get_peft_model_state_dict(self.model, gradients)


@pytest.fixture(scope="module")
def case(tmp_path_factory, model_dir) -> Case:
    return Case(tmp_path_factory.mktemp("regimes"), model_dir)


@pytest.fixture(scope="module")
def quantisable(tmp_path_factory) -> dict:
    """Flags of a run on a base model that can be quantised, with a fresh adapter."""
    folder = tmp_path_factory.mktemp("quantisable")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(hidden_size=64, intermediate_size=128)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return {"model_name_or_path": folder, "peft_path": ""}


def assert_same(found: dict, expected: dict, floor: dict, tolerance: float = 1e-5) -> None:
    """Equal in relative L2 norm, tensor by tensor; `floor` is what a tensor's rounding errors are relative to."""
    assert found.keys() == expected.keys()
    assert sum(tensor.norm() > 0 for tensor in expected.values()) > len(expected) / 2
    for key, tensor in expected.items():
        assert (found[key] - tensor).norm() <= tolerance * max(tensor.norm(), floor[key].norm()), key


def gradient_runs(case: Case, layouts: list[Layout], processes: int, half: bool) -> list[dict]:
    """Two runs for each layout, without and with the balance term."""
    return [
        {
            "dataset_dir": case.folder / f"{layout.rows} rows.json",
            "gradient_accumulation_steps": layout.accumulation,
            "per_device_train_batch_size": layout.micro_batch // processes,
            "activation_checkpointing": layout.checkpointing,
            "blc_reference": layout.reference,
            "blc_weight": beta,
            "bf16": half,
        }
        for layout in layouts
        for beta in (0, BETA)
    ]


def check_gradients(case: Case, layouts: list[Layout], processes: int, adapters: list[dict], tolerance: float) -> None:
    gradients = map(case.gradients, adapters)
    for layout in layouts:
        lm, total = next(gradients), next(gradients)
        lm_expected = case.expected("lm_loss", [np.arange(layout.rows)])
        assert_same(lm, lm_expected, lm_expected, tolerance)
        balance = {key: (total[key] - lm[key]) / BETA for key in lm}
        parts = [rows for rows in layout.micro_batches(processes) if len(rows)]
        balance_expected = case.expected("balance_loss", parts, layout.reference)
        assert_same(balance, balance_expected, {key: tensor / BETA for key, tensor in lm_expected.items()}, tolerance)


@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime_trains_as_one_process(case, quantisable, regime):
    """Gradients in float32 and bf16, dtypes of what the experts compute, and dropout masks of each rank's own."""
    processes, file = REGIMES[regime]
    layouts = WHOLE + RAGGED + REFERENCE
    runs = gradient_runs(case, layouts, processes, half=False)
    exact = len(runs)
    runs += gradient_runs(case, HALF, processes, half=True)
    rounded = len(runs)
    rows = {"dataset_dir": case.folder / "8 rows.json"}
    if file in (None, "zero2.json"):
        runs += [
            quantisable | rows | {"load_in_kbits": bits, "bf16": half} for bits, half in product((4, 8), (False, True))
        ]
    runs.append({"dataset_dir": case.folder / "equal rows.json", "lora_dropout": 0.5, "bf16": False})
    sharding = {"deepspeed": deepspeed_file(case.folder, file)} if file else {}
    adapters, records = case.run(regime, processes, [run | sharding for run in runs])
    check_gradients(case, layouts, processes, adapters[:exact], 1e-5)
    check_gradients(case, HALF, processes, adapters[exact:rounded], BF16)
    for run, record in zip(runs, records[0], strict=True):
        compute = "bfloat16" if run["bf16"] else "float32"
        expected = {role: [compute] for role in ("activations", "parameters", "products", "sums")}
        assert record["dtypes"] == expected | ({} if file else {"parameters": ["float32"]}), run
    masks = [mask for rank in records for mask in rank[-1]["masks"]]
    assert len(set(masks)) == len(masks) == 6 * processes


def test_fused_kernels_under_zero3(case, monkeypatch):
    """They get the parameters of experts and router at once, of which ZeRO-3 gathers each with its module."""
    pytest.importorskip("triton", reason="needs triton")
    layouts = [WHOLE[0], WHOLE[3]]
    runs = gradient_runs(case, layouts, 2, half=False)
    with monkeypatch.context() as context:
        context.setenv("LORAMOE_KERNELS", "triton")
        adapters, _ = case.run(
            "kernels", 2, [run | {"deepspeed": deepspeed_file(case.folder, "zero3.json")} for run in runs]
        )
    check_gradients(case, layouts, 2, adapters, 1e-5)
