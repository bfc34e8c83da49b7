"""The finished artefact: records of indices and values, what a reader must check, and the file they stand in.

Imports torch, safetensors and the standard library only.
"""

from .files import (
    MARKER,
    PARTS,
    PEFT_PREFIX,
    RECORD_KEY,
    WEIGHTS_NAME,
    parse_summaries,
    read_metadata,
    read_records,
    read_summaries,
    stamp,
)
from .records import (
    FORMAT_VERSION,
    DeltaError,
    Record,
    Summary,
    check_entries,
    check_record,
    check_seed,
    check_shape,
    index_dtype,
    summarize,
)


__all__ = [
    "FORMAT_VERSION",
    "MARKER",
    "PARTS",
    "PEFT_PREFIX",
    "RECORD_KEY",
    "WEIGHTS_NAME",
    "DeltaError",
    "Record",
    "Summary",
    "check_entries",
    "check_record",
    "check_seed",
    "check_shape",
    "index_dtype",
    "parse_summaries",
    "read_metadata",
    "read_records",
    "read_summaries",
    "stamp",
    "summarize",
]
