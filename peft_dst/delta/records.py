"""One tensor's entries, and everything that must hold before they may be written into a weight."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


FORMAT_VERSION = 1
# No tensor has as many components, whose bytes torch counts in 63 bits, nor as many dimensions.
MAX_NUMEL = 2**60
_MAX_DIMENSIONS = 64
# Nor has a name as many characters or parts: the modules around a parameter are looked at one by one.
_MAX_NAME, _MAX_PARTS = 1000, 64
# Dtypes in which a seed can be compared, from exact to coarse.
_PRECISIONS: dict[torch.dtype, str] = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
DTYPES = {name: dtype for dtype, name in _PRECISIONS.items()}


class DeltaError(ValueError):
    """An adapter's entries are malformed, or belong to another base model. Nothing has been changed."""


class Record(NamedTuple):
    """Entries of one tensor: sorted flat positions, int32 or int64 (k,), and the new values there, floating (k,)."""

    indices: Tensor
    values: Tensor


class Summary(NamedTuple):
    """What `adapter_config.json` says of a record: enough to size it, and to recognise its base.

    Attributes:
        entries: number of entries.
        digest: CRC-32 of positions and values, in hexadecimal.
        seed: CRC-32 of the seed's values there, in the base's dtype and in every coarser one it may be loaded in,
            dtype → hexadecimal. So an adapter trained in float32 is recognised on the same base in bfloat16.
        shape: shape of the base's tensor, which gives flat positions their meaning.
        dtype: of the values, e.g. "bfloat16".
    """

    entries: int
    digest: str
    seed: Mapping[str, str]
    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def parse(cls, name: str, raw: Any) -> Summary:
        """Read one from JSON.

        Raises:
            DeltaError: if it has not the form of one, or the name none of a parameter's.
        """
        check_name(name)
        try:
            entries, digest, seed, shape, dtype = raw
            if (
                type(entries) is int
                and _is_checksum(digest)
                and isinstance(seed, Mapping)
                and seed
                and all(key in DTYPES and _is_checksum(checksum) for key, checksum in seed.items())
                and isinstance(shape, list | tuple)
                and 0 < entries <= _numel(shape) < MAX_NUMEL
                and dtype in DTYPES
            ):
                return cls(entries, digest, dict(seed), tuple(shape), dtype)
        except (TypeError, ValueError):
            pass
        raise DeltaError(
            f"adapter_config.json has a malformed entry for {name!r} in `records`: {raw!r:.80}. The file was damaged or "
            "edited; save the adapter again."
        )


def check_name(name: str) -> None:
    """Check that a name, or a tensor's key in a file, is no longer than any model's.

    Raises:
        DeltaError: if it is.
    """
    if len(name) > _MAX_NAME or name.count(".") >= _MAX_PARTS:
        raise DeltaError(
            f"{name[:40]!r}… has {len(name):,} characters in {name.count('.') + 1:,} parts; no parameter's name has more "
            f"than {_MAX_NAME:,} in {_MAX_PARTS}. The file was damaged or edited."
        )


def _is_checksum(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{8}", value) is not None


def _numel(shape: Sequence[object]) -> int:
    """Number of components, or `MAX_NUMEL` for what is no shape; without multiplying numbers of any length."""
    numel = 1
    for size in shape if len(shape) <= _MAX_DIMENSIONS else (0,):
        if type(size) is not int or not 0 < size < MAX_NUMEL or numel >= MAX_NUMEL:
            return MAX_NUMEL
        numel *= size
    return numel


def check_floating(name: str, dtype: torch.dtype) -> None:
    """Check that a tensor is of a dtype whose components a delta can change.

    Raises:
        DeltaError: naming the tensor.
    """
    if dtype not in _PRECISIONS:
        raise DeltaError(f"{name!r} is {dtype}: a delta has values for {', '.join(DTYPES)} only. Leave the tensor out.")


def index_dtype(numel: int) -> torch.dtype:
    """int32, or int64 for tensors whose positions do not fit."""
    return torch.int32 if numel <= 2**31 - 1 else torch.int64


def check_record(name: str, numel: int, dtype: torch.dtype, record: Record, *, allow_nonfinite: bool = False) -> None:
    """Check that entries can be written into a tensor.

    Args:
        name: the tensor's.
        numel: its components.
        dtype: its dtype, in which values must be finite.
        record: the entries.
        allow_nonfinite: whether they need not.

    Raises:
        DeltaError: naming the tensor, the first offending entry and the remedy.
    """
    indices, values = record
    if indices.dtype not in (torch.int32, torch.int64) or values.dtype not in _PRECISIONS:
        raise DeltaError(
            f"{name!r}: indices are {indices.dtype} and values {values.dtype}; expected int32 or int64, and one of "
            f"{', '.join(DTYPES)}. The file is not a DST adapter of this format; save the adapter again."
        )
    if indices.dim() != 1 or indices.shape != values.shape:
        raise DeltaError(
            f"{name!r}: indices of shape {tuple(indices.shape)} and values of shape {tuple(values.shape)}; expected two "
            "vectors of one length. The file is damaged; save or download it again."
        )
    if not indices.numel():
        return
    wrong = (indices < 0) | (indices.long() >= numel)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise DeltaError(
            f"{name!r}: entry {at} has position {int(indices[at])}, outside a tensor of {numel:,} components. The adapter "
            "was made for a base of another shape, or the file is damaged."
        )
    unsorted = indices[1:] <= indices[:-1]
    if unsorted.any():
        at = int(unsorted.nonzero()[0]) + 1
        raise DeltaError(
            f"{name!r}: positions are not strictly ascending at entry {at} ({int(indices[at])} after "
            f"{int(indices[at - 1])}). The file is damaged; save or download it again."
        )
    strange = ~torch.isfinite(values.to(dtype))
    if not allow_nonfinite and strange.any():
        at = int(strange.nonzero()[0])
        raise DeltaError(
            f"{name!r}: entry {at} has the value {float(values[at])}, which is not finite in {dtype}. An adapter "
            "may not write non-finite weights; train it again with a lower learning rate, or load a base of a wider dtype."
        )


def digest(record: Record) -> str:
    """CRC-32 of a record's positions as int64 and its values after them, in hexadecimal."""
    return _crc(record.indices.to(torch.int64), record.values)


def _crc(*tensors: Tensor) -> str:
    code = 0
    for tensor in tensors:
        code = zlib.crc32(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data, code)
    return f"{code:08x}"


def _coarser(dtype: torch.dtype) -> list[torch.dtype]:
    """The dtype itself and every one that a base may be rounded to from it."""
    return [dtype, *(d for d in _PRECISIONS if torch.finfo(d).bits < torch.finfo(dtype).bits)]


def seed_checksums(seeds: Tensor) -> dict[str, str]:
    """CRC-32 of a seed's values, (k,) in the base's dtype: dtype → hexadecimal, for it and every coarser one."""
    return {_PRECISIONS[dtype]: _crc(seeds.to(dtype)) for dtype in _coarser(seeds.dtype)}


def summarize(record: Record, checksums: Mapping[str, str], shape: Sequence[int]) -> Summary:
    """Summarise a record for `adapter_config.json`.

    Args:
        record: the entries.
        checksums: `seed_checksums` of the seed's values at their positions.
        shape: shape of the base's tensor.
    """
    return Summary(
        record.indices.numel(),
        digest(record),
        checksums,
        tuple(shape),
        _PRECISIONS[record.values.dtype],
    )


def check_shape(name: str, shape: Sequence[int], was: Sequence[int], entries: int) -> None:
    """Check that flat positions mean the same components in a tensor as where they were made.

    More or fewer rows are no harm: an embedding that was resized since keeps its positions, and those that lie beyond its
    end are found by `check_record`.

    Args:
        name: the tensor's.
        shape: its shape.
        was: that of the tensor where the positions were made.
        entries: how many there are.

    Raises:
        DeltaError: if it has rows of another shape, or fewer components than entries.
    """
    if tuple(shape[1:]) != tuple(was[1:]) or len(shape) != len(was) or entries > math.prod(shape):
        raise DeltaError(
            f"{name!r} is of shape {tuple(shape)}, and the adapter has {entries:,} entries for a tensor of shape "
            f"{tuple(was)}. It was made for another base; load it onto the one named in adapter_config.json."
        )


def check_entries(name: str, summary: Summary, record: Record) -> None:
    """Check that a record is the one that was summarised.

    Raises:
        DeltaError: if it is not.
    """
    dtype = _PRECISIONS.get(record.values.dtype)
    if (record.indices.numel(), digest(record), dtype) != (summary.entries, summary.digest, summary.dtype):
        raise DeltaError(
            f"{name!r}: the entries in adapter_model.safetensors are not those that adapter_config.json describes. The "
            "two files come from different saves; copy or download both again."
        )


def is_comparable(checksums: Mapping[str, str], dtype: torch.dtype) -> bool:
    """Whether a base's values in this dtype can be compared with a seed's of which these are known."""
    return any(_PRECISIONS[coarser] in checksums for coarser in _coarser(dtype))


def check_seed(name: str, checksums: Mapping[str, str], seeds: Tensor) -> None:
    """Check that a base has the values that an adapter was trained from.

    The comparison is made in the coarser of the two dtypes; a base in a dtype that neither rounds to the other
    (float16 against bfloat16) cannot be compared and passes.

    Args:
        name: the tensor's name.
        checksums: of the seed's values at an adapter's positions, dtype → hexadecimal, as `Summary.seed` has them.
        seeds: this base's values there, (k,).

    Raises:
        DeltaError: if they are others.
    """
    for dtype in _coarser(seeds.dtype):
        if saved := checksums.get(_PRECISIONS[dtype]):
            if saved != _crc(seeds.to(dtype)):
                raise DeltaError(
                    f"{name!r}: the base model's values differ from those the adapter was trained from. The adapter "
                    "belongs to another base, another revision of it, or one that was fine-tuned or merged since. Load "
                    "it onto the base named in adapter_config.json (base_model_name_or_path, revision)."
                )
            return
