"""Run steps of PyPI's `peft` on request: one line of JSON in, one out. `workbench.peers` starts it in the environment
that `workbench/benchmark_peers.sh` makes, where `import peft` finds the package from PyPI.

    {"do": "build", "variant": "peft_lora", "model": FOLDER, "experts": 8, "rank": 4, "dropout": 0.0}
    {"do": "measure", "batch": BATCH}      {"do": "resident", "batch": BATCH}      {"do": "step", "batch": BATCH}
"""

import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from torch import nn

import peft

TARGETS = ["gate_proj", "up_proj", "down_proj"]
ALPHA_PER_RANK = 8


def load_instruments():
    """Load `workbench/instruments.py` without putting this repository, and so its `peft`, on the module path."""
    file = Path(__file__).with_name("instruments.py")
    spec = importlib.util.spec_from_file_location("instruments", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


instruments = load_instruments()


def lora_config(rank: int, dropout: float) -> peft.LoraConfig:
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=ALPHA_PER_RANK * rank,
        lora_dropout=dropout,
        target_modules=TARGETS,
        init_lora_weights=False,  # B is not zero
    )


def build(request: dict) -> nn.Module:
    """Build the peer's model: a LoRA of the total rank, or X-LoRA with one trainable LoRA per expert."""
    torch.manual_seed(0)

    def base() -> nn.Module:
        return transformers.AutoModelForCausalLM.from_pretrained(
            request["model"], dtype=torch.float32, trust_remote_code=False
        )

    if request["variant"] == "peft_lora":
        config = lora_config(request["experts"] * request["rank"], request["dropout"])
        return peft.get_peft_model(base(), config).train()
    with tempfile.TemporaryDirectory() as folder:
        adapter = peft.get_peft_model(base(), lora_config(request["rank"], request["dropout"]))
        adapter.save_pretrained(folder)
        model = base()
        model.config.use_cache = False  # required by X-LoRA
        config = peft.XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=model.config.hidden_size,
            adapters={str(number): folder for number in range(request["experts"])},
            layerwise_scalings=True,  # separate weights for every Linear, as in LoRAMoE
            use_trainable_adapters=True,
        )
        return peft.get_peft_model(model, config).train()


def main() -> None:
    # Only answers go to the pipe; anything that libraries print goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    model, is_large = None, False
    for line in sys.stdin:
        request = json.loads(line)
        batch = {name: torch.tensor(rows) for name, rows in request.get("batch", {}).items()}
        try:
            if request["do"] == "build":
                model, is_large = build(request), request["variant"] == "xlora"
                answer = {"version": peft.__version__, "file": peft.__file__}
            elif request["do"] == "measure":
                answer = instruments.step_counts(model, batch)
            elif request["do"] == "resident":
                answer = instruments.step_memory(model, batch)
            else:
                answer = {"seconds": instruments.step(model, batch)}
        except (RuntimeError, TypeError, ValueError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        if is_large or request["do"] != "step":
            instruments.trim_heap()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
