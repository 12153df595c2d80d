"""Load an exported model in a process of its own and compare its logits. Run as `python -I compare.py MODEL EXPECTED`.

It must not import anything of this repository: it shows that the folder needs nothing of it.

MODEL is the folder; EXPECTED a safetensors file with `input_ids` and the `logits` of the routed model, in float32. The
last line of the output is JSON: the largest `difference`, and the tensors that are `missing` or too many.
"""

import ctypes
import json
import sys
import tempfile

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

M_MMAP_THRESHOLD = -3


def give_freed_memory_back() -> None:
    """Make glibc return freed weights to the system at once. Of those below 32 MB it would keep most."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)


def main(folder: str, expected: str) -> None:
    """Compare and print. The weights stay on the disk, each module reads its own when it is called."""
    give_freed_memory_back()
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            trust_remote_code=True,
            device_map={"": "disk"},
            offload_folder=scratch,
            output_loading_info=True,
        )
        tensors = load_file(expected)
        difference = (model.float().eval()(tensors["input_ids"]).logits - tensors["logits"]).abs().max().item()
    odd = [f"{kind}: {name}" for kind in ("missing_keys", "unexpected_keys") for name in sorted(info[kind])]
    print(json.dumps({"difference": difference, "odd": odd}))


if __name__ == "__main__":
    main(*sys.argv[1:])
