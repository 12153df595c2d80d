"""Encoded rows of a data file, and batches of them, for a trained model."""

from collections.abc import Iterator

from datasets import Dataset
from torch import Tensor
from tqdm import tqdm

from data import Collator, InputError, Part, load_part
from inference.trained import TrainedModel
from loading.base_model import check_lengths


def load_rows(trained: TrainedModel, path: str | None, field: str, cache_dir: str) -> tuple[str, Dataset]:
    """The path of a file or folder, and its rows, encoded as in the run.

    Args:
        path: the file or folder; None for the one named in `run_config.json`.
        field: its field there.

    Raises:
        InputError: neither names a file, it cannot be read, or a row is longer than the model's table of positions.
    """
    path = path or trained.run_config.get(field)
    if not path:
        raise InputError(f"name a data file: the adapter's folder does not have a run_config.json that names a {field}")
    part: Part = "training" if field == "dataset_dir" else "held out"
    rows, _ = load_part(path, part, trained.tokenizer, trained.encoding(), cache_dir)
    check_lengths(trained.model, rows, remedy=f"shorten or remove the longer ones in {path}")
    return path, rows


def batches(trained: TrainedModel, rows: Dataset, batch_size: int, name: str) -> Iterator[dict[str, Tensor]]:
    """`input_ids`, `attention_mask` and `labels` on the model's device, in the rows' order, with a progress bar."""
    collate = Collator(trained.tokenizer.pad_token_id)
    for batch_rows in tqdm(rows.iter(batch_size), desc=name, total=-(-len(rows) // batch_size), unit="batch"):
        batch = collate(
            [dict(zip(batch_rows, values, strict=True)) for values in zip(*batch_rows.values(), strict=True)]
        )
        yield {field: batch[field].to(trained.model.device) for field in ("input_ids", "attention_mask", "labels")}
