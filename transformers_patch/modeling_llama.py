"""Llama with task types and the balance term."""

from transformers import LlamaForCausalLM

from transformers_patch.mixin import LoRAMoEMixin


class LlamaLoRAMoEForCausalLM(LoRAMoEMixin, LlamaForCausalLM):
    """`LlamaForCausalLM` whose forward takes `task_types` and returns `loss`, `lm_loss`, `balance_loss`, `logits`."""
