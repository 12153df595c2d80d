"""Calls `train.main` once for each list of flags in a JSON file; started under torchrun by the tests.

One process group and one import serve all of them: imports are most of the time that such a run takes. What the experts
compute is written next to the JSON file, by each rank.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from peft import layer
from training.ending import run_process


class Recorder:
    """Records dtypes and dropout masks of the experts.

    Attributes:
        dtypes: names of dtypes by role: `activations`, `parameters`, `products` and `sums`.
        masks: the dropout masks that were drawn, as digests.
    """

    def __init__(self):
        self.reset()
        self._input_products, self._gated_sum = layer.input_products, layer.gated_sum
        self._dropout_mask = layer.dropout_mask
        layer.input_products, layer.gated_sum = self.input_products, self.gated_sum
        layer.dropout_mask = self.dropout_mask

    def reset(self) -> None:
        self.dtypes: dict[str, set[str]] = {}
        self.masks: list[str] = []

    def record(self) -> dict:
        return {"dtypes": {role: sorted(names) for role, names in self.dtypes.items()}, "masks": self.masks}

    def input_products(self, x, router, lora_A, *rest):
        x, logits, hidden = self._input_products(x, router, lora_A, *rest)
        self._note(activations=x, parameters=lora_A, products=hidden)
        if router is not None:
            self._note(parameters=router, products=logits)
        return x, logits, hidden

    def gated_sum(self, output, hidden, weights, lora_B, *rest):
        total = self._gated_sum(output, hidden, weights, lora_B, *rest)
        self._note(activations=output, parameters=lora_B, products=hidden, sums=total)
        return total

    def dropout_mask(self, x, probability):
        mask, kept = self._dropout_mask(x, probability)
        self.masks.append(hashlib.sha256(mask.numpy().tobytes()).hexdigest())
        return mask, kept

    def _note(self, **tensors) -> None:
        for role, tensor in tensors.items():
            self.dtypes.setdefault(role, set()).add(str(tensor.dtype).removeprefix("torch."))


def main() -> None:
    commands = Path(sys.argv[1])
    recorder, records = Recorder(), []
    for flags in json.loads(commands.read_text()):
        recorder.reset()
        train.main(flags)
        records.append(recorder.record())
    commands.with_name(f"record-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(records))


if __name__ == "__main__":
    run_process(main)
