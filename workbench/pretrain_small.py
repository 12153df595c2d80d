"""Pretrain a small Llama of a few million parameters that knows the facts of `data/world_facts`.

    python -m workbench.pretrain_small --output models/small-llama

In an hour, two CPU cores train this model on hundreds of thousands of short instruction rows, but a model of 135M
parameters on only about ten thousand. It is trained on every fact as a statement and as questions, and on the texts
(not the answers) of the generated tasks, with a SentencePiece BPE tokenizer trained on the same data. The training is
`train.py --tuning full` on random weights, so it logs, stops and resumes like any other run.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

import train
from data.facts import QUESTIONS, fact_row, load_facts, statement
from data.tasks import TASKS, make_rows
from loading.command_line import flag, parse_flags, run_verb
from workbench.processes import as_flags

TEXTS_OF_A_TASK = 250
VOCABULARY = 3000
COMMAND = "python -m workbench.pretrain_small"
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


@dataclass
class PretrainArguments:
    """Output folder and length of the training."""

    output: str = flag("models/small-llama", "folder for the model")
    epochs: float = flag(24, "number of passes over the texts")
    facts: int | None = flag(None, "use only this many facts of each part, for a quick trial")
    seed: int = flag(1, "random seed of weights and order")

    def problems(self) -> list[str]:
        problems = [] if self.epochs > 0 else [f"--epochs is {self.epochs:g}, but has to be above 0"]
        most = min(len(load_facts(part)) for part in ("probe", "training"))
        if self.facts is not None and not 1 <= self.facts <= most:
            problems.append(f"--facts is {self.facts}, but has to be from 1 to {most}")
        return problems


KINDS = (PretrainArguments,)


def main(argv: list[str] | None = None) -> None:
    """Write a Llama with random weights and its texts next to the output folder, and train it.

    Raises:
        InputError: a flag is invalid.
    """
    (args,) = parse_flags(COMMAND, __doc__.splitlines()[0], KINDS, argv)
    untrained = Path(f"{args.output.rstrip('/')}-untrained")
    texts, made_for = untrained / "texts.json", untrained / "made_for.json"
    rows = pretraining_rows(args.facts)
    wanted = json.dumps({"seed": args.seed, "rows": rows}, ensure_ascii=False)
    if not made_for.is_file() or made_for.read_text() != wanted:
        make_untrained(untrained, rows, args.seed)
        texts.write_text(json.dumps(rows, ensure_ascii=False))
        made_for.write_text(wanted)
    flags = {
        "model_name_or_path": untrained,
        "dataset_dir": texts,
        "output_dir": args.output,
        "tuning": "full",
        "knowledge_probe": "none",
        "prompt_template": "plain",
        "learning_rate": 2e-3,
        "per_device_train_batch_size": 64,
        "num_train_epochs": args.epochs,
        "logging_steps": 50,
        "save_steps": 500,
        "save_total_limit": 1,
        "seed": args.seed,
    }
    train.main(as_flags(**flags))


def pretraining_rows(facts_per_part: int | None = None) -> list[dict]:
    """Make rows of every fact, as a statement and in every phrasing of its question, and of the generated tasks' texts.

    A row without an instruction is plain text.
    """
    facts = [fact for part in ("probe", "training") for fact in load_facts(part, facts_per_part)]
    questions = [fact_row(fact, n) for fact in facts for n in range(len(QUESTIONS[fact.relation]))]
    texts = [row["input"] for task in TASKS for row in make_rows(task, TEXTS_OF_A_TASK, seed=0)]
    texts += [statement(fact) for fact in facts]
    plain = [{"instruction": "", "output": text} for text in texts]
    return plain + [{"instruction": row["instruction"], "output": row["output"]} for row in questions]


def make_untrained(folder: Path, rows: list[dict], seed: int) -> None:
    """Write a Llama with random weights and a tokenizer for these texts."""
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(text for row in rows for text in (row["instruction"], row["output"]) if text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCABULARY,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        byte_fallback=True,
        hard_vocab_limit=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    settings = {"tokenizer_class": "LlamaTokenizer", "add_eos_token": False, "legacy": False, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = LlamaTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SHAPE)).save_pretrained(folder)


if __name__ == "__main__":
    run_verb(main)
