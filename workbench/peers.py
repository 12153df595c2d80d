"""PyPI's `peft`, with which the benchmark compares, in a separate process and environment."""

import json
import os
import subprocess
from pathlib import Path

from torch import Tensor

from loading.provenance import ROOT
from workbench.instruments import MMAP_THRESHOLD
from workbench.variants import Variant

PYTHON = ROOT / ".cache" / "peers" / "bin" / "python"


class PeerError(RuntimeError):
    """The peer failed; the message is its own."""


class Peer:
    """A peer's model in a worker process that runs single steps on request, so that steps can be interleaved.

    Args:
        variant: `peft_lora` or `xlora`.
        folder: the base model.
        environment: additional environment variables for the worker.

    Attributes:
        package: version and location of the `peft` that the worker runs.

    Raises:
        PeerError: the model cannot be built.
    """

    def __init__(self, variant: Variant, folder: str, **environment: str):
        # -P keeps the script's folder, and so this repository's `peft`, off the module path.
        self._process = subprocess.Popen(
            [PYTHON, "-P", Path(__file__).with_name("peer_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | environment,
            text=True,
        )
        size = {"experts": variant.experts, "rank": variant.rank, "dropout": variant.dropout}
        try:
            self.package = self._ask(
                {"do": "build", "variant": variant.name, "model": str(Path(folder).resolve()), **size}
            )
        except PeerError:
            self.close()
            raise

    def measure(self, batch: dict[str, Tensor]) -> dict[str, int]:
        """Saved bytes and FLOPs of one step."""
        return self._ask({"do": "measure", "batch": _plain(batch)})

    def resident_memory(self, batch: dict[str, Tensor]) -> dict[str, int]:
        """Resident bytes before the second step and their peak during it."""
        return self._ask({"do": "resident", "batch": _plain(batch)})

    def step(self, batch: dict[str, Tensor]) -> float:
        """Seconds of one step, measured in the worker."""
        return self._ask({"do": "step", "batch": _plain(batch)})["seconds"]

    def close(self) -> None:
        self._process.communicate()

    def _ask(self, request: dict) -> dict:
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        requests.write(json.dumps(request) + "\n")
        requests.flush()
        answer = json.loads(answers.readline() or '{"error": "the worker ended"}')
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer


def _plain(batch: dict[str, Tensor]) -> dict[str, list]:
    """The parts of a batch that other models accept, as JSON."""
    return {name: batch[name].tolist() for name in ("input_ids", "attention_mask", "labels")}


def resident_memory(variant: Variant, folder: str, batch: dict[str, Tensor]) -> dict[str, int]:
    """Measure in a new worker that returns freed memory at once; see `instruments.return_freed_memory`."""
    peer = Peer(variant, folder, MALLOC_MMAP_THRESHOLD_=str(MMAP_THRESHOLD))
    try:
        return peer.resident_memory(batch)
    finally:
        peer.close()
