"""Evaluate a trained adapter, and its base model, on instruction data or on tasks of lm-evaluation-harness.

Run as ``python -m scripts.evaluate --adapter DIR`` from the repository root. docs/EVALUATION.md defines every metric
and describes the file that is written.
"""

from collections.abc import Callable, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

from datasets import Dataset
from tqdm import tqdm

from data import TEMPLATES, DataStatistics, InputError, load_part
from data.atomic import write_json
from data.errors import writing
from data.probe import AUTO, NONE, load_probe
from inference.contamination import revealed_facts
from inference.evaluation import METRICS, Plan, label_tasks, measure, run_model
from inference.generation import DecodingArguments
from inference.knowledge import Probe, ask_base, compare, encode_probe
from inference.metrics import PACKAGE_OF
from inference.trained import InferenceArguments, TrainedModel, find_trained, load_trained
from loading.arguments import DataArguments, ProbeArguments
from loading.base_model import check_lengths
from loading.command_line import (
    a_seed,
    at_least,
    flag,
    one_of,
    output_problem,
    parse_flags,
    range_problems,
    refuse,
    run_verb,
)
from peft import PeftModel

COMMAND = "python -m scripts.evaluate"


@dataclass
class EvaluateArguments:
    """The metrics and the data."""

    data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "files or folders of rows, or mixes (their held-out rows), each measured separately; by default "
            "the run's validation file"
        },
    )
    output: str | None = flag(None, "JSON file for all results")
    base: bool = flag(False, "also measure the base model")
    metrics: list[str] = field(
        default_factory=lambda: list(METRICS), metadata={"help": f"any of {', '.join(METRICS)}; by default all of them"}
    )
    label_tasks: list[str] = field(
        default_factory=list,
        metadata={
            "help": "tasks with a fixed set of labels, for accuracy; by default those with few different outputs"
        },
    )
    template: str | None = flag(None, f"prompt template: {', '.join(TEMPLATES)}; by default the run's")
    max_seq_length: int | None = flag(
        None, f"maximum length of a row in tokens; by default the run's, or {DataArguments.max_seq_length}"
    )
    max_new_tokens: int | None = flag(
        None, "maximum length of an answer in tokens; by default that of the longest answer in the data"
    )
    lm_eval: list[str] = field(
        default_factory=list, metadata={"help": "tasks of lm-evaluation-harness; tiny_data works offline"}
    )
    num_fewshot: int | None = flag(None, "examples in the prompts of the harness's tasks; by default as the task says")
    knowledge: bool = flag(False, "measure the facts that the model knows, of those that its base model knows")
    knowledge_probe: str | None = flag(
        None, "facts: auto (of data/world_facts), or a file or folder of rows; by default the run's, or auto"
    )
    probe_facts: int | None = flag(
        None,
        f"number of facts; by default the run's, or {ProbeArguments.probe_facts}; if there are more, a fixed random "
        "sample",
    )
    limit: int | None = flag(None, "use only this many rows of each file and task")
    seed: int = flag(0, "seed of the bootstrap and of the harness")
    data_cache_dir: str = flag(".cache/data", "cache folder for encoded data sets, keyed by content")

    def problems(self) -> list[str | None]:
        ranges = (
            one_of(TEMPLATES, "template"),
            at_least(2, "max_seq_length"),
            at_least(1, "max_new_tokens", "limit", "probe_facts"),
            at_least(0, "num_fewshot"),
            a_seed("seed"),
        )
        return [
            *(
                f"--metrics {name} is not a metric; allowed are {', '.join(METRICS)}"
                for name in self.metrics
                if name not in METRICS
            ),
            *range_problems(self, ranges),
            output_problem(self.output, self.data, endings=(".json",)),
            *ProbeArguments(self.knowledge_probe or AUTO).problems(),
            *(
                f"--{name} needs --knowledge"
                for name in ("knowledge_probe", "probe_facts")
                if getattr(self, name) is not None and not self.knowledge
            ),
            "--knowledge contradicts --knowledge_probe none" if self.knowledge and self.knowledge_probe == NONE else "",
        ]


KINDS = (InferenceArguments, EvaluateArguments)


def main(argv: list[str] | None = None) -> None:
    """Read the command line, measure, print a table and write the file.

    Raises:
        InputError: flags, adapter, rows or harness tasks cannot be used.
    """
    inference, args = parse_flags(COMMAND, __doc__.splitlines()[0], KINDS, argv)
    manager = _find_harness_tasks(args.lm_eval)
    trained = load_trained(inference)
    template = trained.template(args.template)
    models: dict[str, Callable[[], AbstractContextManager]] = {"adapter": nullcontext}
    if args.base:
        trained.as_base()  # Raises before any measurement if there is no adapter.
        models["base"] = trained.as_base
    report = {
        "adapter": inference.adapter,
        "base_model": trained.base_model,
        "dtype": str(inference.torch_dtype).removeprefix("torch."),
        "load_in_kbits": inference.load_in_kbits,
        "template": template,
        "seed": args.seed,
        "versions": {name: version(name) for name in used_packages(args)},
        "data": [],
    }
    paths = data_paths(trained, args)
    refuse([output_problem(args.output, paths)])  # again, as the run may name the file
    asked = probe_arguments(trained, args)
    probe = find_probe(trained, inference, template, asked, args.data_cache_dir) if args.knowledge else None
    for path, rows, statistics in load_sets(trained, paths, template, args):
        print(f"{path}: {statistics.summary(max_length(trained, args))}", flush=True)
        report["data"].append(evaluate_set(trained, models, rows, template, args, inference.batch_size))
        report["data"][-1] |= {"path": path, "sha256": statistics.sha256, "rows": len(rows)}
        report["data"][-1] |= {"truncated": statistics.truncated, "dropped": statistics.dropped}
        print(*table_lines(report["data"][-1]["results"]), sep="\n", flush=True)
    if args.lm_eval:
        report["lm_eval"] = evaluate_tasks(trained, models, manager, template, args, inference.batch_size)
        print(*harness_lines(report["lm_eval"]), sep="\n")
    if probe:
        report["knowledge"] = {"probe": asked.knowledge_probe, **evaluate_knowledge(trained, inference, probe)}
    if args.output:
        write_report(Path(args.output), report)


def used_packages(args: EvaluateArguments) -> list[str]:
    """The packages that compute the results."""
    measures_rows = args.data or not (args.lm_eval or args.knowledge)
    of_metrics = {PACKAGE_OF[name] for name in args.metrics if name in PACKAGE_OF} if measures_rows else set()
    return ["torch", "transformers", *sorted(of_metrics), *(["lm-eval"] if args.lm_eval else [])]


def data_paths(trained: TrainedModel, args: EvaluateArguments) -> list[str]:
    """The files and folders of rows to measure.

    Raises:
        InputError: neither the flags nor the run name any.
    """
    if args.data or args.lm_eval or args.knowledge:
        return args.data
    if not (own := trained.run_config.get("validation_file")):
        raise InputError("there is nothing to measure on: name files with --data, tasks with --lm_eval, or --knowledge")
    return [own]


def load_sets(
    trained: TrainedModel, paths: list[str], template: str, args: EvaluateArguments
) -> list[tuple[str, Dataset, DataStatistics]]:
    """All data sets, encoded, before any is measured.

    Raises:
        InputError: one cannot be used.
    """
    encoding = trained.encoding(template, args.max_seq_length)
    sets = []
    for path in paths:
        rows, statistics = load_part(path, "held out", trained.tokenizer, encoding, args.data_cache_dir)
        check_lengths(trained.model, rows)
        if unknown := sorted(set(args.label_tasks) - set(rows["task"])):
            raise InputError(f"--label_tasks {' '.join(unknown)}: {path} does not have a row of this task")
        sets.append((path, rows.select(range(min(args.limit or len(rows), len(rows)))), statistics))
    return sets


def max_length(trained: TrainedModel, args: EvaluateArguments) -> int:
    return args.max_seq_length or trained.max_seq_length


def evaluate_set(
    trained: TrainedModel, models: dict, rows: Dataset, template: str, args: EvaluateArguments, batch_size: int
) -> dict:
    """The results of one data set, by model."""
    longest = args.max_new_tokens or max(end - start for *_, start, end in rows["spans"])
    found = label_tasks(rows)
    if args.label_tasks:
        pairs = list(zip(rows["task"], rows["output"], strict=True))
        found = {task: sorted({output for each, output in pairs if each == task}) for task in args.label_tasks}
    decoding = DecodingArguments(max_new_tokens=longest)
    plan = Plan(
        metrics=tuple(args.metrics),
        template=template,
        decoding=decoding.settings(trained.tokenizer.pad_token_id, trained.end_tokens(template)),
        label_tasks=found,
        batch_size=batch_size,
        seed=args.seed,
    )
    results = {}
    for name, voice in models.items():
        with voice():
            results[name] = measure(rows, run_model(trained.model, trained.tokenizer, rows, plan, name), plan)
    return {"label_tasks": found, "max_new_tokens": longest, "results": results}


def evaluate_tasks(
    trained: TrainedModel, models: dict, manager, template: str, args: EvaluateArguments, batch_size: int
) -> dict[str, dict]:
    """The harness's results, by model and task."""
    from inference.harness import TemplateLM, run_tasks

    lm = TemplateLM(trained, template, batch_size)
    results = {}
    for name, voice in models.items():
        with voice():
            results[name] = run_tasks(lm, args.lm_eval, manager, args.num_fewshot, args.limit, args.seed)
    return results


def probe_arguments(trained: TrainedModel, args: EvaluateArguments) -> ProbeArguments:
    """The facts that the flags name, or else the run's."""
    config = trained.run_config
    recorded = config.get("knowledge_probe", AUTO)
    place = args.knowledge_probe or (AUTO if recorded == NONE else recorded)
    return ProbeArguments(place, args.probe_facts or config.get("probe_facts", ProbeArguments.probe_facts))


def find_probe(
    trained: TrainedModel, inference: InferenceArguments, template: str, asked: ProbeArguments, cache_dir: str
) -> Probe:
    """The probe, without the facts that the run's training rows reveal.

    Raises:
        InputError: the facts, the training rows or the base model cannot be used.
    """
    if base := _base_of_complete(trained, inference):
        try:
            find_trained(base)
        except InputError as error:
            raise InputError(f"{_wanted_base(inference)} ({error})") from None
    facts = load_probe(asked.knowledge_probe)
    revealed: Set[int] = frozenset()
    place = trained.run_config.get("dataset_dir")
    if place and Path(place).exists():
        rows, statistics = load_part(place, "training", trained.tokenizer, trained.encoding(), cache_dir)
        revealed = revealed_facts(facts, rows, statistics.sha256)
        if statistics.sha256 != trained.run_config.get("dataset_sha256"):
            print(f"{place} has changed since the run, which may have left out other facts")
    else:
        print("the training rows are not known here, so facts that they reveal are asked, too")
    probe = encode_probe(facts, trained.tokenizer, template, trained.model, asked.probe_facts, revealed)
    print(f"knowledge probe  {asked.knowledge_probe}: {probe.summary()}", flush=True)
    return probe


def evaluate_knowledge(trained: TrainedModel, inference: InferenceArguments, probe: Probe) -> dict:
    """The knowledge of the model next to that of its base model."""
    bar = partial(tqdm, desc="knowledge", unit="batch")
    batch_size = 4 * inference.batch_size  # questions and answers are short
    if base := _base_of_complete(trained, inference):
        reference = ask_base(load_trained(replace(inference, adapter=base)).model, probe, batch_size, bar)
    else:
        with trained.as_base():
            reference = ask_base(trained.model, probe, batch_size, bar)
    found = compare(trained.model, probe, reference, batch_size, bar)
    print(*found.lines(), sep="\n")
    return found.to_dict()


def _base_of_complete(trained: TrainedModel, inference: InferenceArguments) -> str | None:
    """Folder or hub id of the base model of a complete model; None if there is an adapter.

    Raises:
        InputError: neither the flags nor the run name it.
    """
    if isinstance(trained.model, PeftModel):
        return None
    if base := inference.base_model or trained.run_config.get("model_name_or_path"):
        return base
    raise InputError(_wanted_base(inference))


def _wanted_base(inference: InferenceArguments) -> str:
    return f"--knowledge compares {inference.adapter} with its base model: name it with --base_model"


def table_lines(results: dict[str, dict]) -> list[str]:
    """A line of metrics for each model and group of rows, with the interval for all rows together."""
    names = [name for name in METRICS if any(name in groups["all"] for groups in results.values())]
    lines = [f"{'':36}{'rows':>6}" + "".join(f"{name.replace('token_exact_match', 'token_em'):>13}" for name in names)]

    def line(label: str, group: dict, key: str = "value") -> str:
        cells = [f"{group[name][key]:13.4g}" if name in group else f"{'-':>13}" for name in names]
        return f"{label:36}{group['rows']:6}" + "".join(cells)

    for model, groups in results.items():
        lines.append(line(model, groups["all"]))
        lines += [line(f"  {bound} bound (95 %)", groups["all"], bound) for bound in ("low", "high")]
        lines += [line(f"  task {name or '(none)'}", group) for name, group in groups["by_task"].items()]
        lines += [line(f"  task type {name}", group) for name, group in groups["by_task_type"].items()]
    return lines


def harness_lines(results: dict[str, dict]) -> list[str]:
    """One line for each model, task and metric of the harness."""
    return [
        f"{model:10}{task:24}{name.removesuffix(',none'):20}{value:.4g}"
        for model, tasks in results.items()
        for task, numbers in tasks.items()
        for name, value in numbers.items()
        if isinstance(value, float)
    ]


def write_report(path: Path, report: dict) -> None:
    """Write the JSON file. Raises InputError if it cannot be written."""
    with writing(f"--output {path} cannot be written", "choose another file, or make this one writable"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, report)
    print(f"all results are in {path}")


def _find_harness_tasks(names: list[str]):
    """The harness's tasks. It takes seconds to import, so it is imported only if it is used.

    Raises:
        InputError: it is not installed, or a task does not exist.
    """
    if not names:
        return None
    try:
        from inference.harness import find_tasks
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise InputError("--lm_eval needs the package lm-eval, which is not installed: pip install lm-eval") from error

    return find_tasks(names)


if __name__ == "__main__":
    run_verb(main)
