"""The finished artefact: records of indices and values, what a reader must check, the file they stand in, a code for
indices, and what becomes of a base's checkpoint with them.

Imports torch, numpy, safetensors and the standard library only.
"""

from .checkpoint import Checkpoint, Layout, open_file, place
from .codec import MAX_COMPONENTS, decode_indices, encode_indices
from .files import (
    CONFIG_NAME,
    MARKER,
    PARTS,
    PEFT_PREFIX,
    WEIGHTS_NAME,
    check_dense_values,
    check_depth,
    describes,
    find_records,
    is_wrapper_s_copy,
    pair,
    parse_summaries,
    plain_name,
    read_metadata,
    reconcile,
    stamp,
)
from .merging import Merged, check_free, copy_others, merge, new_folder
from .packed import pack
from .patches import export_patches
from .records import (
    DTYPES,
    FORMAT_VERSION,
    DeltaError,
    Record,
    Summary,
    check_entries,
    check_record,
    check_seed,
    check_shape,
    digest,
    index_dtype,
    seed_checksums,
    summarize,
)
from .sparse import SparseDelta
from .tensors import SparseTensor


__all__ = [
    "CONFIG_NAME",
    "DTYPES",
    "FORMAT_VERSION",
    "MARKER",
    "MAX_COMPONENTS",
    "PARTS",
    "PEFT_PREFIX",
    "WEIGHTS_NAME",
    "Checkpoint",
    "DeltaError",
    "Layout",
    "Merged",
    "Record",
    "SparseDelta",
    "SparseTensor",
    "Summary",
    "check_dense_values",
    "check_depth",
    "check_entries",
    "check_free",
    "check_record",
    "check_seed",
    "check_shape",
    "copy_others",
    "decode_indices",
    "describes",
    "digest",
    "encode_indices",
    "export_patches",
    "find_records",
    "index_dtype",
    "is_wrapper_s_copy",
    "merge",
    "new_folder",
    "open_file",
    "pack",
    "pair",
    "parse_summaries",
    "place",
    "plain_name",
    "read_metadata",
    "reconcile",
    "seed_checksums",
    "stamp",
    "summarize",
]
