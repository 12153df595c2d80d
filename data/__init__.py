"""Records in, tensors out: data files (`files.py`), rows (`rows.py`), prompts (`prompt.py`), encoded data sets
(`dataset.py`), processes that share the work on rows (`workers.py`), which rows go together (`sampler.py`), batches
(`collate.py`), files of answers (`answers.py`). Knows no model."""

from data.answers import AnswerFile
from data.collate import IGNORED_LABEL, Collator, supervised_indices
from data.dataset import (
    DataStatistics,
    Encoding,
    content_hash,
    count_shared_rows,
    file_hash,
    load_data,
    row_lengths,
    task_types,
)
from data.errors import InputError, first_line
from data.files import is_unicode
from data.prompt import (
    TEMPLATE_VARIABLES,
    TEMPLATES,
    encode_answer,
    encode_prompt,
    encode_target,
    encode_turns,
    encoding_problem,
    marked_row,
    resolve_template,
    show_turns,
    with_fixed_date,
)
from data.sampler import ORDERS, EpochDataLoader, GlobalBatchSampler

__all__ = [
    "IGNORED_LABEL",
    "ORDERS",
    "TEMPLATES",
    "TEMPLATE_VARIABLES",
    "AnswerFile",
    "Collator",
    "DataStatistics",
    "Encoding",
    "EpochDataLoader",
    "GlobalBatchSampler",
    "InputError",
    "content_hash",
    "count_shared_rows",
    "encode_answer",
    "encode_prompt",
    "encode_target",
    "encode_turns",
    "encoding_problem",
    "file_hash",
    "first_line",
    "is_unicode",
    "load_data",
    "marked_row",
    "resolve_template",
    "row_lengths",
    "show_turns",
    "supervised_indices",
    "task_types",
    "with_fixed_date",
]
