"""A delta made ready for a model's flat storage: checked, with positions in the buffers and the seed values there."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from ..core.tiles import bits
from ..delta import PEFT_PREFIX, DeltaError, SparseDelta, check_dense_values, check_seed
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

    @cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions, and the bits of values and seeds, over the same memory; on the CPU."""
        return self.positions.numpy(), bits(self.values).numpy(), bits(self.seeds).numpy()


class ReadDelta:
    """A delta as it was read, in the host's memory.

    Args:
        delta: what was read.
    """

    def __init__(self, delta: SparseDelta) -> None:
        # What was read may be a mapping of a file, which others may change or cut.
        tensors = {
            name: replace(one, indices=one.indices.clone(), values=one.values.clone()) for name, one in delta.items()
        }
        self.delta = delta = replace(
            delta, tensors=tensors, dense={key: one.clone() for key, one in delta.dense.items()}
        )
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
    dense: Mapping[str, nn.Parameter] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts) + sum(tensor.nbytes for tensor in self.dense.values())

    @property
    def entries(self) -> int:
        return sum(part.positions.numel() for part in self.parts)


#: The base itself.
UNCHANGED = Placed(())


@torch.no_grad()
def place(
    delta: SparseDelta,
    storage: FlatStorage,
    heads: Container[nn.Module],
    seeds_at: Callable[[int, Tensor], Tensor],
    check: bool = True,
) -> Placed:
    """Make a delta ready.

    Args:
        delta: what was read of it.
        storage: of the model.
        heads: of the model, which a delta may bring in another size.
        seeds_at: what the base has in a buffer, by its number, at positions, int64 (k,).
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
    dense = _dense(delta, storage, heads)
    # Shapes, dtypes and positions are checked here; what stands in the weights may be another delta's, or half of it.
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
        seeds = seeds_at(number, positions)
        if check:
            for name, own in zip(names, seeds.split([len(known[name]) for name in names]), strict=True):
                if checksums := delta[name].checksums():
                    check_seed(name, checksums, own)
        parts.append(Part(number, positions, values, seeds))
    return Placed(tuple(parts), dense)


@torch.no_grad()
def seeds_below(shown: Placed, storage: FlatStorage, buffer: int, positions: Tensor) -> Tensor:
    """What the base has in a buffer at these positions, int64 (k,), below the delta that is in the weights."""
    found = storage.buffers[buffer][positions]
    part = next((part for part in shown.parts if part.buffer == buffer), None)
    if part is not None and part.positions.numel():
        at = torch.searchsorted(part.positions, positions).clamp_(max=part.positions.numel() - 1)
        found = torch.where(part.positions[at] == positions, part.seeds[at], found)
    return found


def _dense(delta: SparseDelta, storage: FlatStorage, heads: Container[nn.Module]) -> dict[str, nn.Parameter]:
    """Dense tensors by the names of the parameters whose place they take."""
    dense = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in delta.dense.items()}
    found = {}
    for name, tensor in dense.items():
        if (parameter := storage.parameters.get(name)) is None:
            raise DeltaError(f"the delta brings a whole tensor for {name!r}, which this model does not have.")
        if tensor.shape != parameter.shape and not _is_resized(name, dense, storage, heads):
            raise DeltaError(
                f"the delta brings a tensor of shape {tuple(tensor.shape)} for {name!r}, which has "
                f"{tuple(parameter.shape)} in this model. A head may have another number of rows, and embeddings more; "
                "all of their tensors come with them then."
            )
        if tensor.is_floating_point() != parameter.is_floating_point() or tensor.is_complex():
            raise DeltaError(
                f"the delta brings a tensor of {tensor.dtype} for {name!r}, which is {parameter.dtype} here."
            )
        # A copy, as what was read may be a mapping of a file, which others may change or cut.
        copied = tensor.to(parameter.device, parameter.dtype, copy=True)
        check_dense_values(name, copied)
        found[name] = nn.Parameter(copied, requires_grad=False)
    return found


def _is_resized(name: str, dense: Mapping[str, Tensor], storage: FlatStorage, heads: Container[nn.Module]) -> bool:
    """Whether a head's own tensors all come with the delta, longer or shorter along their first dimension alone.

    So does a head of other classes. A vector by itself is none: norms and biases are as long as what they are added to. An
    embedding may have more rows wherever it is, but not fewer, as tokens that the base has would be outside of it. Other
    modules of the body may work in another size by themselves, as attention does with fewer keys and values, by which a
    batch could not go on beside those of other deltas.
    """
    module = storage.owners[name][0]
    own = {other: storage.parameters[other] for other, (owner, _) in storage.owners.items() if owner is module}
    return (
        (module in heads or isinstance(module, nn.Embedding))
        and own.keys() <= dense.keys()
        and len({dense[other].shape[:1] for other in own}) == 1
        and all(dense[other].numel() and dense[other].shape[1:] == p.shape[1:] for other, p in own.items())
        and any(p.dim() > 1 for p in own.values())
        and not (isinstance(module, nn.Embedding) and len(dense[name]) < len(storage.parameters[name]))
    )


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
    wholes = [Whole(*storage.owners[name], storage.parameters[name], one) for name, one in placed.dense.items()]
    found = changes_of(readers, entries, wholes)
    # Its values and seeds are held by this, too.
    return Mixable(placed, found, placed.nbytes + sum(of_one.nbytes for of_one in found.values()))


def write(storage: FlatStorage, placed: Placed, seeds: bool = False) -> None:
    """Write a delta's values into the buffers, or the seed's in their place."""
    for part in placed.parts:
        array = storage.arrays[part.buffer]
        if array is None:
            storage.buffers[part.buffer].scatter_(0, part.positions, part.seeds if seeds else part.values)
        else:
            # torch's own call takes several times as long to begin.
            positions, new, own = part.arrays
            array[positions] = own if seeds else new
