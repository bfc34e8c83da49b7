"""Live weights that differ from their seed in a few known places.

Outside the subset a weight *is* its seed. So no copy of the seed is kept: the seed values at the subset's positions,
next to the live weight, are the whole seed, and putting them back is exact in every dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .selection import bits


def _gather(tensor: Tensor, indices: Tensor) -> Tensor:
    """Entries of a tensor of any shape and layout at flat positions, shape (k,)."""
    return tensor.view(-1)[indices] if tensor.is_contiguous() else tensor[torch.unravel_index(indices, tensor.shape)]


def _scatter(tensor: Tensor, indices: Tensor, values: Tensor) -> None:
    if tensor.is_contiguous():
        tensor.view(-1)[indices] = values
    else:
        tensor[torch.unravel_index(indices, tensor.shape)] = values


class SparseWeight:
    """One parameter of a module and the subset of it that currently differs from the seed.

    The parameter is looked up in its module at every use, so it may be moved, cast or replaced. All edits go through
    `.data`: a swap between a forward pass and its backward pass (the reference pass of DPO) writes the same bits back,
    and must not trip autograd's version counter.

    Attributes:
        name: name of the parameter in the model, for messages.
        indices: sorted flat positions of the subset, int64 (k,).
        seeds: the seed's values there, (k,) in the parameter's dtype.
        adapters: names of the adapters whose values stand in the live weight.
        disabled: whether the seed shows although an adapter is active.
        stepped: whether an optimizer step has changed the weight since this was last set to False.
    """

    def __init__(self, module: nn.Module, attribute: str, name: str):
        self.module = module
        self.attribute = attribute
        self.name = name
        self.adapters: tuple[str, ...] = ()
        self.disabled = False
        self.stepped = False
        self._checksum: tuple[torch.dtype, int] | None = None
        self.forget()

    @property
    def parameter(self) -> nn.Parameter:
        return getattr(self.module, self.attribute)

    @property
    def data(self) -> Tensor:
        """The live weight, outside autograd."""
        return self.parameter.data

    def forget(self) -> None:
        """Take the live weight as the seed."""
        self.indices = torch.empty(0, dtype=torch.int64)
        self.seeds = torch.empty(0)
        self._checksum = None

    def place(self, indices: Tensor, seeds: Tensor) -> None:
        """Take note of a subset that has already been written."""
        self.indices, self.seeds = indices, seeds

    def _follow(self) -> Tensor:
        """Bring the notes to the live weight's device and dtype, and return that weight.

        Rounding a seed value gives the same bits whether it was rounded here or with its whole tensor.
        """
        data = self.data
        if self.seeds.device != data.device or self.seeds.dtype != data.dtype:
            self.indices, self.seeds = self.indices.to(data.device), self.seeds.to(data)
        return data

    def values(self) -> Tensor:
        """Live values of the subset, (k,)."""
        return _gather(self._follow(), self.indices)

    def revert(self) -> None:
        """Write the seed back everywhere. Exact."""
        data = self._follow()
        _scatter(data, self.indices, self.seeds)
        self.indices, self.seeds = self.indices[:0], self.seeds[:0]

    def apply(self, indices: Tensor, values: Tensor) -> None:
        """Make the live weight the seed with `values` (k,) at `indices` (k,) int64, sorted."""
        self.revert()
        data = self.data
        indices = indices.to(data.device)
        self.indices, self.seeds = indices, _gather(data, indices)
        _scatter(data, indices, values.to(data))

    def seeds_at(self, indices: Tensor) -> Tensor:
        """Seed values at any flat positions (k,) int64, whatever is applied now."""
        data = self._follow()
        values = _gather(data, indices)
        if self.indices.numel():
            slot = torch.searchsorted(self.indices, indices).clamp_max_(self.indices.numel() - 1)
            values = torch.where(self.indices[slot] == indices, self.seeds[slot], values)
        return values

    def seed_copy(self) -> Tensor:
        """A dense copy of the seed, flat, shape (n,)."""
        seed = self._follow().clone(memory_format=torch.contiguous_format).view(-1)
        seed[self.indices] = self.seeds
        return seed

    def flat(self) -> Tensor:
        """The live weight, flat, shape (n,); a view wherever its layout allows."""
        return self.data.reshape(-1)

    def remember_seed(self) -> None:
        """Note a checksum of the whole seed, so that `seed_is_intact` can tell a change nobody told us of."""
        self._checksum = self._seed_checksum()

    def seed_is_intact(self) -> bool:
        """Whether everything outside the subset still has the seed's bits (True if the weight was cast meanwhile)."""
        if self._checksum is None or self._checksum[0] != self.data.dtype:
            return True
        return self._seed_checksum() == self._checksum

    def _seed_checksum(self) -> tuple[torch.dtype, int]:
        # A sum of bit patterns can be corrected at the subset, so the seed need not be rebuilt to be summed.
        live = bits(self._follow()).sum(dtype=torch.int64)
        live += bits(self.seeds).sum(dtype=torch.int64) - bits(self.values()).sum(dtype=torch.int64)
        return self.data.dtype, int(live)
