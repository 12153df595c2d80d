"""From data files to batches, without any model.

`files.py` reads data files, `rows.py` checks rows, `prompt.py` turns them into tokens, `dataset.py` encodes and caches
whole files with the processes of `workers.py`, `sampler.py` orders rows, `packing.py` puts several into one,
`collate.py` makes batches. `recipes.py` maps
public data sets to rows, `tasks.py` and `facts.py` make them. `answers.py` is the file of generated answers,
`atomic.py` how files and folders are written, `errors.py` what the user can fix.
"""

from data.answers import AnswerFile
from data.collate import IGNORED_LABEL, Collator, PackingCollator, supervised_indices
from data.dataset import (
    DataStatistics,
    Encoding,
    count_shared_rows,
    file_hash,
    load_data,
    row_lengths,
    task_types,
)
from data.errors import InputError, first_line
from data.files import is_unicode
from data.packing import PackedRows, pack
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
    "PackedRows",
    "PackingCollator",
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
    "pack",
    "resolve_template",
    "row_lengths",
    "show_turns",
    "supervised_indices",
    "task_types",
    "with_fixed_date",
]
