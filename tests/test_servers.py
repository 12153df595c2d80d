"""Exported mixtures in other programs, most in the environment of scripts/serve.sh: `bash scripts/test.sh -m slow`."""

import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import ROOT, fill_adapter, tiny_config, tiny_tokenizer
from test_export_model import exported
from test_launch import environment, free_port
from transformers import LlamaForCausalLM

from inference.generation import end_tokens
from peft import LoraConfig, PeftModel, get_peft_model
from scripts import serving_environment
from scripts.generate import main as generate
from transformers_patch import AutoModelForCausalLM

pytestmark = pytest.mark.slow

IDS = [5, 40, 33, 200, 17, 90, 121, 8]
ADAPTERS = {
    "dense": {},
    "top_2": {"lora_top_k": 2},
    "shared_a": {"lora_shared_A": True},
    "null_expert": {"lora_null_expert": True},
    "some_layers": {"layers_to_transform": [1]},
}
INCOMPLETE = "\ufffd"
OFFLINE = """
import json, sys
from vllm import LLM, SamplingParams

def main():
    ids, options, folders = json.loads(sys.argv[1])
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, prompt_logprobs=0)
    kept = []  # a model that is deleted takes the process group of the next with it
    for folder in folders:
        model = LLM(model=folder, trust_remote_code=True, dtype="float32", max_model_len=64, enforce_eager=True,
                    kv_cache_memory_bytes=2**27, **options)
        kept.append(model)
        found = model.generate([{"prompt_token_ids": ids}], greedy)[0]
        logprobs = [each[token].logprob for each, token in zip(found.prompt_logprobs[1:], ids[1:])]
        print("FOUND", json.dumps([list(found.outputs[0].token_ids), logprobs]), flush=True)

if __name__ == "__main__":
    main()
"""
CLIENT = """
import asyncio, json, sys
from openai import AsyncOpenAI

async def main(address, name, text):
    client = AsyncOpenAI(base_url=address, api_key="none")
    turns = [{"role": "user", "content": text}]
    common = {"model": name, "max_tokens": 12, "temperature": 0}
    answers = await asyncio.gather(
        *(client.completions.create(prompt=text, **common) for _ in range(16)),
        *(client.chat.completions.create(messages=turns, **common) for _ in range(16)),
    )
    texts = [each.choices[0].text for each in answers[:16]] + [each.choices[0].message.content for each in answers[16:]]
    print(json.dumps(texts))

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture(scope="session")
def servers() -> Path:
    """The programs of the environment that vLLM runs in; made here if it is missing."""
    serving_environment.make("cpu")
    return serving_environment.PYTHON.parent


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A tiny Llama with heads as wide as vLLM's attention on CPUs needs them."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(hidden_size=128, intermediate_size=96)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def mixture(base: Path, **settings) -> PeftModel:
    values = {"task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "lora_nums": 4, "lora_dropout": 0.0}
    model = AutoModelForCausalLM.from_pretrained(base)
    return fill_adapter(get_peft_model(model, LoraConfig(**(values | settings)))).eval()


def expected(model: PeftModel) -> tuple[list[int], list[float]]:
    """Greedy tokens after `IDS`, and the log-probabilities of these."""
    ids = torch.tensor([IDS])
    with torch.no_grad():
        tokens = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=1)
        logprobs = model(ids).logits[0].float().log_softmax(-1)
    return tokens[0, len(IDS) :].tolist(), logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()


def offline(servers: Path, folders: list[Path], one_process: bool, **options) -> list[tuple[list[int], list[float]]]:
    """What vLLM gives for folders, without a server."""
    outcome = subprocess.run(
        [servers / "python", "-c", OFFLINE, json.dumps([IDS, options, [str(folder) for folder in folders]])],
        env=environment(VLLM_ENABLE_V1_MULTIPROCESSING=int(not one_process), VLLM_CPU_OMP_THREADS_BIND="nobind"),
        capture_output=True,
        text=True,
    )
    assert outcome.returncode == 0, outcome.stdout[-3000:] + outcome.stderr[-3000:]
    return [json.loads(found) for found in re.findall(r"^FOUND (.*)$", outcome.stdout, re.MULTILINE)]


@contextmanager
def running(command: list, ready: str | None = None, **variables: object) -> Iterator[str]:
    """A server; yields its output up to a line that begins with `ready`."""
    with subprocess.Popen(command, cwd=ROOT, env=environment(**variables), stdout=subprocess.PIPE, text=True) as server:
        try:
            lines = []
            while ready and not (lines and lines[-1].startswith(ready)):
                lines.append(server.stdout.readline())
                assert lines[-1], "".join(lines[-30:])
            yield lines[-1] if lines else ""
        finally:
            server.send_signal(signal.SIGTERM)
            server.communicate()


def test_vllm_gives_the_same_tokens_and_probabilities(servers, base, tmp_path):
    models = {name: mixture(base, **settings) for name, settings in ADAPTERS.items()}
    folders = [exported(model, base, tmp_path / name) for name, model in models.items()]
    found = offline(servers, folders, one_process=True)
    for model, (tokens, logprobs) in zip(models.values(), found, strict=True):
        wanted = expected(model)
        assert tokens == wanted[0]
        assert logprobs == pytest.approx(wanted[1], abs=1e-4)


def test_vllm_splits_a_mixture_over_two_processes(servers, base, tmp_path):
    model = mixture(base, target_modules=["q_proj", "o_proj", "gate_proj", "down_proj"])
    folder = exported(model, base, tmp_path / "split")
    ((tokens, logprobs),) = offline(servers, [folder], one_process=False, tensor_parallel_size=2)
    assert tokens == expected(model)[0]
    assert logprobs == pytest.approx(expected(model)[1], abs=1e-4)


def test_the_request_that_is_shown_gives_the_answer_of_generate(servers, capsys):
    adapter = ROOT / "outputs" / "default"
    if not (adapter / "all_results.json").is_file():
        pytest.skip("needs the main job: bash run_loramoe.sh")
    generate(["--adapter", str(adapter), "--prompt", "Question: What is the capital of Kenya?"])
    wanted = capsys.readouterr().out.strip()
    with running(["bash", "scripts/serve.sh", str(adapter), "--port", str(free_port())], "curl ") as curl:
        answer = json.loads(subprocess.check_output(shlex.split(curl)))
    assert answer["choices"][0]["message"]["content"].strip() == wanted


def test_many_clients_are_answered_at_once(servers, base, tmp_path):
    folder = exported(mixture(base), base, tmp_path / "served")
    port = free_port()
    client = [servers / "python", "-c", CLIENT, f"http://127.0.0.1:{port}/v1", "served", "say softly"]
    with running(["bash", "scripts/serve.sh", str(folder), "--port", str(port)], "curl "):
        texts = json.loads(subprocess.check_output(client))
    assert len(texts) == 32
    texts = [text.rstrip(INCOMPLETE) for text in texts]  # a server leaves out the begun character at an answer's end
    for kind, shown in ((texts[:16], "say softly"), (texts[16:], "<|user|>say softly</s><|assistant|>")):
        assert set(kind) == {answer_text(mixture(base), shown).rstrip(INCOMPLETE)}


def answer_text(model: PeftModel, prompt: str) -> str:
    """A greedy answer of 12 tokens as text."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    ends = end_tokens(model, tokenizer, "plain")
    tokens = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, eos_token_id=ends, pad_token_id=1)
    return tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)


def test_transformers_serve_answers(base, tmp_path):
    """Of this environment: before 5.23, it does not find classes of remote code."""
    needed = ("fastapi", "uvicorn", "openai")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--target", tmp_path / "packages", *needed], check=True
    )
    folder, port = exported(mixture(base), base, tmp_path / "served"), free_port()
    program = Path(sys.executable).with_name("transformers")
    command = [program, "serve", folder, "--trust-remote-code", "--port", str(port)]
    turns = [{"role": "user", "content": "say softly"}]
    body = {"model": str(folder), "messages": turns, "max_tokens": 12, "temperature": 0, "stream": False}
    curl = ["curl", "-sS", "--retry", "120", "--retry-delay", "1", "--retry-connrefused", "-d", json.dumps(body)]
    address = f"http://127.0.0.1:{port}/v1/chat/completions"
    flags = ["--dtype", "float32", "--device", "cpu"]
    with running([*command, *flags], PYTHONPATH=tmp_path / "packages"):
        answer = subprocess.check_output([*curl, "-H", "Content-Type: application/json", address])
    text = json.loads(answer)["choices"][0]["message"]["content"]
    assert text == answer_text(mixture(base), "<|user|>say softly</s><|assistant|>")


def test_lm_eval_evaluates_the_folder(base, tmp_path):
    folder = exported(mixture(base), base, tmp_path / "evaluated")
    program = Path(sys.executable).with_name("lm_eval")
    arguments = f"pretrained={folder},trust_remote_code=True,dtype=float32"
    task = ["--tasks", "tiny_data", "--include_path", "scripts/lm_eval_tasks", "--limit", "2", "--device", "cpu"]
    outcome = subprocess.run(
        [program, "--model", "hf", "--model_args", arguments, *task],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert "exact_match" in outcome.stdout
