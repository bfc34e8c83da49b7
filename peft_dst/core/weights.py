"""Live weights that differ from their seed in a few known places.

Outside the subset a weight *is* its seed. So no copy of the seed is kept: the seed values at the subset's positions,
next to the live weight, are the whole seed, and putting them back is exact in every dtype.

Where several processes hold a weight together, "the weight" is what this process holds of it, and positions are those in
that, but for shapes and for what is said to be of the whole tensor.
"""

from __future__ import annotations

import weakref
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from .checksums import SeedChecksum
from .shards import Box, box_of, divide_again, local, put_local, together
from .tiles import bits


class Undoable(Protocol):
    """A step under way over some weights."""

    def recover(self) -> None: ...


def gather(tensor: Tensor, indices: Tensor) -> Tensor:
    """Entries of a tensor of any shape and layout at flat positions, shape (k,)."""
    if tensor.is_contiguous():
        return tensor.view(-1).index_select(0, indices)
    return tensor[torch.unravel_index(indices, tensor.shape)]


def scatter(tensor: Tensor, indices: Tensor, values: Tensor) -> None:
    """Write values (k,) at flat positions (k,) of a tensor of any shape and layout."""
    if tensor.is_contiguous():
        tensor.view(-1).index_copy_(0, indices, values)
    else:
        tensor[torch.unravel_index(indices, tensor.shape)] = values


def widened(live: Tensor, values: Tensor | None) -> Tensor:
    """Half-precision values in float32: those that are remembered, wherever they are what the live ones were made of."""
    if values is None or values.shape != live.shape:
        return live.float()
    return torch.where(values.to(live.dtype) == live, values, live.to(values.dtype))


class SparseWeight:
    """One parameter of a module and the subset of it that currently differs from the seed.

    The parameter is looked up in its module at every use, so it may be moved, cast or replaced. All edits go through
    `.data`: a swap between a forward pass and its backward pass (the reference pass of DPO) writes the same bits back,
    and must not trip autograd's version counter.

    While an optimizer steps, the parameter lends it a working copy to write into, and the live weight stays untouched.

    Attributes:
        name: name of the parameter in the model, for messages.
        indices: sorted flat positions of the subset, int64 (k,).
        seeds: the seed's values there, (k,) in the parameter's dtype.
        adapters: names of the adapters whose values stand in the live weight.
        disabled: whether the seed shows although an adapter is active.
        free: where the subset is fixed and trained, the parameter that holds its exact values, (k,) in float32 or wider;
            `free_at` is where they stand, int64 (k,). Both stay while the adapter is disabled.
        frees: the same of every adapter with a fixed subset here.
        superseded: parameters that stood there before, with another subset.
        averaged_by: the DistributedDataParallel module that averages gradients before they are gathered for `free`, as far
            as the last forward pass told; `averaged` is whether it does so after that pass.
        stepped: whether an optimizer step has changed the weight since this was last set to False.
        seed_checksum: what tells a change of the seed that nobody told us of.
    """

    def __init__(self, module: nn.Module, attribute: str, name: str):
        self.module = module
        self.attribute = attribute
        self.name = name
        self.adapters: tuple[str, ...] = ()
        self.disabled = False
        self.stepped = False
        self.free: nn.Parameter | None = None
        self.free_at: Tensor | None = None
        self.frees: dict[str, nn.Parameter] = {}
        self.superseded: list[weakref.ref[nn.Parameter]] = []
        self.averaged_by: weakref.ref[nn.Module] | None = None
        self.averaged = True
        #: The parameter whose gradients are gathered for `free`, and its hook.
        self.watched: tuple[nn.Parameter, RemovableHandle] | None = None
        #: The outermost step over `free` that is under way.
        self.stepping: weakref.ref[object] | None = None
        #: How often the seed was replaced.
        self.generation = 0
        self._seed_bound: tuple[object, float] | None = None
        #: The parameter where it is divided over processes: FSDP2 puts whole ones in its place for a forward pass.
        self._divided: DTensor | None = None
        self._box: tuple[object, Box] | None = None
        #: What of the whole tensor the noted positions are positions in.
        self._noted_in: Box | None = None
        self.requires_grad_before = self.parameter.requires_grad
        self.seed_checksum = SeedChecksum(self)
        #: The outermost optimizer step that has begun over this weight and has not come to its end.
        self.under_way: Undoable | None = None
        self._live: Tensor | None = None
        self.forget()

    def __getstate__(self) -> dict[str, object]:
        self.recover()
        # Copies of a parameter come without its hooks.
        return {**self.__dict__, "watched": None, "stepping": None, "superseded": [], "averaged_by": None, "_box": None}

    @property
    def registered(self) -> nn.Parameter:
        """What the module has under its name now: the parameter, or the gathered one that FSDP2 has put in its place."""
        # It is asked for some thirty times a step, and a module's own way takes three times as long.
        found = self.module._parameters.get(self.attribute)
        return getattr(self.module, self.attribute) if found is None else found

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter itself, also while a gathered one stands in its place."""
        found = self.registered
        if isinstance(found, DTensor) and not self._is_gathered(found):
            self._divided = found
        return found if self._divided is None else cast(nn.Parameter, self._divided)

    def _is_gathered(self, found: Tensor) -> bool:
        """Whether what stands in the parameter's place is more than this process's part of it."""
        known = self._divided
        if known is None or found is known:
            return False
        # What stays divided along other dimensions may be no larger, where FSDP's dimension is of size 1.
        fewer = isinstance(found, DTensor) and found.device_mesh.ndim < known.device_mesh.ndim
        return fewer or local(found).numel() > local(known).numel()

    @property
    def data(self) -> Tensor:
        """The live weight, outside autograd."""
        return self.working if self._live is None else self._live

    @property
    def working(self) -> Tensor:
        """What stands in the live weight's place, outside autograd: itself, or the working copy that was lent."""
        parameter = self.parameter
        return local(parameter) if isinstance(parameter, DTensor) else parameter.data

    @property
    def shape(self) -> torch.Size:
        """Of the whole tensor."""
        return self.parameter.shape

    @property
    def box(self) -> Box:
        """What of the whole tensor the live weight is."""
        parameter = self.parameter
        if not isinstance(parameter, DTensor):
            return box_of(parameter)
        # It is asked for several times a step.
        if self._box is None or self._box[0] is not parameter._spec:
            self._box = parameter._spec, box_of(parameter)
        return self._box[1]

    @property
    def is_divided(self) -> bool:
        """Whether several processes hold the weight together."""
        return isinstance(self.parameter, DTensor)

    @property
    def is_managed(self) -> bool:
        """Whether FSDP2 divides the parameters of its module; it may have been told to ignore some."""
        return getattr(self.module, "_is_fsdp_managed_module", False)

    @property
    def device(self) -> torch.device:
        """Where notes on the weight are kept: where it is, or on the CPU while it has no memory ("meta")."""
        device = self.data.device
        return torch.device("cpu") if device.type == "meta" else device

    def check_memory(self) -> None:
        """Check that the weight can be read and written.

        Raises:
            RuntimeError: if it has no memory.
        """
        if self.data.is_meta:
            raise RuntimeError(
                f"{self.name!r} has no memory now (device 'meta'), so it can neither be trained, nor saved, nor switched "
                "to another adapter or the seed. If the base model is still to be loaded, load it first; if it was "
                "offloaded (a device_map, accelerate's hooks), bring it back with "
                "accelerate.hooks.remove_hook_from_submodules."
            )

    def prepare_to_write(self) -> None:
        """See to it that what is written into the live weight is what the next forward pass uses.

        Raises:
            RuntimeError: if that cannot be had.
        """
        if self._is_in_place():
            return
        divide_again({self.module})
        if self._divided is not None and not self._is_in_place():
            raise RuntimeError(
                f"{self.name!r} is gathered from all processes now, as FSDP leaves it after a forward pass without "
                "gradients, so writing into this process's part of it would not be seen. Call reshard() on the FSDP "
                "modules."
            )

    def _is_in_place(self) -> bool:
        found = self.registered
        if self._divided is None:
            return isinstance(found, DTensor) or not self.is_managed
        return found is self._divided

    def lend(self) -> Tensor:
        """Have a working copy in the live weight's place, for an optimizer to write into, and return it."""
        self.prepare_to_write()
        live = self.data
        copied = live.clone()
        if self.is_divided:
            # FSDP gathers the memory that it knows, and no other. A closure within the step is to see what the optimizer
            # has written.
            self._live = copied
            return live
        put_local(self.parameter, copied)
        self._live = live
        return copied

    def take_back(self) -> None:
        """Put the live weight back into its place, if a working copy stands there."""
        if self._live is None:
            return
        if self.is_divided:
            self.working.copy_(self._live)
        else:
            put_local(self.parameter, self._live)
        self._live = None

    def give_up(self) -> Tensor:
        """Make the working copy the live weight, with the same values; the one from before is returned as the seed."""
        seed = self.data
        self.working.copy_(seed)
        scatter(seed, self.indices, self.seeds)
        self._live = None
        return seed

    def forget(self) -> None:
        """Take the live weight as the seed."""
        self.generation += 1
        self.under_way = None
        # Whatever the default device is.
        self.indices, self.seeds = torch.empty(0, dtype=torch.int64, device="cpu"), torch.empty(0, device="cpu")
        self._noted_in = None
        self.seed_checksum.forget()

    def let_go(self) -> None:
        """No adapter tunes the weight any more: it may change as it will."""
        self.forget()
        self.seed_checksum.let_go()

    def place(self, indices: Tensor, seeds: Tensor) -> None:
        """Take note of a subset that has already been written."""
        self.indices, self.seeds = indices, seeds
        self._noted_in = self.box if self.is_divided else None

    def _follow(self) -> Tensor:
        """Bring the notes to the live weight's device and dtype, and to what of the tensor it is; return that weight.

        Rounding a seed value gives the same bits whether it was rounded here or with its whole tensor.
        """
        data = self.data
        if self.is_divided and self._noted_in != (box := self.box):
            self._divide_notes(box)
        if not data.is_meta and (self.seeds.device != data.device or self.seeds.dtype != data.dtype):
            self.indices, self.seeds = self.indices.to(data.device), self.seeds.to(data)
        return data

    def _divide_notes(self, box: Box) -> None:
        """The tensor has been divided over processes since its subset was noted."""
        if self._noted_in is not None and self.indices.numel():
            raise RuntimeError(
                f"{self.name!r} was divided over processes anew while an adapter stands in it. Divide the base model once, "
                "then load the adapter."
            )
        inside, self.indices = box.inwards(self.indices)
        self.seeds, self._noted_in = self.seeds[inside], box
        # The whole one's checksum is of no use here.
        if self.seed_checksum.is_noted:
            self.seed_checksum.note()

    def noted(self) -> tuple[Tensor, Tensor]:
        """Flat positions of the subset in the live weight, int64 (k,), and the seed's values there, (k,)."""
        self._follow()
        return self.indices, self.seeds

    def values(self) -> Tensor:
        """Live values of the subset, (k,)."""
        return gather(self._follow(), self.indices)

    def revert(self) -> None:
        """Write the seed back everywhere. Exact."""
        self.prepare_to_write()
        data = self._follow()
        if not self.indices.numel():
            return
        scatter(data, self.indices, self.seeds)
        self.indices, self.seeds = self.indices[:0], self.seeds[:0]

    def apply(self, indices: Tensor, values: Tensor) -> None:
        """Make the live weight the seed with `values` (k,) at `indices` (k,) int64, sorted."""
        self.revert()
        if not indices.numel():
            return
        data = self.data
        indices = indices.to(data.device)
        self.place(indices, gather(data, indices))
        scatter(data, indices, values.to(data))

    def overwrite(self, indices: Tensor, values: Tensor) -> None:
        """Make the live weight, which is the seed now, `values` of its own shape, which differ from it at `indices`."""
        self.place(indices, gather(self.data, indices))
        self.data.copy_(values)

    def seeds_at(self, indices: Tensor) -> Tensor:
        """Seed values at any flat positions (k,) int64, whatever is applied now."""
        data = self._follow()
        values = gather(data, indices)
        if self.indices.numel():
            slot = torch.searchsorted(self.indices, indices).clamp_max_(self.indices.numel() - 1)
            values = torch.where(self.indices[slot] == indices, self.seeds[slot], values)
        return values

    def whole_seeds_at(self, positions: Tensor) -> Tensor:
        """Seed values at any flat positions (k,) int64 of the whole tensor. To be called by all that hold it together."""
        processes = together([self.box])
        if processes is None:
            return self.seeds_at(positions)
        data = self._follow()
        inside, own = self.box.inwards(positions)
        # Zeros and one value: sums of bit patterns keep the sign of a zero.
        wide = torch.int64 if data.element_size() == 8 else torch.int32
        found = torch.zeros(positions.shape, dtype=wide, device=data.device)
        found[inside] = bits(self.seeds_at(own)).to(wide)
        return processes.reduce(found).to(bits(data.new_empty(0)).dtype).view(data.dtype)

    def joined(self, positions: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The entries of all processes' parts, as entries of the whole tensor. To be called by all that hold it together.

        Args:
            positions: flat positions in the live weight, int64 (k,).
            values: in its dtype, (k,).

        Returns:
            Sorted flat positions in the whole tensor, int64 (n,), and the values there.
        """
        processes = together([self.box])
        if processes is None:
            return positions, values
        # In one message: saving sends some for every weight.
        entries = processes.join(torch.stack((self.box.outwards(positions), bits(values).long()), 1))
        everywhere, order = entries[:, 0].sort()
        return everywhere, entries[order, 1].to(bits(values).dtype).view(values.dtype)

    def seed_bound(self) -> float:
        """A number that no absolute value of the seed exceeds. It is computed once for each seed."""
        data = self._follow()
        known = (self.generation, data.dtype, self.shape)
        if self._seed_bound is None or self._seed_bound[0] != known:
            largest = [part.abs().max() for part in (data, self.seeds) if part.numel()]
            self._seed_bound = known, float(torch.stack(largest).max()) if largest else 0.0
        return self._seed_bound[1]

    def flat(self) -> Tensor:
        """The live weight, flat, shape (n,); a view wherever its layout allows."""
        return self.data.reshape(-1)

    def recover(self) -> None:
        """Undo a step that raised half-way and so never came to its end."""
        if self.under_way is not None:
            self.under_way.recover()
