"""Configuration of an adapter, saved next to its weights as `adapter_config.json`."""

import enum
import json
import math
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

CONFIG_NAME = "adapter_config.json"
ALL_LINEAR = "all-linear"
# Fields that adapters saved by earlier versions do not have; their defaults are what those versions did.
ADDED_LATER = {
    "blc_reference", "expert_groups", "layers_to_transform", "lora_null_expert", "lora_rslora", "lora_shared_A",
    "lora_top_k", "modules_to_save", "task_type_names",
}  # fmt: skip

# See `LoraConfig.fixed_differences`.
FIXED_FIELDS = (
    "r", "lora_alpha", "lora_rslora", "lora_nums", "lora_null_expert", "lora_top_k", "lora_shared_A",
    "num_task_types", "task_type_names", "expert_groups", "target_modules", "layers_to_transform", "modules_to_save",
)  # fmt: skip


class PeftType(enum.StrEnum):
    """Type of adapter. Not called LORA, so that no plain-LoRA loader mistakes one of ours for a plain LoRA."""

    LORAMOE = "LORAMOE"


class TaskType(enum.StrEnum):
    """The task of the base model; unrelated to the `task_type` of a data row."""

    CAUSAL_LM = "CAUSAL_LM"


@dataclass
class PeftConfig:
    """The fields of every adapter: its type and its base model.

    Args:
        task_type: the task of the base model.
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
        try:
            temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> "LoraConfig":
        """Read `adapter_config.json` from a folder.

        Raises:
            ValueError: there is no such file, it is not JSON, or it is not a configuration of this class; the
                message names the file and what was found.
        """
        path = Path(directory) / CONFIG_NAME
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError:
            raise ValueError(f"{directory} is not an adapter folder: it has no {CONFIG_NAME}") from None
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON ({error}): the file is damaged, restore it") from None
        if not isinstance(values, dict) or values.get("peft_type") != PeftType.LORAMOE.value:
            found = values.get("peft_type") if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"{path}: peft_type is {found!r}, but only {PeftType.LORAMOE.value!r} can be loaded here")
        kind = cls if issubclass(cls, LoraConfig) else LoraConfig
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
        lora_rslora: scale it by lora_alpha / sqrt(r) instead (rank-stabilized LoRA, arXiv 2312.03732).
        lora_nums: number of trained experts per adapted Linear; 1 is plain LoRA, without router and balance term,
            unless there is a null expert.
        lora_null_expert: the router has one more output, the last one, whose expert is zero: its weight is taken from
            the trained experts and leaves the base model as it is.
        lora_top_k: experts that take part for a token, at least 2: a softmax over the largest router logits, the others
            weigh nothing; None (or 0) for all of them.
        lora_shared_A: one A of rank r for all experts of a Linear, which then differ in B alone (as in HydraLoRA).
        lora_dropout: probability of dropping an input element of the experts, in [0, 1).
        blc_alpha: delta of the paper, in [0, 1): how far a group is drawn to its task type. Two equal groups settle at
            shares of (1 + blc_alpha) / 2 and (1 - blc_alpha) / 2.
        blc_weight: the weight of the balance term in the loss, beta of the paper; 0 turns it off.
        blc_reference: compute the balance term from the statistic of the authors' code: router weights summed over all
            positions, padding included, and the samples of one process alone.
        num_task_types: number of task types K; if the balance term counts, K (with a null expert, K - 1) has to divide
            lora_nums, unless `expert_groups` is given.
        task_type_names: names of the task types, in their order, if they have any.
        expert_groups: number of experts in the group of each task type, the null expert included, which is in the last
            group; None for equal groups of trained experts, and one of the null expert alone.
        target_modules: the Linears to adapt: a list of names, each compared with the end of the modules' dotted names;
            a regular expression, which the full dotted name of a Linear has to match; or `all-linear`, every Linear
            but the output embedding. A string of letters, digits, underscores and dots alone is a name. None for the
            defaults of the base model's architecture, which are filled in when the adapter is put on a model.
        layers_to_transform: numbers of the layers, from 0, whose Linears are adapted; None for all.
        modules_to_save: names of further modules (`embed_tokens`, `lm_head`), or a single one, of which the adapter
            holds a copy that is trained in full; compared like the names in `target_modules`.

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
    task_type_names: list[str] | None = None
    expert_groups: list[int] | None = None
    lora_top_k: int | None = None
    lora_shared_A: bool = False
    lora_null_expert: bool = False
    lora_rslora: bool = False
    target_modules: list[str] | str | None = None
    layers_to_transform: list[int] | None = None
    modules_to_save: list[str] | str | None = None

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.target_modules, str) and re.fullmatch(r"[\w.]+", self.target_modules):
            self.target_modules = [self.target_modules]
        if isinstance(self.modules_to_save, str):
            self.modules_to_save = [self.modules_to_save]
        for name in ("task_type_names", "expert_groups"):
            if isinstance(value := getattr(self, name), tuple):
                setattr(self, name, list(value))
        for name in ("target_modules", "layers_to_transform", "modules_to_save"):
            if isinstance(value := getattr(self, name), list | tuple | set):
                values = list(value)
                can_be = _are_names(values) or _are_counts(values, least=0)
                setattr(self, name, sorted(set(values)) if can_be else values)
        self.lora_top_k = self.lora_top_k or None
        if problems := self.problems():
            raise ValueError("\n".join(problems))

    @property
    def scaling(self) -> float:
        """Factor on the experts' output."""
        return self.lora_alpha / (math.sqrt(self.r) if self.lora_rslora else self.r)

    @property
    def routed_experts(self) -> int:
        """Number of experts that share the weight of a token, the null expert included; 1 needs no router."""
        return self.lora_nums + self.lora_null_expert

    @property
    def null_expert(self) -> int | None:
        """Number of the null expert among them, None if there is none."""
        return self.lora_nums if self.lora_null_expert else None

    @property
    def balances(self) -> bool:
        """True if the balance term is part of the training loss."""
        return self.blc_weight > 0 and self.routed_experts > 1

    @property
    def group_sizes(self) -> list[int]:
        """Number of experts of each task type's group; one group of all if they cannot be split."""
        if self.expert_groups is not None:
            return self.expert_groups
        of_null = [1] if self.lora_null_expert else []
        of_trained = self.num_task_types - len(of_null)
        if of_trained == 0 or self.lora_nums % of_trained:
            return [self.routed_experts]
        return [self.lora_nums // of_trained] * of_trained + of_null

    def fixed_differences(self, other: "LoraConfig") -> list[str]:
        """The fields that give weights their shapes and meaning, as far as another configuration differs in them."""
        return [name for name in FIXED_FIELDS if getattr(self, name) != getattr(other, name)]

    def problems(self) -> list[str]:
        """One sentence for each invalid value: what was found and what is allowed."""
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
        problems += [
            f"{name} is {value!r}, but has to be true or false"
            for name in ("blc_reference", "lora_null_expert", "lora_rslora", "lora_shared_A", "inference_mode")
            if type(value := getattr(self, name)) is not bool
        ]
        problems += self._module_problems()
        return problems or self._expert_problems()

    def _module_problems(self) -> list[str]:
        problems = [
            f"{name} is {value}, but has to be a list of names"
            for name in ("target_modules", "modules_to_save")
            if not (isinstance(value := getattr(self, name), str | None) or _are_names(value))
        ]
        if self.target_modules is not None and not self.target_modules:
            problems.append("target_modules is empty, but at least one Linear has to be named")
        if isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR:
            try:
                re.compile(self.target_modules)
            except re.error as error:
                problems.append(f"target_modules {self.target_modules!r} is not a regular expression: {error}")
        if self.layers_to_transform is not None and not _are_counts(self.layers_to_transform, least=0):
            problems.append(
                f"layers_to_transform is {self.layers_to_transform}, but has to be a list of layer numbers, from 0"
            )
        return problems

    def _expert_problems(self) -> list[str]:
        """Contradictions among values that are valid by themselves."""
        problems, K, groups, names = [], self.num_task_types, self.expert_groups, self.task_type_names
        E, total = self.routed_experts, "lora_nums and the null expert" if self.lora_null_expert else "lora_nums"
        if groups is not None and not (_are_counts(groups) and len(groups) == K and sum(groups) == E):
            problems.append(
                f"expert_groups is {groups}, but has to be {K} whole numbers of at least 1, one for each task type, "
                f"that add up to {total}, {E}"
            )
        if groups is None and self.balances and len(self.group_sizes) != K:
            of_trained, rest = (K - 1, " next to the null expert's") if self.lora_null_expert else (K, "")
            problems.append(
                f"lora_nums is {self.lora_nums} and num_task_types is {K}: the experts cannot be split into "
                f"{of_trained} equal groups{rest}; choose a multiple of {of_trained}, give the sizes of the groups "
                "with expert_groups, or turn the balance term off with blc_weight 0"
            )
        if names is not None and not (_are_names(names) and len(set(names)) == len(names) == K):
            problems.append(f"task_type_names is {names!r}, but has to be {K} different names, one for each task type")
        if self.lora_top_k is not None and not (type(self.lora_top_k) is int and 2 <= self.lora_top_k <= E):
            problems.append(
                f"lora_top_k is {self.lora_top_k}, but has to be from 2 to {total}, {E}, or 0 for all "
                "experts; with 1 its weight would always be 1, and no gradient would reach the router"
            )
        return problems


def _are_counts(values: object, least: int = 1) -> bool:
    return isinstance(values, list) and bool(values) and all(type(value) is int and value >= least for value in values)


def _are_names(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
