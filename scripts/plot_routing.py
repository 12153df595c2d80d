"""Show which experts an adapter's routers choose for which rows: `routing.json` and its picture `routing.png`.

Run as ``python -m scripts.plot_routing --adapter DIR`` from the repository root. docs/ROUTING.md describes both files.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from data import InputError, encode_prompt, encoding_problem
from data.errors import reading, writing
from inference.routing import Routing, routing_lines, routing_summary, training_curves
from inference.routing_plot import write_routing
from inference.rows import batches, load_rows
from inference.token_routing import route_tokens
from inference.trained import InferenceArguments, TrainedModel, load_trained, read_run_config
from loading.base_model import length_problem
from loading.command_line import flag, output_problem, parse_flags, refuse, run_verb
from loading.run_files import RUN_CONFIG_NAME, STATE_NAME
from peft import PeftModel
from transformers_patch.recorder import RoutingRecorder

COMMAND = "python -m scripts.plot_routing"


@dataclass
class PlotArguments:
    """The rows to route, and the place of the result."""

    data: str | None = flag(None, "rows to route, file or folder; by default the run's validation file")
    prompt: str | None = flag(None, "text whose routing is shown token by token")
    runs: list[str] = field(
        default_factory=list,
        metadata={"help": "run folders whose routing during training is shown; by default the adapter's"},
    )
    output: str | None = flag(None, "folder for routing.json and routing.png; by default the adapter's")
    data_cache_dir: str = flag(".cache/data", "cache folder for encoded data sets, keyed by content")

    def problems(self) -> list[str | None]:
        return [
            "--prompt is empty" if self.prompt is not None and not self.prompt.strip() else None,
            output_problem(Path(self.output) / "routing.json", [self.data]) if self.output else None,
            encoding_problem("--prompt", self.prompt),
        ]


KINDS = (InferenceArguments, PlotArguments)


def main(argv: list[str] | None = None) -> None:
    """Read the command line, route the rows, write both files and print the shares of the groups.

    Raises:
        InputError: flags, adapter, rows or run folders cannot be used.
    """
    inference, args = parse_flags(COMMAND, __doc__.splitlines()[0], KINDS, argv)
    with reading(Path(inference.adapter)):
        own = [inference.adapter] if (Path(inference.adapter) / STATE_NAME).is_file() else []
        curves = read_curves(args.runs or own)
    trained = load_trained(inference)
    if not args.output and not Path(inference.adapter).is_dir():
        raise InputError(f"{inference.adapter} is on the hub: give a folder for the files with --output")
    if not isinstance(trained.model, PeftModel) or trained.model.active_peft_config.routed_experts == 1:
        print(f"{inference.adapter} does not have a router, so there is nothing to plot")
        return
    path, rows = load_rows(trained, args.data, "validation_file", args.data_cache_dir)
    folder = Path(args.output or inference.adapter)
    refuse([output_problem(folder / "routing.json", [path])])
    of_prompt = {"prompt": route_prompt(trained, args.prompt)} if args.prompt else {}
    routing = route(trained, rows, inference.batch_size)
    summary = routing_summary(routing, trained.model.active_peft_config) | {"training": curves} | of_prompt
    with writing(f"--output {folder} cannot be written", "choose another folder, or make this one writable"):
        folder.mkdir(parents=True, exist_ok=True)
        write_routing(folder, summary)
    print(f"{len(rows)} rows of {path}", *routing_lines(routing, trained.model.active_peft_config), sep="\n")
    print(
        f"relative entropy {summary['entropy']:.3f}, coefficient of variation {summary['coefficient_of_variation']:.3f}"
    )
    print(f"saved {folder / 'routing.json'} and {folder / 'routing.png'}")


def route(trained: TrainedModel, rows: Dataset, batch_size: int) -> Routing:
    """The routing of the rows."""
    shares: list[torch.Tensor] = []
    for batch in batches(trained, rows, batch_size, "routing"):
        mask_BT = batch["attention_mask"]
        with torch.no_grad(), RoutingRecorder(trained.model) as recorder:
            trained.model(input_ids=batch["input_ids"], attention_mask=mask_BT, logits_to_keep=1)
        shares.append(recorder.sample_shares(mask_BT).transpose(0, 1).cpu())
    return Routing(
        list(recorder.weights), torch.cat(shares).numpy(), np.array(rows["task_type"]), np.array(rows["task"])
    )


def route_prompt(trained: TrainedModel, text: str) -> dict:
    """The tokens of one prompt and, for each, the mean weight of every expert over all adapted Linears.

    Raises:
        InputError: the prompt is longer than the model's table of positions.
    """
    ids = encode_prompt(trained.tokenizer, trained.template(), text, "")
    if problem := length_problem(trained.model, len(ids)):
        raise InputError(f"--prompt has {problem}; shorten it")
    weights_TE = route_tokens(trained.model, ids).weights_TLE.mean(dim=1)
    tokens = [trained.tokenizer.decode([token]) for token in ids]
    return {"text": text, "tokens": tokens, "expert_weights": weights_TE.double().numpy().round(6).tolist()}


def read_curves(runs: list[str]) -> dict[str, dict]:
    """Evenness of the routing over the steps of several runs or checkpoints, from their logs.

    Raises:
        InputError: a folder does not belong to a run, or one of its files is damaged.
    """
    curves: dict[str, dict] = {}
    names = [Path(folder).name for folder in runs]
    for folder in map(Path, runs):
        config = read_run_config(folder)
        found = {STATE_NAME: (folder / STATE_NAME).is_file(), RUN_CONFIG_NAME: config}
        if missing := [name for name, there in found.items() if not there]:
            raise InputError(f"{folder} is not a run folder: it does not have {' and '.join(missing)}")
        try:
            log = json.loads((folder / STATE_NAME).read_text())["log_history"]
            label = folder.name if names.count(folder.name) == 1 else str(folder)
            curves |= training_curves(label, log, config["blc_weight"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{STATE_NAME} or {RUN_CONFIG_NAME} of {folder} is damaged ({error})") from None
    return curves


if __name__ == "__main__":
    run_verb(main)
