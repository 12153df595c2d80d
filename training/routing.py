"""What the routers do: expert shares by task type and kind of task, and the watch over them while training.

Shape suffixes: L adapted Linears, B rows, E experts, K task types, each with a group of experts.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import nested_gather

from peft import LoraConfig

COLLAPSE_SHARE = 0.02
COLLAPSE_STEPS = 50


@dataclass
class Routing:
    """Where rows were routed.

    Args:
        modules: names of the adapted Linears, L of them.
        shares_BLE: mean weight of each expert over the real tokens of each row.
        task_types_B: the rows' task types.
        tasks_B: the rows' kinds of task, as text; empty where a row has none.
    """

    modules: list[str]
    shares_BLE: np.ndarray
    task_types_B: np.ndarray
    tasks_B: np.ndarray

    def by_task_type(self) -> dict[int, np.ndarray]:
        """Mean share (L, E) over the rows of each task type that occurs."""
        return {int(kind): self.shares_BLE[self.task_types_B == kind].mean(axis=0) for kind in self.task_types()}

    def by_task(self) -> dict[str, np.ndarray]:
        """Mean share (L, E) over the rows of each kind of task that occurs."""
        kinds = np.unique(self.tasks_B[self.tasks_B != ""])
        return {str(kind): self.shares_BLE[self.tasks_B == kind].mean(axis=0) for kind in kinds}

    def task_types(self) -> np.ndarray:
        return np.unique(self.task_types_B)


def relative_entropy(shares: Tensor) -> Tensor:
    """Entropy over the last dimension, the experts, divided by its largest value ln E: 1 is even, 0 is one expert."""
    return torch.special.entr(shares).sum(dim=-1) / math.log(shares.shape[-1])


def coefficient_of_variation(load: Tensor) -> Tensor:
    """Standard deviation (unbiased) over mean, over the last dimension, the experts: 0 is even, sqrt(E) one expert."""
    return load.std(dim=-1) / load.mean(dim=-1)


def group_spans(group_sizes: list[int]) -> list[slice]:
    """The experts of each group."""
    ends = np.cumsum(group_sizes).tolist()
    return [slice(end - size, end) for end, size in zip(ends, group_sizes, strict=True)]


def span_text(span: slice) -> str:
    last = span.stop - 1
    return f"experts {span.start}-{last}" if span.start < last else f"expert {last}"


def group_shares(routing: Routing, group_sizes: list[int]) -> dict[int, np.ndarray]:
    """Mean weight of each expert group by task type of the row, over rows and adapted Linears."""
    spans = group_spans(group_sizes)
    return {
        kind: np.array([shares_LE[:, span].sum(axis=1).mean() for span in spans])
        for kind, shares_LE in routing.by_task_type().items()
    }


def routing_summary(routing: Routing, config: LoraConfig) -> dict:
    """What `routing.json` holds, and `routing.png` shows: docs/ROUTING.md describes each field."""
    by_type, by_task = routing.by_task_type(), routing.by_task()
    shares_BLE = torch.from_numpy(routing.shares_BLE).double()
    entropy_L = relative_entropy(shares_BLE).mean(dim=0)
    variation_L = coefficient_of_variation(shares_BLE.mean(dim=0))
    summary = {
        "num_experts": shares_BLE.shape[-1],
        "num_task_types": config.num_task_types,
        "task_type_names": config.task_type_names,
        "expert_groups": config.group_sizes,
        "rows": {str(kind): int((routing.task_types_B == kind).sum()) for kind in by_type},
        "rows_by_task": {task: int((routing.tasks_B == task).sum()) for task in by_task},
        "modules": [name.split(".experts.")[0] for name in routing.modules],
        "expert_share_by_task_type": {str(kind): _rounded(shares.mean(axis=0)) for kind, shares in by_type.items()},
        "expert_share_by_task": {task: _rounded(shares.mean(axis=0)) for task, shares in by_task.items()},
        "expert_share_by_task_type_and_module": {str(kind): _rounded(shares) for kind, shares in by_type.items()},
        "expert_share_by_task_and_module": {task: _rounded(shares) for task, shares in by_task.items()},
        "entropy": entropy_L.mean().item(),
        "entropy_by_module": _rounded(entropy_L),
        "coefficient_of_variation": variation_L.mean().item(),
        "coefficient_of_variation_by_module": _rounded(variation_L),
    }
    if len(config.group_sizes) == config.num_task_types:
        groups = group_shares(routing, config.group_sizes)
        summary["group_share_by_task_type"] = {str(kind): _rounded(shares) for kind, shares in groups.items()}
    return summary


def _rounded(values: np.ndarray | Tensor) -> list:
    return np.asarray(values, dtype=np.float64).round(6).tolist()


class RoutingWatch(TrainerCallback):
    """Collects the routing of the training rows for the log lines, and notices a group of experts that dies out.

    Everything stays on the device until a log line is due, so that no step waits for it.

    Args:
        num_task_types: number of task types K.
        group_sizes: experts in the group of each; where there are not K groups, none is watched.
    """

    # From the first micro-batch on, which tells shapes and device.
    _sums_KLE: Tensor
    _counts_K: Tensor
    _entropy: Tensor
    _step_E: Tensor
    _steps_below_K: Tensor

    def __init__(self, num_task_types: int, group_sizes: list[int]):
        self.num_task_types = num_task_types
        self._groups = group_spans(group_sizes) if len(group_sizes) == num_task_types else []
        self._started = False
        self._warned = False

    def watch(self, shares_LBE: Tensor, task_types_B: Tensor, row_weights_B: Tensor) -> None:
        """Take in the rows of a micro-batch, but padding examples; unlabelled rows are summed before task type 0."""
        if not self._started:
            self._start(shares_LBE)
        row_weights_B = row_weights_B.to(shares_LBE)
        shares_BLE = shares_LBE.transpose(0, 1) * row_weights_B[:, None, None]
        self._sums_KLE.index_add_(0, task_types_B + 1, shares_BLE)
        self._counts_K.index_add_(0, task_types_B + 1, row_weights_B)
        self._entropy += relative_entropy(shares_BLE).mean(dim=1).sum()
        self._step_E += shares_BLE.mean(dim=1).sum(dim=0)

    def _start(self, shares_LBE: Tensor) -> None:
        self._started = True
        num_linears, _, num_experts = shares_LBE.shape
        self._sums_KLE = shares_LBE.new_zeros(self.num_task_types + 1, num_linears, num_experts)
        self._counts_K = shares_LBE.new_zeros(self.num_task_types + 1)
        self._entropy = shares_LBE.new_zeros(())
        self._step_E = shares_LBE.new_zeros(num_experts)
        self._steps_below_K = shares_LBE.new_zeros(len(self._groups))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Count, for each group, the consecutive steps with hardly any weight on it, on this process's rows."""
        if not self._started or not self._groups:
            return
        weights_K = torch.stack([self._step_E[group].sum() for group in self._groups])
        steps_below_K = torch.where(weights_K / weights_K.sum() < COLLAPSE_SHARE, self._steps_below_K + 1, 0)
        # A step of padding examples alone tells nothing.
        self._steps_below_K = torch.where(weights_K.sum() > 0, steps_below_K, self._steps_below_K)
        self._step_E.zero_()

    def scalars(self, args: TrainingArguments) -> dict[str, float]:
        """The values of a log line, over the rows of all processes since the last one; {} where nothing is routed.

        A collective: every process calls it at the same step.
        """
        if not self._started:
            return {}
        sums_KLE, counts_K, entropy = (
            nested_gather(part.unsqueeze(0), args.parallel_mode).sum(dim=0)
            for part in (self._sums_KLE, self._counts_K, self._entropy)
        )
        for part in (self._sums_KLE, self._counts_K, self._entropy):
            part.zero_()
        load_LE = sums_KLE.sum(dim=0) / counts_K.sum()
        values = {
            "routing_entropy": (entropy / counts_K.sum()).item(),
            "routing_cv": coefficient_of_variation(load_LE).mean().item(),
        }
        shares_KE = sums_KLE[1:].mean(dim=1) / counts_K[1:, None]
        shares = [shares_KE[kind, group].sum().item() for kind, group in enumerate(self._groups)]
        return values | {f"group_share_type_{kind}": share for kind, share in enumerate(shares) if share == share}

    def collapse(self, args: TrainingArguments, step: int) -> str | None:
        """A warning of a group that has died out on every process, once in a run. A collective, as `scalars` is."""
        if self._warned or not self._started or not self._groups:
            return None
        steps_K = nested_gather(self._steps_below_K.unsqueeze(0), args.parallel_mode).min(dim=0).values
        group = int(steps_K.argmax())
        if steps_K[group] < COLLAPSE_STEPS:
            return None
        self._warned = True
        return (
            f"warning: the routing has collapsed: {span_text(self._groups[group])}, the group of task type "
            f"{group}, have had less than {COLLAPSE_SHARE:.0%} of the weight in each of the last "
            f"{int(steps_K[group])} steps (now step {step}). They hardly learn any more: give the balance term more "
            "weight (--blc_weight), or lower --learning_rate"
        )
