"""PyPI's `peft`, with which the benchmark compares, in a separate process and environment."""

import importlib.metadata
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from loading.provenance import ROOT
from workbench.instruments import MMAP_THRESHOLD
from workbench.variants import Variant

PYTHON = ROOT / ".cache" / "peers" / "bin" / "python"


def peer_python() -> Path | None:
    """The interpreter that has PyPI's `peft`: that of `workbench/benchmark_peers.sh`, or this one; None without any."""
    if PYTHON.exists():
        return PYTHON
    # This repository's package of the same name is not installed, so it has no metadata.
    return Path(sys.executable) if any(importlib.metadata.distributions(name="peft")) else None


class PeerError(RuntimeError):
    """The peer failed; the message is its own."""


class Peer:
    """A worker process that runs single steps of PyPI's `peft` on request, so that steps can be interleaved. It has a
    GPU's memory for itself alone if nothing else is on that GPU.

    Args:
        model: folder of the base model; or the values of its configuration, which gives it random weights in bf16.
        environment: additional environment variables for the worker.

    Raises:
        PeerError: nothing here has PyPI's `peft`.
    """

    def __init__(self, model: str | dict, **environment: str):
        python = peer_python()
        if python is None:
            raise PeerError("PyPI's peft is not here; bash workbench/benchmark_peers.sh")
        # -P keeps the script's folder, and so this repository's `peft`, off the module path.
        self._process = subprocess.Popen(
            [python, "-P", Path(__file__).with_name("peer_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | environment,
            text=True,
        )
        self._model = model if isinstance(model, dict) else str(Path(model).resolve())

    def build(self, variant: Variant) -> dict:
        """Build `frozen`, `peft_lora` or `xlora`. Returns version and location of the `peft` that the worker runs.

        Raises:
            PeerError: the model cannot be built.
        """
        return self._ask({"do": "build", "model": self._model, **asdict(variant)})

    def measure(self, variant: Variant, batch: dict[str, Tensor]) -> dict[str, int]:
        """Saved bytes and FLOPs of one step."""
        return self._ask({"do": "measure", **asdict(variant), "batch": _plain(batch)})

    def memory(self, variant: Variant, batch: dict[str, Tensor]) -> dict[str, int]:
        """Memory of the second step; see `instruments.step_memory`."""
        return self._ask({"do": "memory", **asdict(variant), "batch": _plain(batch)})

    def kernels(self, variant: Variant, batch: dict[str, Tensor]) -> dict[str, float]:
        """Launches of a step; see `instruments.step_kernels`."""
        return self._ask({"do": "kernels", **asdict(variant), "batch": _plain(batch)})

    def step(self, variant: Variant, batch: dict[str, Tensor]) -> float:
        """Seconds of one step, measured in the worker."""
        return self._ask({"do": "step", **asdict(variant), "batch": _plain(batch)})["seconds"]

    def drop(self) -> None:
        """Forget all variants that were built."""
        self._ask({"do": "drop"})

    def close(self) -> None:
        self._process.communicate()

    def _ask(self, request: dict) -> dict:
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        try:
            requests.write(json.dumps(request) + "\n")
            requests.flush()
        except BrokenPipeError:
            raise PeerError("the worker ended") from None
        answer = json.loads(answers.readline() or '{"error": "the worker ended"}')
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer


def _plain(batch: dict[str, Tensor]) -> dict[str, list]:
    """The parts of a batch that other models accept, as JSON."""
    return {name: batch[name].tolist() for name in ("input_ids", "attention_mask", "labels")}


def resident_memory(variant: Variant, folder: str, batch: dict[str, Tensor]) -> dict[str, int]:
    """Measure in a new worker that returns freed memory at once; see `instruments.return_freed_memory`."""
    peer = Peer(folder, MALLOC_MMAP_THRESHOLD_=str(MMAP_THRESHOLD))
    try:
        peer.build(variant)
        return peer.memory(variant, batch)
    finally:
        peer.close()
