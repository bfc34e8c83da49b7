"""The marker child: PEFT's layer contract over records of indices and values.

DST edits the base model's own weights in place, so nothing is wrapped and nothing is added to the forward pass. What
PEFT needs to find (adapters by name, their tensors in the state dict, merge, enable, delete) lives in one child module
called `_sparse` of every module that holds tuned parameters:

    dst_indices.<adapter>.<parameter>   sorted flat positions, int32 (int64 past 2^31)
    dst_values.<adapter>.<parameter>    the new values there, in the base's dtype
    dst_free.<adapter>.<parameter>      the same in float32, of fixed subsets while they are trained; in no state dict

While an adapter is written into the live weights they, not its record, are
up to date; the record is refreshed whenever somebody could see it (`state_dict`) or the adapter leaves the weights.

Positions in records are those in the whole tensor also where several processes hold it together. Of an adapter that was
trained there, each has in its record what lies in its own part; in state dicts the record is joined.

Several active adapters add up, as in PEFT's LoRA: a component that one of them changes takes its value, a component that
several change takes seed + Σ (value − seed).
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.distributed._composable.contract import REGISTRY_KEY, RegistryItem
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX as EXTRA_STATE

from ..core import SparseWeight
from ..core.distances import wide_dtype
from ..core.free import free_values, watch
from ..core.shards import local
from ..core.tiles import bits
from ..delta import MARKER, PARTS, DeltaError, Record, check_record, index_dtype
from .entries import Entries, FreeValues, Notes
from .overlay import sparse_weight


# What stands in a record whose tensors have their size but are still to be loaded: no valid index.
NOT_LOADED = -1


class SparseLayer(nn.Module, BaseTunerLayer):
    """Child of a host module; holds the records of all adapters for the host's own parameters.

    Args:
        host: the module whose direct parameters are tuned.
        name: the host's name in the base model, "" for the base model itself.
    """

    adapter_layer_names = ("dst_values",)
    other_param_names = ("dst_indices",)

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
        self.sizes, self.seed_indices, self.seed_values = Notes(), Notes(), Notes()
        #: Adapters whose subset was chosen once, and never changes.
        self.fixed: set[str] = set()
        #: Adapters that are to have one, from when it is chosen or loaded.
        self.static: set[str] = set()
        #: Adapters that have values for quantised weights somewhere in the model, and so cannot be trained.
        self.served: set[str] = set()
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
        self._overwritten: set[str] = set()
        self._load_hooks = [host.register_load_state_dict_pre_hook(_before_host_loads)]
        # Of shared parameters: what was last loaded under the host's name, to know it under another.
        self._shared: dict[str, int | None] = {}

    def __repr__(self) -> str:
        return f"dst.{type(self).__name__}({', '.join(self.weights)})"

    @property
    def host(self) -> nn.Module:
        return self._host[0]

    def forward(self, x: Any) -> Any:
        """Hand on what an nn.Sequential, which calls all of its children in turn, has come to."""
        if not isinstance(self.host, nn.Sequential):
            raise TypeError(
                f"{self.name!r} is a {type(self.host).__name__} with parameters of its own, and its children were called "
                f"in turn. The one that marks tuned parameters, {MARKER!r}, cannot be: leave it out of the loop, or tune "
                "other modules (target_modules, exclude_modules)."
            )
        return x

    # Records

    def add_adapter(self, adapter: str, parameters: Sequence[str], entries: Mapping[str, int] | None = None) -> None:
        """Make room for an adapter.

        Args:
            adapter: its name.
            parameters: names of the host's parameters that it tunes.
            entries: for a saved adapter whose tensors are still to come, the number of entries of each parameter that
                has any. Its records then have their size before they are loaded, since transformers' own loader checks
                shapes, and parameters without entries have no record, since they have none on disk either.
        """
        self.dst_indices[adapter] = Entries()
        self.dst_values[adapter] = Entries()
        self.tuned[adapter] = tuple(parameters)
        self.sizes.name(adapter)
        if entries is not None:
            self.awaited.add(adapter)
        for parameter in parameters:
            if parameter not in self.weights:
                name = f"{self.name}.{parameter}" if self.name else parameter
                self.weights[parameter] = sparse_weight(self.host, parameter, name)
                self.seed_indices.name(parameter)
                self.seed_values.name(parameter)
            weight, device = self.weights[parameter], self.weights[parameter].device
            if entries is None or parameter in entries:
                size = entries[parameter] if entries else 0
                indices = torch.full((size,), NOT_LOADED, dtype=index_dtype(weight.shape.numel()), device=device)
                self._store(adapter, parameter, indices, torch.zeros(size, dtype=weight.data.dtype, device=device))

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
        self.awaited.discard(adapter)
        self.fixed |= self.static & {adapter}
        self._stale = True
        self.sync()

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
        self._store(adapter, parameter, record.indices, record.values)
        self._stale = True

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
            names = self.merged_adapters if self._merged_model else self.active_adapters
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
            parameter: _scaled(self.weights[parameter], record, self._scale) for parameter, record in records.items()
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
            for parameter, weight in self.weights.items():
                records = [found[parameter] for found in by_adapter if parameter in found]
                if not records:
                    weight.revert()
                elif len(records) == 1:
                    weight.apply(*records[0])
                else:
                    weight.apply(*_add_up(weight, records))
                weight.stepped = False
        self._written, self._stale = wanted, False
        for parameter, weight in self.weights.items():
            weight.adapters = tuple(name for name in wanted if parameter in self.tuned[name])
            weight.disabled = self._disable_adapters or self._shown is not None or self._scale != 1
        if not self._disable_adapters and self._shown is None and self._scale == 1:
            self._train_fixed()

    def _train_fixed(self) -> None:
        """Have the values of a fixed subset trained in the place of the weights, where the one active adapter has one."""
        for parameter, weight in self.weights.items():
            before, weight.free = weight.free, None
            if len(weight.adapters) != 1 or weight.adapters[0] not in self.fixed:
                continue
            # Only what holds free values needs a gradient.
            trainable = self.is_trainable and weight.indices.numel() > 0
            weight.parameter.requires_grad_(trainable)
            if trainable:
                weight.free, weight.free_at = self._free(weight.adapters[0], parameter, weight.indices), weight.indices
                watch(weight)
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
        same = torch.equal(self._positions.get((adapter, parameter), indices), indices)
        if free is None or not same or free.shape != indices.shape or free.dtype != wide_dtype(weight.data):
            if free is not None:
                weight.superseded.append(weakref.ref(free))
            free = free_values(weight.values() if values is None else values)
            found.replace(parameter, free)
        self._positions[adapter, parameter] = indices
        weight.frees[adapter] = free
        return free

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

    def release(self, adapter: str) -> None:
        """Let the weights be trained as a whole again where the adapter's subset is no longer a fixed one."""
        if adapter in self.fixed - self.static:
            self.fixed.discard(adapter)
            self._forget_free(adapter)
            self.set_adapter(self.active_adapters, inference_mode=not self.is_trainable)

    def _forget_free(self, adapter: str) -> None:
        for parameter, weight in self.weights.items():
            weight.frees.pop(adapter, None)
            self._positions.pop((adapter, parameter), None)
        if adapter in self.dst_free:
            del self.dst_free[adapter]

    def forget_seed(self, parameters: Sequence[str]) -> None:
        """Dense weights are about to be loaded over these parameters: keep what training made, let go of the seed."""
        self.refresh()
        for parameter in parameters:
            self.weights[parameter].forget()
        self._overwritten.update(parameters)
        self._stale = True

    def share(self, parameter: str, owner: nn.Module, attribute: str) -> None:
        """Take note that another module owns a parameter too, under a name of its own."""
        if parameter not in self._shared:
            self._shared[parameter] = None
        hook = functools.partial(_before_other_owner_loads, self, parameter, attribute)
        self._load_hooks.append(owner.register_load_state_dict_pre_hook(hook))

    def load_dense(self, parameter: str, tensor: Tensor) -> None:
        """Take new dense weights for the seed, under the active adapters."""
        self.forget_seed([parameter])
        self.weights[parameter].data.copy_(local(tensor))
        self._overwritten.clear()
        self.sync()
        self.weights[parameter].remember_seed_again()

    def detach(self) -> None:
        """Leave the host, whose weights stay as they are."""
        for hook in self._load_hooks:
            hook.remove()
        for weight in self.weights.values():
            weight.parameter.requires_grad_(weight.requires_grad_before)
            weight.adapters, weight.disabled, weight.free = (), False, None
            if weight.watched is not None:
                weight.watched[1].remove()
        delattr(self.host, MARKER)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Records are stored where their weights are, each in the dtype of its own.
        return

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLayer:
        # Children are moved and cast before their parents: the host still has the dtype that is about to change.
        for weight in self.weights.values():
            weight.remember_seed_cast(fn)
        return super()._apply(fn, recurse)

    # PEFT's contract

    def get_base_layer(self) -> nn.Module:
        return self.host

    @property
    def in_features(self) -> int | None:
        """The host's, if it has any."""
        return getattr(self.host, "in_features", None)

    @property
    def out_features(self) -> int | None:
        """The host's, if it has any."""
        return getattr(self.host, "out_features", None)

    @property
    def active_adapters(self) -> list[str]:
        return list(self._active_adapter)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters: their values go into the live weights, which become trainable unless `inference_mode`, or
        unless an adapter can only be served.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._active_adapter = names
        if not self.merged:
            self._merged_model = False
        inference_mode = inference_mode or not self.served.isdisjoint(names)
        self.is_trainable = not inference_mode
        for parameter, weight in self.weights.items():
            tuned = any(parameter in self.tuned.get(name, ()) for name in names)
            weight.parameter.requires_grad_(tuned and not inference_mode)
            if tuned and not inference_mode:
                weight.watch()
        self.sync()

    def enable_adapters(self, enabled: bool) -> None:
        """Show the active adapters, or the seed. `requires_grad` stays as it is: a reference pass inside a training
        step must not disturb the graph or DDP's reducer.
        """
        self._disable_adapters = not enabled
        self.sync()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make the parameters that the named adapters tune trainable or not, if such an adapter is active.

        Raises:
            ValueError: if one is to become trainable that has values for quantised weights.
        """
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        if requires_grad and (served := sorted(names & self.served)):
            raise ValueError(
                f"adapter {served[0]!r} has values for quantised weights, which cannot be trained. Train it on the base "
                "model in float32, bfloat16 or float16."
            )
        concerned = names.intersection(self.active_adapters)
        for parameter, weight in self.weights.items():
            if any(parameter in self.tuned.get(name, ()) for name in concerned):
                weight.parameter.requires_grad_(requires_grad)
                if requires_grad:
                    weight.watch()
        if concerned:
            self.is_trainable = requires_grad
            self._train_fixed()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Declare adapters part of the base weights, where their values already stand or now come to stand.

        Raises:
            ValueError: if `safe_merge` and a value is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.tuned]
        if safe_merge:
            self.check_finite(names)
        self.merged_adapters.extend(names)
        self._merged_model = True
        self.sync()

    def check_finite(self, adapter_names: Sequence[str]) -> None:
        """Check that the named adapters' values here are finite.

        Raises:
            ValueError: if one is not.
        """
        for name in self.tuned.keys() & set(adapter_names):
            for parameter, record in self.records(name).items():
                if not torch.isfinite(record.values).all():
                    raise ValueError(
                        f"NaNs detected in the merged weights: adapter {name!r} has non-finite values for "
                        f"{self.weights[parameter].name!r}. Nothing was merged."
                    )

    def unmerge(self) -> None:
        """Undo `merge`: the live weights are those of the active adapters again."""
        if not self._merged_model:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        self.unmerge_silently()

    def unmerge_silently(self) -> None:
        self.merged_adapters.clear()
        self._merged_model = False
        self.scale = self._next_scale

    def delete_adapter(self, adapter_name: str) -> None:
        self.tuned.pop(adapter_name, None)
        self.awaited.discard(adapter_name)
        self.fixed.discard(adapter_name)
        self.static.discard(adapter_name)
        self.served.discard(adapter_name)
        self._forget_free(adapter_name)
        super().delete_adapter(adapter_name)
        self.sync()

    # State dicts

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
            sizes = [records[p].indices.numel() if p in records else 0 for p in self.tuned[adapter]]
            notes[f"sizes.{adapter}"] = torch.tensor(sizes)
        # A full state dict holds the live weights; with the seed values beside them it can be loaded and reverted.
        for parameter, weight in self.weights.items():
            indices, seeds = weight.joined(*weight.noted())
            if indices.numel():
                notes[f"seed_indices.{parameter}"] = indices
                notes[f"seed_values.{parameter}"] = seeds
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
                tensors |= zip((f"{part}.{adapter}.{parameter}" for part in PARTS), record, strict=True)
        return save({key: tensor.cpu().contiguous() for key, tensor in tensors.items()})

    def set_extra_state(self, state: object) -> None:
        """Nothing: it is read with the rest of a state dict."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        # Records change their length from step to step, so they are replaced rather than copied into.
        self.refresh()
        self._complete(state_dict, prefix)
        for adapter, parameters in self.tuned.items():
            sizes = state_dict.get(f"{prefix}sizes.{adapter}")
            for i, parameter in enumerate(parameters):
                keys = [f"{prefix}{part}.{adapter}.{parameter}" for part in ("dst_indices", "dst_values")]
                weight, device = self.weights[parameter], self.weights[parameter].device
                dtype = weight.data.dtype
                if sizes is not None and i < len(sizes) and sizes[i] == 0:
                    # Complete what a saver left out, for the children that load next and are strict.
                    state_dict[keys[0]] = torch.empty(0, dtype=index_dtype(weight.shape.numel()), device="cpu")
                    state_dict[keys[1]] = torch.empty(0, dtype=dtype, device="cpu")
                if all(key in state_dict for key in keys):
                    # No aliases: the caller keeps the tensors of a state dict and may change them.
                    indices, values = (state_dict[key] for key in keys)
                    try:
                        check_record(weight.name, weight.stand_in(), Record(indices, values))
                    except DeltaError as error:
                        lists[-1].append(str(error))
                        continue
                    copied = indices.to(device, copy=True), values.to(device, dtype, copy=True)
                    self._store(adapter, parameter, *copied)
                    if not self.has_memory(adapter):
                        if indices.numel() and adapter not in self.awaited:
                            lists[-1].append(
                                f"{self.weights[parameter].name!r} has no memory yet (device 'meta'). Load the base model "
                                "before the adapter, or load the adapter with PeftModel.from_pretrained."
                            )
                    else:
                        self.awaited.discard(adapter)
                        self.fixed |= self.static & {adapter}
                        self._stale = True
        overwritten = [self.weights[parameter] for parameter in self._overwritten]
        for weight in overwritten:
            seeds = state_dict.get(f"{prefix}seed_values.{weight.attribute}")
            if seeds is not None:
                inside, own = weight.box.inwards(
                    state_dict[f"{prefix}seed_indices.{weight.attribute}"].to(seeds.device)
                )
                weight.place(own, seeds[inside])
        self._overwritten.clear()
        self.sync()
        for weight in overwritten:
            weight.remember_seed_again()

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
                keys = [f"{prefix}{part}.{adapter}.{parameter}" for part in PARTS]
                if self.weights[parameter].is_divided and not any(key in state_dict for key in keys):
                    state_dict |= zip(keys, record, strict=True)


def expanded(state_dict: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """What a state dict holds of a marker as its extra state, by the keys that it has in others.

    Args:
        state_dict: the state dict.
        prefix: the marker's name there, with a point at its end.
    """
    extra = state_dict.get(f"{prefix}{EXTRA_STATE}")
    return {f"{prefix}{key}": tensor for key, tensor in load(extra).items()} if isinstance(extra, bytes) else {}


def _keep_from_fsdp(marker: SparseLayer) -> None:
    """Keep `fully_shard` from dividing records: each process knows by itself which entries it needs.

    Of modules with this entry in torch's registry of what was applied to them it takes neither parameters nor children.
    """
    marker.__dict__.setdefault(REGISTRY_KEY, {})["replicate"] = RegistryItem()


def own_part(weight: SparseWeight, record: Record) -> Record:
    """Of a record what lies in the part of its weight that this process holds, with positions in that, int64."""
    indices = record.indices.to(weight.data.device, torch.int64)
    if not weight.is_divided:
        return Record(indices, record.values)
    inside, own = weight.box.inwards(indices)
    return Record(own, record.values.to(weight.data.device)[inside])


def _scaled(weight: SparseWeight, record: Record, scale: float) -> Record:
    seeds = weight.seeds_at(record.indices)
    values = seeds.double() + scale * (record.values.double() - seeds.double())
    return Record(record.indices, values.to(record.values.dtype))


def _add_up(weight: SparseWeight, records: Sequence[Record]) -> tuple[Tensor, Tensor]:
    """Combine records of one weight: seed + Σ (value − seed), in float64; exact where only one has an entry."""
    indices = torch.cat([record.indices for record in records]).unique()
    seeds = weight.seeds_at(indices)
    total, count, single = seeds.double(), torch.zeros_like(indices), seeds.clone()
    for record in records:
        at = torch.searchsorted(indices, record.indices)
        total[at] += record.values.double() - seeds[at].double()
        count[at] += 1
        single[at] = record.values.to(single)
    return indices, torch.where(count == 1, single, total.to(single))


def _before_host_loads(host: nn.Module, state_dict: Mapping[str, Any], prefix: str, *unused: Any) -> None:
    """Before new dense weights are loaded over a host's: save what training made, and let go of the old seed."""
    marker = getattr(host, MARKER, None)
    if isinstance(marker, SparseLayer):
        loaded = [parameter for parameter in marker.weights if prefix + parameter in state_dict]
        if loaded:
            marker.forget_seed(loaded)
        for parameter in marker._shared.keys() & set(loaded):
            marker._shared[parameter] = _bit_sum(state_dict[prefix + parameter])


def _before_other_owner_loads(
    marker: SparseLayer,
    parameter: str,
    attribute: str,
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    *_: Any,
) -> None:
    """A shared parameter comes again under another name: if with other values, then as new dense weights."""
    key = prefix + attribute
    weight = marker.weights.get(parameter)
    if weight is None or key not in state_dict or state_dict[key].shape != weight.shape:
        return
    if _bit_sum(state_dict[key]) != marker._shared[parameter]:
        marker.load_dense(parameter, state_dict[key])
    # The copy that follows changes nothing.
    state_dict[key] = weight.parameter.data


def _bit_sum(tensor: Tensor) -> int:
    return int(bits(local(tensor)).sum(dtype=torch.int64))


def markers(model: nn.Module) -> Iterator[tuple[str, SparseLayer]]:
    """The marker children of a model with their names, in model order."""
    # By name: after a second import of the package there are two classes of them.
    found = ((name, module) for name, module in model.named_modules() if name.rpartition(".")[2] == MARKER)
    return ((name, cast(SparseLayer, module)) for name, module in found if isinstance(module, BaseTunerLayer))
