"""The paper's approximate choice of a silo's subset: a threshold that is tracked from step to step (Appendix C, Alg. 2).

The threshold q_S moves little between two steps, so a few bisections of an interval around the last one give the next.
The number of kept components is then near the budget, not equal to it: the interval has 2^m points at most, and the
budget's own threshold lies between two of them. The exact choice is in `selection`.

Bisections only count components above a threshold. One pass over the weights notes the largest distance of every block;
a count then looks at the blocks whose maximum is above its threshold, some tiles at a time, so Δ is never materialised.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .distances import distance
from .selection import NonFiniteDistanceError, Selection, select


# m and r of Appendix C.
ITERATIONS = 3
FLUCTUATION = 2.0

# Components looked at together: 256 KiB of float32, which stays in a core's second-level cache with its operands.
_TILE = 1 << 16
# Components a block. Maxima of shorter ones take longer; of longer ones more reach the threshold (docs/LOG.md).
_BLOCK = 64


def refine_threshold(
    previous: float,
    count: Callable[[float], int],
    budget: int,
    iterations: int = ITERATIONS,
    fluctuation: float = FLUCTUATION,
) -> float:
    """Refine the threshold of one silo by bisection around that of the previous step (Alg. 2).

    The interval is [q' / r, r q']. Fractions are compared as the counts they stand for: c(Δ, q) > ε is
    count(q) > budget. The midpoint is (lo + hi) / 2, where the paper's line 10 misprints the sign. Of two ends that miss
    the budget by as much, the upper one is returned, which keeps fewer.

    Args:
        previous: q', the threshold of the previous step, positive.
        count: number of distances strictly above a threshold; called once for each different one, m to m + 2 times.
        budget: ε |S|.
        iterations: m, the number of bisections.
        fluctuation: r > 1, by how much a threshold may grow or shrink in one step.

    Returns:
        q, within [q' / r, r q'].
    """
    count = functools.cache(count)
    low, middle, high = previous / fluctuation, previous, previous * fluctuation
    for _ in range(iterations):
        if count(middle) > budget:
            low = middle
        else:
            high = middle
        middle = (low + high) / 2
    return low if abs(count(low) - budget) < abs(count(high) - budget) else high


def select_iteratively(
    seeds: Sequence[Tensor],
    updates: Sequence[Tensor],
    budget: int,
    kind: str,
    previous: float | None,
    iterations: int = ITERATIONS,
    fluctuation: float = FLUCTUATION,
) -> Selection:
    """Choose the components of one silo that keep their update, by Alg. 2: those whose distance is above q (Eq. 6, 7).

    A distance equal to q is not above it, so ties are kept or dropped together, and a component at distance zero is
    never kept, q being positive. Where there is nothing to refine the choice is the exact one of `select`: at the first
    step (the paper does not say where its q' comes from; the exact threshold is the value that Alg. 2 approximates, and
    a guess would keep many times the budget for some steps), after a step whose threshold was zero or infinite (nothing
    had moved, as under a learning rate of 0, and an interval around zero is empty), and for a budget of nothing or of
    the whole silo. For the ramp-up of the paper give a guess as the first `previous`: `mean_distance` is one.

    Args:
        seeds: Θ0 of the silo's tensors, each flat, e.g. [(262144,), (512,)] float32.
        updates: Θ̂, likewise.
        budget: ε |S|, 0 <= budget <= the number of components.
        kind: name of the distance.
        previous: q', the threshold that the silo's last selection returned; None at the first step.
        iterations: m.
        fluctuation: r.

    Returns:
        The subset, and q in the distance's dtype. After an exact choice, q is the smallest kept distance.

    Raises:
        NonFiniteDistanceError: if any distance is NaN or infinite.
    """
    n = sum(seed.numel() for seed in seeds)
    if previous is None or not 0 < previous < math.inf or not 0 < budget < n:
        return select(seeds, updates, budget, kind)
    silo = _Distances(seeds, updates, kind)
    threshold = refine_threshold(previous, silo.count, budget, iterations, fluctuation)
    return Selection(silo.above(threshold), torch.tensor(threshold, dtype=silo.dtype, device=silo.device))


def mean_distance(seeds: Sequence[Tensor], updates: Sequence[Tensor], kind: str) -> float:
    """Mean Δ of one silo, a first q' that takes no selection to find; it keeps far too many at first.

    Args:
        seeds: Θ0 of the silo's tensors, each flat.
        updates: Θ̂, likewise.
        kind: name of the distance.
    """
    sums = [
        distance(kind, part, moved).sum(dtype=torch.float64)
        for seed, updated in zip(seeds, updates, strict=True)
        for part, moved in zip(seed.split(_TILE), updated.split(_TILE), strict=True)
    ]
    return float(torch.stack(sums).sum()) / max(sum(seed.numel() for seed in seeds), 1)


class _Distances:
    """Δ of one silo, computed anew for every question but never all at once.

    Args:
        seeds: Θ0 of the silo's tensors, each flat.
        updates: Θ̂, likewise.
        kind: name of the distance.

    Raises:
        NonFiniteDistanceError: if any distance is NaN or infinite.
    """

    def __init__(self, seeds: Sequence[Tensor], updates: Sequence[Tensor], kind: str):
        self.pairs = list(zip(seeds, updates, strict=True))
        self.kind = kind
        self.maxima = [_block_maxima(seed, updated, kind) for seed, updated in self.pairs]
        everywhere = torch.cat(self.maxima)
        self.dtype, self.device = everywhere.dtype, everywhere.device
        self.ceiling = torch.finfo(self.dtype).max
        # NaN and infinity survive maximum and sum; the second look is for a sum of finite maxima that overflows.
        if not torch.isfinite(everywhere.sum()) and not torch.isfinite(everywhere).all():
            raise NonFiniteDistanceError(next(i for i, m in enumerate(self.maxima) if not torch.isfinite(m).all()))

    def count(self, threshold: float) -> int:
        """Number of components whose distance is above the threshold."""
        if threshold >= self.ceiling:
            return 0
        # A comparison whose result has the operands' dtype is vectorised on the CPU, one that makes booleans is not.
        # The sum of a tile's ones is exact in float32.
        counts = [
            delta.gt_(threshold).sum() for i in range(len(self.pairs)) for delta, _ in self._reaching(i, threshold)
        ]
        return int(torch.stack(counts).sum(dtype=torch.float64)) if counts else 0

    def above(self, threshold: float) -> list[Tensor]:
        """For each tensor the sorted flat positions, int64 (k_i,), whose distance is above the threshold."""
        subset = []
        for i, (seed, _) in enumerate(self.pairs):
            found = [torch.empty(0, dtype=torch.int64, device=seed.device)]
            for delta, blocks in self._reaching(i, threshold) if threshold < self.ceiling else ():
                row, column = (delta > threshold).nonzero(as_tuple=True)
                found.append(blocks[row] * _BLOCK + column)
            subset.append(torch.cat(found))
        return subset

    def _reaching(self, i: int, threshold: float) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of tensor i that hold a distance above the threshold: Δ (blocks, components) and their numbers."""
        blocks = (self.maxima[i] > threshold).nonzero().flatten()
        seed, updated = self.pairs[i]
        whole = seed.numel() // _BLOCK
        last = bool(blocks.numel()) and int(blocks[-1]) == whole
        parts = [tensor[: whole * _BLOCK].view(-1, _BLOCK) for tensor in (seed, updated)]
        for at in blocks[: blocks.numel() - last].split(_TILE // _BLOCK):
            if at.numel():
                yield distance(self.kind, parts[0][at], parts[1][at]), at
        if last:
            # What does not fill a block.
            rest = slice(whole * _BLOCK, None)
            yield distance(self.kind, seed[rest], updated[rest]).view(1, -1), blocks[-1:]


def _block_maxima(seed: Tensor, updated: Tensor, kind: str) -> Tensor:
    """Largest distance of each block of consecutive components; the last block may be shorter. Shape (⌈n / block⌉,)."""
    maxima = [distance(kind, seed[:0], updated[:0])]
    for part, moved in zip(seed.split(_TILE), updated.split(_TILE), strict=True):
        delta = distance(kind, part, moved)
        whole = delta.numel() // _BLOCK * _BLOCK
        maxima.append(delta[:whole].view(-1, _BLOCK).amax(1))
        if whole < delta.numel():
            maxima.append(delta[whole:].amax().view(1))
    return torch.cat(maxima)
