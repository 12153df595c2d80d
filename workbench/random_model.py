"""Write a model with random weights, a tokenizer of bytes and rows of a length, for runs that need no real model:

python -m workbench.random_model --model Llama-2-7B --output FOLDER
"""

import argparse
import json
import random
from pathlib import Path

import torch

from loading.command_line import at_least, range_problems, refuse, run_verb
from workbench.tiny_model import make_tiny_model, write_tokenizer
from workbench.variants import random_base


def main(argv: list[str] | None = None) -> None:
    """Write the folder.

    Raises:
        InputError: there is no such architecture, or a number is too small.
    """
    parser = argparse.ArgumentParser(prog="python -m workbench.random_model", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="architecture, as `python -m workbench.plan` knows them; default: a tiny one")
    parser.add_argument("--output", type=Path, required=True, help="folder of the model and its rows.json")
    parser.add_argument("--rows", type=int, default=96, help="number of rows (default: %(default)s)")
    parser.add_argument("--length", type=int, default=1400, help="bytes of an answer (default: %(default)s)")
    flags = parser.parse_args(argv)
    refuse(range_problems(flags, [at_least(1, "rows", "length")]))
    if flags.model is None:
        make_tiny_model(flags.output)
    else:
        write_tokenizer(flags.output)
        model = random_base(flags.model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        model.config.bos_token_id, model.config.eos_token_id = 0, 1
        model.save_pretrained(flags.output)
    chance = random.Random(0)
    rows = [
        {
            "instruction": f"Say {number}",
            "output": "".join(chance.choices("abcdefghij ", k=flags.length)),
            "task_type": number % 2,
        }
        for number in range(flags.rows)
    ]
    (flags.output / "rows.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    run_verb(main)
