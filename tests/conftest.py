"""Shared fixtures: a tiny random Llama with its own tokenizer, and adapters whose weights are not zero."""

import os

# Threads that spin while another test or process computes make the tiny models ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Read when triton is imported, if it is there.
os.environ.setdefault("TRITON_INTERPRET", "0" if os.path.exists("/dev/nvidiactl") else "1")

import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import data.files
import data.workers
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers_patch import LlamaLoRAMoEForCausalLM

ROOT = Path(__file__).resolve().parent.parent

# A script that runs the tests in the background has told them to ignore Ctrl-C, which some of them send.
signal.signal(signal.SIGINT, signal.default_int_handler)


def tiny_config(**changes) -> LlamaConfig:
    values = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    return LlamaConfig(**(values | changes))


def tiny_model() -> LlamaLoRAMoEForCausalLM:
    torch.manual_seed(0)
    return LlamaLoRAMoEForCausalLM(tiny_config())


def fill_adapter(model: PeftModel, seed: int = 1) -> PeftModel:
    """Give A, B and the routers fixed values away from zero: a fresh adapter hides faults, since B = 0."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def filled_model(**settings) -> PeftModel:
    """A tiny Llama with an adapter of non-zero weights; 4 experts of rank 2 and no dropout where not set otherwise."""
    values = {"task_type": TaskType.CAUSAL_LM, "r": 2, "lora_alpha": 4, "lora_nums": 4, "lora_dropout": 0.0}
    return fill_adapter(get_peft_model(tiny_model(), LoraConfig(**(values | settings))))


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """A context in which the disk is full for files of more than `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def deepspeed_file(folder: Path, name: str) -> Path:
    """A shipped DeepSpeed file, under ZeRO-3 one that partitions even tensors as small as those of a tiny model."""
    config = json.loads((ROOT / "scripts" / "deepspeed" / name).read_text())
    if config["zero_optimization"]["stage"] == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    file = folder / name
    file.write_text(json.dumps(config))
    return file


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges worth speaking of, with a chat template in the ChatML manner."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(["the cat sat on the mat and the dog lay in the sun"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", additional_special_tokens=specials[2:]
    )
    tokenizer.chat_template = (
        "{% for turn in messages %}<|{{ turn.role }}|>{{ turn.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return tokenizer


# Writes what a model thought before its last answer, an empty block where it is told not to think: as Qwen3's does.
THINKING = (
    "{% for turn in messages %}<|{{ turn.role }}|>"
    "{% if turn.role == 'assistant' and loop.last %}(thought: ){% endif %}{{ turn.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}(thought: ){% endif %}{% endif %}"
)


def example_rows(count: int = 12) -> list[dict]:
    """Rows of different lengths and both task types."""
    return [
        {
            "instruction": f"Say {'very ' * (index % 4)}softly the number",
            "input": str(index) if index % 2 else "",
            "output": f"number {index}",
            "task_type": index % 2,
            "task": ("summarization", "closed_book_qa")[index % 2],
        }
        for index in range(count)
    ]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    """A folder with a tiny random Llama and its tokenizer, as a base model for the command line."""
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config()).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture
def quantisable_dir(tmp_path, tokenizer) -> Path:
    """A base model whose widths are multiples of 64, as quantisation needs them."""
    folder = tmp_path / "quantisable"
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(hidden_size=64, intermediate_size=128)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def gpt2_dir(tmp_path) -> Path:
    """A base model with a table of 64 positions."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.fixture
def data_file(tmp_path) -> Path:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(example_rows()))
    return file


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few rows, which processes share as they share those of large files."""
    monkeypatch.setattr(data.files, "CHARACTERS_OF_A_BLOCK", 200)
    monkeypatch.setattr(data.files, "ROWS_OF_A_BLOCK", 7)
    monkeypatch.setattr(data.workers, "BYTES_WORTH_A_WORKER", 200)


@pytest.fixture
def adapter_dir(tmp_path, model_dir) -> Path:
    """An adapter folder with non-zero weights on the tiny base, as a run leaves it."""
    folder = tmp_path / "adapter"
    filled_model(base_model_name_or_path=str(model_dir)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "run_config.json").write_text(json.dumps({"prompt_template": "plain", "max_seq_length": 128}))
    return folder
