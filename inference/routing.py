"""A summary of routing: expert shares by task type and by task, as numbers and as text.

Shape suffixes: L adapted Linears, B rows, E experts, K task types, each with a group of experts.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from peft import LoraConfig

PAPERS_TASK_TYPES = ("0 (other tasks)", "1 (world knowledge)")


@dataclass
class Routing:
    """Expert shares of a set of rows.

    Args:
        modules: names of the adapted Linears, L of them.
        shares_BLE: mean weight of each expert over the real tokens of each row.
        task_types_B: the rows' task types.
        tasks_B: the rows' tasks, as text; empty if a row has none.
    """

    modules: list[str]
    shares_BLE: np.ndarray
    task_types_B: np.ndarray
    tasks_B: np.ndarray

    def by_task_type(self) -> dict[int, np.ndarray]:
        """Mean share (L, E) over the rows of each task type that occurs."""
        return {int(kind): self.shares_BLE[self.task_types_B == kind].mean(axis=0) for kind in self.task_types()}

    def by_task(self) -> dict[str, np.ndarray]:
        """Mean share (L, E) over the rows of each task that occurs."""
        tasks = np.unique(self.tasks_B[self.tasks_B != ""])
        return {str(task): self.shares_BLE[self.tasks_B == task].mean(axis=0) for task in tasks}

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


def span_text(span: slice, null_expert: int | None = None) -> str:
    """The experts of a group, for reports: by number, and the null expert by name."""
    if span.stop - 1 == null_expert:
        return f"{span_text(slice(span.start, null_expert))}, null" if span.start < null_expert else "null expert"
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
    """Content of `routing.json`, which `routing.png` shows: docs/ROUTING.md describes each field."""
    by_type, by_task = routing.by_task_type(), routing.by_task()
    shares_BLE = torch.from_numpy(routing.shares_BLE).double()
    entropy_L = relative_entropy(shares_BLE).mean(dim=0)
    variation_L = coefficient_of_variation(shares_BLE.mean(dim=0))
    summary = {
        "num_experts": shares_BLE.shape[-1],
        "null_expert": config.null_expert,
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


def training_curves(name: str, log_history: list[dict], blc_weight: float) -> dict[str, dict]:
    """Evenness of the routing over the steps of a run, under a label; {} if its log has none."""
    lines = [line for line in log_history if "routing_cv" in line]
    if not lines:
        return {}
    constraint = f"blc_weight {blc_weight:g}" if blc_weight else "no constraint"
    fields = {"step": "step", "coefficient_of_variation": "routing_cv", "entropy": "routing_entropy"}
    return {f"{name} ({constraint})": {field: [line[key] for line in lines] for field, key in fields.items()}}


def routing_lines(routing: Routing, config: LoraConfig) -> list[str]:
    """A small table: one line for each task type, one column for each expert group."""
    if len(config.group_sizes) != config.num_task_types:
        return [f"no groups: {config.routed_experts} experts cannot be split among {config.num_task_types} task types"]
    heads = [span_text(span, config.null_expert) for span in group_spans(config.group_sizes)]
    width = max(16, *(len(head) + 2 for head in heads))
    lines = [" " * 32 + "".join(f"{head:>{width}}" for head in heads)]
    names = task_type_names(config)
    for kind, shares in group_shares(routing, config.group_sizes).items():
        name = "no task type" if kind < 0 else names[kind]
        lines.append(f"  {name:30}" + "".join(f"{share:{width}.1%}" for share in shares))
    return lines


def task_type_names(config: LoraConfig) -> list[str]:
    """The name of each task type, for reports."""
    papers = PAPERS_TASK_TYPES if config.num_task_types == 2 else range(config.num_task_types)
    return [f"task type {name}" for name in config.task_type_names or papers]


def _rounded(values: np.ndarray | Tensor) -> list:
    return np.asarray(values, dtype=np.float64).round(6).tolist()
