"""The Linears that are adapted if none are named."""

# The feed-forward Linears of Llama and of most others; the default for a base model that names none.
GATED_MLP = ("gate_proj", "up_proj", "down_proj")
FUSED_MLP = ("gate_up_proj", "down_proj")
PLAIN_MLP = ("c_fc", "c_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

# The architectures that are tested, with the Linears that are adapted if none are named. In a base model that is a
# mixture of experts itself these are the attention projections: its own experts are stacked tensors, not Linears.
DEFAULT_TARGETS: dict[str, tuple[str, ...]] = {
    "llama": GATED_MLP,
    "mistral": GATED_MLP,
    "qwen2": GATED_MLP,
    "qwen3": GATED_MLP,
    "gemma2": GATED_MLP,
    "gemma3_text": GATED_MLP,
    "phi3": FUSED_MLP,
    "olmo2": GATED_MLP,
    "granite": GATED_MLP,
    "smollm3": GATED_MLP,
    "starcoder2": PLAIN_MLP,
    # Longer ends of names, since the attention block of GPT-2 has a c_proj as well.
    "gpt2": ("mlp.c_fc", "mlp.c_proj"),
    "mixtral": ATTENTION,
    "qwen3_moe": ATTENTION,
}


def default_targets(model_type: str) -> tuple[str, ...]:
    """Names of the Linears that are adapted in an architecture if none are named."""
    return DEFAULT_TARGETS.get(model_type, GATED_MLP)
