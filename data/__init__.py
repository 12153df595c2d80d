"""Records in, tensors out: rows (`rows.py`), prompts (`prompt.py`), encoded data sets (`dataset.py`), batches
(`collate.py`). Knows no model."""

from data.collate import IGNORED_LABEL, Collator
from data.dataset import DataStatistics, Encoding, content_hash, count_shared_rows, file_hash, load_data
from data.errors import InputError
from data.prompt import TEMPLATES, encode_prompt, encode_target, resolve_template

__all__ = [
    "IGNORED_LABEL",
    "TEMPLATES",
    "Collator",
    "DataStatistics",
    "Encoding",
    "InputError",
    "content_hash",
    "count_shared_rows",
    "encode_prompt",
    "encode_target",
    "file_hash",
    "load_data",
    "resolve_template",
]
