"""Modules that an adapter trains in full (`modules_to_save`), as peft wants to see them."""

from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from ._method.trained_copy import in_float32

PART = "trained."  # what the adapter's file has before the names of a copy's parameters


class LoraMoeCopy(ModulesToSaveWrapper):
    """A module and its float32 copy for each adapter.

    Args:
        module_to_save: the frozen module; it maps one tensor to one tensor.
        adapter_name: the first adapter.
        copies: where a model has the copies of its parameters, by adapter and frozen parameter; filled in here. Modules
            that share a frozen parameter (tied embeddings) share its copy, which is saved as part of the first.
    """

    def __init__(self, module_to_save: nn.Module, adapter_name: str, copies: dict):
        AuxiliaryTrainingWrapper.__init__(self, module_to_save, adapter_name, copies=copies)

    def init_modules(self, adapter_name: str, copies: dict) -> None:
        super().init_modules(adapter_name)
        self._copies, self._borrowed = copies, {}

    def update(self, adapter_name: str, copies: dict | None = None) -> None:
        """Make the copy of an adapter."""
        super().update(adapter_name)
        copied = self.modules_to_save[adapter_name].float()
        for name, frozen in self.original_module.named_parameters():
            owner, _, attribute = name.rpartition(".")
            place = copied.get_submodule(owner), attribute
            lender = self._copies.setdefault((adapter_name, frozen), place)
            if lender is not place:
                self._borrowed[adapter_name, name] = place, lender
        self._tie()

    def _tie(self) -> None:
        """Share the copies that other modules have: again after loading, which may replace a parameter."""
        for place, lender in self._borrowed.values():
            if (parameter := getattr(*lender)) is not getattr(*place):
                setattr(*place, parameter)

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        super().delete_adapter(adapter_name, new_active_adapters)
        for places in (self._copies, self._borrowed):
            for key in [key for key in places if key[0] == adapter_name]:
                del places[key]

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        names = super().adapter_state_dict_load_map(adapter_name)
        return {PART + key: name for key, name in names.items() if (adapter_name, key) not in self._borrowed}

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        names = self.adapter_state_dict_load_map(adapter_name)
        return {key: state_dict[name] for key, name in names.items()}

    def _forward_wrapped(self, x: Tensor) -> Tensor:
        self._tie()
        return in_float32(self.modules_to_save[self.active_adapters[0]], x, self.original_module.weight.dtype)
