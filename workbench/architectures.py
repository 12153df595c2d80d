"""Public architectures for the planner, from their published `config.json`. Planning needs no weights."""

from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from data import InputError, first_line
from transformers_patch.auto import load_config


def _llama(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **more) -> dict:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        **more,
    }


ARCHITECTURES = {
    "SmolLM2-135M": _llama(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True),
    "Llama-2-7B": _llama(4096, 11008, 32, 32, 32, 32000),
    "Llama-2-13B": _llama(5120, 13824, 40, 40, 40, 32000),
    "Llama-2-70B": _llama(8192, 28672, 80, 64, 8, 32000),
    "Llama-3-8B": _llama(4096, 14336, 32, 32, 8, 128256),
    "Llama-3-70B": _llama(8192, 28672, 80, 64, 8, 128256),
    "Llama-3.2-1B": _llama(2048, 8192, 16, 32, 8, 128256, head_dim=64, tie_word_embeddings=True),
    "Llama-3.2-3B": _llama(3072, 8192, 28, 24, 8, 128256, head_dim=128, tie_word_embeddings=True),
    "Mistral-7B-v0.3": _llama(4096, 14336, 32, 32, 8, 32768, model_type="mistral", sliding_window=None),
    "Qwen3-8B": _llama(4096, 12288, 36, 32, 8, 151936, model_type="qwen3", head_dim=128),
    "Qwen3-32B": _llama(5120, 25600, 64, 64, 8, 151936, model_type="qwen3", head_dim=128),
}


def find_architecture(name: str) -> PretrainedConfig:
    """Load the configuration for a built-in name, a folder with a `config.json`, or such a file.

    Raises:
        InputError: it is none of these.
    """
    if name in ARCHITECTURES:
        return AutoConfig.for_model(**ARCHITECTURES[name])
    if not Path(name).exists():
        raise InputError(
            f"--model {name}: no such file or folder, and not a built-in architecture; these are "
            f"{', '.join(ARCHITECTURES)}"
        )
    try:
        return load_config(name)
    except (OSError, ValueError) as error:
        raise InputError(f"--model {name} does not contain a model configuration: {first_line(error)}") from error
