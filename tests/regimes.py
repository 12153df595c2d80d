"""Calls `train.main` once for each list of flags in a JSON file; started under torchrun by the tests.

One process group and one import serve all of them: imports are most of the time that such a run takes.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from transformers_patch.training.ending import run_process


def main() -> None:
    for flags in json.loads(Path(sys.argv[1]).read_text()):
        train.main(flags)


if __name__ == "__main__":
    run_process(main)
