"""The files of an exported model besides its weights: configuration, code, tokenizer, model card."""

import json
import re
from pathlib import Path

import transformers
from transformers import GenerationConfig, PreTrainedModel

from data import InputError
from inference.standalone.weights import target_names
from inference.trained import TrainedFolder
from peft.saving import load_adapter_weights

CODE = Path(__file__).with_name("modeling_lora_mixture.py")
# The class that each of transformers' automatic classes finds. `transformers serve` 5.23 looks for custom code under
# AutoModelForDecision only.
AUTO_CLASSES = {
    "AutoConfig": "LoraMixtureConfig",
    "AutoModel": "LoraMixtureModel",
    "AutoModelForCausalLM": "LoraMixtureForCausalLM",
    "AutoModelForDecision": "LoraMixtureForCausalLM",
}
CARD = """---
{front}tags: [loramoe, custom_code]
library_name: transformers
pipeline_tag: text-generation
---
# {base} with a mixture of LoRA experts

The weights of {base} and, around {count} of its Linears, {experts} of rank {rank}{null}, weighed for each token by a
router (Dou et al., *LoRAMoE*, arXiv 2312.09979). The adapter was {adapter}.

The model's code is [modeling_lora_mixture.py](modeling_lora_mixture.py). It needs torch and transformers (5.16 to 5.23)
only, and runs if you allow it to:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
```

The licence of {base} applies to its weights.
"""


def stock_classes(skeleton: PreTrainedModel) -> dict[str, str]:
    """The names in transformers of a base model's classes, by the names that the code gives them.

    Raises:
        InputError: transformers has no class for the model without its output layer.
    """
    kinds = {"BaseConfig": type(skeleton.config), "BaseModel": type(skeleton.base_model)}
    kinds["BaseForCausalLM"] = next(
        kind for kind in type(skeleton).__mro__ if kind.__module__.startswith("transformers.")
    )
    names = {alias: kind.__name__ for alias, kind in kinds.items()}
    strange = [name for alias, name in names.items() if getattr(transformers, name, None) is not kinds[alias]]
    if strange or skeleton.base_model is skeleton:
        raise InputError(
            f"base models of type {skeleton.config.model_type!r} cannot be exported: transformers does not have their "
            "classes under names that an exported model could import"
        )
    return names


def write_code(skeleton: PreTrainedModel, folder: Path) -> None:
    """Copy the code, with the base model's classes in place of Llama's."""
    text = CODE.read_text()
    for alias, name in stock_classes(skeleton).items():
        text, count = re.subn(rf"import \w+ as {alias}$", f"import {name} as {alias}", text, flags=re.M)
        assert count == 1, alias
    (folder / CODE.name).write_text(text)


def write_config(base: PreTrainedModel, trained: TrainedFolder, folder: Path) -> None:
    """Write config.json: the base model's with an own model type, the classes to load, and the adapter's settings.

    Those are nested, and no name has "moe" in it: SGLang takes models with such names and fields for other ones.
    """
    targets, adapter = target_names(load_adapter_weights(trained.folder)), trained.config
    assert adapter is not None
    config = base.config.to_diff_dict()
    if any(base.get_submodule(name) is base.get_output_embeddings() for name in targets):
        config["tie_word_embeddings"] = False  # the adapted output layer stores its weight under another name
    config |= {
        "architectures": ["LoraMixtureForCausalLM"],
        "auto_map": {auto: f"{CODE.stem}.{name}" for auto, name in AUTO_CLASSES.items()},
        "dtype": str(base.dtype).removeprefix("torch."),
        "model_type": f"lora_mixture_{base.config.model_type}",
        "lora_mixture": {
            "null_expert": adapter.lora_null_expert,
            "num_experts": adapter.lora_nums,
            "rank": adapter.r,
            "scaling": adapter.scaling,
            "shared_A": adapter.lora_shared_A,
            "targets": targets,
            "top_k": adapter.lora_top_k,
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_generation_config(settings: GenerationConfig, folder: Path) -> None:
    """Write the settings that the base model's folder proposes, even where they contradict each other."""
    settings._original_object_hash = hash(settings)  # saved without a check if nothing was changed
    settings.save_pretrained(folder)


def write_card(trained: TrainedFolder, folder: Path) -> None:
    """Write README.md; of local folders only the last part is named, since cards are published."""
    base, adapter = trained.base_model, trained.config
    assert adapter is not None
    card = CARD.format(
        front="" if Path(base).is_dir() else f"base_model: {base}\n",
        base=Path(base).name if Path(base).is_dir() else base,
        count=len(target_names(load_adapter_weights(trained.folder))),
        experts="one expert" if adapter.lora_nums == 1 else f"{adapter.lora_nums} experts",
        rank=adapter.r,
        null=" and a null expert" if adapter.lora_null_expert else "",
        adapter=trained.folder.name,
    )
    (folder / "README.md").write_text(card)
