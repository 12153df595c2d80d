"""Memory and FLOPs of one training step, counted on tensors without data: the real model with the real adapter runs
forward and backward under `FakeTensorMode`, measured by the instruments of the benchmark.

Shape suffixes: B samples, T tokens, N supervised tokens, H hidden size, V vocabulary.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.pytorch_utils import Conv1D

from peft import LoraConfig, LoraLayer, PeftModel, get_peft_model
from transformers_patch.labels import SupervisedTokens
from workbench.instruments import LiveBytes, SavedBytes, count_flops, default_dtype

# Without padding no mask is needed, and attention is one fused kernel. transformers detects this from the values of
# masks and positions, which fake tensors do not have; it skips the test for attention functions without a mask type.
ATTENTION = "sdpa_without_padding"
AttentionInterface.register(ATTENTION, sdpa_attention_forward)


@dataclass(frozen=True)
class Shape:
    """Size and precision of a step.

    Args:
        batch: examples per process and micro-batch.
        length: tokens per example.
        labelled: number of supervised tokens in the micro-batch.
        dtype: dtype of the frozen weights and of the computation.
        casts_adapter: the adapter is also in `dtype`, as with DeepSpeed; otherwise it is float32 under autocast.
        checkpointing: layers are recomputed in the backward pass.
        forms_logits: all logits exist at once, as with ZeRO-3, where the output layer has hooks.
    """

    batch: int
    length: int
    labelled: int
    dtype: torch.dtype
    casts_adapter: bool
    checkpointing: bool
    forms_logits: bool = False


@dataclass(frozen=True)
class Footprint:
    """Counts of one step in a process that holds the full model; in bytes unless stated otherwise.

    Args:
        frozen_parameters: number of them.
        trainable_parameters: number of them.
        quantisable_parameters: number of weights of Linears inside the decoder, which quantisation packs.
        quantisable_rows: total number of their output features.
        largest_linear: number of weights of the largest of them.
        saved: kept for the backward pass.
        activations: alive after the forward pass of the layers, before the loss.
        logits: peak of output layer, loss and their gradients, on top of the activations.
        backward: peak of the backward pass of the layers, on top of activations and adapter gradients.
        gradients: of the adapter.
        flops: FLOPs of forward and backward pass.
    """

    frozen_parameters: int
    trainable_parameters: int
    quantisable_parameters: int
    quantisable_rows: int
    largest_linear: int
    saved: int
    activations: int
    logits: int
    backward: int
    gradients: int
    flops: int

    @property
    def step_peak(self) -> int:
        """Peak on top of weights and optimizer; the loss and the layers' backward pass run one after the other."""
        return self.activations + self.gradients + max(self.logits, self.backward)


def count_step(config: PretrainedConfig, adapter: LoraConfig, shape: Shape) -> Footprint:
    """Count memory and FLOPs of a step of the adapted model.

    The balance term is left out: its tensors have only shape (samples, experts).

    Raises:
        ValueError: the adapter's target modules do not exist.
    """
    # `.to()` does not work on fake parameters.
    with FakeTensorMode(), default_dtype(shape.dtype):
        model = _adapted_model(config, adapter, shape)
        step = _Step(model, shape)
        saved, live = SavedBytes(model), LiveBytes()
        with live:
            with saved:
                loss, hidden_BTH, activations = step.loss(live)
            (gradient_BTH,) = torch.autograd.grad(loss, hidden_BTH)
            logits = live.peak - activations
            del loss
            live.reset_peak()
            hidden_BTH.backward(gradient_BTH)
            peak = live.peak
        gradients = sum(_bytes(parameter.grad) for parameter in model.parameters() if parameter.grad is not None)
        del hidden_BTH, gradient_BTH
        model.zero_grad(set_to_none=True)
        flops = count_flops(lambda: step.loss(live)[0].backward())
        return Footprint(
            **_sizes(model),
            saved=saved.total,
            activations=activations,
            logits=logits,
            backward=max(0, peak - activations - gradients),
            gradients=gradients,
            flops=flops,
        )


class _Step:
    """A training step. Without data, the number of supervised tokens is known, but not their positions."""

    def __init__(self, model: PeftModel, shape: Shape):
        self.base, self.may_wait = model.get_base_model(), not shape.forms_logits
        self.ids_BT = torch.zeros(shape.batch, shape.length, dtype=torch.long)
        self.positions = SupervisedTokens(self.ids_BT, torch.zeros(shape.labelled, dtype=torch.long))
        mixed = shape.dtype != torch.float32 and not shape.casts_adapter
        self.precision = torch.autocast("cpu", shape.dtype) if mixed else nullcontext()

    def loss(self, live: LiveBytes) -> tuple[torch.Tensor, torch.Tensor, int]:
        """The loss, what the layers hand to the output layer, and the bytes that are alive then; the peak counts from
        there."""
        reached: list = []

        def layers_done(module, inputs, outputs):
            reached[:] = [outputs.last_hidden_state, live.now]
            live.reset_peak()

        hook = self.base.get_decoder().register_forward_hook(layers_done)
        with self.precision, self.positions.only(self.base, self.may_wait):
            logits = self.base(input_ids=self.ids_BT, use_cache=False).logits
            loss = self.positions.loss(self.base, logits)
        hook.remove()
        return loss, *reached


def _adapted_model(config: PretrainedConfig, adapter: LoraConfig, shape: Shape) -> PeftModel:
    base = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION, trust_remote_code=False)
    model = get_peft_model(base, adapter)
    if shape.casts_adapter:
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    setattr(module, name, nn.Parameter(torch.empty_like(parameter, dtype=shape.dtype)))
    if shape.checkpointing:
        # Random states have no fake counterpart, and their memory is negligible.
        model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    return model.train()


def _sizes(model: PeftModel) -> dict[str, int]:
    """Numbers of parameters. Quantisation packs the Linears of the decoder but not the output layer."""
    linears = [
        module.base_layer if isinstance(module, LoraLayer) else module
        for module in model.get_base_model().get_decoder().modules()
        if isinstance(module, LoraLayer | nn.Linear | Conv1D)
    ]
    linears = [module for module in dict.fromkeys(linears) if not module.weight.requires_grad]
    trainable, total = model.get_nb_trainable_parameters()
    return {
        "frozen_parameters": total - trainable,
        "trainable_parameters": trainable,
        "quantisable_parameters": sum(module.weight.numel() for module in linears),
        "quantisable_rows": sum(module.nf if isinstance(module, Conv1D) else module.out_features for module in linears),
        "largest_linear": max(module.weight.numel() for module in linears),
    }


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
