"""The configuration of an adapter: the method's own, as peft wants to see it."""

import os
from dataclasses import dataclass

from peft import PeftConfig

from ._method import LoraConfig

# Fields that peft adds to every configuration; the adapter's file does not have them.
FIELDS_OF_PEFT = ("auto_mapping", "peft_version", "revision")


@dataclass
class LoraMoeConfig(PeftConfig, LoraConfig):
    """A mixture of LoRA experts with the localized balancing constraint; the fields are those of `_method.LoraConfig`.

    Its `adapter_config.json` is the one of the LoRAMoE repository, field by field.

    Raises:
        ValueError: at least one value is out of range; the message has a line for every problem.
    """

    task_type: str | None = "CAUSAL_LM"
    peft_type: str | None = "LORAMOE"

    def __post_init__(self):
        PeftConfig.__post_init__(self)
        LoraConfig.__post_init__(self)

    def to_dict(self) -> dict:
        return {name: value for name, value in LoraConfig.to_dict(self).items() if name not in FIELDS_OF_PEFT}

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Write `adapter_config.json` as the LoRAMoE repository does; the keyword arguments of peft have no effect."""
        LoraConfig.save_pretrained(self, save_directory)
