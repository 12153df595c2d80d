"""Base models that can be trained on packed samples."""

from transformers import PretrainedConfig

# The architectures in which samples that share a row do not see each other, as tests/test_packing.py finds: their
# positions and attention masks come from `position_ids` alone. Others take positions or masks from an attention mask,
# or carry a state from token to token.
PACKABLE = frozenset({
    "apertus", "arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4",
    "gpt2", "gpt_neox", "granite", "helium", "hunyuan_v1_dense", "llama", "llama4_text", "ministral", "ministral3",
    "mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe",
    "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2",
})  # fmt: skip
# The attention kernels that keep samples apart only in a single row.
ONE_ROW = {"flash_attention_2", "flash_attention_3"}


def packing_problem(config: PretrainedConfig) -> str | None:
    """The reason why a base model cannot be trained on packed samples, or None."""
    if config.model_type not in PACKABLE:
        return (
            f"base models of type {config.model_type!r} are not known to keep the samples of a row apart; supported "
            f"are {', '.join(sorted(PACKABLE))}"
        )
    if getattr(config, "output_router_logits", False):
        return "the base model's own router loss (--output_router_logits) would count padding"
    return None


def packs_into_one_row(config: PretrainedConfig) -> bool:
    """True if samples are kept apart only in a single row of all of them, as by FlashAttention."""
    return config._attn_implementation in ONE_ROW
