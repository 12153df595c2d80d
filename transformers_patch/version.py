"""The transformers that this code was written against, and the `peft` that it needs."""

from pathlib import Path

import transformers
from packaging.version import Version

import peft

OLDEST, TOO_NEW = "5.23", "5.24"


def check_environment() -> None:
    """Refuse to run on untested internals.

    Raises:
        ImportError: transformers is outside the supported range, or another package named peft hides ours.
    """
    if not Version(OLDEST) <= Version(transformers.__version__) < Version(TOO_NEW):
        raise ImportError(
            f"transformers {transformers.__version__} is installed, but LoRAMoE supports >={OLDEST},<{TOO_NEW}: "
            "install the version in requirements.txt"
        )
    root = Path(__file__).resolve().parent.parent
    if Path(peft.__file__).resolve().parent.parent != root:
        raise ImportError(
            f"`import peft` found {peft.__file__}, not the one of LoRAMoE: run from the root of the repository, with "
            "`python train.py` or `python -m scripts.NAME`"
        )
