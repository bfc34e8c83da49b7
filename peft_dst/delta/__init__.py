"""The finished artefact: records of indices and values, what a reader must check, the file they stand in, and
a code for indices.

Imports torch, numpy, safetensors and the standard library only.
"""

from .codec import MAX_COMPONENTS, decode_indices, encode_indices
from .files import (
    CONFIG_NAME,
    MARKER,
    PARTS,
    PEFT_PREFIX,
    WEIGHTS_NAME,
    find_records,
    pair,
    parse_summaries,
    read_metadata,
    stamp,
)
from .packed import pack
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
from .sparse import SparseDelta, SparseTensor


__all__ = [
    "CONFIG_NAME",
    "FORMAT_VERSION",
    "MARKER",
    "MAX_COMPONENTS",
    "PARTS",
    "PEFT_PREFIX",
    "WEIGHTS_NAME",
    "DeltaError",
    "Record",
    "SparseDelta",
    "SparseTensor",
    "Summary",
    "check_entries",
    "check_record",
    "check_seed",
    "check_shape",
    "decode_indices",
    "encode_indices",
    "find_records",
    "index_dtype",
    "pack",
    "pair",
    "parse_summaries",
    "read_metadata",
    "stamp",
    "summarize",
]
