"""The finished artefact: records of indices and values, what a reader must check, the file they stand in, and
a code for indices.

Imports torch, numpy, safetensors and the standard library only.
"""

from .codec import MAX_COMPONENTS, decode_indices, encode_indices
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
    index_dtype,
    summarize,
)


__all__ = [
    "FORMAT_VERSION",
    "MARKER",
    "MAX_COMPONENTS",
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
    "decode_indices",
    "encode_indices",
    "index_dtype",
    "parse_summaries",
    "read_metadata",
    "read_records",
    "read_summaries",
    "stamp",
    "summarize",
]
