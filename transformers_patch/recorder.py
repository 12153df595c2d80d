"""The recording of routing: forward hooks on the routers, alive for one forward pass.

Shape suffixes: L adapted Linears, B rows, S samples, T tokens of a row, N of all rows, E experts, X = L * E.
"""

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

    def packed_shares(self, sample_ids_BT: Tensor, num_samples: int) -> Tensor:
        """As `sample_shares`, of samples that share rows, (L, S, E).

        Args:
            sample_ids_BT: the number of each token's sample, -1 for padding.
            num_samples: S.
        """
        weights = list(self.weights.values())
        device, num_experts = weights[0].device, weights[0].shape[-1]
        weights_NX = torch.cat([each.to(device).flatten(0, -2) for each in weights], dim=-1)
        sample_ids_N = sample_ids_BT.to(device).flatten()
        belongs_SN = (sample_ids_N == torch.arange(num_samples, device=device).unsqueeze(1)).double()
        # A product gives the same sums each time, where index_add does not on a GPU. In float64, which neither autocast
        # nor TF32 rounds.
        sums_SX = belongs_SN @ weights_NX.double()
        shares_SX = (sums_SX / belongs_SN.sum(dim=1, keepdim=True).clamp(min=1)).float()
        return shares_SX.view(num_samples, len(weights), num_experts).transpose(0, 1)

    def _keep(self, name: str):
        def hook(module, inputs, output):
            self.weights[name] = output

        return hook
