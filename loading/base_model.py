"""The base model, its tokenizer, and the adapter on it."""

from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer, BitsAndBytesConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import is_flash_attn_2_available

from data import InputError, first_line, row_lengths, with_fixed_date
from loading.arguments import FLAG_OF_FIELD, ModelArguments, RunArguments
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training, set_peft_model_state_dict
from peft.saving import load_adapter_weights
from transformers_patch.auto import (
    AutoModelForCausalLM,
    base_of,
    code_refused,
    damage_refused,
    load_config,
    most_positions,
    patched_class,
)
from transformers_patch.packing import packing_problem

MOST_LINES_SHOWN = 12


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer. Without a padding token it pads with the end-of-sequence token.

    Its chat template writes the same date every day.

    Raises:
        InputError: it does not exist, its files are damaged, it needs custom code, it has no fast backend, or it has no
            end-of-sequence token.
    """
    try:
        # transformers also reads the model's configuration, for the class of the tokenizer.
        with code_refused(), damage_refused("config.json or a file of the tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            _fix_dates(tokenizer)
    except (OSError, ValueError) as error:
        raise InputError(f"no tokenizer could be loaded from {name}: {first_line(error)}") from error
    if not tokenizer.is_fast:
        raise InputError(
            f"the tokenizer of {name} is a {type(tokenizer).__name__}, which has no fast backend; only fast tokenizers "
            "(those with a tokenizer.json) are supported"
        )
    if tokenizer.eos_token is None:
        raise InputError(f"the tokenizer of {name} has no end-of-sequence token, so answers could never end")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_base_model(
    name: str, tokenizer: PreTrainedTokenizerBase, put_adapter: Callable[[nn.Module], nn.Module]
) -> nn.Module:
    """Check, without loading any weights, that a base model exists and fits the tokenizer and the adapter.

    Args:
        name: the base model, a local folder or a hub id.
        put_adapter: puts the adapter on a model; here it is called with one on the meta device.

    Returns:
        The model with its adapter, without weights.

    Raises:
        InputError: the model does not exist, its configuration cannot be used, another method has quantised its
            weights, its architecture has no patched class, target modules do not exist, the adapter does not fit, or
            the tokenizer has more tokens than the model.
    """
    try:
        config = load_config(name)
    except (OSError, ValueError) as error:
        raise InputError(f"no model could be loaded from {name}: {first_line(error)}") from error
    _refuse_other_quantisation(name, config)
    try:
        with torch.device("meta"), damage_refused(f"config.json of {name}"):
            skeleton = AutoModelForCausalLM.from_config(config)
        skeleton = put_adapter(skeleton)
    except ValueError as error:
        raise InputError(_shortened(str(error))) from error
    last_token = max(tokenizer.get_vocab().values())
    if last_token >= skeleton.config.vocab_size:
        raise InputError(
            f"the tokenizer has token ids up to {last_token}, but the vocabulary of {name} ends at "
            f"{skeleton.config.vocab_size - 1}; use the model's own tokenizer"
        )
    return skeleton


def _fix_dates(tokenizer: PreTrainedTokenizerBase) -> None:
    templates = tokenizer.chat_template
    if isinstance(templates, dict):  # by name; "default" is the one that is used
        tokenizer.chat_template = {name: with_fixed_date(template) for name, template in templates.items()}
    elif templates:
        tokenizer.chat_template = with_fixed_date(templates)


def _refuse_other_quantisation(name: str, config: PretrainedConfig) -> None:
    """Raises InputError if the weights of a base model are already quantised, and not by bitsandbytes."""
    found = _quantisation(config)
    method = found.get("quant_method")
    if found and method != "bitsandbytes":
        raise InputError(
            f"the weights of {name} are already quantised by {method or 'an unknown method'}, which is not supported; "
            "use the unquantised model, with --load_in_kbits 4 or 8 if needed"
        )


def _quantisation(config: PretrainedConfig) -> dict:
    """The quantisation settings of a model's weights; {} if they are not quantised."""
    found = getattr(config, "quantization_config", None) or {}
    return found if isinstance(found, dict) else found.to_dict()


def check_attention(model: nn.Module, name: str) -> None:
    """Set the attention kernel of a model without weights. Raises InputError if its architecture cannot use the kernel.

    Args:
        name: name of the kernel; `auto` fits every architecture.
    """
    if name == "auto":
        return
    try:
        base_of(model).set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        raise InputError(f"--attn_implementation {name}: {first_line(error)}") from error


def check_packing(model: nn.Module) -> None:
    """Raises InputError if a model cannot be trained on packed samples."""
    if problem := packing_problem(base_of(model).config):
        raise InputError(f"--packing: {problem}")


def check_lengths(model: nn.Module, *sets: Dataset, remedy: str | None = None) -> None:
    """Raises InputError if a row is longer than the model's table of positions.

    Args:
        remedy: the advice in the message; by default to truncate the rows.
    """
    longest = max(row_lengths(rows).max() for rows in sets)
    if problem := length_problem(model, longest):
        raise InputError(f"there are rows of {problem}; {remedy or f'set --max_seq_length {most_positions(model)}'}")


def length_problem(model: nn.Module, length: int) -> str | None:
    """The reason why a text of this many tokens does not fit the model's table of positions, or None."""
    positions = most_positions(model)
    if positions is None or length <= positions:
        return None
    return f"{length} tokens, but this base model ({model.config.model_type}) has {positions} positions"


def build_model(model_args: ModelArguments, args: RunArguments) -> nn.Module:
    """Load the base model and put the adapter on it, a new one or the one at `peft_path`, in their dtypes.

    Raises:
        InputError: the weights are missing or damaged.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_args.model_name_or_path,
            dtype=base_dtype(model_args, args),
            attn_implementation=_attention(model_args, args),
            quantization_config=quantization(model_args.load_in_kbits, base_dtype(model_args, args)),
        )
    except (OSError, SafetensorError) as error:
        place = model_args.model_name_or_path
        raise InputError(f"the weights of {place} could not be read: {first_line(error)}") from error
    if model_args.load_in_kbits in (4, 8):
        # The Trainer itself turns checkpointing on if it is asked for.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = with_adapter(model, model_args)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(trained_dtype(args))
    return model


def with_adapter(model: nn.Module, model_args: ModelArguments) -> nn.Module:
    """Put the adapter on a model. With a model on the meta device, this only checks that everything fits."""
    found = _quantisation(model.config)
    bits = 4 if found.get("load_in_4bit") else 8
    if found and model_args.load_in_kbits != bits:
        raise ValueError(
            f"--load_in_kbits is {model_args.load_in_kbits}, but the weights of {model_args.model_name_or_path} are "
            f"already quantised to {bits} bits: set it to {bits}"
        )
    if model_args.output_router_logits is not None:
        if not hasattr(model, "router_aux_loss_coef"):
            raise ValueError(f"--output_router_logits: {type(model).__name__} has no router loss")
        model.config.output_router_logits = model_args.output_router_logits
    if model_args.tuning == "full":
        return model
    model = get_peft_model(model, _adapter_config(model_args))
    if model_args.peft_path:
        set_peft_model_state_dict(model, load_adapter_weights(model_args.peft_path))
    return model


def adapter_warnings(model_args: ModelArguments) -> list[str]:
    """Warnings about the adapter at `peft_path`."""
    found = model_args.continued_config
    warning = found and other_base_warning(found.base_model_name_or_path, model_args.model_name_or_path)
    return [warning] if warning else []


def other_base_warning(trained_on: str | None, base: str) -> str | None:
    """A warning if an adapter is put on a different base model than the one it names, or None."""
    if not trained_on or trained_on == base or Path(trained_on).resolve() == Path(base).resolve():
        return None
    return (
        f"warning: the adapter was trained on {trained_on}, and the base model is {base}: results are valid only if "
        "both have the same weights"
    )


def _adapter_config(model_args: ModelArguments) -> LoraConfig:
    """The adapter's configuration. If training continues from an adapter, shapes and scaling are those of that adapter,
    while dropout and balance term follow the flags."""
    wanted, found = model_args.lora_config(), model_args.continued_config
    if not found:
        return wanted
    wanted.target_modules = wanted.target_modules or found.target_modules
    differing = [
        f"{FLAG_OF_FIELD[name]} is {_typed(getattr(wanted, name))}, the adapter has {_typed(getattr(found, name))}"
        for name in wanted.fixed_differences(found)
    ]
    if differing:
        raise ValueError(f"the adapter in --peft_path was trained with other settings: {'; '.join(differing)}")
    return wanted


def _typed(value: object) -> str:
    """A field of the adapter's configuration in the spelling of the command line."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "none" if value is None else str(value)


def compute_dtype(args: RunArguments) -> torch.dtype:
    """Dtype of the activations: under autocast, or everywhere with DeepSpeed, which does not use it."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def trained_dtype(args: RunArguments) -> torch.dtype:
    """Dtype of the trained weights: adapters, modules that are trained in full, or all weights.

    float32 if the optimizer has no other copy. DeepSpeed's optimizer keeps float32 weights itself and needs the model's
    weights in the dtype of the activations; if ZeRO-3 has partitioned them, it does not cast them.
    """
    return compute_dtype(args) if args.deepspeed else torch.float32


def base_dtype(model_args: ModelArguments, args: RunArguments) -> torch.dtype:
    """Dtype of the base model's weights; for a quantised one, the dtype of its computation."""
    return compute_dtype(args) if model_args.tuning == "loramoe" else trained_dtype(args)


def _attention(model_args: ModelArguments, args: RunArguments) -> str | None:
    """The attention kernel; None leaves the choice to transformers: sdpa, if the architecture can use it."""
    if model_args.attn_implementation != "auto":
        return model_args.attn_implementation
    half_on_gpu = (args.bf16 or args.fp16) and args.device.type == "cuda"
    capable = half_on_gpu and torch.cuda.get_device_capability(args.device)[0] >= 8
    if not (capable and is_flash_attn_2_available()):
        return None
    config = load_config(model_args.model_name_or_path)
    return "flash_attention_2" if patched_class(config)._supports_flash_attn else None


def quantization(kbits: int, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """The bitsandbytes settings for the base model's weights: 4 is nf4, 8 is int8, 16 does not quantise them."""
    if kbits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    if kbits == 4:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
        )
    return None


def _shortened(message: str) -> str:
    """The first lines of a message; a wrong base model gives one line for each of hundreds of tensors."""
    lines = message.splitlines()
    more = len(lines) - MOST_LINES_SHOWN
    return message if more <= 0 else "\n".join([*lines[:MOST_LINES_SHOWN], f"  ... and {more} more"])
