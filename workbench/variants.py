"""The models that the benchmark compares: they share the weights of one base model and differ in their adapters.

Shape suffixes: B samples, T tokens, E experts, R rank of one expert, I / O input and output features.
"""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel

from data import InputError
from peft import LoraConfig, LoraLayer, Router, TaskType, get_peft_model
from transformers_patch import AutoModelForCausalLM, LlamaLoRAMoEForCausalLM
from transformers_patch.mixin import LoRAMoEOutput
from transformers_patch.recorder import RoutingRecorder
from workbench.architectures import find_architecture
from workbench.instruments import default_dtype, return_freed_memory, step_memory

T = TypeVar("T")

# So small that --quick spends its time on the benchmark's own code.
QUICK_MODEL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class PlainLayer(LoraLayer):
    """Stacked experts in plain autograd: o = W0 x + (alpha/r) * B (repeat(w, r) * (A dropout(x)))."""

    def forward(self, x_BTI: Tensor) -> Tensor:
        experts = self.experts[str(self.active_adapter)]
        dropped_BTI = F.dropout(x_BTI, self.dropout_rate, self.training)
        hidden = F.linear(dropped_BTI, experts.lora_A) * experts.scaling
        if experts.router is not None:
            hidden_BTER = hidden.unflatten(-1, (experts.num_experts, experts.rank))
            weights_BTE = experts.router(x_BTI).to(hidden.dtype)
            hidden = (hidden_BTER * weights_BTE.unsqueeze(-1)).flatten(-2)
        return self.base_layer(x_BTI) + F.linear(hidden, experts.lora_B)


class LoopLayer(LoraLayer):
    """A loop over experts, each with its dropout mask: o = W0 x + (alpha/r) * sum_n w_n B_n A_n dropout(x)."""

    def forward(self, x_BTI: Tensor) -> Tensor:
        experts = self.experts[str(self.active_adapter)]
        output_BTO = self.base_layer(x_BTI)
        weights_BTE = experts.router(x_BTI).to(output_BTO.dtype)
        As = experts.lora_A.split(experts.rank, dim=0)
        Bs = experts.lora_B.split(experts.rank, dim=1)
        for n, (A_RI, B_OR) in enumerate(zip(As, Bs, strict=True)):
            dropped_BTI = F.dropout(x_BTI, self.dropout_rate, self.training)
            expert_BTO = F.linear(F.linear(dropped_BTI, A_RI), B_OR)
            output_BTO = output_BTO + experts.scaling * weights_BTE[..., n : n + 1] * expert_BTO
        return output_BTO


class PlainRouter(Router):
    """w = softmax(W_g x) in plain autograd."""

    def softmax(self, logits_BTE: Tensor) -> Tensor:
        return torch.softmax(logits_BTE, dim=-1, dtype=torch.float32)


class PlainLlama(LlamaLoRAMoEForCausalLM):
    """Unoptimized training: logits at every position."""

    def forward(self, input_ids, attention_mask, labels, task_types, balance_scale=1.0, **kwargs) -> LoRAMoEOutput:
        with RoutingRecorder(self) as recorder:
            outputs = LlamaForCausalLM.forward(
                self, input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs
            )
        shares_LBE = recorder.sample_shares(attention_mask)
        balance_loss = self._balance_term(recorder, shares_LBE, attention_mask, task_types)
        assert self._balance_config is not None
        loss = outputs.loss + self._balance_config.blc_weight * balance_scale * balance_loss
        return LoRAMoEOutput(loss=loss, logits=outputs.logits, lm_loss=outputs.loss, balance_loss=balance_loss)


@dataclass(frozen=True)
class Variant:
    """A way to compute a step.

    Args:
        name: `frozen` (the base model alone), `lora` (one expert), `loramoe`, `plain` (its definition in plain
            autograd), `loop` (expert by expert), `top2` (2 experts for a token), `shared_a` (one A for all experts).
        experts: number of experts N.
        rank: rank of each expert.
        dropout: probability.
        checkpointing: layers are recomputed in the backward pass.
        kernels: value of LORAMOE_KERNELS; empty leaves it alone.
    """

    name: str
    experts: int = 8
    rank: int = 4
    dropout: float = 0.0
    checkpointing: bool = False
    kernels: str = ""

    def config(self, balances: bool = True) -> LoraConfig:
        """The adapter's configuration; without `balances`, `blc_weight` (beta) is 0."""
        return LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=self.rank,
            lora_nums=self.experts,
            lora_dropout=self.dropout,
            blc_weight=0.1 if balances else 0,
            **OPTIONS.get(self.name, {}),
        )

    def model(self, base: PreTrainedModel) -> nn.Module:
        """Build the variant in training mode, with new modules that share the weights of `base`, and an adapter of
        their dtype, as DeepSpeed trains it. Equal adapters have equal weights.

        `frozen` is a lower bound for any method that trains parameters in the first layer: the gradient flows through
        the entire backbone to the output of the embedding, but no weight gets one.
        """
        tensors = (*base.requires_grad_(False).parameters(), *base.buffers())
        own = copy.deepcopy(base, memo={id(tensor): tensor for tensor in tensors}).train()
        if self.checkpointing:
            own.activation_checkpointing_enable({"use_reentrant": False})
        if self.name == "frozen":
            own.enable_input_require_grads()
            return own
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = get_peft_model(own, self.config())
            for layer in model.base_model.layers():
                # A fresh B is zero, which would make the gradients of A and router zero, too.
                nn.init.normal_(layer.experts["default"].lora_B, std=0.01)
        if self.name in LAYER_CLASSES:
            compute_as(model, LAYER_CLASSES[self.name], self.dropout)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(base.dtype)
        return model

    @property
    def label(self) -> str:
        return f"{self.name}, {self.kernels}" if self.kernels else self.name

    def running(self, run: Callable[[], T]) -> Callable[[], T]:
        """`run` with the experts in the kernels of this variant."""

        def switched() -> T:
            before = dict(os.environ)
            os.environ |= {"LORAMOE_KERNELS": self.kernels} if self.kernels else {}
            try:
                return run()
            finally:
                os.environ.pop("LORAMOE_KERNELS", None)
                os.environ |= before

        return switched


# Settings of the adapter in which a variant differs from `loramoe`.
OPTIONS: dict[str, dict] = {"top2": {"lora_top_k": 2}, "shared_a": {"lora_shared_A": True}}
LAYER_CLASSES = {"plain": PlainLayer, "loop": LoopLayer}


def compute_as(model: nn.Module, layer_class: type[LoraLayer], dropout: float) -> None:
    """Switch all adapted Linears of a model to `layer_class` and its routers to plain autograd."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.__class__, module.dropout_rate = layer_class, dropout
        elif isinstance(module, Router):
            module.__class__ = PlainRouter


def load_base(folder: str | None) -> PreTrainedModel:
    """Load the base model in float32; None gives a tiny random Llama.

    Raises:
        InputError: the folder does not hold a supported model.
    """
    if folder is None:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(base_config(None))
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise InputError(f"no base model could be loaded from {folder}: {error}") from error


def base_config(architecture: str | None) -> PretrainedConfig:
    """The configuration of an architecture that `find_architecture` knows; None is a tiny Llama."""
    return LlamaConfig(**QUICK_MODEL) if architecture is None else find_architecture(architecture)


def random_base(architecture: str | None, device: torch.device) -> PreTrainedModel:
    """A model with random weights in bf16, made on the device.

    Args:
        architecture: see `base_config`.

    Raises:
        InputError: there is no such architecture.
    """
    torch.manual_seed(0)
    with default_dtype(torch.bfloat16), device:
        return AutoModelForCausalLM.from_config(base_config(architecture))


def random_batch(vocabulary: int, batch: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Random tokens, all supervised, with alternating task types 0 (other) and 1 (world knowledge)."""
    ids_BT = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))
    return {
        "input_ids": ids_BT,
        "attention_mask": torch.ones_like(ids_BT),
        "labels": ids_BT,
        "task_types": torch.arange(batch) % 2,
    }


def resident_memory(load: Callable[[], PreTrainedModel], variant: Variant, batch: dict[str, Tensor]) -> dict[str, int]:
    """Resident memory of a variant's step on the base model that `load` gives; see `step_memory`."""
    return_freed_memory()
    return step_memory(variant.model(load()), batch)
