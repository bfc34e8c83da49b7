"""Packed files: all records as one code of positions and one vector of values, in as few bytes as they can be had.

The tensors with entries are thought of one after another, sorted by name, those of one dtype of values together; a
component's position in the whole is the number of components before its tensor, and its position there.

    dst_packed_records             uint8, zlib of the description as JSON: name → [entries, digest, seed, shape, dtype]
    dst_packed_indices_<dtype>     uint8, the code (`codec`) of the ascending positions of all entries of that dtype
    dst_packed_values_<dtype>      their values, in that dtype
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .codec import MAX_COMPONENTS, decode_indices, encode_indices
from .records import DTYPES, DeltaError, Record, Summary, index_dtype


DESCRIPTION = "dst_packed_records"
_PARTS = ("dst_packed_indices", "dst_packed_values")
_KEYS = {DESCRIPTION, *(f"{part}_{dtype}" for part in _PARTS for dtype in DTYPES)}
# How long a description may be, decompressed: most of it is checksums, and those hardly get shorter.
_RATIO, _SLACK = 16, 1 << 12


def is_packed(key: str) -> bool:
    """Whether a file's key is one of a packed file's."""
    return key in _KEYS


def pack(records: Mapping[str, Record], summaries: Mapping[str, Summary]) -> dict[str, Tensor]:
    """Pack records.

    Args:
        records: parameter's name → its record.
        summaries: the same names → their summaries.

    Returns:
        Key → tensor, on the CPU; nothing for no records.

    Raises:
        ValueError: if the tensors have more than 2^40 components together.
    """
    packed = {}
    for dtype, names in _by_dtype(summaries).items():
        positions, start = [], 0
        for name in names:
            positions.append(records[name].indices.cpu().long() + start)
            start += math.prod(summaries[name].shape)
        if start > MAX_COMPONENTS:
            raise ValueError(
                f"the tensors have {start:,} components, more than a packed file can address. Save it plain."
            )
        indices_key, values_key = (f"{part}_{dtype}" for part in _PARTS)
        packed[indices_key] = encode_indices(torch.cat(positions), start)
        packed[values_key] = torch.cat([records[name].values.cpu() for name in names])
    if packed:
        description = json.dumps({name: summaries[name] for name in sorted(summaries)}, separators=(",", ":"))
        code = zlib.compress(description.encode(), 9)
        packed[DESCRIPTION] = torch.frombuffer(bytearray(code), dtype=torch.uint8)
    return packed


def describe(packed: Mapping[str, Tensor]) -> dict[str, Any]:
    """The description in a packed file: parameter's name → its Summary, as JSON.

    Raises:
        DeltaError: if it is missing or damaged.
    """
    code = packed.get(DESCRIPTION)
    try:
        if code is None or code.dtype != torch.uint8 or code.dim() != 1:
            raise ValueError("it is missing" if code is None else f"it is {code.dtype} of shape {tuple(code.shape)}")
        reader = zlib.decompressobj()
        text = reader.decompress(code.cpu().numpy().tobytes(), _RATIO * code.numel() + _SLACK)
        if not reader.eof or reader.unused_data:
            raise ValueError("it does not end where it should")
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError("it is no map")
    except (ValueError, zlib.error, RecursionError) as error:
        raise DeltaError(
            f"{DESCRIPTION!r} cannot be read ({error}). The file is damaged; save or download it again."
        ) from error
    return found


def unpack(packed: Mapping[str, Tensor]) -> dict[str, Record]:
    """Read records back; whether each is what its summary says is for the caller to check.

    Args:
        packed: key → tensor.

    Raises:
        DeltaError: if the tensors are damaged.
    """
    summaries = {name: Summary.parse(name, raw) for name, raw in describe(packed).items()}
    records = {}
    left = packed.keys() - {DESCRIPTION}
    for dtype, names in _by_dtype(summaries).items():
        keys = [f"{part}_{dtype}" for part in _PARTS]
        if missing := set(keys) - packed.keys():
            raise DeltaError(f"the file has no {min(missing)!r}, which it announces. It is damaged; save it again.")
        left -= set(keys)
        code, values = (packed[key] for key in keys)
        sizes = [math.prod(summaries[name].shape) for name in names]
        counts = [summaries[name].entries for name in names]
        total, count = sum(sizes), sum(counts)
        if total > MAX_COMPONENTS or values.dtype != DTYPES[dtype] or values.shape != (count,):
            raise DeltaError(
                f"{keys[1]!r} is {values.dtype} of shape {tuple(values.shape)}; {count:,} values of {dtype} in tensors of "
                f"{total:,} components were announced. The file is damaged; save or download it again."
            )
        try:
            positions = decode_indices(code, total, count)
        except DeltaError as error:
            raise DeltaError(f"{keys[0]!r}: {error}") from error
        start = 0
        parts = zip(names, sizes, positions.split(counts), values.split(counts), strict=True)
        for name, size, indices, entries in parts:
            # Copies: a view of the whole would keep it in memory, and be saved with it.
            records[name] = Record((indices - start).to(index_dtype(size)), entries.clone())
            start += size
    if left:
        raise DeltaError(f"the file has {min(left)!r}, which it does not announce. It is damaged; save it again.")
    return records


def _by_dtype(summaries: Mapping[str, Summary]) -> dict[str, list[str]]:
    """Dtype → names of the tensors with such values, sorted."""
    names: dict[str, list[str]] = {}
    for name in sorted(summaries):
        names.setdefault(summaries[name].dtype, []).append(name)
    return names
