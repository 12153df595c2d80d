"""Serve a trained mixture, or another complete model, over HTTP with the API of OpenAI. `scripts/serve.sh` starts it:

    python -m scripts.serve ADAPTER_OR_FOLDER [--port 8000] [flags of vLLM]

Its steps: check everything, make the environment of vLLM (scripts/serving_environment.py), export the adapter
(scripts/export_model.py) into `.cache/exports`, start the server, and print a request once it answers. The steps and
the server are child processes in their own sessions; Ctrl-C and SIGTERM end them.

Exit code: 143 if a signal stopped it, else 1.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase

from data import TEMPLATE_VARIABLES, InputError, encode_prompt, encode_target, file_hash, resolve_template, show_turns
from inference.generation import DecodingArguments
from inference.standalone.folder import CODE
from inference.trained import InferenceArguments, TrainedFolder, find_trained, read_run_config
from loading.base_model import load_tokenizer
from loading.command_line import run_verb
from peft.config import CONFIG_NAME
from peft.saving import WEIGHTS_NAME
from scripts import serving_environment
from scripts.launch import STOP_SIGNALS, STOPPED, start, step, wait

EXPORTS = serving_environment.ROOT / ".cache" / "exports"
HOST = "127.0.0.1"
QUESTION = "Question: What is the capital of Kenya?"
CACHE_BYTES = 2**30  # keys and values on a CPU; a GPU gives them the memory that it has left
PROGRAM_BYTES = 3 * 2**30  # measured: 2.7 GB of vLLM's processes, besides weights and cache
SECONDS_TO_END = 20  # for the server, before its processes are killed


@dataclass(frozen=True)
class Served:
    """What is to be served.

    Args:
        folder: of the model that the server loads; missing until it has been exported.
        adapter: what it is exported from; None if it is complete.
        tokenizer: of the folder.
        parameters: their number.
        template: of the prompts, `plain` or `chat`.
    """

    folder: Path
    adapter: TrainedFolder | None
    tokenizer: PreTrainedTokenizerBase
    parameters: int
    template: str


def main(argv: list[str] | None = None) -> None:
    """Run all steps; ends with SystemExit.

    Raises:
        InputError: port, adapter or memory will not do.
    """
    args, of_vllm = parse(argv)
    check_port(args.port)
    served = find_served(args.model, args.base_model, args.template)
    gpus = torch.cuda.device_count()
    check_memory(served, gpus)
    # As in scripts/launch.py: blocked signals stay pending until a child process is waited for.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS | {signal.SIGCHLD})
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    kind = "gpu" if gpus else "cpu"
    if not serving_environment.is_complete(kind):
        step("-m", "scripts.serving_environment", kind)
    export(served)
    name = served.adapter.folder.resolve().name if served.adapter else served.folder.resolve().name
    sys.exit(serve(server_command(served, name, args.port, gpus, of_vllm), args.port, request(served, name, args.port)))


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line; the flags that are not known here are the server's."""
    parser = argparse.ArgumentParser(
        prog="bash scripts/serve.sh", description="Serve a trained mixture with vLLM.", allow_abbrev=False
    )
    parser.add_argument("model", metavar="ADAPTER_OR_FOLDER", help="adapter, exported or merged model: a folder")
    parser.add_argument("--port", type=int, default=8000, help=f"on {HOST}")
    parser.add_argument("--base_model", help="base model of the adapter; by default the one that it names")
    parser.add_argument("--template", help="prompt template of the request that is shown: plain or chat")
    parser.epilog = "Further flags go to vLLM, such as --tensor-parallel-size 2 or --max-model-len 4096."
    return parser.parse_known_args(argv)


def check_port(port: int) -> None:
    """Raises InputError if another process listens at the port, or none can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise InputError(f"--port {port}: {error}; stop what uses it, or choose another") from error


def find_served(model: str, base_model: str | None, template: str | None) -> Served:
    """Find an adapter or a complete model and check everything but the weights.

    Raises:
        InputError: it does not exist, or something does not fit.
    """
    caller = Path(os.environ.get("LORAMOE_CALLER", "."), model)
    model = str(caller) if caller.is_dir() else model
    folder = Path(model)
    if (folder / "config.json").is_file() and not (folder / CONFIG_NAME).is_file():
        tokenizer = load_tokenizer(model)
        adapter, parameters = None, count_parameters(folder)
    else:
        adapter = find_trained(model, base_model)
        tokenizer, parameters = adapter.tokenizer, sum(each.numel() for each in adapter.skeleton.parameters())
        folder = EXPORTS / f"{adapter.folder.resolve().name}-{content_key(adapter)}"
    trained_with = read_run_config(adapter.folder if adapter else folder).get("prompt_template", "auto")
    return Served(folder, adapter, tokenizer, parameters, resolve_template(template or trained_with, tokenizer))


def count_parameters(folder: Path) -> int:
    """The number of parameters in a folder's weights."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total


def content_key(adapter: TrainedFolder) -> str:
    """A hash of everything that an export is made of. The base model's weights count by size and time."""
    base = Path(adapter.base_model)
    files = sorted(file for file in base.glob("*") if file.is_file())
    parts = [str(base.resolve() if files else base)]
    parts += [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    parts += [file_hash(file) for file in (adapter.folder / WEIGHTS_NAME, adapter.folder / CONFIG_NAME, CODE)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def dtype(gpus: int) -> torch.dtype:
    """The dtype that `scripts.generate` computes in."""
    return InferenceArguments(device_map="auto" if gpus else "cpu").torch_dtype


def check_memory(served: Served, gpus: int) -> None:
    """Raises InputError if the free memory cannot hold the weights and what else the server needs."""
    needed = served.parameters * dtype(gpus).itemsize + CACHE_BYTES + PROGRAM_BYTES
    if gpus:
        free, of = sum(torch.cuda.mem_get_info(index)[0] for index in range(gpus)), "memory of the GPUs"
    else:
        free, of = available_memory(), "memory"
    if free < needed:
        raise InputError(
            f"{served.parameters / 1e9:.2f} billion parameters in {str(dtype(gpus)).removeprefix('torch.')} need "
            f"{needed / 1e9:.1f} GB of {of} to be served, and {free / 1e9:.1f} GB are free; end other programs, or "
            "serve a smaller model"
        )


def available_memory() -> int:
    """Bytes that programs can still get, according to the kernel."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def export(served: Served) -> None:
    """Export the adapter unless that has been done; ends the program if it fails."""
    if served.adapter is None or served.folder.is_dir():
        return
    flags = ["--adapter", str(served.adapter.folder), "--base_model", served.adapter.base_model]
    step("-m", "scripts.export_model", *flags, "--output", str(served.folder))


def server_command(served: Served, name: str, port: int, gpus: int, of_vllm: list[str]) -> list[str]:
    """The command that starts the server; flags of the user come last, so they win."""
    # The module, since the command `vllm` of the build for CPUs looks for a package of another name.
    command = [str(serving_environment.PYTHON), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(served.folder), "--served-model-name", name, "--trust-remote-code"]
    command += ["--host", HOST, "--port", str(port), "--dtype", str(dtype(gpus)).removeprefix("torch.")]
    command += ["--max-model-len", "auto"]
    # Requests that do not set them are sampled without the penalties that a base model's folder may propose, and
    # prompts are written as in training.
    command += ["--generation-config", "vllm", "--default-chat-template-kwargs", json.dumps(TEMPLATE_VARIABLES)]
    if not gpus:
        # Compiling the model takes minutes on a CPU; `--no-enforce-eager` asks for it.
        command += ["--kv-cache-memory-bytes", str(CACHE_BYTES), "--enforce-eager"]
    return command + of_vllm


def server_environment(gpus: int) -> dict[str, str]:
    """The environment variables of the server: those of this process, and where they are not set, ours."""
    ours = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if not gpus:
        ours["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return ours | os.environ


def request(served: Served, name: str, port: int) -> str:
    """A curl command whose answer has the tokens of `python -m scripts.generate --prompt`."""
    tokenizer, turns = served.tokenizer, [{"role": "user", "content": QUESTION}]
    body: dict = {"model": name, "max_tokens": DecodingArguments.max_new_tokens, "temperature": 0}
    if served.template == "chat":
        place, body["messages"] = "chat/completions", turns
    else:
        text, ids = show_turns(tokenizer, "plain", turns), encode_prompt(tokenizer, "plain", QUESTION, "")
        place, body["prompt"] = "completions", text if tokenizer(text).input_ids == ids else ids
    if (end := encode_target(tokenizer, served.template, "x", "", "x")[-1]) != tokenizer.eos_token_id:
        body["stop_token_ids"] = [end]
    address, data = f"http://{HOST}:{port}/v1/{place}", shlex.quote(json.dumps(body))
    return f"curl -s {address} -H 'Content-Type: application/json' -d {data}"


def serve(command: list[str], port: int, example: str) -> int:
    """Run the server until it ends or a signal stops it; returns the exit code."""
    server = start(command, env=server_environment(torch.cuda.device_count()), stdin=subprocess.DEVNULL)
    threading.Thread(target=announce, args=(server, port, example), daemon=True).start()
    first_stop: list[float] = []

    def stop() -> None:
        first_stop.append(time.monotonic())
        is_late = first_stop[-1] - first_stop[0] > SECONDS_TO_END
        if is_late or len(first_stop) == 1:
            signal_group(server, signal.SIGKILL if is_late else signal.SIGTERM)

    stopped = wait(server, stop)
    signal_group(server, signal.SIGKILL)  # the processes that it has left
    if stopped:
        return STOPPED
    print(f"error: the server has ended by itself, with exit code {server.returncode}; see above", file=sys.stderr)
    return 1


def announce(server: subprocess.Popen, port: int, example: str) -> None:
    """Wait until the server answers, and print the request."""
    while server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=5):
            print(f"\nThe server answers; Ctrl-C ends it. For example:\n\n{example}\n", flush=True)
            return
        time.sleep(1)


def signal_group(process: subprocess.Popen, number: int) -> None:
    """Send a signal to a process and all that it has started, which are in its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


if __name__ == "__main__":
    run_verb(main)
