"""A tiny run of `train.py`: a random Llama with a tokenizer of single bytes, rows and flags."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from transformers_patch import LlamaLoRAMoEForCausalLM
from workbench.processes import as_flags


def make_tiny_model(folder: Path) -> LlamaLoRAMoEForCausalLM:
    """Write model and tokenizer to a folder and return the model. Its layers are wide enough to be quantised."""
    write_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaLoRAMoEForCausalLM(config)
    model.save_pretrained(folder)
    return model


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of bytes, with 258 tokens."""
    specials = ["<s>", "</s>"]
    vocabulary = {token: index for index, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def write_rows(file: Path, count: int) -> None:
    """Write rows of different lengths and of both task types, 0 (other) and 1 (world knowledge)."""
    rows = [
        {"instruction": f"Count {'on ' * (index % 5)}from {index}", "output": f"{index + 1}", "task_type": index % 2}
        for index in range(count)
    ]
    file.write_text(json.dumps(rows))


def tiny_run(folder: Path, model: Path, output: Path, **more) -> list[str]:
    """Flags of `train.py` for a run on the CPU, with dropout, on the `rows.json` of a folder."""
    return as_flags(
        model_name_or_path=model,
        dataset_dir=folder / "rows.json",
        output_dir=output,
        use_cpu=True,
        knowledge_probe="none",
        lora_nums=4,
        lora_dropout=0.2,
        disable_tqdm=True,
        **more,
    )
