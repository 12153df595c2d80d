"""Choosing, and making, the patched class for a base model."""

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from peft import PeftModel
from peft.targets import DEFAULT_TARGETS, default_targets
from transformers_patch.mixin import LoRAMoEMixin
from transformers_patch.modeling_llama import LlamaLoRAMoEForCausalLM

# The names that transformers gives to a table of positions.
POSITION_TABLES = {"wpe", "embed_positions", "position_embeddings"}

# Errors that transformers raises, besides ValueError, for values in the JSON files of a model that it cannot use.
UNUSABLE = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, StrictDataclassError, TypeError,
)  # fmt: skip

# The version of a model and how it is fetched: the same for configuration and weights.
HUB_ARGUMENTS = ("cache_dir", "local_files_only", "revision", "subfolder", "token")


class AutoModelForCausalLM:
    """As transformers' class of this name, but the models know task types and the balance term."""

    @staticmethod
    def from_pretrained(name_or_path: str | os.PathLike, **kwargs) -> PreTrainedModel:
        """Load a base model from a local folder or a hub id; keyword arguments as in transformers.

        Raises:
            ValueError: the architecture cannot be patched, or needs custom code, which is never run.
        """
        if kwargs.pop("trust_remote_code", False):
            raise ValueError("trust_remote_code: code in a model's folder is never run; leave it out")
        where = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        config = _text_config(kwargs.pop("config", None) or load_config(name_or_path, **where))
        stock = patched_class(config)
        return stock.from_pretrained(name_or_path, config=config, trust_remote_code=False, **kwargs)

    @staticmethod
    def from_config(config: PretrainedConfig) -> nn.Module:
        """A model with random weights; under `torch.device("meta")`, one without any, to look at its modules."""
        config = _text_config(config)
        return patched_class(config)(config)


def load_config(name_or_path: str | os.PathLike, **where) -> PretrainedConfig:
    """The configuration of a base model; `where` are those of `HUB_ARGUMENTS`.

    Raises:
        OSError, ValueError: there is none, a value in it cannot be used, or it needs custom code, which is never run.
    """
    with code_refused(), damage_refused(f"config.json of {name_or_path}"):
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False, **where)
    _refuse_kernels(config)
    return config


@contextmanager
def damage_refused(files: str) -> Iterator[None]:
    """A context for reading the JSON files of a model, or building it from them without weights.

    Args:
        files: what is read, for the message.

    Raises:
        ValueError: a value in them cannot be used.
    """
    try:
        yield
    except UNUSABLE as error:
        found = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{files} cannot be used ({found})") from error


@contextmanager
def code_refused() -> Iterator[None]:
    """A context for loading with `trust_remote_code=False`: transformers' advice to allow the code is replaced.

    Raises:
        ValueError: the model or tokenizer needs custom code.
    """
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            "it needs custom Python code (auto_map in its JSON files), which is never executed; use a model and a "
            "tokenizer whose classes are part of transformers"
        ) from error


def _refuse_kernels(config: PretrainedConfig) -> None:
    """Raises ValueError if a configuration names an attention kernel of the hub, which would be fetched and run."""
    if "/" in str(kernel := config._attn_implementation):
        raise ValueError(
            f"it needs custom Python code (attn_implementation in its config.json is {kernel!r}), which is never "
            "executed; remove that entry"
        )
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            _refuse_kernels(part)


def _text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of the language model: in one that reads images as well, the part about text."""
    part = config.sub_configs.get("text_config")
    stock = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if part is None or getattr(stock, "config_class", None) is not part:
        return config
    text = config.get_text_config()
    if quantization := getattr(config, "quantization_config", None):
        text.quantization_config = quantization
    return text


def patched_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The patched class for a model configuration: the mixin in front of transformers' own class.

    Raises:
        ValueError: it is not a decoder-only language model whose forward the mixin can wrap; the message says why and
            names the architectures that are tested.
    """
    stock = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if problem := _why_not(stock, config):
        raise ValueError(
            f"base models of type {config.model_type!r} are not supported: {problem}. Tested are "
            f"{', '.join(sorted(DEFAULT_TARGETS))}; most other decoders of transformers work as well"
        )
    return LlamaLoRAMoEForCausalLM if config.model_type == "llama" else _patch(stock, config.model_type)


def most_positions(model: nn.Module) -> int | None:
    """The length in tokens at which a model's table of positions ends; None if positions are computed."""
    has_table = any(
        isinstance(module, nn.Embedding) and not POSITION_TABLES.isdisjoint(name.split("."))
        for name, module in model.named_modules()
    )
    return model.config.max_position_embeddings if has_table else None


def context_length(model: nn.Module) -> int | None:
    """The longest text in tokens that a model is made for; None if its configuration does not say."""
    return getattr(model.config, "max_position_embeddings", None)


def base_of(model: nn.Module) -> nn.Module:
    """The base model under an adapter; a model without an adapter itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@cache
def _patch(stock: type[PreTrainedModel], model_type: str) -> type[PreTrainedModel]:
    # transformers finds the loss by the end of the name.
    name = stock.__name__.removesuffix("ForCausalLM").removesuffix("LMHeadModel") + "LoRAMoEForCausalLM"
    members = {
        "__doc__": f"`{stock.__name__}` whose forward takes `task_types` and returns the losses separately.",
        "__module__": __name__,
        "default_target_modules": default_targets(model_type),
        # transformers would read the tensors of custom code as they are named; these checkpoints are the stock class's.
        "is_custom_code": classmethod(lambda cls: False),
    }
    if conversions := get_checkpoint_conversion_mapping(stock.__name__):
        register_checkpoint_conversion_mapping(name, conversions, overwrite=True)
    return type(name, (LoRAMoEMixin, stock), members)


def _why_not(stock: type[PreTrainedModel] | None, config: PretrainedConfig) -> str | None:
    if stock is None or not stock.__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return "transformers has no language model class for it that takes text alone"
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", True):
        return "it is an encoder (is_decoder is false in its configuration)"
    own = {"task_types", "row_weights", "supervised_indices", "sample_ids", "balance_scale", "return_logits"}
    needed = inspect.signature(LoRAMoEMixin.forward).parameters.keys() - own
    if missing := sorted(needed - inspect.signature(stock.forward).parameters.keys()):
        return f"the forward of {stock.__name__} does not take {', '.join(missing)}"
    return None
