"""What is calculated of several deltas: entries of their tensors, by name, and what they are as an adapter.

`SparseDelta` has the methods. Here is what they do with mappings of names to `SparseTensor`s, which deltas are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..core.distances import distance
from ..core.tiles import bits
from .files import PEFT_PREFIX
from .records import DeltaError
from .tensors import Aligned, SparseTensor, align, changed, shared


Tensors = Mapping[str, SparseTensor]
# For these PEFT expects a dense head in the file, whatever modules_to_save says.
_TASKS_WITH_HEADS = {"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"}


def have_seeds(tensors: Tensors) -> bool:
    """Whether the base's values are known at every position."""
    return all(tensor.seeds is not None for tensor in tensors.values())


def need_seeds(tensors: Tensors, what: str) -> None:
    """Check that the base's values are known at every position.

    Raises:
        ValueError: if they are not; `what` says what they are needed for.
    """
    if not have_seeds(tensors):
        raise ValueError(
            f"the base's values at the delta's positions are needed {what}; a file does not hold them. Take them from "
            "the base with delta.with_seeds(base)."
        )


def check_fit(one: Tensors, other: Tensors, what: str, chained: bool = False) -> None:
    """Check that another delta has this one's base, or (`chained`) what this one makes of it.

    Raises:
        ValueError: if seeds are not known.
        DeltaError: if it has another one.
    """
    for tensors in (one, other):
        need_seeds(tensors, f"for a {what}")
    for name in one.keys() & other.keys():
        mine, theirs = one[name], other[name]
        if mine.shape != theirs.shape or mine.values.dtype != theirs.values.dtype:
            raise DeltaError(
                f"{name!r} is {mine.values.dtype} {mine.shape} in one delta and {theirs.values.dtype} {theirs.shape} "
                "in the other. They belong to different bases, or need one dtype (delta.to)."
            )
        _, where, at = shared(mine.indices, theirs.indices)
        assert mine.seeds is not None
        assert theirs.seeds is not None
        found = bits(theirs.seeds[at].to(mine.seeds))
        fits = found == bits(mine.seeds[where])
        if chained:
            fits |= found == bits(mine.values[where].to(mine.seeds))
        if not fits.all():
            raise DeltaError(f"the two deltas have different seeds in {name!r}: they belong to different bases.")


def combined(deltas: Sequence[Tensors], join: Callable[[Sequence[Aligned], Tensor], Tensor]) -> dict[str, SparseTensor]:
    """Entries at all positions of several, but for those that come out at their seed.

    Args:
        deltas: with their seeds.
        join: of what each has at some positions, and the seeds there, the new values.
    """
    for delta in deltas:
        need_seeds(delta, "to calculate with it")
    found = {}
    for name in dict.fromkeys(name for delta in deltas for name in delta):
        there = [delta[name] for delta in deltas if name in delta]
        indices, seeds, aligned = align(there)
        found[name] = changed(SparseTensor(there[0].shape, indices, join(aligned, seeds), seeds))
    return found


def differences(one: Tensors, other: Tensors) -> dict[str, SparseTensor]:
    """What leads from one's values to another's; its seeds are the values of the first."""
    found = {}
    for name in dict.fromkeys([*one, *other]):
        indices, seeds, (mine, theirs) = align([one.get(name), other.get(name)])
        shape = (one.get(name) or other[name]).shape
        found[name] = changed(SparseTensor(shape, indices, theirs.where_absent(seeds), mine.where_absent(seeds)))
    return found


def scaled(tensors: Tensors, factor: float) -> dict[str, SparseTensor]:
    """Seed + factor · (value − seed), in float64, but for what comes out at its seed."""
    return {
        name: changed(replace(t, values=torch.lerp(t.seeds.double(), t.values.double(), factor).to(t.values)))
        for name, t in tensors.items()
        if t.seeds is not None
    }


def furthest(tensors: Tensors, count: int, kind: str) -> dict[str, SparseTensor]:
    """So many entries with the largest distances from their seeds; of equal ones the first."""
    distances = [distance(kind, t.seeds, t.values).double() for t in tensors.values() if t.seeds is not None]
    every = torch.cat([d.cpu() for d in distances]) if distances else torch.empty(0, device="cpu")
    kept = torch.zeros(every.numel(), dtype=torch.bool, device="cpu")
    kept[every.argsort(descending=True, stable=True)[:count]] = True
    parts = kept.split([len(tensor) for tensor in tensors.values()])
    return {name: t.take(part.to(t.indices.device)) for (name, t), part in zip(tensors.items(), parts, strict=True)}


def of_one_kind(several: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """The dense tensors that all have which have any, bit for bit; none where they differ."""
    first, *others = [dense for dense in several if dense] or [{}]
    alike = all(
        first.keys() == other.keys()
        and all(tensor.dtype == other[key].dtype and torch.equal(tensor, other[key]) for key, tensor in first.items())
        for other in others
    )
    return first if alike else {}


def calculated_config(
    default: Mapping[str, Any], sources: Sequence[Mapping[str, Any]], head: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What adapter_config.json says of a calculated delta: of the sources' options none holds for its entries.

    Args:
        default: what it says of entries that no training has chosen.
        sources: what it says of the deltas they were made of, one at least.
        head: of these the one whose dense tensors go along, if any do.
    """
    config = {**default, **{key: sources[0].get(key) for key in ("base_model_name_or_path", "revision")}}
    if head is not None:
        return config | {key: head.get(key) for key in ("task_type", "modules_to_save")}
    tasks = {source.get("task_type") for source in sources}
    return config | {"task_type": tasks.pop() if len(tasks) == 1 and not tasks & _TASKS_WITH_HEADS else None}


def has_entries_in(dense: Mapping[str, Tensor], tensors: Tensors) -> bool:
    """Whether some of a file's dense tensors have entries, too."""
    return any(key.removeprefix(PEFT_PREFIX) in tensors for key in dense)
