"""How routing leaves the layers: forward hooks on the routers, alive for one forward pass."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from peft import Router, sample_shares, sample_sums


class RoutingRecorder:
    """Context manager that keeps what each router of a model returns while it is open.

        with RoutingRecorder(model) as recorder:
            model(**batch)
        shares_LBE = recorder.sample_shares(batch["attention_mask"])

    The hooks only keep references and add no operation, so a checkpointed layer saves and recomputes exactly the same
    tensors with and without them, and the recorded weights carry their gradient (with non-re-entrant checkpointing).

    Attributes:
        weights: router weights (B, T, E) by the router's dotted name, in the order of the calls; (B*T, E) where the
            base model puts all tokens in one row ahead of the Linear. Routers of inactive adapters do not appear.
    """

    def __init__(self, model: nn.Module):
        self._routers = {name: module for name, module in model.named_modules() if isinstance(module, Router)}
        self._hooks: list = []
        self.weights: dict[str, Tensor] = {}

    def __enter__(self) -> "RoutingRecorder":
        for name, router in self._routers.items():
            self._hooks.append(router.register_forward_hook(self._keep(name)))
        return self

    def __exit__(self, *exception) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def is_frozen(self, name: str) -> bool:
        """Whether the router of this dotted name is not to be trained."""
        return not self._routers[name].weight.requires_grad

    def sample_shares(self, mask_BT: Tensor) -> Tensor:
        """Mean weight of each expert over the real tokens of each sample, (L, B, E) over the L recorded routers.

        The routers may be on several devices; the result is on that of the first.
        """
        rows = self._rows(mask_BT.shape)
        return _stacked([sample_shares(weights_BTE, mask_BT.to(weights_BTE.device)) for weights_BTE in rows])

    def sample_sums(self, shape: torch.Size) -> Tensor:
        """Summed weight of each expert over all positions of each sample, padding included, (L, B, E).

        Args:
            shape: of the batch, (B, T).
        """
        return _stacked([sample_sums(weights_BTE) for weights_BTE in self._rows(shape)])

    def _rows(self, shape: torch.Size) -> Iterator[Tensor]:
        return (weights.view(*shape, weights.shape[-1]) for weights in self.weights.values())

    def _keep(self, name: str):
        def hook(module, inputs, output):
            self.weights[name] = output

        return hook


def _stacked(statistics_BE: list[Tensor]) -> Tensor:
    return torch.stack([each.to(statistics_BE[0].device) for each in statistics_BE])
