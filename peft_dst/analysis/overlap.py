"""How much two subsets have in common: |A ∩ B| / |A| (Eq. 9 of the DST paper), beside what chance would give.

Two random subsets of a tensor of n components, of |A| and |B| of them, share |A| |B| / n in the mean. Subsets of very
unequal tensors share more than their sizes suggest, since small silos get few components out of few; so chance is summed
tensor by tensor, and an overlap is a signal only as far as it is above it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from ..core.shards import check_held_alone
from ..core.silos import compile_silo_patterns, read_names
from ..delta import SparseDelta, plain_name
from ..tables import text_table
from ..tuner.layer import markers
from ..tuner.overlay import can_edit, can_overlay, original_shape
from ..tuner.settling import settle


Subset: TypeAlias = "str | PathLike[str] | SparseDelta | tuple[nn.Module, str] | Mapping[str, Tensor | Sequence[int]]"


@dataclass(frozen=True)
class Count:
    """Two subsets of some tensors.

    Attributes:
        a: |A|.
        b: |B|.
        both: |A ∩ B|.
        chance: what `both` would be in the mean of random subsets with as many components of each tensor; None where the
            size of a tensor is not known.
    """

    a: int
    b: int
    both: int
    chance: float | None

    @property
    def of_a(self) -> float:
        """|A ∩ B| / |A| (Eq. 9), NaN if A is empty."""
        return self.both / self.a if self.a else math.nan

    @property
    def of_b(self) -> float:
        """|A ∩ B| / |B|, the same from the other side, NaN if B is empty."""
        return self.both / self.b if self.b else math.nan

    @property
    def chance_of_a(self) -> float:
        """What `of_a` would be by chance, NaN if A is empty or a size is not known."""
        return self.chance / self.a if self.a and self.chance is not None else math.nan

    @property
    def chance_of_b(self) -> float:
        """What `of_b` would be by chance, NaN if B is empty or a size is not known."""
        return self.chance / self.b if self.b and self.chance is not None else math.nan


@dataclass(frozen=True)
class Overlap:
    """What two subsets have in common. `str()` of it is a table.

    Attributes:
        total: over all tensors.
        kinds: by kind of module ("attention", "feed_forward", …), as silos are read off names.
        layers: by layer, e.g. "encoder.layer.3"; "" for what is outside any.
        parameters: by parameter, for those with entries in either.
    """

    total: Count
    kinds: dict[str, Count]
    layers: dict[str, Count]
    parameters: dict[str, Count]

    @property
    def only_in_a(self) -> tuple[str, ...]:
        """Parameters with entries in A and none in B."""
        return tuple(name for name, count in self.parameters.items() if count.a and not count.b)

    @property
    def only_in_b(self) -> tuple[str, ...]:
        """Parameters with entries in B and none in A."""
        return tuple(name for name, count in self.parameters.items() if count.b and not count.a)

    def __str__(self) -> str:
        header = ("", "|A|", "|B|", "|A ∩ B|", "of A", "by chance", "of B", "by chance")
        lines = text_table(
            header,
            [_row("total", self.total)],
            [_row(kind, count) for kind, count in self.kinds.items()],
            [_row(layer or "outside any layer", count) for layer, count in self.layers.items()],
        )
        if self.only_in_a or self.only_in_b:
            lines.append(f"tensors with entries in A only: {len(self.only_in_a)}, in B only: {len(self.only_in_b)}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The same in plain types."""
        return asdict(self)


def overlap(
    a: Subset,
    b: Subset,
    *,
    sizes: Mapping[str, int] | nn.Module | None = None,
    silo_pattern: str | Sequence[str] | None = None,
) -> Overlap:
    """Compare two subsets of one base model: two tasks, two seeds, two distances, two moments of a run.

    A parameter without entries counts as empty, so adapters that tune different modules can be compared; an adapter
    folder does not say which base its names belong to, so that both have one is the caller's to know. Where sizes are
    known, as of saved adapters, a difference is refused.

    Args:
        a: folder of a saved adapter, or what was loaded of it; or a model and the name of one of its adapters; or name of
            each parameter → sorted flat positions, (k,) of integers.
        b: likewise; it need not have as many entries.
        sizes: number of components of each parameter by name, or the base model: what chance needs. Models and saved
            adapters given as `a` or `b` bring their own.
        silo_pattern: how to read names that the built-in rules do not read, as in `DSTConfig`.

    Raises:
        ValueError: if a subset cannot be read, its positions do not ascend, or the two belong to different bases (a
            parameter is missing in one of them, has another size, or is smaller than a position in it).
    """
    models = [source[0] for source in (a, b) if isinstance(source, tuple)]
    models += [sizes] if isinstance(sizes, nn.Module) else []
    a, b = (SparseDelta.load(source) if isinstance(source, str | PathLike) else source for source in (a, b))
    one, other = _positions(a, "a"), _positions(b, "b")
    names = [name for name in dict.fromkeys([*one, *other]) if len(one.get(name, ())) or len(other.get(name, ()))]
    loaded = [source for source in (a, b) if isinstance(source, SparseDelta)]
    given: list[Mapping[str, int]] = [{name: math.prod(t.shape) for name, t in delta.items()} for delta in loaded]
    given += [sizes] if isinstance(sizes, Mapping) else []
    numels = _agree(names, [_parameter_sizes(model) for model in models], given)
    nothing = torch.empty(0, dtype=torch.int64, device="cpu")
    parameters = {}
    for name in names:
        first, second = one.get(name, nothing), other.get(name, nothing)
        _check_within(name, numels.get(name), first, second)
        parameters[name] = _count(first, second, numels.get(name))
    read = read_names(names, compile_silo_patterns(silo_pattern))
    return Overlap(
        _sum(parameters.values()),
        _by({name: kind for name, (_, kind) in read.items()}, parameters),
        _by({name: layer for name, (layer, _) in read.items()}, parameters),
        parameters,
    )


def _positions(source: Subset, which: str) -> dict[str, Tensor]:
    """Name → sorted flat positions, int64 (k,) on the CPU."""
    if isinstance(source, SparseDelta):
        return {name: tensor.indices.cpu() for name, tensor in source.items()}
    if isinstance(source, Mapping):
        found = {name: torch.as_tensor(positions).cpu() for name, positions in source.items()}
        for name, positions in found.items():
            _check_sorted(name, positions, which)
        return {name: positions.long() for name, positions in found.items()}
    assert isinstance(source, tuple)
    model, adapter = source
    settle(model)
    owners = [marker for _, marker in markers(model) if adapter in marker.tuned]
    if not owners:
        there = sorted({name for _, marker in markers(model) for name in marker.tuned})
        raise ValueError(f"{which}: the model has no DST adapter {adapter!r}; it has {', '.join(there) or 'none'}.")
    if any(adapter in marker.awaited for marker in owners):
        raise ValueError(
            f"{which}: adapter {adapter!r} was added from a saved config, but its tensors were not loaded."
        )
    check_held_alone(
        (weight.parameter for marker in owners for weight in marker.weights.values()),
        "overlap of a model's adapter",
        "Compare saved adapters: overlap takes their folders.",
    )
    return {
        marker.weights[parameter].name: record.indices.long().cpu()
        for marker in owners
        for parameter, record in marker.records(adapter).items()
    }


def _check_sorted(name: str, positions: Tensor, which: str) -> None:
    if positions.numel() and (positions.is_floating_point() or positions.dtype == torch.bool or positions.dim() != 1):
        raise ValueError(
            f"{which}: positions of {name!r} are {positions.dtype} of shape {tuple(positions.shape)}; expected one vector "
            "of integers. Of a marking of components, pass marks.flatten().nonzero().flatten()."
        )
    if positions.numel() and (int(positions[0]) < 0 or bool((positions[1:] <= positions[:-1]).any())):
        raise ValueError(
            f"{which}: positions of {name!r} are negative or not strictly ascending. Sort them, each once."
        )


def _parameter_sizes(model: nn.Module) -> dict[str, int]:
    """Sizes by the names that the base model has for its parameters, and the adapter's records with it."""
    inner = getattr(model, "get_base_model", lambda: model)()
    return {
        plain_name(f"{name}.{parameter}" if name else parameter): _numel(host, parameter, tensor)
        for name, host in inner.named_modules(remove_duplicate=False)
        for parameter, tensor in host.named_parameters(recurse=False)
    }


def _numel(host: nn.Module, parameter: str, tensor: nn.Parameter) -> int:
    # Quantised weights are stored in other shapes.
    packed = not can_edit(tensor) and can_overlay(host, parameter)
    return math.prod(original_shape(cast(nn.Linear, host))) if packed else tensor.numel()


def _agree(names: Iterable[str], models: list[dict[str, int]], given: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The sizes of some parameters, on which all models must agree, and with what is known of some."""
    agreed: dict[str, int] = {}
    for name in names:
        found = [sizes.get(name) for sizes in models] + [sizes[name] for sizes in given if name in sizes]
        if len(set(found)) > 1 or None in found:
            sizes = ", ".join("none" if size is None else f"{size:,}" for size in found)
            raise ValueError(
                f"{name!r} has a subset, but numbers of components that do not agree ({sizes}): the subsets, or `sizes`, "
                "belong to different bases and cannot be compared."
            )
        if found and found[0] is not None:
            agreed[name] = found[0]
    return agreed


def _check_within(name: str, numel: int | None, *subsets: Tensor) -> None:
    last = max(int(positions[-1]) for positions in subsets if positions.numel())
    if numel is not None and last >= numel:
        raise ValueError(
            f"{name!r} has {numel:,} components, and a subset has position {last:,}: it belongs to another base, or "
            "`sizes` does."
        )


def _count(a: Tensor, b: Tensor, numel: int | None) -> Count:
    both = int(torch.isin(a, b, assume_unique=True).sum())
    return Count(a.numel(), b.numel(), both, None if numel is None else a.numel() * b.numel() / numel)


def _sum(counts: Iterable[Count]) -> Count:
    counts = list(counts)
    chances = [count.chance for count in counts if count.chance is not None]
    chance = math.fsum(chances) if len(chances) == len(counts) else None
    return Count(sum(c.a for c in counts), sum(c.b for c in counts), sum(c.both for c in counts), chance)


def _by(groups: Mapping[str, str], parameters: Mapping[str, Count]) -> dict[str, Count]:
    members: dict[str, list[Count]] = {}
    for name, count in parameters.items():
        members.setdefault(groups[name], []).append(count)
    return {group: _sum(counts) for group, counts in members.items()}


def _row(name: str, count: Count) -> tuple[str, ...]:
    shares = (count.of_a, count.chance_of_a, count.of_b, count.chance_of_b)
    cells = ("-" if math.isnan(share) else f"{share:.2%}" for share in shares)
    return (name, f"{count.a:,}", f"{count.b:,}", f"{count.both:,}", *cells)
