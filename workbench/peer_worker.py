"""Run steps of PyPI's `peft` on request: one line of JSON in, one out. `workbench.peers` starts it in the environment
that `workbench/benchmark_peers.sh` makes, where `import peft` finds the package from PyPI.

    {"do": "build", VARIANT, "model": FOLDER or CONFIGURATION}
    {"do": "measure", VARIANT, "batch": BATCH}      {"do": "memory", VARIANT, "batch": BATCH}
    {"do": "kernels", VARIANT, "batch": BATCH}      {"do": "step", VARIANT, "batch": BATCH}
    {"do": "drop"}

VARIANT stands for the fields of `workbench.variants.Variant`. The variants share the weights of one base model.
"""

import copy
import functools
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
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


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


@functools.cache
def load_base(model: str) -> nn.Module:
    """The base model, from JSON: of its folder, or of its configuration, with random weights in bf16."""
    model = json.loads(model)
    if isinstance(model, str):
        base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=False)
        return base.to(DEVICE)
    config = transformers.AutoConfig.for_model(**model)
    with instruments.default_dtype(torch.bfloat16), DEVICE:
        return transformers.AutoModelForCausalLM.from_config(config)


def build(request: dict) -> nn.Module:
    """Build the peer's model: the base alone, a LoRA of the total rank, or X-LoRA with one trainable LoRA per expert.
    The adapter has the dtype of the base."""
    torch.manual_seed(0)
    shared = load_base(json.dumps(request["model"]))

    def base() -> nn.Module:
        tensors = (*shared.requires_grad_(False).parameters(), *shared.buffers())
        own = copy.deepcopy(shared, memo={id(tensor): tensor for tensor in tensors}).train()
        if request["checkpointing"]:
            own.gradient_checkpointing_enable({"use_reentrant": False})
        return own

    if request["name"] == "frozen":
        model = base()
        model.enable_input_require_grads()
        return model
    if request["name"] == "peft_lora":
        config = lora_config(request["experts"] * request["rank"], request["dropout"])
        return peft.get_peft_model(base(), config, autocast_adapter_dtype=False).train()
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


def answer(request: dict, models: dict[tuple, nn.Module]) -> dict:
    """Do what a line asks for."""
    do = request["do"]
    if do == "drop":
        models.clear()
        torch.cuda.empty_cache()
        return {}
    variant = tuple(request[name] for name in ("name", "experts", "rank", "dropout", "checkpointing"))
    if do == "build":
        models[variant] = build(request)
        return {"version": peft.__version__, "file": peft.__file__}
    batch = {name: torch.tensor(rows, device=DEVICE) for name, rows in request["batch"].items()}
    if do == "measure":
        return instruments.step_counts(models[variant], batch)
    if do == "memory":
        return instruments.step_memory(models[variant], batch)
    if do == "kernels":
        return instruments.step_kernels(models[variant], batch)[0]
    return {"seconds": instruments.step(models[variant], batch)}


def main() -> None:
    # Only answers go to the pipe; anything that libraries print goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    models: dict[tuple, nn.Module] = {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            found = answer(request, models)
        except (RuntimeError, TypeError, ValueError) as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        if request.get("name") == "xlora" or request["do"] != "step":
            instruments.trim_heap()
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
