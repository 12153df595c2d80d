"""From data files to batches, without any model.

`files.py` reads data files, `formats.py` knows the shapes of their rows, `rows.py` checks and completes these.
`chat_template.py` renders a conversation, `segments.py` and `prompt.py` turn it into tokens, `dataset.py` encodes and
caches whole files with the processes of `workers.py`. `sources.py` puts together those that a mix (`mix.py`) names,
also from the hub (`hub.py`). `sampler.py` orders rows, `packing.py` puts several into one, `collate.py` makes batches.
`recipes.py` maps public data sets to rows, `tasks.py` and `facts.py` make them; `probe.py` has the facts that a model
is asked. `answers.py` is the file of generated answers, `atomic.py` how files and folders are written, `errors.py` what
the user can fix.
"""

from data.answers import AnswerFile
from data.chat_template import TEMPLATE_VARIABLES, with_fixed_date
from data.collate import IGNORED_LABEL, Collator, PackingCollator, supervised_indices
from data.dataset import (
    DataStatistics,
    Encoding,
    answer_start,
    count_shared_rows,
    count_supervised,
    file_hash,
    load_data,
    row_lengths,
    task_types,
    turns_before_answer,
)
from data.errors import InputError, first_line
from data.files import is_unicode
from data.formats import Conversation
from data.packing import PackedRows, pack
from data.prompt import (
    TEMPLATES,
    encode_answer,
    encode_conversations,
    encode_prompt,
    encode_question,
    encode_target,
    encode_turns,
    encoding_problem,
    marked_row,
    resolve_template,
    show_turns,
)
from data.rows import Reading
from data.sampler import ORDERS, EpochDataLoader, GlobalBatchSampler
from data.sources import Part, load_part

__all__ = [
    "IGNORED_LABEL",
    "ORDERS",
    "TEMPLATES",
    "TEMPLATE_VARIABLES",
    "AnswerFile",
    "Collator",
    "Conversation",
    "DataStatistics",
    "Encoding",
    "EpochDataLoader",
    "GlobalBatchSampler",
    "InputError",
    "PackedRows",
    "PackingCollator",
    "Part",
    "Reading",
    "answer_start",
    "count_shared_rows",
    "count_supervised",
    "encode_answer",
    "encode_conversations",
    "encode_prompt",
    "encode_question",
    "encode_target",
    "encode_turns",
    "encoding_problem",
    "file_hash",
    "first_line",
    "is_unicode",
    "load_data",
    "load_part",
    "marked_row",
    "pack",
    "resolve_template",
    "row_lengths",
    "show_turns",
    "supervised_indices",
    "task_types",
    "turns_before_answer",
    "with_fixed_date",
]
