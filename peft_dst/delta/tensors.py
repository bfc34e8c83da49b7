"""Entries of one tensor, and what is calculated of several's: `SparseDelta` does the same for all tensors of a base."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.tiles import bits
from .records import Record, Summary, index_dtype, seed_checksums, summarize


@dataclass(frozen=True, eq=False)
class SparseTensor:
    """Entries of one tensor.

    Attributes:
        shape: shape of the base's tensor.
        indices: sorted flat positions, each once, int64 (k,).
        values: the new values there, floating (k,).
        seeds: what the base has there, (k,) in the base's dtype; None if it is not known.
        digests: checksums of the seeds by dtype, as saved; None if there are none. Where `seeds` are known they count.
    """

    shape: tuple[int, ...]
    indices: Tensor
    values: Tensor
    seeds: Tensor | None = None
    digests: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))

    def __len__(self) -> int:
        return self.indices.numel()

    def __eq__(self, other: object) -> bool:
        """Same shape, same positions, same values in the same dtype, bit for bit."""
        if not isinstance(other, SparseTensor):
            return NotImplemented
        return (
            self.shape == other.shape
            and self.values.dtype == other.values.dtype
            and torch.equal(self.indices, other.indices)
            and torch.equal(bits(self.values), bits(other.values))
        )

    __hash__ = None  # type: ignore[assignment]

    def take(self, kept: Tensor) -> SparseTensor:
        """Those entries where `kept` (k,) bool is true."""
        if bool(kept.all()):
            return self
        seeds = None if self.seeds is None else self.seeds[kept]
        return SparseTensor(self.shape, self.indices[kept], self.values[kept], seeds)

    def record(self) -> Record:
        """Indices in the dtype they have in files, and values."""
        return Record(self.indices.to(index_dtype(math.prod(self.shape))), self.values)

    def summary(self) -> Summary | None:
        """What a file says of these entries, or None where seeds and their checksums are unknown."""
        if self.seeds is None and self.digests is None:
            return None
        return summarize(self.record(), self.checksums(), self.shape)

    def checksums(self) -> Mapping[str, str]:
        """Of the seeds, by dtype; empty if nothing is known of them."""
        return self.digests or {} if self.seeds is None else seed_checksums(self.seeds)


@dataclass(frozen=True)
class Aligned:
    """The values of one delta on the union of several's positions, (k,), and which of them it has, bool (k,)."""

    values: Tensor
    has: Tensor

    def where_absent(self, other: Tensor) -> Tensor:
        return torch.where(self.has, self.values, other.to(self.values))


def align(tensors: Sequence[SparseTensor | None]) -> tuple[Tensor, Tensor, list[Aligned]]:
    """Bring several on the union of their positions: (positions, the first's seeds there, each one's values there)."""
    there = [tensor for tensor in tensors if tensor is not None]
    indices = torch.cat([tensor.indices for tensor in there]).unique()
    first = there[0].seeds
    assert first is not None
    seeds = torch.zeros(indices.numel(), dtype=first.dtype, device=indices.device)
    # The first one's seeds count.
    for earlier in reversed(there):
        if earlier.seeds is not None:
            seeds[torch.searchsorted(indices, earlier.indices)] = earlier.seeds.to(seeds)
    aligned = []
    for tensor in tensors:
        has = torch.zeros(indices.numel(), dtype=torch.bool, device=indices.device)
        values = torch.zeros(indices.numel(), dtype=there[0].values.dtype, device=indices.device)
        if tensor is not None:
            at = torch.searchsorted(indices, tensor.indices)
            has[at] = True
            values[at] = tensor.values
        aligned.append(Aligned(values, has))
    return indices, seeds, aligned


def last(aligned: Sequence[Aligned]) -> Tensor:
    """The values of the last one that has any; where none has, nothing of use."""
    values = aligned[0].values
    for later in aligned[1:]:
        values = torch.where(later.has, later.values, values)
    return values


def summed(aligned: Sequence[Aligned], seeds: Tensor) -> Tensor:
    """Seed + Σ (value − seed), of those that have one."""
    count = torch.stack([one.has for one in aligned]).sum(dim=0)
    shift = torch.zeros_like(seeds, dtype=torch.float64)
    for one in aligned:
        shift += torch.where(one.has, one.values.double() - seeds.double(), 0.0)
    total = seeds.double() + shift
    # Exact where only one has an entry.
    return torch.where(count == 1, last(aligned), total.to(aligned[0].values))


def shared(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positions that two sorted vectors share, and where in each they stand."""
    where = torch.isin(a, b, assume_unique=True).nonzero().view(-1)
    return a[where], where, torch.searchsorted(b, a[where])


def changed(tensor: SparseTensor) -> SparseTensor:
    """Those entries whose value is not their seed's, bit for bit."""
    assert tensor.seeds is not None
    return tensor.take(bits(tensor.values) != bits(tensor.seeds.to(tensor.values)))
