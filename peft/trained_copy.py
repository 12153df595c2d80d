"""Modules that an adapter trains in full, alongside the frozen ones (`modules_to_save`)."""

import copy

import torch
from torch import Tensor, nn

from .saving import gathered


class TrainedCopy(nn.Module):
    """Wraps a module, an embedding say, and replaces it by the active adapter's copy.

    Copies are made in float32, whatever the dtype of the frozen module; the output has the frozen module's dtype.

    Args:
        base_layer: the frozen module; it maps one tensor to one tensor.
    """

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.trained = nn.ModuleDict()
        self.active_adapter: str | None = None

    def add_adapter(self, name: str) -> None:
        """Make the copy of adapter `name`."""
        with gathered(self.base_layer.parameters()):
            self.trained[name] = copy.deepcopy(self.base_layer).float()

    @property
    def active_layer(self) -> nn.Module:
        return self.base_layer if self.active_adapter is None else self.trained[self.active_adapter]

    @property
    def weight(self) -> Tensor:
        """The weight of the active module: model code asks embeddings for it."""
        return self.active_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.active_adapter is None:
            return self.base_layer(x)
        return in_float32(self.active_layer, x, self.base_layer.weight.dtype)


def in_float32(copied: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """What the float32 copy of a module makes of x, in the dtype of the module that it stands for."""
    if x.is_floating_point() and not torch.is_autocast_enabled(x.device.type):
        x = x.to(copied.weight.dtype)
    return copied(x).to(dtype)
