"""Finding the Linears to adapt and putting a LoraLayer around each."""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from peft.config import LoraConfig
from peft.layer import LoraLayer


def find_targets(model: nn.Module, target_modules: list[str]) -> dict[str, nn.Module]:
    """The modules whose dotted name ends with one of `target_modules`, by name. Works on the meta device.

    A module that is wrapped already is returned as its LoraLayer, under the name of the module it wraps.

    Raises:
        ValueError: a name matches nothing (with the nearest names that exist) or matches something that is no Linear.
    """
    candidates = {name: module for name, module in model.named_modules() if not _is_inside_lora_layer(name, model)}
    targets: dict[str, nn.Module] = {}
    for wanted in target_modules:
        matches = {n: m for n, m in candidates.items() if n == wanted or n.endswith("." + wanted)}
        if not matches:
            raise ValueError(_no_such_module(wanted, candidates))
        for name, module in matches.items():
            if not _is_linear(module):
                kind = type(module).__name__
                raise ValueError(f"target module {name!r} is a {kind}; only Linear layers can be adapted")
        targets.update(matches)
    return targets


class LoraModel(nn.Module):
    """A base model whose target Linears are wrapped; everything but the experts and routers is frozen.

    Args:
        model: the base model, changed in place.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        model.requires_grad_(False)

    def add_adapter(self, name: str, config: LoraConfig) -> None:
        """Create the experts of adapter `name` in every target Linear.

        Raises:
            ValueError: see `find_targets`.
            TypeError: the balance term has weight, but the model's forward does not compute it.
        """
        if config.balances and not hasattr(self.model, "configure_balance"):
            raise TypeError(
                f"blc_weight is {config.blc_weight}, but {type(self.model).__name__} does not compute the balance "
                "term. Load the model with transformers_patch.AutoModelForCausalLM.from_pretrained(...), or turn the "
                "term off with blc_weight=0"
            )
        for module_name, module in find_targets(self.model, config.target_modules).items():
            if not isinstance(module, LoraLayer):
                module = LoraLayer(module)
                self.model.set_submodule(module_name, module)
            module.add_adapter(name, config)

    def layers(self) -> Iterator[LoraLayer]:
        return (module for module in self.model.modules() if isinstance(module, LoraLayer))

    def activate(self, name: str | None, config: LoraConfig | None) -> None:
        """Route through adapter `name`; with None, the model is the base model again."""
        for layer in self.layers():
            layer.active_adapter = name if name in layer.experts else None
        if hasattr(self.model, "configure_balance"):
            self.model.configure_balance(config)

    @contextmanager
    def disabled(self, name: str, config: LoraConfig):
        self.activate(None, None)
        try:
            yield
        finally:
            self.activate(name, config)

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


def _is_linear(module: nn.Module) -> bool:
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def _is_inside_lora_layer(name: str, model: nn.Module) -> bool:
    """Whether a module is the base layer, router or another part of a LoraLayer."""
    parents = name.split(".")[:-1]
    return any(
        isinstance(model.get_submodule(".".join(parents[:end])), LoraLayer) for end in range(1, len(parents) + 1)
    )


def _no_such_module(wanted: str, candidates: dict[str, nn.Module]) -> str:
    linears = sorted({name.rsplit(".", 1)[-1] for name, module in candidates.items() if _is_linear(module)})
    message = f"target module {wanted!r} does not exist in the model"
    if near := difflib.get_close_matches(wanted, linears, cutoff=0.5):
        message += f"; did you mean {' or '.join(map(repr, near))}?"
    return f"{message} Linears of this model: {', '.join(linears)}"
