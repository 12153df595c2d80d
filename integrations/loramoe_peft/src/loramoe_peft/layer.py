"""The adapted Linear, as peft wants to see it."""

from functools import partial

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ._method import LoraConfig, LoraLayer
from .balance import Balance


class LoraMoeLayer(BaseTunerLayer, LoraLayer):
    """`_method.LoraLayer`, of which peft chooses the active adapter.

    Args:
        base_layer: the Linear to wrap.
        balance: the balance term of the model, which is shown the weights of the routers.
    """

    adapter_layer_names = ("experts",)

    def __init__(self, base_layer: nn.Module, balance: Balance):
        super().__init__(base_layer)
        self.balance = balance

    def add_adapter(self, name: str, config: LoraConfig) -> None:
        """Create the experts of adapter `name`."""
        super().add_adapter(name, config)
        if (router := self.experts[name].router) is not None and config.balances:
            router.register_forward_hook(partial(self.balance.see, config))

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As peft's.

        Raises:
            ValueError: more than one is to be active.
        """
        if not isinstance(adapter_names, str) and len(adapter_names) > 1:
            raise ValueError(f"one mixture can be active at a time, not {', '.join(adapter_names)}")
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def forward(self, x_BTI: Tensor) -> Tensor:
        active = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.experts]
        return self.experts[active[0]](x_BTI, self.base_layer) if active else self.base_layer(x_BTI)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Without peft's cast to the dtype of the base layer: the experts are float32.
        if adapter_name in self.experts:
            self.experts[adapter_name].to(device or self.base_layer.weight.device)
