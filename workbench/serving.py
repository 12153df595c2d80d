"""Tokens per second of `scripts.generate` and of a server, for several numbers of requests at once.

    python -m workbench.serving --models outputs/default,outputs/merged --requests 1,8,32 --tokens 64

The first model is run by `scripts.generate`'s code, in one batch, and each is served by `scripts/serve.sh`. They take
turns, so that other work on the machine slows all of them alike. Every answer has the same number of tokens.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch

from data import InputError, encode_prompt
from inference.generation import DecodingArguments, generate_answers
from inference.trained import InferenceArguments, load_trained
from loading.command_line import at_least, flag, listed, parse_flags, range_problems, run_verb

COMMAND = "python -m workbench.serving"
ROWS = "data/tiny_data/test.json"
# Answers some prompts with exactly `tokens` tokens each.
Answers = Callable[[list[list[int]]], object]


@dataclass
class ServingArguments:
    """The models, and the sizes."""

    models: str = flag(None, "adapters or folders, separated by commas; the first is also run here", required=True)
    requests: str = flag("1,8,32", "numbers of requests at once")
    tokens: int = flag(64, "tokens of an answer")
    rounds: int = flag(3, "rounds after one that warms up; the table shows the medians")

    def problems(self) -> list[str]:
        return range_problems(self, [at_least(1, "tokens", "rounds")])


def main(argv: list[str] | None = None) -> None:
    """Measure and print a table in Markdown.

    Raises:
        InputError: a model cannot be loaded or served.
    """
    (args,) = parse_flags(COMMAND, __doc__.splitlines()[0], (ServingArguments,), argv)
    models, counts = listed(args.models) or [], [int(count) for count in listed(args.requests) or []]
    trained = load_trained(InferenceArguments(adapter=models[0]))
    texts = [row["instruction"] for row in json.loads(Path(ROWS).read_text())]
    prompts = [encode_prompt(trained.tokenizer, trained.template(), text, "") for text in texts]
    settings = DecodingArguments(max_new_tokens=args.tokens).settings(trained.tokenizer.pad_token_id, [])
    settings.eos_token_id = None
    ways: dict[str, Answers] = {"generate": partial(generate_answers, trained.model, settings=settings)}
    with contextlib.ExitStack() as servers:
        for model in models:
            port = servers.enter_context(serving(model, 0.8 / len(models)))
            ways[f"server, {Path(model).name}"] = partial(ask, port, Path(model).resolve().name, args.tokens)
        print_table(ways, counts, prompts, args)


@contextlib.contextmanager
def serving(model: str, share: float) -> Iterator[int]:
    """A server of a model, with a share of a GPU's memory, on a free port, which it yields."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--gpu-memory-utilization", str(share)] if torch.cuda.is_available() else []
    command = ["bash", "scripts/serve.sh", model, "--port", str(port), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            if not any(line.startswith("curl ") for line in server.stdout):
                raise InputError(f"{model} could not be served; see above")
            threading.Thread(target=server.stdout.read, daemon=True).start()  # a full pipe would stop the server
            yield port
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait()


def ask(port: int, name: str, tokens: int, prompts: list[list[int]]) -> None:
    """Send all prompts at once and wait for the answers."""

    def post(prompt: list[int]) -> None:
        body = {"model": name, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == tokens

    with ThreadPoolExecutor(len(prompts)) as threads:
        list(threads.map(post, prompts))


def print_table(ways: dict[str, Answers], counts: list[int], prompts: list[list[int]], args: ServingArguments) -> None:
    """Measure all ways in turn, and print the tokens per second."""
    seconds: dict[tuple[str, int], list[float]] = {(way, count): [] for count in counts for way in ways}
    for _ in range(args.rounds + 1):
        for (way, count), times in seconds.items():
            batch = [prompts[index % len(prompts)] for index in range(count)]
            start = time.perf_counter()
            ways[way](batch)
            times.append(time.perf_counter() - start)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    print(f"\ntokens per second, {args.tokens} for each answer, on {device}; median of {args.rounds} rounds\n")
    print("| requests at once |", " | ".join(ways), "|\n|", " | ".join("---" for _ in range(len(ways) + 1)), "|")
    for count in counts:
        rates = [count * args.tokens / median(seconds[way, count][1:]) for way in ways]
        print(f"| {count} |", " | ".join(f"{rate:.1f}" for rate in rates), "|")


if __name__ == "__main__":
    run_verb(main)
