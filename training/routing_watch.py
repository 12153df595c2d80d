"""The watch over the routers while training: values for the log lines, and a warning if a group of experts dies out.

Shape suffixes: L adapted Linears, B rows, E experts, K task types, each with a group of experts.
"""

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import nested_gather

from inference.routing import coefficient_of_variation, group_spans, relative_entropy, span_text

COLLAPSE_SHARE = 0.02
COLLAPSE_STEPS = 50


class RoutingWatch(TrainerCallback):
    """Collects the routing of the training rows for the log lines, and notices a group of experts that dies out.

    Everything stays on the device until a log line is due, so that no step synchronises with it.

    Args:
        num_task_types: number of task types K.
        group_sizes: experts in the group of each; unless there are K groups, none is watched.
        null_expert: number of the null expert, if there is one. It learns nothing, so it cannot die out (far from its
            task type, a strong constraint asks for less weight than a warning is due for), nor keep a group alive.
    """

    # From the first micro-batch on, which tells shapes and device.
    _sums_KLE: Tensor
    _counts_K: Tensor
    _entropy: Tensor
    _step_E: Tensor
    _steps_below_K: Tensor

    def __init__(self, num_task_types: int, group_sizes: list[int], null_expert: int | None = None):
        self.num_task_types, self.null_expert = num_task_types, null_expert
        self._groups = group_spans(group_sizes) if len(group_sizes) == num_task_types else []
        end = sum(group_sizes) if null_expert is None else null_expert
        self._learning = [slice(group.start, min(group.stop, end)) for group in self._groups if group.start < end]
        self._started = False
        self._warned = False

    def watch(self, shares_LBE: Tensor, task_types_B: Tensor, row_weights_B: Tensor) -> None:
        """Add the rows of a micro-batch except padding examples; rows without a task type are summed at index 0."""
        if not self._started:
            self._start(shares_LBE)
        row_weights_B = row_weights_B.to(shares_LBE)
        shares_BLE = shares_LBE.transpose(0, 1) * row_weights_B[:, None, None]
        self._sums_KLE.index_add_(0, task_types_B + 1, shares_BLE)
        self._counts_K.index_add_(0, task_types_B + 1, row_weights_B)
        self._entropy += relative_entropy(shares_BLE).mean(dim=1).sum()
        self._step_E += shares_BLE.mean(dim=1).sum(dim=0)

    def _start(self, shares_LBE: Tensor) -> None:
        num_linears, _, num_experts = shares_LBE.shape
        self._sums_KLE = shares_LBE.new_zeros(self.num_task_types + 1, num_linears, num_experts)
        self._counts_K = shares_LBE.new_zeros(self.num_task_types + 1)
        self._entropy = shares_LBE.new_zeros(())
        self._step_E = shares_LBE.new_zeros(num_experts)
        self._steps_below_K = shares_LBE.new_zeros(len(self._learning))
        self._started = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Count, for each group, the consecutive steps with hardly any weight on it, on this process's rows."""
        if not self._started or not self._groups:
            return
        weights_K = torch.stack([self._step_E[group].sum() for group in self._learning])
        total = self._step_E.sum()
        steps_below_K = torch.where(weights_K / total < COLLAPSE_SHARE, self._steps_below_K + 1, 0)
        # A step of nothing but padding examples does not count.
        self._steps_below_K = torch.where(total > 0, steps_below_K, self._steps_below_K)
        self._step_E.zero_()

    def scalars(self, args: TrainingArguments) -> dict[str, float]:
        """The values of a log line, over the rows of all processes since the last one; {} if nothing is routed.

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
            f"warning: the routing has collapsed: {span_text(self._learning[group])}, the group of "
            f"task type {group}, have had less than {COLLAPSE_SHARE:.0%} of the weight in each of the last "
            f"{int(steps_K[group])} steps (now step {step}). They hardly learn any more: give the balance term more "
            "weight (--blc_weight), or lower --learning_rate"
        )
