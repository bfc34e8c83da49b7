"""SparseDelta: the finished artefact as a value.

A delta says which components of which tensors of a base have which new values. It can be read, written, put into weights
and taken out again, and calculated with, without a model class and without PEFT.

Values are absolute, so putting one into weights needs nothing but the weights. To calculate with differences (a sum, a
multiple, what leads from one delta to another) one has to know what the base has at the same positions: its seed values,
which no file holds. `with_seeds` takes them from the base.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..core.tiles import bits
from ..core.weights import gather, scatter
from .algebra import (
    calculated_config,
    check_fit,
    combined,
    differences,
    furthest,
    has_entries_in,
    have_seeds,
    need_seeds,
    of_one_kind,
    scaled,
)
from .files import (
    WEIGHTS_NAME,
    check_dense_values,
    name_records,
    read,
    write_config,
    write_file,
)
from .packed import pack
from .records import (
    DTYPES,
    FORMAT_VERSION,
    DeltaError,
    check_floating,
    check_record,
    check_seed,
    check_shape,
)
from .tensors import SparseTensor, changed, last, summed


Weights = Mapping[str, Tensor] | nn.Module


@dataclass(frozen=True, eq=False)
class SparseDelta(Mapping[str, SparseTensor]):
    """New values for a small part of a base's tensors: parameter's name → SparseTensor. Immutable.

    Two deltas are equal if they have the same entries, bit for bit; configs and seeds do not count. Tensors without entries
    are left out.

    Attributes:
        tensors: the entries, by names of the base's parameters.
        dense: dense tensors that belong to the adapter (its modules_to_save), by their keys in its file. They have no
            differences to calculate with: a sum keeps them where all deltas that have any have the same, a composition
            the last ones, a difference those that it leads to. Where a delta has entries in them they are left out.
        config: what adapter_config.json says, without `records`; empty for a delta that was never one of PEFT's. What is
            calculated of several has one of its own, which tunes what has entries.
    """

    tensors: Mapping[str, SparseTensor]
    dense: Mapping[str, Tensor] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    # It puts back what stood in weights, finite or not.
    _restores: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        kept = {name: tensor for name, tensor in self.tensors.items() if len(tensor)}
        object.__setattr__(self, "tensors", MappingProxyType(kept))
        object.__setattr__(self, "dense", MappingProxyType(dict(self.dense)))
        object.__setattr__(self, "config", MappingProxyType(dict(self.config)))

    def __getitem__(self, name: str) -> SparseTensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SparseDelta):
            return NotImplemented
        return self.tensors.keys() == other.tensors.keys() and all(self[name] == other[name] for name in self)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"SparseDelta({self.num_entries:,} entries in {len(self)} tensors)"

    @property
    def num_entries(self) -> int:
        """Number of entries over all tensors."""
        return sum(len(tensor) for tensor in self.values())

    @property
    def has_seeds(self) -> bool:
        """Whether the base's values are known at every position."""
        return have_seeds(self)

    # To and from files

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, allow_nonfinite: bool = False) -> SparseDelta:
        """Read an adapter.

        Args:
            path: the folder of an adapter, or its safetensors file alone.
            allow_nonfinite: take NaN and infinite values, to look at them; weights they are never written into.

        Raises:
            DeltaError: if it is no DST adapter, or a damaged one.
        """
        found = read(path, allow_nonfinite=allow_nonfinite)
        tensors = {
            name: SparseTensor(
                summary.shape, found.records[name].indices.long(), found.records[name].values, None, summary.seed
            )
            for name, summary in found.summaries.items()
        }
        return cls(tensors, found.dense, found.config)

    def save(self, path: str | os.PathLike[str], *, packed: bool = False, allow_nonfinite: bool = False) -> None:
        """Write it as an adapter that PEFT can load.

        Each file is replaced in one step, the tensors first: a kill at any moment leaves the old adapter or the new one.

        Args:
            path: a folder, which is made if it is not there, and gets adapter_model.safetensors and adapter_config.json;
                or a file, if it ends in ".safetensors".
            packed: code positions in few bytes; PEFT's loading opens such a file, transformers' own does not.
            allow_nonfinite: write NaN and infinite values, which only a reader takes that asks for them.

        Raises:
            DeltaError: if an entry is none: positions that do not ascend, or lie outside.
            ValueError: if neither seeds nor their checksums are known, without which a base cannot be recognised.
        """
        summaries = {name: summary for name in sorted(self) if (summary := self[name].summary()) is not None}
        if len(summaries) < len(self):
            need_seeds(self, "to let a reader recognise its base")
        entries = {name: tensor.record() for name, tensor in self.items()}
        for name, tensor in self.items():
            numel = math.prod(tensor.shape)
            check_record(name, numel, tensor.values.dtype, entries[name], allow_nonfinite=allow_nonfinite)
        tensors = {**self.dense, **(pack(entries, summaries) if packed else name_records(entries))}
        config = dict(self.config) or self._default_config()
        config |= {"peft_type": "DST", "format_version": FORMAT_VERSION}
        path = Path(path)
        if path.suffix == ".safetensors":
            write_file(path, tensors, config, summaries)
            return
        path.mkdir(parents=True, exist_ok=True)
        write_file(path / WEIGHTS_NAME, tensors, config, summaries)
        write_config(path, config, summaries)

    def _default_config(self) -> dict[str, Any]:
        # Of nothing, as a difference may be, an adapter that fits any base: no budget is zero, no list of targets empty.
        return {
            "peft_type": "DST",
            "format_version": FORMAT_VERSION,
            "num_free_parameters": self.num_entries or 1,
            "siloing": "none",
            "target_parameters": sorted(self) or None,
            "inference_mode": True,
        }

    def described(self, **config: Any) -> SparseDelta:
        """The same with a config made for its entries, as of something that was never trained, and what is given of it."""
        return replace(self, config={**self._default_config(), **config})

    # To and from weights

    @classmethod
    def between(
        cls, base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], config: Mapping[str, Any] | None = None
    ) -> SparseDelta:
        """The delta that leads from one state dict to another: every component whose bits differ.

        Args:
            base: name → tensor.
            tuned: name → tensor of the same shape; names that `base` has not are refused, and those that it has not itself
                are unchanged.
            config: kept with the delta.

        Raises:
            DeltaError: if the two do not belong together.
        """
        found = {}
        for name, tensor in tuned.items():
            if name not in base or base[name].shape != tensor.shape:
                there = f"shape {tuple(base[name].shape)}" if name in base else "none"
                raise DeltaError(
                    f"{name!r} is of shape {tuple(tensor.shape)} in the tuned weights and {there} in the base. A delta "
                    "leads from a base to weights of the same shapes; leave the tensor out, or give its own base."
                )
            seed = base[name].detach()
            if seed.dtype not in DTYPES.values():
                if seed.dtype != tensor.dtype or not torch.equal(_bytes(seed), _bytes(tensor)):
                    check_floating(name, seed.dtype)
                continue
            flat, new = seed.reshape(-1), tensor.detach().to(seed).reshape(-1)
            indices = (bits(flat) != bits(new)).nonzero().view(-1)
            found[name] = SparseTensor(tuple(seed.shape), indices, new[indices], flat[indices])
        return cls(found, config=config or {})

    @torch.no_grad()
    def apply(self, weights: Weights, *, check: bool = True) -> SparseDelta:
        """Write the values into weights, in place; everything is checked before the first is written.

        Args:
            weights: a state dict, or a module by whose parameters' names the delta goes.
            check: whether to compare the base's values with the checksums of those that the delta was made from.

        Returns:
            The delta that undoes it, bit for bit: what stood at the same positions.

        Raises:
            DeltaError: if a tensor is missing, has another shape, or other values than the delta's base; nothing has been
                written by then.
        """
        targets = self._targets(weights, check)
        undo = self._seeded(targets)._swapped()
        written: list[str] = []
        try:
            for name, target in targets.items():
                written.append(name)
                scatter(target, self[name].indices.to(target.device), self[name].values.to(target))
        except BaseException:
            for name in written:
                scatter(targets[name], undo[name].indices.to(targets[name].device), undo[name].values)
            raise
        return undo

    @torch.no_grad()
    def revert(self, weights: Weights) -> None:
        """Write the seeds back into weights that this delta was applied to. Exact.

        Raises:
            ValueError: if the seeds are not known.
        """
        self._swapped().apply(weights, check=False)

    @torch.no_grad()
    def with_seeds(self, base: Weights, *, check: bool = True) -> SparseDelta:
        """The same with the seeds, read from the base that it belongs to.

        Args:
            base: a state dict, or a module with those weights; not changed.
            check: whether to compare them with the delta's checksums.

        Raises:
            DeltaError: if a tensor is missing, has another shape, or other values than the delta's base.
        """
        return self._seeded(self._targets(base, check))

    def _seeded(self, targets: Mapping[str, Tensor]) -> SparseDelta:
        return self._with(
            {
                name: replace(tensor, seeds=gather(targets[name], tensor.indices.to(targets[name].device)))
                for name, tensor in self.items()
            }
        )

    def _targets(self, weights: Weights, check: bool) -> dict[str, Tensor]:
        there = _named(weights)
        found = {}
        for name, tensor in self.items():
            if name not in there:
                raise DeltaError(
                    f"the delta has entries for {name!r}, which the weights do not have. They belong to another base, or "
                    "their names carry a prefix."
                )
            target = there[name].detach()
            check_shape(name, target.shape, tensor.shape, len(tensor))
            check_floating(name, target.dtype)
            check_record(name, target.numel(), target.dtype, tensor.record(), allow_nonfinite=self._restores)
            if check and (checksums := tensor.checksums()):
                check_seed(name, checksums, gather(target, tensor.indices.to(target.device)))
            found[name] = target
        return found

    def _swapped(self) -> SparseDelta:
        """Values and seeds exchanged."""
        need_seeds(self, "to undo it")
        return SparseDelta(
            {
                name: replace(t, values=t.seeds, seeds=t.values, digests=None)
                for name, t in self.items()
                if t.seeds is not None
            },
            _restores=True,
        )

    # Algebra

    def compose(self, *others: SparseDelta) -> SparseDelta:
        """One delta, then others over it: a component that several change has the last one's value.

        Each of the others belongs to the same base or to what those before it made of that (`difference`). Needs all seeds;
        what comes out equal to its seed is left out.
        """
        composed = self
        for other in others:
            check_fit(composed, other, "composition", chained=True)
            found = combined([composed, other], lambda aligned, seeds: last(aligned))
            composed = composed._calculated(found, [other], other if other.dense else composed)
        return composed.reduced()

    def add(self, *others: SparseDelta) -> SparseDelta:
        """The sum: a component that one changes has its value, one that several change seed + Σ (value − seed).

        All belong to one base. Needs all seeds; summed in float64; what comes out equal to its seed is left out.
        """
        deltas = (self, *others)
        for one, other in itertools.combinations(deltas, 2):
            check_fit(one, other, "sum")
        kept = of_one_kind([delta.dense for delta in deltas])
        dense = next((delta for delta in deltas if delta.dense), None) if kept else None
        return self._calculated(combined(deltas, summed), others, dense)

    def difference(self, other: SparseDelta) -> SparseDelta:
        """What leads from this delta's weights to another's: `a.compose(a.difference(b)) == b.reduced()`.

        Its seeds are this delta's values, so it is applied to weights that this one was applied to. Needs both seeds.
        """
        check_fit(self, other, "difference")
        return self._calculated(differences(self, other), [other], other)

    def scale(self, factor: float) -> SparseDelta:
        """Seed + factor · (value − seed); calculated in float64. Needs the seeds; what equals its seed is left out."""
        need_seeds(self, "to scale it")
        if not math.isfinite(factor):
            raise ValueError(f"factor must be finite, got {factor}.")
        if factor == 1:
            return self.reduced()
        return self._with(scaled(self, factor))

    def reduced(self) -> SparseDelta:
        """Without the entries whose value is their seed's, bit for bit. Needs the seeds."""
        need_seeds(self, "to tell what equals it")
        return self._with({name: changed(tensor) for name, tensor in self.items()})

    def restrict(self, keep: Callable[[str], bool] | Sequence[str]) -> SparseDelta:
        """Only some tensors.

        Args:
            keep: says of a parameter's name whether it stays; or names of modules or parameters, which stay with all that
                is below them.
        """
        if not callable(keep):
            prefixes = [keep] if isinstance(keep, str) else list(keep)
            unknown = [p for p in prefixes if not any(f"{name}.".startswith(f"{p}.") for name in self)]
            if unknown:
                some = ", ".join(list(self)[:3]) + (f" and {len(self) - 3} more" if len(self) > 3 else "")
                raise ValueError(f"the delta has no entries in {unknown[0]!r}; it has some in {some or 'nothing'}.")
            return self.restrict(lambda name: any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes))
        return self._with({name: tensor for name, tensor in self.items() if keep(name)})

    def prune(
        self, num_entries: int | None = None, kind: str = "inverse_relative", *, epsilon: float | None = None
    ) -> SparseDelta:
        """The entries that are furthest from their seed, over all tensors. Needs the seeds.

        Of equal distances the earlier tensor's and the lower position win, as in training.

        Args:
            num_entries: how many to keep.
            kind: the distance, see `peft_dst.core.distance`.
            epsilon: the same as a fraction of the components of all tensors that have entries.

        Raises:
            ValueError: if there are fewer entries, or not one of the two numbers is given.
        """
        need_seeds(self, "to measure distances")
        if (num_entries is None) == (epsilon is None):
            raise ValueError("give one of num_entries and epsilon: how much is to be kept.")
        if num_entries is None:
            num_entries = round((epsilon or 0.0) * sum(math.prod(tensor.shape) for tensor in self.values()))
        if not 0 <= num_entries <= self.num_entries:
            raise ValueError(f"the delta has {self.num_entries:,} entries, of which {num_entries:,} cannot be kept.")
        return self._with(furthest(self, num_entries, kind))

    def to(self, dtype: torch.dtype) -> SparseDelta:
        """Values in another dtype, rounded to nearest; seeds and dense tensors as well if it is narrower.

        Raises:
            DeltaError: if a value is not finite in it.
        """
        if dtype not in DTYPES.values():
            raise ValueError(f"values are {', '.join(DTYPES)}; {dtype} is none of them.")
        converted = {}
        for name, tensor in self.items():
            check_record(name, math.prod(tensor.shape), dtype, tensor.record())
            # Widened seeds would no longer say what they were rounded from.
            seeds = tensor.seeds
            if seeds is not None and torch.finfo(dtype).bits < torch.finfo(seeds.dtype).bits:
                seeds = seeds.to(dtype)
            converted[name] = replace(tensor, values=tensor.values.to(dtype), seeds=seeds)
        dense = {key: t.to(dtype) if t.dtype.is_floating_point else t for key, t in self.dense.items()}
        for key, t in dense.items():
            check_dense_values(key, t)
        return self._with(converted, dense=dense)

    # Helpers

    def _with(self, tensors: Mapping[str, SparseTensor], dense: Mapping[str, Tensor] | None = None) -> SparseDelta:
        return SparseDelta(tensors, self.dense if dense is None else dense, self.config)

    def _calculated(
        self, tensors: Mapping[str, SparseTensor], others: Sequence[SparseDelta], dense: SparseDelta | None
    ) -> SparseDelta:
        """Entries that no training has chosen: their number is the budget, and of the sources' options none holds for them.

        Args:
            tensors: the entries.
            others: what they were made of, besides this delta.
            dense: whose dense tensors go with them.
        """
        made = SparseDelta(tensors)
        sources = [delta.config for delta in (self, *others) if delta.config]
        if not sources:
            return made
        if dense is None or not dense.dense or has_entries_in(dense.dense, tensors):
            return replace(made, config=calculated_config(made._default_config(), sources, None))
        config = calculated_config(made._default_config(), sources, dense.config)
        return replace(made, dense=dense.dense, config=config)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _named(weights: Weights) -> Mapping[str, Tensor]:
    if isinstance(weights, nn.Module):
        return dict(weights.named_parameters(remove_duplicate=False))
    return weights
