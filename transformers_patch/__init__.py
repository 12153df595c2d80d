"""Everything that knows the internals of transformers.

`mixin.py` adds task types and the balance term to a stock model class, `recorder.py` takes the routing out of the
layers, `labels.py` restricts logits and loss to the supervised tokens, `logits.py` forms some rows of them at a time,
and `modeling_*.py` name the patched classes.
"""

from transformers_patch.version import check_environment

check_environment()

from transformers_patch.auto import AutoModelForCausalLM  # noqa: E402
from transformers_patch.mixin import LoRAMoEMixin, LoRAMoEOutput  # noqa: E402
from transformers_patch.modeling_llama import LlamaLoRAMoEForCausalLM  # noqa: E402
from transformers_patch.recorder import RoutingRecorder  # noqa: E402

__all__ = ["AutoModelForCausalLM", "LlamaLoRAMoEForCausalLM", "LoRAMoEMixin", "LoRAMoEOutput", "RoutingRecorder"]
