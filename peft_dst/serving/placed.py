"""A delta made ready for a model's flat storage: checked, with positions in the buffers and the seed values there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..core.tiles import bits
from ..delta import PEFT_PREFIX, DeltaError, SparseDelta, check_seed
from ..mixing import Changes, Entries, Reader, Readers, Whole, changes_of
from .storage import FlatStorage


@dataclass(frozen=True)
class Part:
    """A delta's entries in one buffer.

    Attributes:
        buffer: its number.
        positions: ascending positions in it, int64 (k,).
        values: new values, (k,) in the buffer's dtype.
        seeds: what the base has there, likewise.
    """

    buffer: int
    positions: Tensor
    values: Tensor
    seeds: Tensor

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.positions, self.values, self.seeds))


class ReadDelta:
    """A delta as it was read, in the host's memory.

    Args:
        delta: what was read.
        pinned: put it into memory from which an accelerator copies by itself.
    """

    def __init__(self, delta: SparseDelta, pinned: bool = False) -> None:
        if pinned:
            tensors = {
                name: replace(one, indices=one.indices.pin_memory(), values=one.values.pin_memory())
                for name, one in delta.items()
            }
            delta = replace(delta, tensors=tensors, dense={key: one.pin_memory() for key, one in delta.dense.items()})
        self.delta = delta
        self.nbytes = sum(one.indices.nbytes + one.values.nbytes for one in delta.values()) + sum(
            tensor.nbytes for tensor in delta.dense.values()
        )


@dataclass(frozen=True, eq=False)
class Placed:
    """A delta on one model.

    Attributes:
        parts: its entries, one part a buffer at most.
        dense: whole tensors (a head) that take the place of parameters, by the parameters' names.
    """

    parts: tuple[Part, ...]
    dense: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts) + sum(tensor.nbytes for tensor in self.dense.values())

    @property
    def entries(self) -> int:
        return sum(part.positions.numel() for part in self.parts)


#: The base itself.
BASE = Placed(())


@torch.no_grad()
def place(delta: SparseDelta, storage: FlatStorage, shown: Placed, check: bool = True) -> Placed:
    """Make a delta ready.

    Args:
        delta: what was read of it.
        storage: of the model.
        shown: what is in the weights now; the delta belongs to the base below it.
        check: whether to compare the base's values with the delta's checksums.

    Raises:
        DeltaError: if the delta is not one of this base's, or changes a parameter that is not in the storage.
    """
    weights = storage.weights()
    for name in delta:
        if name not in storage:
            raise DeltaError(
                f"the delta has entries for {name!r}, which is no plain floating parameter of this model: it is missing, "
                "quantised or sharded. A pool serves plain weights; peft_dst's adapters in PEFT serve quantised ones."
            )
    dense = _dense(delta, storage)
    # Shapes, dtypes and positions are checked here; what stands in the weights may be another delta's.
    known = delta.with_seeds(weights, check=False)
    parts = []
    for number, buffer in enumerate(storage.buffers):
        names = [name for name in known if storage.places[name].buffer == number]
        names.sort(key=lambda name: storage.places[name].start)
        if not names:
            continue
        positions = torch.cat([known[name].indices + storage.places[name].start for name in names]).to(buffer.device)
        # Tied parameters have several names, of which a delta has one.
        if bool((positions.diff() <= 0).any()):
            raise DeltaError("the delta has entries for one parameter under two names; keep one of them.")
        values = torch.cat([known[name].values for name in names]).to(buffer)
        seeds = _seeds(buffer, positions, next((part for part in shown.parts if part.buffer == number), None))
        if check:
            for name, own in zip(names, seeds.split([len(known[name]) for name in names]), strict=True):
                _check_seed(name, delta, own)
        parts.append(Part(number, positions, values, seeds))
    return Placed(tuple(parts), dense)


def _seeds(buffer: Tensor, positions: Tensor, shown: Part | None) -> Tensor:
    """What the base has at these positions, below the delta that is shown."""
    found = buffer[positions]
    if shown is not None and shown.positions.numel():
        at = torch.searchsorted(shown.positions, positions).clamp_(max=shown.positions.numel() - 1)
        found = torch.where(shown.positions[at] == positions, shown.seeds[at], found)
    return found


def _check_seed(name: str, delta: SparseDelta, seeds: Tensor) -> None:
    summary = delta[name].summary()
    if summary is not None and summary.seed:
        check_seed(name, summary, delta[name].record(), seeds)


def _dense(delta: SparseDelta, storage: FlatStorage) -> dict[str, Tensor]:
    """Dense tensors by the names of the parameters whose place they take."""
    found = {}
    for key, tensor in delta.dense.items():
        name = key.removeprefix(PEFT_PREFIX)
        if (parameter := storage.parameters.get(name)) is None:
            raise DeltaError(f"the delta brings a whole tensor for {name!r}, which this model does not have.")
        if tensor.dim() != parameter.dim():
            raise DeltaError(
                f"the delta brings a tensor of shape {tuple(tensor.shape)} for {name!r}, which has "
                f"{tuple(parameter.shape)} in this model."
            )
        found[name] = tensor.to(parameter.device, parameter.dtype)
    return found


@dataclass(frozen=True, eq=False)
class Mixable:
    """A delta as mixed batches take it: what it changes, module by module."""

    placed: Placed
    changes: Mapping[Reader, Changes]
    nbytes: int


def mixable(placed: Placed, storage: FlatStorage, readers: Readers) -> Mixable:
    """Arrange a delta for mixed batches.

    Args:
        placed: the delta on this model.
        storage: of the model.
        readers: of the model.
    """
    entries = [
        Entries(parameter, data, part.positions[at] - start, part.values[at], part.seeds[at])
        for part in placed.parts
        for parameter, data, at, start in storage.split(part.buffer, part.positions)
    ]
    wholes = [Whole(storage.parameters[name], tensor) for name, tensor in placed.dense.items()]
    found = changes_of(readers, entries, wholes)
    # Its values and seeds are held by this, too.
    return Mixable(placed, found, placed.nbytes + sum(of_one.nbytes for of_one in found.values()))


def write(storage: FlatStorage, placed: Placed, seeds: bool = False) -> None:
    """Write a delta's values into the buffers, or the seed's in their place."""
    for part in placed.parts:
        storage.buffers[part.buffer].scatter_(0, part.positions, part.seeds if seeds else part.values)


def is_written(storage: FlatStorage, placed: Placed) -> bool:
    """Whether the buffers have a delta's values, bit for bit."""
    return all(
        torch.equal(bits(storage.buffers[part.buffer][part.positions]), bits(part.values)) for part in placed.parts
    )
