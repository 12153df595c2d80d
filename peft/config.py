"""Configuration of an adapter, saved beside its weights as `adapter_config.json`."""

import enum
import json
import math
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

CONFIG_NAME = "adapter_config.json"
DEFAULT_TARGET_MODULES = ("gate_proj", "up_proj", "down_proj")
# Fields that adapters saved by earlier versions do not have; their defaults are what those versions did.
ADDED_LATER = {"blc_reference"}


class PeftType(enum.StrEnum):
    """Kind of adapter. Not called LORA, so that no plain-LoRA loader takes one of ours for its own."""

    LORAMOE = "LORAMOE"


class TaskType(enum.StrEnum):
    """What the base model does; unrelated to the `task_type` of a data row."""

    CAUSAL_LM = "CAUSAL_LM"


@dataclass
class PeftConfig:
    """What every adapter has: its kind and its base model.

    Args:
        task_type: what the base model does.
        base_model_name_or_path: folder or hub id that the adapter was trained on.
        inference_mode: the saved adapter is meant for inference; loading for training overrides it.
    """

    task_type: TaskType | str | None = None
    base_model_name_or_path: str | None = None
    inference_mode: bool = False
    peft_type: PeftType | str = PeftType.LORAMOE

    def __post_init__(self):
        self.peft_type = PeftType(self.peft_type)
        self.task_type = None if self.task_type is None else TaskType(self.task_type)

    @property
    def is_prompt_learning(self) -> bool:
        return False

    def to_dict(self) -> dict:
        return {
            name: value.value if isinstance(value, enum.Enum) else value for name, value in sorted(asdict(self).items())
        }

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write `adapter_config.json` into the folder, replacing one that is there in a single step."""
        path = Path(save_directory) / CONFIG_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".json.tmp")
        temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        temporary.replace(path)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> "PeftConfig":
        """Read `adapter_config.json` from a folder.

        Raises:
            ValueError: there is no such file, it is not JSON, or it is not a configuration of this class; the
                message names the file and what was found.
        """
        path = Path(directory) / CONFIG_NAME
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError:
            raise ValueError(f"{directory} is no adapter folder: it has no {CONFIG_NAME}") from None
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON ({error}): the file is damaged, restore it") from None
        if not isinstance(values, dict) or values.get("peft_type") != PeftType.LORAMOE.value:
            found = values.get("peft_type") if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"{path}: peft_type is {found!r}, but only {PeftType.LORAMOE.value!r} can be loaded here")
        kind = LoraConfig if cls is PeftConfig else cls
        known = {item.name for item in fields(kind)}
        problems = [f"unknown field {name!r}" for name in sorted(set(values) - known)]
        problems += [f"missing field {name!r}" for name in sorted(known - set(values) - ADDED_LATER)]
        try:
            if not problems:
                return kind(**values)
        except ValueError as error:
            problems = str(error).splitlines()
        raise ValueError(f"{path}: {'; '.join(problems)}")


@dataclass
class LoraConfig(PeftConfig):
    """A mixture of LoRA experts with the localized balancing constraint.

    Args:
        r: rank of each expert.
        lora_alpha: the experts' output is scaled by lora_alpha / r.
        lora_nums: number of experts per adapted Linear; 1 is plain LoRA, without router and balance term.
        lora_dropout: probability of dropping an input element of the experts, in [0, 1).
        blc_alpha: delta of the constraint, in [0, 1): how far a group is drawn to its task type. Two groups settle
            at shares of (1 + delta) / 2 and (1 - delta) / 2.
        blc_weight: beta, the weight of the balance term in the loss; 0 turns it off.
        blc_reference: compute the balance term from the statistic of the authors' code: router weights summed over all
            positions, padding included, and the samples of one process alone.
        num_task_types: number of task types K; where the balance term counts, K has to divide lora_nums.
        target_modules: names of the Linears to adapt, compared with the end of each module's dotted name.

    Raises:
        ValueError: at least one value is out of range; the message has a line for every problem.
    """

    r: int = 4
    lora_alpha: float = 32
    lora_nums: int = 6
    lora_dropout: float = 0.05
    blc_alpha: float = 0.1
    blc_weight: float = 0.1
    blc_reference: bool = False
    num_task_types: int = 2
    target_modules: list[str] = field(default_factory=lambda: list(DEFAULT_TARGET_MODULES))

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.target_modules, str):
            self.target_modules = [self.target_modules]
        self.target_modules = sorted(set(self.target_modules))
        if problems := self.problems():
            raise ValueError("\n".join(problems))

    @property
    def balances(self) -> bool:
        """Whether the balance term has a part in the training loss."""
        return self.blc_weight > 0 and self.lora_nums > 1

    def problems(self) -> list[str]:
        """One sentence for each value that cannot be: what was found and what is allowed."""
        problems = [
            f"{name} is {value}, but has to be a whole number of at least 1"
            for name, value in (("r", self.r), ("lora_nums", self.lora_nums), ("num_task_types", self.num_task_types))
            if type(value) is not int or value < 1
        ]
        if not (_is_finite(self.lora_alpha) and self.lora_alpha > 0):
            problems.append(f"lora_alpha is {self.lora_alpha}, but has to be a number above 0")
        for name, value in (("lora_dropout", self.lora_dropout), ("blc_alpha", self.blc_alpha)):
            if not (_is_finite(value) and 0 <= value < 1):
                problems.append(f"{name} is {value}, but has to be in [0, 1)")
        if not (_is_finite(self.blc_weight) and self.blc_weight >= 0):
            problems.append(f"blc_weight is {self.blc_weight}, but has to be a number of at least 0")
        if type(self.blc_reference) is not bool:
            problems.append(f"blc_reference is {self.blc_reference!r}, but has to be true or false")
        if not self.target_modules:
            problems.append("target_modules is empty, but at least one Linear has to be named")
        if not problems and self.balances and self.lora_nums % self.num_task_types:
            problems.append(
                f"lora_nums is {self.lora_nums} and num_task_types is {self.num_task_types}: the experts cannot be "
                f"split into {self.num_task_types} equal groups; choose a multiple of {self.num_task_types}, or turn "
                "the balance term off with blc_weight 0"
            )
        return problems


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
