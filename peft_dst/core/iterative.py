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
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .selection import Selection, select
from .tiles import Tiles, count_above, positions_above


# m and r of Appendix C.
ITERATIONS = 3
FLUCTUATION = 2.0

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
    divisors: Sequence[float] | None = None,
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
        divisors: for each tensor a number that its distances are divided by; None for none.

    Returns:
        The subset, and q in the distance's dtype. After an exact choice, q is the smallest kept distance.

    Raises:
        NonFiniteDistanceError: if any distance is NaN or infinite.
    """
    n = sum(seed.numel() for seed in seeds)
    if previous is None or not 0 < previous < math.inf or not 0 < budget < n:
        return select(seeds, updates, budget, kind, divisors)
    silo = Tiles(seeds, updates, kind, divisors)
    counts = _Counts(silo)
    threshold = refine_threshold(previous, counts.count, budget, iterations, fluctuation)
    return Selection(counts.above(threshold), torch.tensor(threshold, dtype=silo.dtype, device=silo.device))


def mean_distance(seeds: Sequence[Tensor], updates: Sequence[Tensor], kind: str) -> float:
    """Mean Δ of one silo, a first q' that takes no selection to find; it keeps far too many at first.

    Args:
        seeds: Θ0 of the silo's tensors, each flat.
        updates: Θ̂, likewise.
        kind: name of the distance.
    """
    silo = Tiles(seeds, updates, kind)
    sums = [delta.sum(dtype=torch.float64) for _, _, delta in silo.tiles()]
    return float(torch.stack(sums).sum()) / silo.size if sums else 0.0


class _Counts:
    """Counts of a silo's distances above any threshold; the blocks that reach it are looked at again for each.

    Raises:
        NonFiniteDistanceError: if any distance is NaN or infinite.
    """

    def __init__(self, silo: Tiles):
        self.silo = silo
        self.maxima = silo.block_maxima(_BLOCK)
        self.ceiling = torch.finfo(silo.dtype).max

    def count(self, threshold: float) -> int:
        """Number of components whose distance is above the threshold."""
        looked_at = self.silo.in_blocks(self._reaching(threshold), _BLOCK)
        return sum(count_above(delta, threshold) for _, delta, _ in looked_at)

    def above(self, threshold: float) -> list[Tensor]:
        """For each tensor the sorted flat positions, int64 (k_i,), whose distance is above the threshold."""
        return self.silo.find_in_blocks(self._reaching(threshold), _BLOCK, threshold)[1]

    def _reaching(self, threshold: float) -> Tensor:
        return positions_above(self.maxima, threshold) if threshold < self.ceiling else self.maxima.new_empty(0).long()
