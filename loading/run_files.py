"""The names of a run's files: training writes them, inference reads them."""

import re

RUN_CONFIG_NAME = "run_config.json"
RESULTS_NAME = "all_results.json"
STATE_NAME = "trainer_state.json"
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")

# What is uploaded to the hub. Optimizer states, logs and the run's configuration, which may hold local paths, are not.
PUBLISHED = (
    "README.md", "routing.json", "routing.png",
    "adapter_config.json", "adapter_model.safetensors",
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "additional_chat_templates/*",
)  # fmt: skip
