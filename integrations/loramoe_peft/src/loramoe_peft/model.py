"""The base model with adapted Linears, as peft wants to see it."""

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ._method.inject import find_copies, find_targets
from ._method.targets import default_targets
from .balance import Balance
from .config import LoraMoeConfig
from .layer import LoraMoeLayer
from .saved import LoraMoeCopy


class LoraMoeModel(BaseTuner):
    """Wraps the Linears that the method's own rules find, and refuses what a mixture cannot do."""

    # How keys of the adapter's file begin after the Linear's name: transformers puts the adapter's name behind it.
    prefix = ".experts"
    tuner_layer_cls = LoraMoeLayer

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        """As peft's, but of `config.target_modules` as the LoRAMoE repository understands them.

        Raises:
            ValueError: see `find_targets`.
        """
        config = self.peft_config[adapter_name]
        if config.target_modules is None:
            config.target_modules = sorted(default_targets(model.config.model_type))
        named = config.target_modules, config.modules_to_save
        self._targets = find_targets(model, config.target_modules, config.layers_to_transform)
        self._add_copies(model, adapter_name, config)
        config.modules_to_save = None  # peft compares names in another way
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config.target_modules, config.modules_to_save = named  # peft has spelt out `all-linear`

    def _pre_injection_hook(self, model: nn.Module, config: LoraMoeConfig, adapter_name: str) -> None:
        self._copies: dict = {}

    def _add_copies(self, model: nn.Module, adapter_name: str, config: LoraMoeConfig) -> None:
        wrapped = {name: module for name, module in model.named_modules() if isinstance(module, LoraMoeCopy)}
        unwrapped = []
        for wanted in config.modules_to_save or []:
            found = [module for name, module in wrapped.items() if f".{name}".endswith(f".{wanted}")]
            for module in found:
                module.update(adapter_name)
            unwrapped += [] if found else [wanted]
        for name, module in find_copies(model, unwrapped, self._targets).items():
            model.set_submodule(name, LoraMoeCopy(module, adapter_name, self._copies))

    def _check_target_module_exists(self, peft_config: LoraMoeConfig, key: str) -> bool:
        return key in self._targets

    def _create_and_replace(
        self,
        peft_config: LoraMoeConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target if isinstance(target, LoraMoeLayer) else LoraMoeLayer(target, Balance.around(self.model))
        layer.add_adapter(adapter_name, peft_config)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return ".experts.".join(key.rsplit(f".experts.{adapter_name}.", 1))

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "a mixture cannot be merged: its router gives every token other weights. Serve it as a mixture, or make a "
            "plain LoRA of it with export_lora of the LoRAMoE repository, which says how much that loses"
        )
