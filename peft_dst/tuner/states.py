"""How a marker's records get into state dicts and out of them, and what is loaded over its host's weights.

Beside the records, which are children of the marker and save themselves, state dicts get its notes:

    sizes.<adapter>                     entries of each parameter that the adapter tunes, int64
    seed_indices.<parameter>            where the live weight differs from the seed, sorted flat positions, int64
    seed_values.<parameter>             the seed's values there

Where several processes hold the weights together, all of it is one value: the marker's extra state.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX as EXTRA_STATE
from torch.utils.hooks import RemovableHandle

from ..core.shards import local
from ..core.tiles import bits
from ..delta import MARKER, PARTS, DeltaError, Record, Summary, check_record
from .entries import Entries, Notes
from .records import HostRecords, no_entries
from .sums import own_part


# What a marker's notes on the seed begin with.
SEED = ("seed_indices", "seed_values")


@dataclass
class _Loading:
    """What one call of `load_state_dict` has brought for a host's shared parameters; other owners may get them too.

    Attributes:
        errors: the call's list of errors, by which it is known: every module is given the same one.
        sums: of each parameter that came under the host's name, the sum of its bits.
        notes: of each parameter that differed from its seed where it was saved, positions and the seed's values there.
    """

    errors: list[str]
    sums: dict[str, int] = field(default_factory=dict)
    notes: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class StatefulRecords(HostRecords):
    """The records of a host, in state dicts too.

    Args:
        host: the module whose direct parameters are tuned.
        name: the host's name in the base model, "" for the base model itself.
    """

    def __init__(self, host: nn.Module, name: str):
        super().__init__(host, name)
        self.sizes, self.seed_indices, self.seed_values = Notes(), Notes(), Notes()
        #: Parameters over which dense weights are being loaded.
        self._overwritten: set[str] = set()
        self._load_hook = host.register_load_state_dict_pre_hook(_before_host_loads)
        # Of shared parameters: the hooks on their other owners.
        self._shared: dict[str, list[RemovableHandle]] = {}
        self._loading = _Loading([])

    def add_adapter(
        self, adapter: str, parameters: Sequence[str], summaries: Mapping[str, Summary] | None = None
    ) -> None:
        """Make room for an adapter, and announce its notes: see `HostRecords.add_adapter`."""
        super().add_adapter(adapter, parameters, summaries)
        self.sizes.name(adapter)
        for parameter in parameters:
            self.seed_indices.name(parameter)
            self.seed_values.name(parameter)

    def drop_adapter(self, adapter: str) -> set[str]:
        """Let go of an adapter's notes, and of parameters that no other one tunes, which are returned."""
        self.tuned.pop(adapter, None)
        self.sizes.drop(adapter)
        left = self.weights.keys() - {parameter for parameters in self.tuned.values() for parameter in parameters}
        for parameter in self._shared.keys() & left:
            for hook in self._shared.pop(parameter):
                hook.remove()
        return left

    # Into state dicts

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # Parents save before their children: the records are fresh by the time they are collected.
        self.refresh()
        divided = any(weight.is_divided for weight in self.weights.values())
        empty = divided and any(weight.data.is_meta for weight in self.weights.values())
        for part in (self.dst_indices, self.dst_values):
            for entries in part.values():
                cast(Entries, entries).shown = "nothing" if empty else "empty" if divided else "all"
        if divided and not empty:
            destination[f"{prefix}{EXTRA_STATE}"] = self.get_extra_state()
        elif not divided:
            destination |= {f"{prefix}{key}": tensor for key, tensor in self._notes().items()}

    def _notes(self) -> dict[str, Tensor]:
        """What state dicts get beside the records."""
        notes = {}
        # Savers that drop aliases (Accelerate's) take all empty tensors for one; sizes tell empty from absent.
        for adapter in [adapter for adapter in self.tuned if adapter not in self.awaited]:
            records = self._records(adapter)
            sizes = [records[p].indices.numel() for p in self.tuned[adapter]]
            notes[f"sizes.{adapter}"] = torch.tensor(sizes)
        # A full state dict holds the live weights; with the seed values beside them it can be loaded and reverted.
        for parameter, weight in self.weights.items():
            indices, seeds = weight.joined(*weight.noted())
            if indices.numel():
                # Those of a silo may lie in one storage, of which savers keep one tensor.
                notes |= {f"{part}.{parameter}": t.clone() for part, t in zip(SEED, (indices, seeds), strict=True)}
        return notes

    def get_extra_state(self) -> bytes:
        """All that state dicts hold of the marker, where several processes hold the weights together, which all call this.

        In safetensors, because torch.distributed.checkpoint loads no tensor into another size: the fresh model's records
        have none yet.
        """
        for adapter in [adapter for adapter in self.tuned if adapter not in self.awaited]:
            for parameter, record in self._records(adapter).items():
                weight = self.weights[parameter]
                indices, values = weight.joined(*own_part(weight, record))
                self._store(adapter, parameter, indices.to(record.indices.dtype), values)
        tensors = self._notes()
        for adapter in [adapter for adapter in self.tuned if adapter not in self.awaited]:
            for parameter, record in self._records(adapter).items():
                tensors |= zip(record_keys("", adapter, parameter), record, strict=True)
        return save({key: tensor.cpu().contiguous() for key, tensor in tensors.items()})

    def set_extra_state(self, state: object) -> None:
        """Nothing: it is read with the rest of a state dict."""

    # Out of state dicts

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        self.refresh()
        self._complete(state_dict, prefix)
        for adapter, parameters in self.tuned.items():
            for parameter in parameters:
                keys = record_keys(prefix, adapter, parameter)
                if all(key in state_dict for key in keys):
                    self._load_record(adapter, parameter, Record(*(state_dict[key] for key in keys)), lists[-1])
        self._load_seeds(state_dict, prefix, lists[-1])

    def _complete(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Have a state dict hold everything that the children, which load next and are strict, look for."""
        found = expanded(state_dict, prefix)
        # Where torch.distributed.checkpoint has nothing to load it leaves what it found in the model.
        for key in [key for key in state_dict if key.startswith(prefix)]:
            if found or not isinstance(state_dict[key], Tensor):
                del state_dict[key]
        state_dict |= found
        for adapter in self.tuned:
            for parameter, record in self._records(adapter).items():
                keys = record_keys(prefix, adapter, parameter)
                if self.weights[parameter].is_divided and not any(key in state_dict for key in keys):
                    state_dict |= zip(keys, record, strict=True)
        for adapter, parameters in self.tuned.items():
            sizes = state_dict.get(f"{prefix}sizes.{adapter}", ())
            for parameter, size in zip(parameters, sizes, strict=False):
                if size == 0:
                    # A saver may have left it out.
                    empty = no_entries(self.weights[parameter])
                    state_dict |= zip(record_keys(prefix, adapter, parameter), empty, strict=True)

    def _load_record(self, adapter: str, parameter: str, record: Record, errors: list[str]) -> None:
        """Replace a record, rather than copy into it: records change their length from step to step."""
        weight = self.weights[parameter]
        try:
            check_record(weight.name, weight.shape.numel(), weight.data.dtype, record)
        except DeltaError as error:
            errors.append(str(error))
            return
        # No aliases: the caller keeps the tensors of a state dict and may change them.
        indices = record.indices.to(weight.device, copy=True)
        # Compared with what the config says of them, values are to be in their own dtype.
        dtype = record.values.dtype if adapter in self.awaited else weight.data.dtype
        values = record.values.to(weight.device, dtype, copy=True)
        self._replace(adapter, parameter, Record(indices, values))
        if self.has_memory(adapter):
            self._take_in(adapter)
        elif indices.numel() and adapter not in self.awaited:
            errors.append(
                f"{weight.name!r} has no memory yet (device 'meta'). Load the base model before the adapter, or load the "
                "adapter with PeftModel.from_pretrained."
            )

    def _load_seeds(self, state_dict: Mapping[str, Tensor], prefix: str, errors: list[str]) -> None:
        """Take dense weights that were loaded for the seed, but for the seed's values where an adapter stood in them."""
        notes = {p: found for p in self.weights if (found := seed_note(state_dict, prefix, p)) is not None}
        self._in_call(errors).notes = {parameter: notes[parameter] for parameter in notes.keys() & self._shared.keys()}
        overwritten, self._overwritten = self._overwritten, set()
        for parameter in overwritten & notes.keys():
            self._place(parameter, *notes[parameter])
        self.sync()
        for parameter in overwritten:
            self.weights[parameter].seed_checksum.note_again()

    def _place(self, parameter: str, positions: Tensor, seeds: Tensor) -> None:
        weight = self.weights[parameter]
        inside, own = weight.box.inwards(positions.to(seeds.device))
        weight.place(own, seeds[inside])

    # New dense weights

    def _in_call(self, errors: list[str]) -> _Loading:
        if self._loading.errors is not errors:
            self._loading = _Loading(errors)
        return self._loading

    def check_notes(self, state_dict: Mapping[str, Tensor], prefix: str) -> None:
        """Check that what a state dict says of the host's seed is whole.

        Args:
            state_dict: what is loaded.
            prefix: the marker's name there, with a point at its end.

        Raises:
            ValueError: if it is not.
        """
        for parameter in self.weights:
            seed_note(state_dict, prefix, parameter)

    def await_dense(self, state_dict: Mapping[str, Tensor], prefix: str, errors: list[str]) -> None:
        """The host is about to load: save what training made of its parameters that are among it, and let go of the seed.

        Args:
            state_dict: what is loaded.
            prefix: the host's name there, with a point at its end.
            errors: the list that stands for this call of `load_state_dict`.

        Raises:
            ValueError: if the state dict has half of what it takes to know a seed here; nothing of the host has been
                changed by then.
        """
        self.check_notes(state_dict, f"{prefix}{MARKER}.")
        # Of another shape torch loads none.
        loaded = [p for p, w in self.weights.items() if getattr(state_dict.get(prefix + p), "shape", None) == w.shape]
        if loaded:
            self._forget_seeds(loaded)
        for parameter in self._shared.keys() & set(loaded):
            self._in_call(errors).sums[parameter] = _bit_sum(state_dict[prefix + parameter])

    def _forget_seeds(self, parameters: Sequence[str]) -> None:
        self.refresh()
        for parameter in parameters:
            self.weights[parameter].forget()
        self._overwritten.update(parameters)
        self._stale = True

    def share(self, parameter: str, owners: Sequence[tuple[nn.Module, str]]) -> None:
        """Take note of who else owns a parameter: modules, each with its own name of it."""
        if parameter not in self._shared:
            self._shared[parameter] = [
                owner.register_load_state_dict_pre_hook(
                    functools.partial(_before_other_owner_loads, self, parameter, attribute)
                )
                for owner, attribute in owners
            ]

    def load_dense(self, parameter: str, tensor: Tensor, errors: list[str]) -> None:
        """Take a shared parameter that came under another name for its seed, under the active adapters; but for what the
        same call of `load_state_dict` has said of the seed.
        """
        came = self._in_call(errors)
        sum_of_bits = _bit_sum(tensor)
        if came.sums.get(parameter) == sum_of_bits:
            return
        self._forget_seeds([parameter])
        self.weights[parameter].data.copy_(local(tensor))
        if parameter in came.notes:
            self._place(parameter, *came.notes[parameter])
        came.sums[parameter] = sum_of_bits
        self._overwritten.clear()
        self.sync()
        self.weights[parameter].seed_checksum.note_again()

    def detach(self) -> None:
        """Leave the host, whose weights stay as they are."""
        for hook in [self._load_hook, *(hook for hooks in self._shared.values() for hook in hooks)]:
            hook.remove()
        super().detach()


def expanded(state_dict: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """What a state dict holds of a marker as its extra state, by the keys that it has in others.

    Args:
        state_dict: the state dict.
        prefix: the marker's name there, with a point at its end.
    """
    extra = state_dict.get(f"{prefix}{EXTRA_STATE}")
    return {f"{prefix}{key}": tensor for key, tensor in load(extra).items()} if isinstance(extra, bytes) else {}


def seed_note(state_dict: Mapping[str, Tensor], prefix: str, parameter: str) -> tuple[Tensor, Tensor] | None:
    """Flat positions where a saved parameter differs from its seed, int64 (k,), and the seed's values there, (k,).

    Args:
        state_dict: the state dict.
        prefix: the marker's name there, with a point at its end.
        parameter: the host's parameter.

    Raises:
        ValueError: if there is one of the two alone.
    """
    found = {key: state_dict.get(key) for key in (f"{prefix}{part}.{parameter}" for part in SEED)}
    positions, seeds = found.values()
    if positions is not None and seeds is not None:
        return positions, seeds
    if positions is not None or seeds is not None:
        missing = next(key for key, tensor in found.items() if tensor is None)
        raise ValueError(
            f"{missing!r} is missing in the state dict, which has what belongs to it, so the seed would be lost. What "
            "saved it has left tensors out; save the model's state_dict() whole."
        )
    return None


def record_keys(prefix: str, adapter: str, parameter: str) -> list[str]:
    """What the two tensors of a record are called in a state dict, where the marker's name and a point are `prefix`."""
    return [f"{prefix}{part}.{adapter}.{parameter}" for part in PARTS]


def _before_host_loads(host: nn.Module, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
    marker = getattr(host, MARKER, None)
    if isinstance(marker, StatefulRecords):
        marker.await_dense(state_dict, prefix, rest[-1])


def _before_other_owner_loads(
    marker: StatefulRecords,
    parameter: str,
    attribute: str,
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    *rest: Any,
) -> None:
    """A shared parameter comes again under another name: if with other values, then as new dense weights."""
    key = prefix + attribute
    weight = marker.weights.get(parameter)
    if weight is None or key not in state_dict or state_dict[key].shape != weight.shape:
        return
    marker.load_dense(parameter, state_dict[key], rest[-1])
    # The copy that follows changes nothing.
    state_dict[key] = weight.parameter.data


def _bit_sum(tensor: Tensor) -> int:
    return int(bits(local(tensor)).sum(dtype=torch.int64))
