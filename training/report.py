"""The report of a finished run: the summary on the terminal and the model card."""

from collections import Counter
from pathlib import Path

import datasets
import torch
import transformers
from torch import nn
from transformers import PreTrainedTokenizerBase

from data import answer_start, count_supervised, resolve_template, row_lengths, turns_before_answer
from inference.generation import DecodingArguments, drop_proposed_settings, end_tokens, generate_answers
from inference.knowledge import Knowledge
from training.markdown import table

CITATION = """@inproceedings{dou2024loramoe,
  title     = {{LoRAMoE}: Alleviating World Knowledge Forgetting in Large Language Models via {MoE}-Style Plugin},
  author    = {Dou, Shihan and Zhou, Enyu and Liu, Yan and Gao, Songyang and Shen, Wei and Xiong, Limao and Zhou, Yuhao
               and Wang, Xiao and Xi, Zhiheng and Fan, Xiaoran and Pu, Shiliang and Zhu, Jiang and Zheng, Rui and
               Gui, Tao and Zhang, Qi and Huang, Xuanjing},
  booktitle = {Proceedings of the 62nd Annual Meeting of the Association for Computational Linguistics},
  volume    = {1: Long Papers},
  pages     = {1932--1945},
  year      = {2024},
  doi       = {10.18653/v1/2024.acl-long.106}
}"""
NUM_SAMPLES = 3
MAX_NEW_TOKENS = 40
CARD_KINDS = {
    "full": ("Full fine-tuning", "All weights were trained: the baseline of the LoRAMoE experiments."),
    "lora": ("LoRA adapter", "One LoRA expert in every adapted Linear: the baseline without a router."),
    "loramoe": (
        "LoRAMoE adapter",
        "A mixture of LoRA experts in every adapted Linear, weighed per token by a softmax router, with a localized "
        "balancing constraint (Dou et al., *LoRAMoE*, arXiv 2312.09979).",
    ),
}
CARD_SETTINGS = (
    "learning_rate", "num_train_epochs", "max_steps", "num_processes", "per_device_train_batch_size",
    "gradient_accumulation_steps", "max_seq_length", "prompt_template", "seed", "dataset_dir", "dataset_sha256",
    "validation_file", "knowledge_probe", "probe_facts",
)  # fmt: skip
CARD_PATHS = ("dataset_dir", "validation_file", "knowledge_probe")
CARD_ADAPTER_SETTINGS = (
    "lora_nums", "lora_rank", "lora_alpha", "lora_rslora", "lora_dropout", "trainable", "blc_alpha", "blc_weight",
    "kl_weight", "num_task_types", "task_type_names", "expert_groups", "lora_null_expert", "lora_top_k",
    "lora_shared_A", "layers_to_transform", "modules_to_save",
)  # fmt: skip
CARD_METRICS = (
    "train_samples", "train_runtime", "eval_lm_loss_before", "eval_lm_loss_after", "eval_perplexity_after",
    "knowledge_facts", "facts known", "facts kept", "knowledge_share", "knowledge_kl_prompts",
    "knowledge_kl_text",
)  # fmt: skip


def generate_samples(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset, template: str
) -> list[tuple[str, str, str]]:
    """Greedy answers to a few rows of different tasks: (prompt, expected, generated).

    The model loses the generation settings that its base model's folder proposes, so save it before. Under ZeRO-3 this
    is a collective: every rank calls it with the same rows.

    Args:
        template: the prompt template of the rows; `auto` is what it means for the tokenizer.
    """
    picked = _one_of_each_task(rows)
    prompts = [row["input_ids"][: answer_start(row)] for row in picked]
    decoding = DecodingArguments(max_new_tokens=MAX_NEW_TOKENS)
    ends = end_tokens(model, tokenizer, resolve_template(template, tokenizer))
    settings = decoding.settings(tokenizer.pad_token_id, ends)
    drop_proposed_settings(model, tokenizer.pad_token_id)
    model.eval()
    answers = tokenizer.batch_decode(generate_answers(model, prompts, settings), skip_special_tokens=True)
    return [
        ("\n".join(turn["content"] for turn in turns_before_answer(row).messages), row["output"], answer.strip())
        for row, answer in zip(picked, answers, strict=True)
    ]


def summary_lines(folder: Path, results: dict) -> list[str]:
    """Lines for the terminal at the end of a run, and again if the run is found to be finished."""
    lines = [f"===== LoRAMoE run finished: {folder} ====="]
    if "eval_lm_loss_after" in results:
        lines += [
            f"held-out LM loss      {results['eval_lm_loss_before']:.4f} before, "
            f"{results['eval_lm_loss_after']:.4f} after training",
            f"held-out perplexity   {results['eval_perplexity_before']:.2f} before, "
            f"{results['eval_perplexity_after']:.2f} after training",
        ]
    if knowledge := results.get("knowledge"):
        lines += Knowledge.from_dict(knowledge).lines()
        seconds, share = knowledge["seconds"], knowledge["time_share"]
        lines.append(f"time spent on probe   {seconds:.0f} s, {share * 100:.0f} % of the run's time")
    if results.get("routing_table"):
        lines += ["mean routing share of each expert group on the held-out examples:", *results["routing_table"]]
    for number, (prompt, expected, generated) in enumerate(results.get("samples", []), start=1):
        lines += [f"sample {number}", *_indented("prompt", prompt), *_indented("expected", expected)]
        lines += _indented("generated", generated)
    files = sorted(file.name for file in folder.iterdir() if file.is_file())
    return [*lines, f"saved in {folder}: {', '.join(files)}"]


def write_model_card(folder: Path, config: dict, results: dict, data: dict[str, datasets.Dataset]) -> None:
    """README.md of the run folder: what the model is, how it was made, what was measured.

    Local folders are shown by their last part alone, since cards are published.

    Args:
        data: the sets of rows by their purpose, `training` and `evaluation`.
    """
    routed = config["lora_nums"] > 1 or config["lora_null_expert"]
    kind = "full" if config["tuning"] == "full" else "loramoe" if routed else "lora"
    title, description = CARD_KINDS[kind]
    base = config["model_name_or_path"]
    measured = results | {f"knowledge_{name}": value for name, value in results.get("knowledge", {}).items()}
    if knowledge := results.get("knowledge"):
        # Counts; `knowledge_kept` is a share in flags and logs.
        measured |= {"facts known": knowledge["known"], "facts kept": knowledge["kept"]}
    settings = [*CARD_SETTINGS, *(CARD_ADAPTER_SETTINGS if kind != "full" else ())]
    text = [
        "---",
        *([] if Path(base).is_dir() else [f"base_model: {base}"]),
        f"tags: [{kind}]",
        "pipeline_tag: text-generation",
        "---",
        f"# {title} of {_published(base)}",
        "",
        description,
        "",
        "## Training",
        table(
            ["setting", "value"],
            (
                (name, _published(config[name]) if name in CARD_PATHS else config[name])
                for name in settings
                if config.get(name) is not None
            ),
        ),
        "",
        f"Made with torch {torch.__version__}, transformers {transformers.__version__}.",
        "",
        "## Data",
        _data_table(data),
        "",
        "## Measured",
        table(["metric", "value"], ((name, _shown(measured[name])) for name in CARD_METRICS if name in measured)),
    ]
    if (folder / "routing.png").is_file():
        text += ["", "## Routing of the evaluation rows", "![Mean weight of each expert](routing.png)"]
    if (folder / "retention.png").is_file():
        text += ["", "## Knowledge", "![Known facts that are kept, against the held-out loss](retention.png)"]
    text += ["", "## Citation", "```bibtex", CITATION, "```"]
    (folder / "README.md").write_text("\n".join(text) + "\n")


def _data_table(data: dict[str, datasets.Dataset]) -> str:
    """Numbers of rows, tokens and supervised tokens, and rows by task type and by task, for each set of rows."""
    counts: dict[str, dict[str, int]] = {}
    for name, rows in data.items():
        types = Counter("no task type" if kind < 0 else f"task type {kind}" for kind in rows["task_type"])
        tokens = int(row_lengths(rows).sum())
        counts[name] = {
            "rows": len(rows),
            "tokens": tokens,
            "tokens of answers": count_supervised(rows),
            **{f"rows of {kind}": count for kind, count in sorted(types.items())},
            **{f"rows of {kind}": count for kind, count in sorted(Counter(filter(None, rows["task"])).items())},
        }
    lines = dict.fromkeys(line for column in counts.values() for line in column)
    return table(["", *counts], ((line, *(column.get(line, 0) for column in counts.values())) for line in lines))


def _one_of_each_task(rows: datasets.Dataset) -> list[dict]:
    """The first row of each of the first tasks; if there are too few tasks, further rows from the front."""
    first_of_task: dict[str, int] = {}
    for index, task in enumerate(rows["task"]):
        first_of_task.setdefault(task, index)
    picked = [*first_of_task.values(), *(index for index in range(len(rows)) if index not in first_of_task.values())]
    return [rows[index] for index in picked[:NUM_SAMPLES]]


def _indented(label: str, text: str) -> list[str]:
    first, *rest = text.splitlines() or [""]
    return [f"  {label:10}{first}", *(f"  {'':10}{line}" for line in rest)]


def _published(place: str) -> str:
    """A path or hub id as a card shows it: of a path that exists here, the last part."""
    return Path(place).name if Path(place).exists() else place


def _shown(value: object) -> object:
    return f"{value:.4f}" if isinstance(value, float) else value
