"""How much each of several subsets has in common with each other: tasks, seeds, distances (Figure 8 of the DST paper)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

from torch import nn

from ..delta import SparseDelta
from ..tables import printable, square_labels, text_table
from .overlap import Count, Subset, overlap


@dataclass(frozen=True)
class Overlaps:
    """What several subsets have in common, each with each. `str()` of it is a square table.

    Attributes:
        names: of the subsets.
        entries: how many components each has.
        shared: for each subset (a row) the fraction of it that is also in each other (a column), and 1 in itself; NaN if it
            is empty.
        chance: what these would be by chance; NaN where the size of a tensor is not known.
    """

    names: tuple[str, ...]
    entries: tuple[int, ...]
    shared: tuple[tuple[float, ...], ...]
    chance: tuple[tuple[float, ...], ...]

    def __str__(self) -> str:
        rows, columns = square_labels(self.names)
        table = [(column, *map(_percentage, shares)) for column, shares in zip(columns, self.shared, strict=True)]
        lines = ["percentage of each subset (row) that is also in each other (column)"]
        lines += text_table(("", *columns), table)
        others = [chance for i, row in enumerate(self.chance) for j, chance in enumerate(row) if i != j]
        if known := [chance for chance in others if not math.isnan(chance)]:
            lines.append(f"by chance: {_percentage(min(known))} to {_percentage(max(known))}")
        if rows != columns:
            lines += map(printable, rows)
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The same in plain types."""
        return asdict(self)


def overlaps(
    subsets: Sequence[Subset], names: Sequence[str], *, sizes: Mapping[str, int] | nn.Module | None = None
) -> Overlaps:
    """Compare several subsets of one base model, each with each.

    Args:
        subsets: as `overlap` takes them, n of them; folders are read once.
        names: what they are called, n of them.
        sizes: as `overlap` takes them.

    Raises:
        ValueError: as `overlap` does, naming the two that do not go together; or if there is not one name for each.
    """
    if len(names) != len(subsets):
        raise ValueError(f"{len(subsets)} subsets need as many names, got {len(names)}.")
    read = [SparseDelta.load(subset) if isinstance(subset, str | PathLike) else subset for subset in subsets]
    counts = {}
    for i, j in itertools.combinations_with_replacement(range(len(read)), 2):
        try:
            found = overlap(read[i], read[j], sizes=sizes).total
        except ValueError as error:
            raise ValueError(f"{names[i]} and {names[j]}: {error}") from error
        counts[i, j], counts[j, i] = found, Count(found.b, found.a, found.both, found.chance)
    places = range(len(read))
    return Overlaps(
        tuple(names),
        tuple(counts[i, i].a for i in places),
        tuple(tuple(counts[i, j].of_a for j in places) for i in places),
        tuple(tuple(counts[i, j].chance_of_a for j in places) for i in places),
    )


def _percentage(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.1%}"
