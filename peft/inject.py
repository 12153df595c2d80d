"""Finding the modules to adapt and putting a LoraLayer or a TrainedCopy around each."""

import difflib
import re
from collections.abc import Iterator

from torch import nn

from .config import ALL_LINEAR, LoraConfig
from .layer import LoraLayer
from .linear import linear_size
from .targets import GATED_MLP
from .trained_copy import TrainedCopy


def find_targets(
    model: nn.Module, target_modules: list[str] | str, layers: list[int] | None = None
) -> dict[str, nn.Module]:
    """The Linears that `target_modules` and `layers_to_transform` of a `LoraConfig` mean, by name.

    Works on the meta device. A module that is wrapped already is returned as its LoraLayer, under the name of the
    module it wraps.

    Raises:
        ValueError: a name matches nothing (with the nearest names that exist) or something other than a Linear;
            a regular expression matches no Linear; the layers that are asked for are not there.
    """
    candidates = {name: module for name, module in model.named_modules() if not _is_inside_wrapper(name, model)}
    linears = {name: module for name, module in candidates.items() if linear_size(module)}
    if target_modules == ALL_LINEAR:
        output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        targets = {name: module for name, module in linears.items() if module is not output}
    elif isinstance(target_modules, str):
        targets = {name: module for name, module in linears.items() if re.fullmatch(target_modules, name)}
        if not targets:
            raise ValueError(
                f"no Linear has a name that the regular expression {target_modules!r} matches from end to end; names "
                f"are like {', '.join(list(linears)[:3])}"
            )
    else:
        targets = _named(target_modules, candidates, "target module")
        for name, module in targets.items():
            if name not in linears:
                if isinstance(module, TrainedCopy):
                    raise ValueError(
                        f"target module {name!r} cannot be adapted: adapter {_first_name(module)} of this model has it "
                        "in modules_to_save"
                    )
                kind = type(module).__name__
                raise ValueError(f"target module {name!r} is a {kind}; only Linear layers can be adapted")
    return targets if layers is None else _in_layers(targets, layers)


def find_copies(model: nn.Module, modules_to_save: list[str], targets: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules that `modules_to_save` of a `LoraConfig` means, by name; `targets` are those of `find_targets`.

    Raises:
        ValueError: a name matches nothing, or a module cannot be trained in full.
    """
    candidates = {name: module for name, module in model.named_modules() if not _is_inside_wrapper(name, model)}
    chosen = _named(modules_to_save, candidates, "module to save")
    _check_copies(chosen, targets, model)
    return chosen


class LoraModel(nn.Module):
    """A base model whose target Linears are wrapped; everything but what the adapters add is frozen.

    Args:
        model: the base model, changed in place.

    Raises:
        ValueError: it is wrapped already.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        if any(isinstance(module, LoraLayer | TrainedCopy) for module in model.modules()):
            raise ValueError(
                "the model has an adapter already: add another one with the PeftModel's add_adapter or "
                "load_adapter, or load the base model anew"
            )
        self.model = model
        model.requires_grad_(False)

    def add_adapter(self, name: str, config: LoraConfig) -> None:
        """Create the modules of adapter `name`: experts in every target Linear, copies of modules to save.

        Fills in `config.target_modules` if it is None.

        Raises:
            ValueError: see `find_targets`; or a module to save cannot be trained in full.
            TypeError: the balance term has weight, but the model's forward does not compute it.
        """
        if config.balances and not hasattr(self.model, "configure_balance"):
            raise TypeError(
                f"blc_weight is {config.blc_weight}, but {type(self.model).__name__} does not compute the balance "
                "term. Load the model with transformers_patch.AutoModelForCausalLM.from_pretrained(...), or turn the "
                "term off with blc_weight=0"
            )
        if config.target_modules is None:
            config.target_modules = _default_targets(self.model)
        targets = find_targets(self.model, config.target_modules, config.layers_to_transform)
        self._add_copies(name, find_copies(self.model, list(config.modules_to_save or []), targets))
        for module_name, module in targets.items():
            self._wrapped(module_name, module, LoraLayer).add_adapter(name, config)

    def _add_copies(self, name: str, chosen: dict[str, nn.Module]) -> None:
        copy_of: dict[nn.Parameter, nn.Parameter] = {}
        for module_name, module in chosen.items():
            wrapper = self._wrapped(module_name, module, TrainedCopy)
            wrapper.add_adapter(name)
            own = wrapper.trained[name]
            for parameter_name, frozen in wrapper.base_layer.named_parameters():
                if frozen in copy_of:  # tied
                    owner, _, attribute = parameter_name.rpartition(".")
                    setattr(own.get_submodule(owner), attribute, copy_of[frozen])
                copy_of[frozen] = own.get_parameter(parameter_name)

    def _wrapped(self, module_name: str, module: nn.Module, wrapper: type[nn.Module]) -> nn.Module:
        if not isinstance(module, wrapper):
            module = wrapper(module)
            self.model.set_submodule(module_name, module)
        return module

    def remove_adapter(self, name: str) -> None:
        """Remove the modules of adapter `name` and the wrappers that no other adapter uses."""
        for module_name, module in list(self.model.named_modules()):
            if isinstance(module, LoraLayer | TrainedCopy) and name in (own := _adapters_of(module)):
                del own[name]
                if not own:
                    self.model.set_submodule(module_name, module.base_layer)

    def layers(self) -> Iterator[LoraLayer | TrainedCopy]:
        return (module for module in self.model.modules() if isinstance(module, LoraLayer | TrainedCopy))

    def activate(self, name: str | None, config: LoraConfig | None) -> None:
        """Route through adapter `name`; with None, the model is the base model again."""
        for layer in self.layers():
            layer.active_adapter = name if name is not None and name in _adapters_of(layer) else None
        if hasattr(self.model, "configure_balance"):
            self.model.configure_balance(config)

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


def _adapters_of(layer: LoraLayer | TrainedCopy) -> nn.ModuleDict:
    """The modules of each adapter there, by its name."""
    return layer.experts if isinstance(layer, LoraLayer) else layer.trained


def _first_name(layer: LoraLayer | TrainedCopy) -> str:
    return repr(next(iter(_adapters_of(layer))))


def _default_targets(model: nn.Module) -> list[str]:
    """Raises ValueError if the model has no Linears of the default names."""
    names = getattr(model, "default_target_modules", GATED_MLP)
    try:
        find_targets(model, list(names))
    except ValueError:
        linears = _linears_of(dict(model.named_modules()))
        raise ValueError(
            f"no default target modules are known for {type(model).__name__}: name some. {linears}"
        ) from None
    return sorted(names)


def _named(wanted_names: list[str], candidates: dict[str, nn.Module], what: str) -> dict[str, nn.Module]:
    """The candidates whose dotted name is, or ends in, one of the wanted names."""
    found: dict[str, nn.Module] = {}
    for wanted in wanted_names:
        matches = {n: m for n, m in candidates.items() if n == wanted or n.endswith("." + wanted)}
        if not matches:
            raise ValueError(f"{what} {_no_such_module(wanted, candidates)}")
        found |= matches
    return found


def _in_layers(targets: dict[str, nn.Module], layers: list[int]) -> dict[str, nn.Module]:
    """Those inside the layers with these numbers. A module's layer is the first number in its dotted name."""
    layer_of = {name: int(number[1]) for name in targets if (number := re.search(r"\.(\d+)\.", name))}
    if missing := sorted(set(layers) - set(layer_of.values())):
        raise ValueError(
            f"layers_to_transform names {', '.join(map(str, missing))}, but there are target modules in layers "
            f"{', '.join(map(str, sorted(set(layer_of.values())))) or 'of no number'} only"
        )
    return {name: module for name, module in targets.items() if layer_of.get(name) in layers}


def _check_copies(chosen: dict[str, nn.Module], targets: dict[str, nn.Module], model: nn.Module) -> None:
    """Raises ValueError if a module is adapted as well, has no own weight or quantised weights, or shares its weight
    with a module that is not saved."""
    owners: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, []).append(name.rpartition(".")[0].removesuffix(".base_layer"))
    for name, module in chosen.items():
        if name in targets:
            raise ValueError(f"{name!r} is in modules_to_save and in target_modules; it can be only one of them")
        if isinstance(module, LoraLayer):
            raise ValueError(
                f"{name!r} is in modules_to_save, but adapter {_first_name(module)} of this model has it in "
                "target_modules"
            )
        frozen = module.base_layer if isinstance(module, TrainedCopy) else module
        parameters = dict(frozen.named_parameters())
        if "weight" not in parameters:
            kind = type(frozen).__name__
            raise ValueError(
                f"{name!r} is in modules_to_save, but it is a {kind}, which has no weight itself; name embeddings, "
                "Linears or normalisations"
            )
        if not all(parameter.is_floating_point() for parameter in parameters.values()):
            raise ValueError(f"{name!r} is in modules_to_save, but its weights are quantised")
        sharing = {owner for parameter in parameters.values() for owner in owners[parameter]}
        if others := sorted(owner for owner in sharing if owner not in chosen and not owner.startswith(name + ".")):
            raise ValueError(
                f"{name!r} is in modules_to_save and shares its weight with {', '.join(map(repr, others))} in this "
                "model: name both, and they are trained as one weight and saved once"
            )


def _is_inside_wrapper(name: str, model: nn.Module) -> bool:
    """True if a module is the base layer, router or another part of a LoraLayer or TrainedCopy."""
    parents = name.split(".")[:-1]
    return any(
        isinstance(model.get_submodule(".".join(parents[:end])), LoraLayer | TrainedCopy)
        for end in range(1, len(parents) + 1)
    )


def _no_such_module(wanted: str, candidates: dict[str, nn.Module]) -> str:
    message = f"{wanted!r} does not exist in the model"
    ends = {name.rsplit(".", 1)[-1] for name in candidates}
    if near := difflib.get_close_matches(wanted, sorted(ends), cutoff=0.5):
        message += f"; did you mean {' or '.join(map(repr, near))}?"
    return f"{message} {_linears_of(candidates)}"


def _linears_of(modules: dict[str, nn.Module]) -> str:
    names = sorted({name.rsplit(".", 1)[-1] for name, module in modules.items() if linear_size(module)})
    return f"Linears of this model: {', '.join(names)}"
