"""What an extraction kept, and what it cut off: counted over the whole change from seed to tuned weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..core import distance
from ..core.tiles import TILE, bits
from ..tables import text_table


@dataclass(frozen=True)
class SiloFigures:
    """The change of some parameters, and the part of it that the adapter has.

    Attributes:
        name: the silo.
        size: number of components.
        budget: how many of them might differ.
        free: how many do, in the adapter.
        threshold: smallest distance kept; 0 where nothing competed or nothing was kept, NaN over several silos.
        changed: components whose bits differ between seed and tuned weights.
        largest_reset: largest distance of those that went back to the seed, 0 if none did; normalised as the silo's are,
            and not for parameters outside any.
        squares: Σ (θ̂ − θ0)² over all components.
        squares_kept: the part of it in the adapter.
        absolute: Σ |θ̂ − θ0| over all components.
        absolute_kept: the part of it in the adapter.
    """

    name: str
    size: int = 0
    budget: int = 0
    free: int = 0
    threshold: float = 0.0
    changed: int = 0
    largest_reset: float = 0.0
    squares: float = 0.0
    squares_kept: float = 0.0
    absolute: float = 0.0
    absolute_kept: float = 0.0

    @property
    def reset(self) -> int:
        """Components that had changed and went back to the seed."""
        return self.changed - self.free

    @property
    def share_of_squares(self) -> float:
        """Share of the squared change that was kept; 1 if nothing had changed."""
        return self.squares_kept / self.squares if self.squares else 1.0

    @property
    def error(self) -> float:
        """Frobenius norm of what was cut off, relative to that of the whole change; 0 if nothing had changed."""
        return math.sqrt(max(0.0, 1.0 - self.share_of_squares))

    @property
    def share_of_absolute(self) -> float:
        """Share of the absolute change that was kept; 1 if nothing had changed."""
        return self.absolute_kept / self.absolute if self.absolute else 1.0


def joined(name: str, parts: Sequence[SiloFigures], budget: int, threshold: float = math.nan) -> SiloFigures:
    """The figures of several parts as one."""
    return SiloFigures(
        name,
        sum(p.size for p in parts),
        budget,
        sum(p.free for p in parts),
        threshold,
        sum(p.changed for p in parts),
        max((p.largest_reset for p in parts), default=0.0),
        math.fsum(p.squares for p in parts),
        math.fsum(p.squares_kept for p in parts),
        math.fsum(p.absolute for p in parts),
        math.fsum(p.absolute_kept for p in parts),
    )


def measure(name: str, seed: Tensor, tuned: Tensor, indices: Tensor, kind: str, divisor: float = 1.0) -> SiloFigures:
    """Figures of one tensor, computed a tile at a time.

    Args:
        name: of the parameter.
        seed: θ0, flat (n,).
        tuned: θ̂, flat (n,), of the same dtype and device.
        indices: flat positions kept, sorted, int64 (k,).
        kind: name of the distance.
        divisor: what distances are divided by.
    """
    tiles = []
    starts = torch.arange(0, seed.numel(), TILE, device=seed.device)
    ends = [0, *torch.searchsorted(indices, starts + TILE).tolist()]
    for start, first, end in zip(starts.tolist(), ends, ends[1:], strict=False):
        part, kept = (seed[start : start + TILE], tuned[start : start + TILE]), indices[first:end] - start
        change = part[1].double().sub_(part[0]).abs_()
        far = distance(kind, *part).div_(divisor).index_fill_(0, kept, 0.0)
        squares = change.square()
        tiles.append(
            SiloFigures(
                name,
                change.numel(),
                free=kept.numel(),
                changed=int((bits(part[0]) != bits(part[1])).sum()),
                largest_reset=float(far.amax()),
                squares=float(squares.sum()),
                squares_kept=float(squares[kept].sum()),
                absolute=float(change.sum()),
                absolute_kept=float(change[kept].sum()),
            )
        )
    return joined(name, tiles, 0)


@dataclass(frozen=True)
class Extraction:
    """What `extract` did. `str()` of it is a table.

    Attributes:
        output: the adapter's folder.
        silos: what became of each silo.
        parameters: the same by parameter, in the silos' order.
        untuned: the change of parameters that the config does not tune, all of which goes back to the seed.
        dense: parameters that the adapter keeps whole (modules_to_save).
        only_in_base: the base's tensors that the tuned model does not have; they have no place in an adapter.
        ignored: the tuned checkpoint's tensors that its own model class does not use.
        not_carried: persistent buffers, and integer or 8-bit parameters, that differ between the two; an adapter holds
            neither.
    """

    output: Path
    silos: tuple[SiloFigures, ...]
    untuned: SiloFigures
    dense: tuple[str, ...] = ()
    only_in_base: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    not_carried: tuple[str, ...] = ()
    parameters: tuple[SiloFigures, ...] = ()

    @property
    def total(self) -> SiloFigures:
        """All parameters but the dense ones, tuned or not."""
        return joined("total", [*self.silos, self.untuned], sum(silo.budget for silo in self.silos))

    def __str__(self) -> str:
        untuned = [self.untuned] if self.untuned.changed else []
        header = ("silo", "size", "free", "threshold", "reset", "largest reset", "Σ|change| kept", "Σ change² kept")
        lines = text_table(header, [_row(figures) for figures in [*self.silos, *untuned]], [_row(self.total)])
        notes = (
            ("kept whole", self.dense),
            ("only in the base, left out", self.only_in_base),
            ("in the tuned checkpoint, but not used by its model", self.ignored),
            ("differs, but an adapter cannot hold it", self.not_carried),
        )
        return "\n".join([*lines, *(f"{note}: {', '.join(names)}" for note, names in notes if names)])


def _row(figures: SiloFigures) -> tuple[str, ...]:
    return (
        figures.name,
        f"{figures.size:,}",
        f"{figures.free:,}",
        "" if math.isnan(figures.threshold) else f"{figures.threshold:.3g}",
        f"{figures.reset:,}",
        f"{figures.largest_reset:.3g}",
        f"{figures.share_of_absolute:.2%}",
        f"{figures.share_of_squares:.2%}",
    )
