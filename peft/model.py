"""The adapted model as users and trainers see it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from .config import LoraConfig
from .inject import LoraModel
from .saving import (
    adapter_parameters,
    get_peft_model_state_dict,
    load_adapter_weights,
    save_adapter_weights,
    set_peft_model_state_dict,
)


class PeftModel(nn.Module):
    """A frozen base model with one or more adapters, of which one is active.

    Attributes and methods that are not defined here are the base model's (`config`, `generate`, `device`, ...).

    Args:
        model: the base model; its target Linears are wrapped in place.
        peft_config: configuration of the first adapter.
        adapter_name: its name.
    """

    def __init__(self, model: nn.Module, peft_config: LoraConfig, adapter_name: str = "default"):
        super().__init__()
        self.base_model = LoraModel(model)
        self.peft_config: dict[str, LoraConfig] = {}
        self._disabled = False
        self.add_adapter(adapter_name, peft_config)
        self.set_adapter(adapter_name)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model.model, name)

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)

    def get_base_model(self) -> nn.Module:
        """The base model itself, its adapted Linears still wrapped."""
        return self.base_model.model

    def add_adapter(self, adapter_name: str, peft_config: LoraConfig) -> None:
        """Add a fresh adapter; it becomes active, and trainable, only by `set_adapter`."""
        if adapter_name in self.peft_config:
            raise ValueError(f"there is already an adapter named {adapter_name!r}")
        if not adapter_name.isidentifier():
            raise ValueError(f"{adapter_name!r} cannot name an adapter: letters, digits and underscores only")
        self.base_model.add_adapter(adapter_name, peft_config)
        for parameter in adapter_parameters(self, adapter_name).values():
            parameter.requires_grad_(False)
        if peft_config.base_model_name_or_path is None:
            peft_config.base_model_name_or_path = getattr(self.base_model.model, "name_or_path", None)
        self.peft_config[adapter_name] = peft_config

    def set_adapter(self, adapter_name: str) -> None:
        """Make one adapter the active one; if it is meant for training, only its parameters receive gradients."""
        if adapter_name not in self.peft_config:
            known = ", ".join(self.peft_config)
            raise ValueError(f"there is no adapter named {adapter_name!r}; this model has {known}")
        self.active_adapter = adapter_name
        config = self.peft_config[adapter_name]
        if not self._disabled:
            self.base_model.activate(adapter_name, config)
        for name in self.peft_config:
            for parameter in adapter_parameters(self, name).values():
                parameter.requires_grad_(name == adapter_name and not config.inference_mode)

    @property
    def active_adapters(self) -> list[str]:
        return [self.active_adapter]

    @property
    def active_peft_config(self) -> LoraConfig:
        return self.peft_config[self.active_adapter]

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """A context in which the model is the base model, bit for bit; `set_adapter` inside takes effect after it."""
        before, self._disabled = self._disabled, True
        self.base_model.activate(None, None)
        try:
            yield
        finally:
            self._disabled = before
            if not before:
                self.base_model.activate(self.active_adapter, self.active_peft_config)

    def load_adapter(self, directory: str | os.PathLike, adapter_name: str, is_trainable: bool = False) -> None:
        """Load an adapter folder under a name. A name that exists already has its weights replaced.

        Raises:
            ValueError: the folder is incomplete or damaged, its tensors do not fit the model, or its settings are not
                those of the adapter whose weights it would replace.
        """
        config, tensors = LoraConfig.from_pretrained(directory), load_adapter_weights(directory)
        if adapter_name in self.peft_config:
            _refuse_other_settings(config, directory, self.peft_config[adapter_name], adapter_name)
            set_peft_model_state_dict(self, tensors, adapter_name)
        else:
            config.inference_mode = not is_trainable
            self.add_adapter(adapter_name, config)
            self._fill_or_remove(adapter_name, tensors)

    def _fill_or_remove(self, adapter_name: str, tensors: dict[str, Tensor]) -> None:
        """Copy tensors into an adapter that has just been added; if they do not fit, it is removed again."""
        try:
            set_peft_model_state_dict(self, tensors, adapter_name)
        except ValueError:
            if adapter_name == self.active_adapter:
                self.base_model.activate(None, None)
            self.base_model.remove_adapter(adapter_name)
            del self.peft_config[adapter_name]
            raise

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        state_dict: dict[str, Tensor] | None = None,
        is_main_process: bool = True,
    ) -> None:
        """Write the active adapter, `adapter_config.json` and `adapter_model.safetensors`, into a folder.

        Under DeepSpeed every rank has to call this, since the tensors are gathered; only the main process writes.

        Args:
            state_dict: full tensors by the model's parameter names, if the caller has gathered them.
            is_main_process: whether this process writes the files.
        """
        tensors = get_peft_model_state_dict(self, state_dict, self.active_adapter)
        if is_main_process:
            save_adapter_weights(tensors, save_directory)
            self.active_peft_config.save_pretrained(save_directory)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        directory: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | None = None,
    ) -> "PeftModel":
        """Put a saved adapter onto its base model.

        Args:
            model: the base model, wrapped in place.
            directory: an adapter folder.
            is_trainable: continue training; otherwise the adapter is frozen too and the model is in eval mode.
            config: the folder's configuration, if the caller has read it already.

        Raises:
            ValueError: the folder is incomplete or damaged, the model has an adapter already, or the tensors do not fit
                the model, which is then unwrapped again, but stays frozen.
        """
        tensors = load_adapter_weights(directory)
        config = config or LoraConfig.from_pretrained(directory)
        config.inference_mode = not is_trainable
        peft_model = get_peft_model(model, config, adapter_name)
        peft_model._fill_or_remove(adapter_name, tensors)
        return peft_model.train(is_trainable)

    def tie_weights(self, *args, **kwargs) -> None:
        """Nothing: weights were tied before wrapping and stay so, and the base model cannot reach into the wrappers."""

    def push_to_hub(self, *args, **kwargs):
        """Not offered: the base model's method would upload the base model itself, under names that nothing loads.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "an adapter is uploaded from its folder: train with --push_to_hub, or write the folder with "
            "save_pretrained and give it to huggingface_hub.upload_folder"
        )

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trainable and of all parameters, whatever way they are packed or partitioned."""
        trainable, total = 0, 0
        for parameter in self.parameters():
            count = true_size(parameter)
            total += count
            trainable += count if parameter.requires_grad else 0
        return trainable, total

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable parameters: {trainable:,} of {total:,} ({100 * trainable / total:.2f} %)")


class PeftModelForCausalLM(PeftModel):
    """A PeftModel whose base is a causal language model: what `get_peft_model` returns."""


class PeftMixedModel(PeftModel):
    """Adapters of several types at once are not supported; transformers imports the name for its type checks."""

    def __init__(self, *args, **kwargs):
        raise TypeError("mixed adapters are not supported; use PeftModel")


def get_peft_model(model: nn.Module, peft_config: LoraConfig, adapter_name: str = "default") -> PeftModelForCausalLM:
    """Put a fresh adapter onto a base model; the base is wrapped in place and frozen.

    Raises:
        ValueError: a target module does not exist or is not a Linear, or the model has an adapter already.
        TypeError: the balance term has weight, but the base model does not compute it.
    """
    return PeftModelForCausalLM(model, peft_config, adapter_name)


def prepare_model_for_kbit_training(
    model: nn.Module, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: dict | None = None
) -> nn.Module:
    """Freeze a quantised base model and prepare it for a backward pass through it.

    Normalisation weights keep their dtype: in float32 they would make the residual stream float32, and with it most of
    what is kept for the backward pass. Checkpointing is the non-re-entrant kind.
    """
    model.requires_grad_(False)
    keep_4bit_packing(model)
    if use_gradient_checkpointing:
        kwargs = gradient_checkpointing_kwargs or {"use_reentrant": False}
        model.activation_checkpointing_enable(kwargs)
    return model


def _refuse_other_settings(
    found: LoraConfig, directory: str | os.PathLike, config: LoraConfig, adapter_name: str
) -> None:
    """Raises ValueError if weights from a folder would mean something else under an adapter's configuration."""
    differing = [
        f"{name} is {getattr(found, name)}, the adapter has {getattr(config, name)}"
        for name in found.fixed_differences(config)
    ]
    if differing:
        raise ValueError(
            f"{directory} cannot replace the weights of adapter {adapter_name!r}, since it was made with other "
            f"settings: {'; '.join(differing)}. Load it under another name"
        )


def keep_4bit_packing(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights at the first evaluation, as it does on some CPUs.

    The kernel that it repacks them for has no backward pass, so no gradient would reach the layers below from then on,
    and it fails on layers that are narrower than a block.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


def true_size(parameter: nn.Parameter) -> int:
    """Number of weights: ZeRO-3 keeps it separately from the partition, 4-bit tensors hold two weights in a byte."""
    if hasattr(parameter, "ds_numel"):
        return parameter.ds_numel
    packed = type(parameter).__name__ == "Params4bit" and not parameter.is_floating_point()
    return parameter.numel() * 2 if packed else parameter.numel()
