"""Measure a trained adapter, and the base model beside it, on instruction data or on tasks of lm-evaluation-harness.

Run as ``python -m scripts.evaluate --adapter DIR`` from the repository root. docs/EVALUATION.md defines every metric
and describes the file that is written.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from datasets import Dataset

from data import TEMPLATES, DataStatistics, Encoding, InputError, load_data
from data.atomic import write_json
from data.errors import writing
from inference.evaluation import METRICS, Plan, label_tasks, measure, run_model
from inference.generation import DecodingArguments
from inference.metrics import PACKAGE_OF
from inference.trained import InferenceArguments, TrainedModel, load_trained
from loading.arguments import DataArguments
from loading.base_model import check_lengths
from loading.command_line import flag, output_problem, parse_flags, refuse, run_verb

COMMAND = "python -m scripts.evaluate"


@dataclass
class EvaluateArguments:
    """What is measured on what."""

    data: list[str] = field(
        default_factory=list,
        metadata={"help": "files or folders of rows, measured one by one; by default the run's own validation file"},
    )
    output: str | None = flag(None, "JSON file for all that was measured")
    base: bool = flag(False, "measure the base model, too")
    metrics: list[str] = field(
        default_factory=lambda: list(METRICS), metadata={"help": f"any of {', '.join(METRICS)}; by default all"}
    )
    label_tasks: list[str] = field(
        default_factory=list,
        metadata={"help": "tasks that choose among labels, for accuracy; by default those with few different outputs"},
    )
    template: str | None = flag(None, f"prompt template, {', '.join(TEMPLATES)}; by default the run's")
    max_seq_length: int | None = flag(
        None, f"longest row in tokens; by default the run's, or else {DataArguments.max_seq_length}"
    )
    max_new_tokens: int | None = flag(None, "longest decoded answer in tokens; by default the data's longest answer")
    lm_eval: list[str] = field(
        default_factory=list, metadata={"help": "tasks of lm-evaluation-harness; tiny_data is one that works offline"}
    )
    num_fewshot: int | None = flag(None, "examples in the prompts of the harness's tasks; by default the task's own")
    limit: int | None = flag(None, "use only this many rows of each file and task, for a quick look")
    seed: int = flag(0, "seed of the bootstrap and of the harness")
    data_cache_dir: str = flag(".cache/data", "folder of encoded data sets, keyed by content")

    def problems(self) -> list[str]:
        problems = [
            f"--metrics {name}: there is no such metric; there are {', '.join(METRICS)}"
            for name in self.metrics
            if name not in METRICS
        ]
        if self.template not in (None, *TEMPLATES):
            problems.append(f"--template is {self.template!r}; allowed are {', '.join(TEMPLATES)}")
        for name, least in (
            ("max_seq_length", 2),
            ("max_new_tokens", 1),
            ("limit", 1),
            ("num_fewshot", 0),
        ):
            if (value := getattr(self, name)) is not None and value < least:
                problems.append(f"--{name} is {value}, but has to be at least {least}")
        if not 0 <= self.seed < 2**32:
            problems.append(f"--seed is {self.seed}, but has to be from 0 to 4294967295")
        if problem := output_problem(self.output, self.data):
            problems.append(problem)
        if self.output and Path(self.output).suffix != ".json":
            problems.append(f"--output {self.output}: the name has to end in .json")
        return problems


KINDS = (InferenceArguments, EvaluateArguments)


def main(argv: list[str] | None = None) -> None:
    """Read the command line, measure, print a table and write the file.

    Raises:
        InputError: flags, adapter, rows or harness tasks are not as they have to be.
    """
    inference, args = parse_flags(COMMAND, __doc__.splitlines()[0], KINDS, argv)
    manager = _find_harness_tasks(args.lm_eval)
    trained = load_trained(inference)
    template = trained.template(args.template)
    models = {"adapter": nullcontext}
    if args.base:
        trained.as_base()  # Refuses, before any measurement, where there is none.
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
    refuse(list(filter(None, [output_problem(args.output, paths)])))  # the run's own file among them
    for path, rows, statistics in load_sets(trained, paths, template, args):
        print(f"{path}: {statistics.summary(max_length(trained, args))}", flush=True)
        report["data"].append(evaluate_set(trained, models, rows, template, args, inference.batch_size))
        report["data"][-1] |= {"path": path, "sha256": statistics.sha256, "rows": len(rows)}
        report["data"][-1] |= {"truncated": statistics.truncated, "dropped": statistics.dropped}
        print(*table_lines(report["data"][-1]["results"]), sep="\n", flush=True)
    if args.lm_eval:
        report["lm_eval"] = evaluate_tasks(trained, models, manager, template, args, inference.batch_size)
        print(*harness_lines(report["lm_eval"]), sep="\n")
    if args.output:
        write_report(Path(args.output), report)


def used_packages(args: EvaluateArguments) -> list[str]:
    """The packages that the numbers come from."""
    measures_rows = args.data or not args.lm_eval
    of_metrics = {PACKAGE_OF[name] for name in args.metrics if name in PACKAGE_OF} if measures_rows else set()
    return ["torch", "transformers", *sorted(of_metrics), *(["lm-eval"] if args.lm_eval else [])]


def data_paths(trained: TrainedModel, args: EvaluateArguments) -> list[str]:
    """The files and folders of rows that are measured.

    Raises:
        InputError: none is named.
    """
    if args.data or args.lm_eval:
        return args.data
    if not (own := trained.run_config.get("validation_file")):
        raise InputError("there is nothing to measure on: name files with --data, or tasks with --lm_eval")
    return [own]


def load_sets(
    trained: TrainedModel, paths: list[str], template: str, args: EvaluateArguments
) -> list[tuple[str, Dataset, DataStatistics]]:
    """Every data set, encoded; all are read before any is measured.

    Raises:
        InputError: one is bad.
    """
    encoding = Encoding(template, max_length(trained, args), trained.num_task_types, trained.task_type_names)
    sets = []
    for path in paths:
        rows, statistics = load_data(path, trained.tokenizer, encoding, args.data_cache_dir)
        check_lengths(trained.model, rows)
        if unknown := sorted(set(args.label_tasks) - set(rows["task"])):
            raise InputError(f"--label_tasks {' '.join(unknown)}: {path} has no row of such a task")
        sets.append((path, rows.select(range(min(args.limit or len(rows), len(rows)))), statistics))
    return sets


def max_length(trained: TrainedModel, args: EvaluateArguments) -> int:
    return args.max_seq_length or trained.max_seq_length


def evaluate_set(
    trained: TrainedModel, models: dict, rows: Dataset, template: str, args: EvaluateArguments, batch_size: int
) -> dict:
    """One data set, by every model."""
    lengths = zip(rows["input_ids"], rows["prompt_length"], strict=True)
    longest = args.max_new_tokens or max(len(ids) - prompt for ids, prompt in lengths)
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
    """The harness's numbers, by model and task."""
    from inference.harness import TemplateLM, run_tasks

    lm = TemplateLM(trained, template, batch_size)
    results = {}
    for name, voice in models.items():
        with voice():
            results[name] = run_tasks(lm, args.lm_eval, manager, args.num_fewshot, args.limit, args.seed)
    return results


def table_lines(results: dict[str, dict]) -> list[str]:
    """For every group of rows and every model a line of its metrics; with the interval for all rows together."""
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
    """One line for each model, task and number of the harness."""
    return [
        f"{model:10}{task:24}{name.removesuffix(',none'):20}{value:.4g}"
        for model, tasks in results.items()
        for task, numbers in tasks.items()
        for name, value in numbers.items()
        if isinstance(value, float)
    ]


def write_report(path: Path, report: dict) -> None:
    """Raises InputError where the file cannot be written."""
    with writing(f"--output {path} cannot be written", "choose another file, or make this one writable"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, report)
    print(f"everything is in {path}")


def _find_harness_tasks(names: list[str]):
    """The harness takes seconds to import: only where it is asked for.

    Raises:
        InputError: it is not installed, or has no such task.
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
