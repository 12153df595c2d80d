"""Picking the patched class for a base model."""

import os

from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from transformers_patch.modeling_llama import LlamaLoRAMoEForCausalLM

PATCHED_CLASSES: dict[str, type[PreTrainedModel]] = {"llama": LlamaLoRAMoEForCausalLM}

# Which version of a model is meant and how it is fetched: the same for configuration and weights.
HUB_ARGUMENTS = ("cache_dir", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")


class AutoModelForCausalLM:
    """As transformers' class of this name, but the models know task types and the balance term."""

    @staticmethod
    def from_pretrained(name_or_path: str | os.PathLike, **kwargs) -> PreTrainedModel:
        """Load a base model from a local folder or a hub id; keyword arguments as in transformers.

        Raises:
            ValueError: the architecture has no patched class here.
        """
        where = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        config = kwargs.pop("config", None) or AutoConfig.from_pretrained(name_or_path, **where)
        return patched_class(config).from_pretrained(name_or_path, config=config, **kwargs)

    @staticmethod
    def from_config(config: PretrainedConfig) -> nn.Module:
        """A model with random weights; under `torch.device("meta")`, one without any, to look at its modules."""
        return patched_class(config)(config)


def patched_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The patched class for a model configuration.

    Raises:
        ValueError: there is none; the message names those that exist.
    """
    if config.model_type not in PATCHED_CLASSES:
        raise ValueError(
            f"base models of type {config.model_type!r} are not supported; supported are "
            f"{', '.join(sorted(PATCHED_CLASSES))}"
        )
    return PATCHED_CLASSES[config.model_type]
