"""A language model of transformers with a routed mixture of LoRA experts around some of its Linears.

The method is LoRAMoE (Dou et al., arXiv 2312.09979). This file needs torch and transformers only: the model is the one
imported below, whose target Linears are replaced by `MixtureLinear` after it has been built. Nothing else is changed,
read or run. Licence: Apache-2.0.

Servers (vLLM, SGLang) rebuild such a model, which gives this file its shape:
- They replace whatever is an `nn.Linear` by their own. `MixtureLinear` is not one, and its softmax is outside of any.
- They split Linears over GPUs by a plan of names, taking the first entry that a name begins with.
- They join Linears that read the input of a forward, so A and the router read a view of it.
- They rewrite the forward of all modules of a class, having looked at one of them. A module with wrapped Linears
  therefore has another class than one without.
"""

import torch
from torch import Tensor, nn
from transformers import LlamaConfig as BaseConfig
from transformers import LlamaForCausalLM as BaseForCausalLM
from transformers import LlamaModel as BaseModel


def _with_parts(plan: dict[str, str]) -> dict[str, str]:
    """A plan for tensor parallelism, extended to the parts that a wrapped Linear has.

    Base and B are split where the base model splits outputs; A and router are then whole. Where it splits inputs, A and
    router are split likewise, and B is whole.
    """
    parts = {}
    for name, style in plan.items():
        parts[f"{name}.base_layer"] = style
        parts[f"{name}.lora_B"] = style if "colwise" in style else "replicate"
        parts[f"{name}.lora_A"] = parts[f"{name}.router"] = style if "rowwise" in style else "replicate"
    return parts | plan


class LoraMixtureConfig(BaseConfig):
    """The base model's configuration with `lora_mixture`, a dictionary:

    targets: names of the wrapped Linears in the model with its output layer
    num_experts, null_expert, rank, scaling, top_k, shared_A: see `MixtureLinear`
    """

    model_type = "lora_mixture_" + BaseConfig.model_type
    base_model_tp_plan = _with_parts(BaseConfig.base_model_tp_plan or {})


class MixtureLinear(nn.Module):
    """A Linear and the experts added to it:

        o = W0 x + scaling * sum_n w_n B_n A_n x        w = softmax(W_g x)

    The experts are stacked: A has the shape (num_experts * rank, in), B (out, num_experts * rank).

    Args:
        base_layer: the Linear of the base model, or the transposed one of GPT-2 (`Conv1D`).
        num_experts: with one, and no null expert, there is no router.
        null_expert: the router has one more output, the last, whose expert is zero.
        rank: of one expert.
        scaling: factor on the sum over the experts.
        top_k: the softmax runs over this many largest logits of a token; None for all.
        shared_A: all experts use one A, of shape (rank, in).
    """

    def __init__(
        self,
        base_layer: nn.Module,
        num_experts: int,
        null_expert: bool,
        rank: int,
        scaling: float,
        top_k: int | None,
        shared_A: bool,
    ):
        super().__init__()
        self.num_experts, routed = num_experts, num_experts + null_expert
        self.rank, self.scaling, self.top_k = rank, scaling, top_k
        width_in, width_out = base_layer.weight.shape
        if isinstance(base_layer, nn.Linear):
            width_in, width_out = width_out, width_in
        kind = {"bias": False, "device": base_layer.weight.device, "dtype": base_layer.weight.dtype}
        self.base_layer = base_layer
        self.lora_A = nn.Linear(width_in, rank if shared_A else num_experts * rank, **kind)
        self.router = nn.Linear(width_in, routed, **kind) if routed > 1 else None
        self.lora_B = nn.Linear(num_experts * rank, width_out, **kind)

    def forward(self, x: Tensor) -> Tensor:
        view = x.view_as(x)
        hidden = self.lora_A(view)
        if self.router is not None:
            weights = self.weigh(self.router(view))[..., : self.num_experts]
            gated = hidden.unflatten(-1, (-1, self.rank)) * weights.unsqueeze(-1)
            hidden = gated.flatten(-2).to(hidden.dtype)
        return self.base_layer(x) + self.scaling * self.lora_B(hidden)

    def weigh(self, logits: Tensor) -> Tensor:
        """The weights of the experts, in float32; the last dimension sums to 1."""
        if self.top_k is not None:
            kept = logits.topk(self.top_k, dim=-1).indices
            dropped = torch.ones_like(logits, dtype=torch.bool).scatter(-1, kept, False)
            logits = logits.masked_fill(dropped, float("-inf"))
        return torch.softmax(logits, dim=-1, dtype=torch.float32)

    @property
    def weight(self) -> Tensor:
        """The weight of the base layer: model code asks Linears for its dtype or device."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias


class LoraMixtureModel(BaseModel):
    config_class = LoraMixtureConfig

    def __init__(self, config: LoraMixtureConfig):
        super().__init__(config)
        _wrap(self, BaseForCausalLM.base_model_prefix + ".", config.lora_mixture)


class LoraMixtureForCausalLM(BaseForCausalLM):
    config_class = LoraMixtureConfig

    def __init__(self, config: LoraMixtureConfig):
        super().__init__(config)
        _wrap(self, "", config.lora_mixture)


def _wrap(model: nn.Module, prefix: str, settings: dict) -> None:
    """Replace the target Linears of a model; those whose names lack the prefix are not in it."""
    kind = {name: value for name, value in settings.items() if name != "targets"}
    for name in settings["targets"]:
        if name.startswith(prefix):
            place = name.removeprefix(prefix)
            model.set_submodule(place, MixtureLinear(model.get_submodule(place), **kind))
            parent = model.get_submodule(place.rpartition(".")[0])
            if parent is not model:
                parent.__class__ = _class_with_mixtures(type(parent))


_CLASSES: dict[type, type] = {}


def _class_with_mixtures(cls: type) -> type:
    """A subclass that differs in nothing; its name is the same, since libraries look for layers by it."""
    if cls in _CLASSES.values():
        return cls
    return _CLASSES.setdefault(cls, type(cls.__name__, (cls,), {"__module__": __name__, "__doc__": cls.__doc__}))
