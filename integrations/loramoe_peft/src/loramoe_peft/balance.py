"""The balance term under trainers that do not know it: its gradient is added where the routers are.

    while the model runs         each router's weights become shares q, (B, E), without a graph
    when it has run              the term, and its gradient with respect to every q
    in the backward pass         each router adds its part to the gradient of its weights

So the loss is the trainer's own, in any form, and all gradients are those of loss + blc_weight * term.

Shape suffixes: L routers, B samples, T tokens, E experts, K task types.
"""

from functools import cached_property, partial

import torch
from torch import Tensor, nn

from ._method import LoraConfig, Router, balance_coefficients, localized_balance_term, sample_shares

ATTRIBUTE = "loramoe_balance"
MOST_TERMS = 1000  # kept for the log, if nobody asks for them


class Balance:
    """The balance term of one model: hooks around its forward pass.

    Attributes:
        scale: factor on the gradient, by which the micro-batches of one optimizer step count as their mean.
        task_types: of the samples of the batches to come, for trainers that pass none on to the model; None for none.
    """

    def __init__(self):
        self.scale = 1.0
        self.task_types: Tensor | None = None
        self._batch: RoutedBatch | None = None
        self._without_graph: dict[Router, RoutedBatch] = {}
        self._terms: list[Tensor] = []

    @classmethod
    def of(cls, model: nn.Module) -> "Balance | None":
        """That of a model with an adapter of this kind, which may be wrapped; None for others."""
        return next((vars(module)[ATTRIBUTE] for module in model.modules() if ATTRIBUTE in vars(module)), None)

    @classmethod
    def around(cls, model: nn.Module) -> "Balance":
        """That of a base model, which gets one if it has none."""
        if ATTRIBUTE not in vars(model):
            balance = cls()
            setattr(model, ATTRIBUTE, balance)
            model.register_forward_pre_hook(balance._open, with_kwargs=True)
            model.register_forward_hook(balance._close, always_call=True)
        return vars(model)[ATTRIBUTE]

    def mean_term(self) -> float | None:
        """The mean of the unweighted term over the batches since the last call; None if there were none."""
        terms, self._terms = self._terms, []
        return torch.stack(terms).mean().item() if terms else None

    def see(self, config: LoraConfig, router: Router, inputs: tuple, weights: Tensor) -> None:
        """Forward hook of a router, for an adapter's configuration."""
        if (batch := self._batch) is not None:
            batch.add(router, config, weights.detach())
            if not weights.requires_grad:  # re-entrant checkpointing: it comes again in the backward pass
                self._without_graph[router] = batch
        elif weights.requires_grad:
            batch = self._without_graph.pop(router, None)
        if batch is not None and weights.requires_grad:
            weights.register_hook(partial(batch.add_gradient, router))

    def _open(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kwargs = dict(kwargs)
        task_types = kwargs.pop("task_types", self.task_types)
        if model.training and torch.is_grad_enabled():
            self._batch = RoutedBatch(kwargs, task_types, self.scale)
        return args, kwargs

    def _close(self, model: nn.Module, inputs: tuple, output) -> None:
        batch, self._batch = self._batch, None
        if batch is not None and batch.shares and output is not None:
            self._terms.append(batch.term())
            del self._terms[:-MOST_TERMS]


class RoutedBatch:
    """The routing of one micro-batch.

    Args:
        inputs: what the model is called with.
        task_types_B: the samples' task types, -1 for none; None is -1 for all. If there are several times as many
            samples, as in preference pairs, they are repeated.
        scale: see `Balance`.
    """

    def __init__(self, inputs: dict, task_types_B: Tensor | None, scale: float):
        self._inputs, self.task_types_B, self.scale = inputs, task_types_B, scale
        self.config: LoraConfig | None = None
        self.shares: dict[Router, Tensor] = {}
        self._gradients: dict[Router, Tensor] = {}

    @cached_property
    def mask(self) -> Tensor:
        """(B, T): 1 for real tokens, 0 for padding."""
        return _mask(self._inputs)

    def add(self, router: Router, config: LoraConfig, weights: Tensor) -> None:
        """Keep the shares of a router."""
        self.config = config
        self._counted_BT = torch.ones_like(self.mask) if config.blc_reference else self.mask
        weights_BTE = weights.view(*self.mask.shape, -1)
        self.shares[router] = sample_shares(weights_BTE, self._counted_BT.to(weights.device))

    def term(self) -> Tensor:
        """The term, detached; a collective of all processes. Its gradient is kept for `add_gradient`."""
        first, config = next(iter(self.shares.values())), self.config
        shares_LBE = torch.stack([each.to(first.device) for each in self.shares.values()]).requires_grad_()
        coefficients_KE = balance_coefficients(config.group_sizes, config.blc_alpha).to(first.device)
        coefficients_BE = coefficients_KE[self._task_types(config.num_task_types).to(first.device)]
        samples_B = self.mask.any(dim=1)
        with torch.enable_grad():
            term = localized_balance_term(shares_LBE, coefficients_BE, samples_B, over_ranks=not config.blc_reference)
            (gradient_LBE,) = torch.autograd.grad(config.blc_weight * self.scale * term, shares_LBE)
            probe_BT1 = torch.zeros_like(self._counted_BT, dtype=torch.float32).unsqueeze(-1).requires_grad_()
            shares_B1 = sample_shares(probe_BT1, self._counted_BT)
            (self._per_token_BT1,) = torch.autograd.grad(shares_B1.sum(), probe_BT1)
        self._gradients = dict(zip(self.shares, gradient_LBE, strict=True))
        return term.detach()

    def add_gradient(self, router: Router, gradient: Tensor) -> Tensor:
        """The gradient of a router's weights with that of the term: dL/dq * dq/dw."""
        added_BTE = self._gradients[router].unsqueeze(1) * self._per_token_BT1.to(self._gradients[router].device)
        return gradient + added_BTE.to(gradient).view_as(gradient)

    def _task_types(self, num_task_types: int) -> Tensor:
        samples, given_B = len(self.mask), self.task_types_B
        if given_B is None:
            return torch.full((samples,), -1)
        if given_B.ndim != 1 or samples % len(given_B):
            raise ValueError(f"task_types has shape {tuple(given_B.shape)}; this batch needs ({samples},)")
        if not ((given_B >= -1) & (given_B < num_task_types)).all():
            raise ValueError(
                f"task_types is {given_B.tolist()}; allowed are 0 to {num_task_types - 1} and -1 for no type"
            )
        return given_B.repeat(samples // len(given_B))


def _mask(kwargs: dict) -> Tensor:
    """The attention mask of a batch, (B, T); all ones if it has none."""
    mask, ids, embeds = (kwargs.get(name) for name in ("attention_mask", "input_ids", "inputs_embeds"))
    if mask is None:
        inputs = ids if embeds is None else embeds
        if inputs is None:
            raise ValueError("training with the balance term needs input_ids or inputs_embeds as keyword arguments")
        return torch.ones(inputs.shape[:2], dtype=torch.long, device=inputs.device)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise ValueError(
            "training with the balance term needs an attention_mask of shape (batch, length), which tells padding from "
            "text"
        )
    return mask
