"""The recording of routing: forward hooks on the routers, alive for one forward pass."""

import torch
from torch import Tensor, nn

from peft import Router, sample_shares


class RoutingRecorder:
    """Context manager that keeps what each router of a model returns while it is open.

        with RoutingRecorder(model) as recorder:
            model(**batch)
        shares_LBE = recorder.sample_shares(batch["attention_mask"])

    The hooks only keep references and add no operation, so a checkpointed layer saves and recomputes exactly the same
    tensors with and without them, and the recorded weights carry their gradient (with non-re-entrant checkpointing).

    Attributes:
        weights: router weights (B, T, E) by the router's dotted name, in the order of the calls; (B*T, E) if the
            base model flattens the tokens before the Linear. Routers of inactive adapters do not appear.
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
        """True if the router of this dotted name is not trained."""
        return not self._routers[name].weight.requires_grad

    def sample_shares(self, mask_BT: Tensor) -> Tensor:
        """Mean weight of each expert over the real tokens of each sample, (L, B, E) over the L recorded routers.

        The routers may be on several devices; the result is on that of the first.
        """
        weights = list(self.weights.values())
        rows = [each.to(weights[0].device).view(*mask_BT.shape, -1) for each in weights]
        return sample_shares(torch.stack(rows), mask_BT)

    def _keep(self, name: str):
        def hook(module, inputs, output):
            self.weights[name] = output

        return hook
