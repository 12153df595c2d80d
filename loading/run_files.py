"""The names of a run's files, which training writes and inference reads."""

import re

RUN_CONFIG_NAME = "run_config.json"
RESULTS_NAME = "all_results.json"
STATE_NAME = "trainer_state.json"
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")

# Files that are uploaded to the hub: not optimizer states, logs or run_config.json, which may contain local paths.
PUBLISHED = (
    "README.md", "routing.json", "routing.png", "retention.png",
    "adapter_config.json", "adapter_model.safetensors",
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "additional_chat_templates/*",
)  # fmt: skip

# Flags that earlier versions wrote into a run's configuration under another name.
RENAMED = {"task_types": "task_type_names"}

# Flags that earlier versions did not have, and what they did.
ADDED = {"kl_weight": 0.0, "packing": False, "train_on": "all"}


def with_current_names(config: dict) -> dict:
    """A run's configuration, perhaps one of an earlier version, as today's flags would write it."""
    return ADDED | {RENAMED.get(name, name): value for name, value in config.items()}
