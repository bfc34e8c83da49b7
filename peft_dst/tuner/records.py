"""The records of all adapters for the parameters of one module, the host, and how they come into its live weights.

    dst_indices.<adapter>.<parameter>   sorted flat positions, int32 (int64 past 2^31)
    dst_values.<adapter>.<parameter>    the new values there, in the base's dtype
    dst_free.<adapter>.<parameter>      the same in float32, of fixed subsets while they are trained; in no state dict

While an adapter is written into the live weights they, not its record, are up to date; the record is refreshed whenever
somebody could see it (`state_dict`) or the adapter leaves the weights.

Positions in records are those in the whole tensor also where several processes hold it together. Of an adapter that was
trained there, each has in its record what lies in its own part; in state dicts the record is joined.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed._composable.contract import REGISTRY_KEY, RegistryItem

from ..core import SparseWeight
from ..core.distances import wide_dtype
from ..core.free import free_values, unwatch, watch
from ..delta import DTYPES, MARKER, Record, Summary, index_dtype, plain_name
from .entries import Entries, FreeValues
from .overlay import sparse_weight
from .sums import add_up, own_part, scaled


# What stands in a record whose tensors have their size but are still to be loaded: no valid index.
NOT_LOADED = -1


class HostRecords(nn.Module):
    """Records of adapters for a host's own parameters, and the live weights that show some of them.

    What is active, disabled and merged is kept here, since the live weights follow it; PEFT's methods change it.

    Args:
        host: the module whose direct parameters are tuned.
        name: the host's name in the base model, "" for the base model itself.
    """

    def __init__(self, host: nn.Module, name: str):
        super().__init__()
        # In a tuple, or the host would become a submodule of its own child.
        self._host = (host,)
        _keep_from_fsdp(self)
        self.name = name
        self.dst_indices = nn.ModuleDict({})
        self.dst_values = nn.ModuleDict({})
        #: What is trained of the adapters in `fixed`.
        self.dst_free = nn.ModuleDict({})
        #: Adapters whose subset was chosen once, and never changes.
        self.fixed: set[str] = set()
        #: Adapters that are to have one, from when it is chosen or loaded.
        self.static: set[str] = set()
        self._positions: dict[tuple[str, str], Tensor] = {}
        #: Whether the active adapters are to be trained, as far as a fixed subset decides what that needs.
        self.is_trainable = False
        self.tuned: dict[str, tuple[str, ...]] = {}
        self.weights: dict[str, SparseWeight] = {}
        self.merged_adapters: list[str] = []
        # The model may have merged an adapter that tunes nothing here; the active ones do not show then either.
        self._merged_model = False
        self._active_adapter: list[str] = []
        self._disable_adapters = False
        self._shown: tuple[str, ...] | None = None
        self._scale = self._next_scale = 1.0
        self._written: tuple[str, ...] = ()
        self._stale = False
        #: Adapters that were added from a saved config and whose tensors are still to be loaded or checked.
        self.awaited: set[str] = set()

    @property
    def host(self) -> nn.Module:
        return self._host[0]

    # Records

    def add_adapter(
        self, adapter: str, parameters: Sequence[str], summaries: Mapping[str, Summary] | None = None
    ) -> None:
        """Make room for an adapter.

        Args:
            adapter: its name.
            parameters: names of the host's parameters that it tunes.
            summaries: for a saved adapter whose tensors are still to come, what its config says of each parameter that
                has entries. Its records then have their size and dtype before they are loaded, since transformers' own
                loader checks the one and casts to the other; and parameters without entries have no record, since they
                have none on disk either.
        """
        self.dst_indices[adapter] = Entries()
        self.dst_values[adapter] = Entries()
        self.tuned[adapter] = tuple(parameters)
        if summaries is not None:
            self.awaited.add(adapter)
            self._keep_dtypes(adapter, True)
        for parameter in parameters:
            if parameter not in self.weights:
                name = f"{self.name}.{parameter}" if self.name else parameter
                self.weights[parameter] = sparse_weight(self.host, parameter, plain_name(name))
            weight, device = self.weights[parameter], self.weights[parameter].device
            if summaries is None:
                self._store(adapter, parameter, *no_entries(weight, device))
            elif parameter in summaries:
                size, dtype = summaries[parameter].entries, DTYPES[summaries[parameter].dtype]
                indices = torch.full((size,), NOT_LOADED, dtype=index_dtype(weight.shape.numel()), device=device)
                self._store(adapter, parameter, indices, torch.zeros(size, dtype=dtype, device=device))

    def has_arrived(self, adapter: str) -> bool:
        """Whether the tensors of an awaited adapter are there, for `accept` to take in once they have been checked, and
        so are the weights that they are for.
        """
        if not self.has_memory(adapter):
            return False
        indices = [record.indices for record in self._records(adapter).values()]
        return not any(i.is_meta or (i.numel() and int(i[0]) == NOT_LOADED) for i in indices)

    def has_memory(self, adapter: str) -> bool:
        """Whether the weights that an adapter tunes are anywhere but on the device "meta"."""
        return not any(self.weights[parameter].data.is_meta for parameter in self.tuned[adapter])

    def check_memory(self) -> None:
        """Check that the weights which adapters change here can be read and written.

        Raises:
            RuntimeError: if one has no memory.
        """
        for parameter, weight in self.weights.items():
            if weight.data.is_meta:
                found = [self._records(name).get(parameter) for name in self.tuned.keys() - self.awaited]
                if weight.indices.numel() or any(record is not None and record.indices.numel() for record in found):
                    weight.check_memory()

    def accept(self, adapter: str) -> None:
        """Take in an awaited adapter's records: they have been checked, and may be written into the weights."""
        self._take_in(adapter)
        self.sync()

    def _take_in(self, adapter: str) -> None:
        """The same, but the next `sync` writes them."""
        if adapter in self.awaited:
            self.awaited.discard(adapter)
            self._keep_dtypes(adapter, False)
            found = self._records(adapter)
            for parameter in self.tuned[adapter]:
                # Parameters without entries get an empty record, as in the model that was saved: optimizers over all of a
                # model's parameters count them.
                weight = self.weights[parameter]
                indices, values = found.get(parameter) or no_entries(weight, weight.device)
                self._store(adapter, parameter, indices, values.to(weight.data.dtype))
        self.fixed |= self.static & {adapter}
        self._stale = True

    def _keep_dtypes(self, adapter: str, kept: bool) -> None:
        """Whether values stay in the dtype that they have in the file, whose digests they are to be compared with."""
        for part in (self.dst_indices, self.dst_values):
            cast(Entries, part[adapter]).keeps_dtype = kept

    def records(self, adapter: str) -> dict[str, Record]:
        """The adapter's records, parameter → Record, brought up to date with the live weights."""
        self.refresh()
        return self._records(adapter)

    def _records(self, adapter: str) -> dict[str, Record]:
        indices, values = (cast(Entries, part[adapter]).tensors() for part in (self.dst_indices, self.dst_values))
        return {parameter: Record(indices[parameter], values[parameter]) for parameter in indices}

    def write_record(self, adapter: str, parameter: str, record: Record) -> None:
        """Replace a record. Call `sync` when all are written; the live weights follow if the adapter is active."""
        self.refresh()
        self._replace(adapter, parameter, record)
        self._stale = True

    def make_room(self, adapter: str, records: Mapping[str, Record]) -> None:
        """Give an adapter's records the sizes of those that are about to be loaded over them. So as not to leave positions
        that are none they are those already.
        """
        self.refresh()
        own = self._records(adapter)
        if any(
            parameter in own and own[parameter].indices.shape != r.indices.shape for parameter, r in records.items()
        ):
            for parameter, (indices, values) in records.items():
                data = self.weights[parameter].data
                copies = Record(indices.to(data.device, copy=True), values.to(data.device, data.dtype, copy=True))
                self.write_record(adapter, parameter, copies)

    def _replace(self, adapter: str, parameter: str, record: Record) -> None:
        """Store what comes from outside. Values that are trained follow it, also after a step that never ended."""
        self._store(adapter, parameter, record.indices, record.values)
        self.weights[parameter].stepping = None

    def _store(self, adapter: str, parameter: str, indices: Tensor, values: Tensor) -> None:
        cast(Entries, self.dst_indices[adapter]).put(parameter, indices)
        cast(Entries, self.dst_values[adapter]).put(parameter, values)

    def refresh(self) -> None:
        """Bring records up to date with what training made of the live weights, undoing a step that raised half-way."""
        for parameter, weight in self.weights.items():
            weight.recover()
            if weight.stepped and len(weight.adapters) == 1 and weight.adapters[0] in self.tuned:
                weight.check_memory()
                values = weight.values()
                indices = weight.box.outwards(weight.indices).to(index_dtype(weight.shape.numel()))
                self._store(weight.adapters[0], parameter, indices, values)
            weight.stepped = False

    # Live weights

    def effective_adapters(self) -> tuple[str, ...]:
        """The adapters whose values the live weights should have now."""
        names: Sequence[str]
        if self._shown is not None:
            names = self._shown
        elif self._disable_adapters:
            return ()
        else:
            names = self.merged_adapters if self._merged_model else self._active_adapter
        return tuple(name for name in names if name in self.tuned and name not in self.awaited)

    def show(self, adapters: tuple[str, ...] | None) -> None:
        """Have the live weights be those of these adapters for a while, whatever is active; None ends that."""
        self._shown = adapters
        self.sync()

    @property
    def scale(self) -> float:
        """What differences to the seed are multiplied with in the live weights. Of what is merged it stays; a new one
        counts from unmerging on.
        """
        return self._scale

    @scale.setter
    def scale(self, scale: float) -> None:
        self._next_scale = scale
        # Weights that the marker has left, as unloading makes it, are no longer its own.
        if getattr(self.host, MARKER, None) is self and not self._merged_model:
            self.refresh()
            self._scale, self._stale = scale, True
            self.sync()

    def scaled_records(self, adapter: str) -> dict[str, Record]:
        """The adapter's records with seed + scale · (value − seed) for their values; of what this process holds, and with
        positions in that, int64.
        """
        records = {
            parameter: own_part(self.weights[parameter], record)
            for parameter, record in self._records(adapter).items()
            # A new adapter of a model that is to be loaded (low_cpu_mem_usage) has its empty record on no device.
            if not record.values.is_meta
        }
        if self._scale == 1:
            return records
        return {
            parameter: scaled(self.weights[parameter], record, self._scale) for parameter, record in records.items()
        }

    def sync(self) -> None:
        """Make the live weights those of the effective adapters, starting from the seed. Bit-exact both ways."""
        for weight in self.weights.values():
            weight.recover()
        wanted = self.effective_adapters()
        if wanted != self._written or self._stale:
            self.check_memory()
            self.refresh()
            by_adapter = [self.scaled_records(name) for name in wanted]
            # Until all are written nobody knows what they are.
            self._stale = True
            for parameter, weight in self.weights.items():
                records = [found[parameter] for found in by_adapter if parameter in found]
                if not records:
                    weight.revert()
                elif len(records) == 1:
                    weight.apply(*records[0])
                else:
                    weight.apply(*add_up(weight, records))
                weight.stepped = False
        self._written, self._stale = wanted, False
        for parameter, weight in self.weights.items():
            weight.adapters = tuple(name for name in wanted if parameter in self.tuned[name])
            weight.disabled = self._disable_adapters or self._shown is not None or self._scale != 1
        if not self._disable_adapters and self._shown is None and self._scale == 1:
            self._train_fixed()

    # Fixed subsets

    def _train_fixed(self) -> None:
        """Have the values of a fixed subset trained in the place of the weights, where the one active adapter has one."""
        for parameter, weight in self.weights.items():
            before, weight.free = weight.free, None
            if len(weight.adapters) != 1 or weight.adapters[0] not in self.fixed:
                unwatch(weight)
                continue
            # Only what holds free values needs a gradient.
            trainable = self.is_trainable and weight.indices.numel() > 0
            weight.parameter.requires_grad_(trainable)
            if trainable:
                weight.free, weight.free_at = self._free(weight.adapters[0], parameter, weight.indices), weight.indices
                watch(weight)
            else:
                unwatch(weight)
            if weight.free is not before:
                # A gradient from before belongs to something else.
                weight.parameter.grad = None
        for name, free in self.dst_free.items():
            free.requires_grad_(self.is_trainable and name in self._active_adapter)

    def _free(self, adapter: str, parameter: str, indices: Tensor, values: Tensor | None = None) -> nn.Parameter:
        """What is trained of a weight; the same parameter as long as it is the same subset, for optimizers hold it.

        Args:
            adapter: whose values they are.
            parameter: the host's parameter.
            indices: the subset, int64 (k,).
            values: what a new one starts from, (k,); None takes the live values.
        """
        weight = self.weights[parameter]
        if adapter not in self.dst_free:
            self.dst_free[adapter] = FreeValues()
        found = cast(Entries, self.dst_free[adapter])
        free = found._parameters.get(parameter)
        # Noted before the model was moved, perhaps.
        same = torch.equal(self._positions.get((adapter, parameter), indices).to(indices.device), indices)
        if free is None or not same or free.shape != indices.shape or free.dtype != wide_dtype(weight.data):
            if free is not None:
                weight.superseded.append(weakref.ref(free))
            free = free_values(weight.values() if values is None else values)
            found.replace(parameter, free)
        self._positions[adapter, parameter] = indices
        weight.frees[adapter] = free
        return free

    def _forget_free(self, adapter: str) -> None:
        for parameter, weight in self.weights.items():
            weight.frees.pop(adapter, None)
            self._positions.pop((adapter, parameter), None)
        if adapter in self.dst_free:
            del self.dst_free[adapter]

    def place(self, adapter: str, positions: Mapping[str, Tensor], values: Mapping[str, Tensor], fixed: bool) -> None:
        """Give an adapter a subset.

        Args:
            adapter: its name.
            positions: for each parameter that it tunes sorted flat positions, int64 (k,).
            values: the values there, (k,); the seed's for parameters that are not in it.
            fixed: whether it keeps that subset.
        """
        if fixed:
            self.fixed.add(adapter)
        for parameter in self.tuned[adapter]:
            weight = self.weights[parameter]
            indices = positions[parameter].to(weight.data.device)
            own = values[parameter].to(weight.data) if parameter in values else weight.whole_seeds_at(indices)
            self.write_record(adapter, parameter, Record(indices.to(index_dtype(weight.shape.numel())), own))
            if fixed and indices.numel():
                # Also where another adapter is active: TRL copies trained adapters parameter by parameter.
                self._free(adapter, parameter, indices, own).requires_grad_(False)
        self.sync()

    # The module itself

    def detach(self) -> None:
        """Leave the host, whose weights stay as they are."""
        for weight in self.weights.values():
            weight.parameter.requires_grad_(weight.requires_grad_before)
            weight.adapters, weight.disabled, weight.free = (), False, None
            unwatch(weight)
        delattr(self.host, MARKER)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HostRecords:
        # Children are moved and cast before their parents: the host still has the dtype that is about to change.
        for weight in self.weights.values():
            weight.seed_checksum.note_cast(fn)
        return super()._apply(fn, recurse)


def no_entries(weight: SparseWeight, device: torch.device | str = "cpu") -> Record:
    """The record of a parameter in which an adapter has no entries."""
    dtype = index_dtype(weight.shape.numel())
    return Record(torch.empty(0, dtype=dtype, device=device), torch.empty(0, dtype=weight.data.dtype, device=device))


def _keep_from_fsdp(marker: nn.Module) -> None:
    """Keep `fully_shard` from dividing records: each process knows by itself which entries it needs.

    Of modules with this entry in torch's registry of what was applied to them it takes neither parameters nor children.
    """
    marker.__dict__.setdefault(REGISTRY_KEY, {})["replicate"] = RegistryItem()
