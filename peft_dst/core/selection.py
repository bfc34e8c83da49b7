"""The exact choice of a silo's subset: the budget's largest distances, without sorting and without a stored Δ.

Δ is computed a tile at a time, and forgotten. What is kept of it depends on the budget k of n components:

* Small budgets keep *block maxima*. Every block holds a component as large as its maximum, so the k-th largest maximum
  is a lower bound of the k-th largest distance, and every winner lies in a block whose maximum reaches it. Only those
  blocks are looked at again.
* Larger budgets first guess, from a sample, a bracket that the k-th largest distance should lie in, keep the
  components inside it and count those above. The counts tell whether the guess was right; if not, a wider one follows.

Nothing is remembered from one step to the next, and neither way ever approximates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .tiles import Tiles, bits, count_above, positions_above


# Blocks shorter than this are slow to reduce, longer ones make the second look longer than the first is shorter.
_SHORTEST_BLOCK, _LONGEST_BLOCK = 64, 1024
# Up to one free component in this many, block maxima are the faster way.
SPARSE = 200
# Up to one in this many, everything above the bracket is kept as well, which saves the second pass that finds it.
_FEW = 16
_SAMPLE = 1 << 16


@dataclass(frozen=True)
class Selection:
    """A silo's subset.

    Attributes:
        indices: for each tensor of the silo the flat positions kept, int64, sorted, shape (k_i,).
        threshold: the smallest kept distance, a 0-d tensor (0 where nothing was left out).
    """

    indices: list[Tensor]
    threshold: Tensor


def select(
    seeds: Sequence[Tensor],
    updates: Sequence[Tensor],
    budget: int,
    kind: str,
    divisors: Sequence[float] | None = None,
) -> Selection:
    """Choose the components of one silo that keep their update.

    Kept are the `budget` largest distances that are not zero; a tie at the threshold goes to the lower (tensor, flat
    index). A budget of the whole silo keeps every component that moved at all: nothing competes, so ε = 1 is plain
    fine-tuning also where a distance is zero (inverse_relative at a zero seed).

    Args:
        seeds: Θ0 of the silo's tensors, each flat, e.g. [(262144,), (512,)] float32.
        updates: Θ̂, likewise; its dtypes may be wider (float32 for bfloat16 seeds).
        budget: k, 0 <= k <= the number of components.
        kind: name of the distance.
        divisors: for each tensor a number that its distances are divided by; None for none.

    Raises:
        NonFiniteDistanceError: if any distance is NaN or infinite.
    """
    silo = Tiles(seeds, updates, kind, divisors)
    if budget == 0 or budget >= silo.size:
        silo.check_finite([delta.amax() for _, _, delta in silo.tiles()])
        everything = [_moved(*pair) if budget else pair[0].new_empty(0, dtype=torch.int64) for pair in silo.pairs]
        return Selection(everything, torch.zeros((), dtype=silo.dtype, device=silo.device))
    return _by_block_maxima(silo, budget) if budget * SPARSE <= silo.size else _by_bracket(silo, budget)


def _moved(seed: Tensor, updated: Tensor) -> Tensor:
    return (bits(seed.to(updated.dtype)) != bits(updated)).nonzero().flatten()


def _by_block_maxima(silo: Tiles, budget: int) -> Selection:
    block = block_size(silo.size, budget)
    maxima = silo.block_maxima(block)
    bound = float(kth_largest(maxima, budget)) if budget < maxima.numel() else 0.0
    below = just_below(bound, silo.dtype)
    blocks = positions_above(maxima, below)
    if blocks.numel() > 2 * budget:
        # Many maxima tie at the bound. Each is a tie at the threshold or below it, of which the first are enough.
        ties = (maxima == bound).nonzero().flatten()[:budget]
        blocks = torch.cat([positions_above(maxima, bound), ties]).sort().values
    # The blocks are looked at in tiles as well: what is gathered then never has to be fetched from the system.
    distances, positions = silo.find_in_blocks(blocks, block, below)
    keep, threshold = largest(torch.cat(distances), budget)
    kept = keep.split([delta.numel() for delta in distances])
    return Selection([at[mask] for at, mask in zip(positions, kept, strict=True)], threshold)


def block_size(n: int, budget: int) -> int:
    """About 1 / (32 ε) components, a power of two: then a thirtieth of the silo is looked at twice."""
    return min(_LONGEST_BLOCK, max(_SHORTEST_BLOCK, 1 << max(0, (n // (32 * budget)).bit_length() - 1)))


def _by_bracket(silo: Tiles, budget: int) -> Selection:
    sample = _sample(silo)
    margin = 5.0
    while True:
        low, high = _bracket(sample, budget / silo.size, margin)
        if budget * _FEW <= silo.size and low < high:
            high = math.inf
        above, distances, positions = _look(silo, low, high, budget)
        found = sum(d.numel() for d in distances)
        # From zero on everything is found that there is.
        if above < budget and (budget <= above + found or (low == 0.0 and (found or high == math.inf))):
            break
        margin *= 8
    keep, threshold = largest(torch.cat(distances), budget - above)
    kept = keep.split([d.numel() for d in distances])
    if high == math.inf:
        return Selection([at[mask] for at, mask in zip(positions, kept, strict=True)], threshold)
    # Ties at the threshold go to the first ones: all up to the last one kept, and none behind it.
    ties = [at[mask & (d == threshold)] for at, d, mask in zip(positions, distances, kept, strict=True)]
    last = max(i for i, at in enumerate(ties) if at.numel())
    count = above + int(keep.sum())
    return Selection(_reach(silo, float(threshold), (last, int(ties[last][-1])), count), threshold)


def _sample(silo: Tiles) -> Tensor:
    """Distances of about 2^16 evenly spaced components, in descending order."""
    stride = max(1, silo.size // _SAMPLE)
    # Widths of matrices are multiples of small primes: such a stride would see the same few columns again and again.
    while stride > 1 and math.gcd(stride, 30) > 1:
        stride += 1
    found, before = [], 0
    for i, (seed, updated) in enumerate(silo.pairs):
        start = -before % stride
        if start < seed.numel():
            found.append(silo.distance(i, seed[start::stride], updated[start::stride]))
        before += seed.numel()
    return torch.cat(found).sort(descending=True).values


def _bracket(sample: Tensor, fraction: float, margin: float) -> tuple[float, float]:
    """Order statistics `margin` standard errors to both sides of a quantile: (low, high), 0 and ∞ beyond the sample."""
    n = sample.numel()
    spread = margin * math.sqrt(n * fraction * (1 - fraction)) + 2
    first, last = int(n * fraction - spread), math.ceil(n * fraction + spread)
    return float(sample[last]) if last < n else 0.0, float(sample[first]) if first > 0 else math.inf


def _look(silo: Tiles, low: float, high: float, enough: int) -> tuple[int, list[Tensor], list[Tensor]]:
    """Count the distances above `high`, and find those from `low` to `high`.

    Where the two are equal, these are all ties, and the first ones, `enough` of them or some more, are found.

    Returns:
        (count, distances, flat positions), the last two with one tensor (m_i,) for each of the silo's.
    """
    maxima, above, found, below = [], 0, 0, just_below(low, silo.dtype)
    distances, positions = silo.nothing(silo.dtype), silo.nothing(torch.int64)
    for i, start, delta in silo.tiles():
        maxima.append(delta.amax())
        if high < math.inf:
            above += count_above(delta, high)
        if low < high or found < enough:
            at = positions_above(delta, below, high)
            found += at.numel()
            distances[i].append(delta.index_select(0, at))
            positions[i].append(at.add_(start))
    silo.check_finite(maxima)
    return above, [torch.cat(d) for d in distances], [torch.cat(p) for p in positions]


def _reach(silo: Tiles, threshold: float, last: tuple[int, int], count: int) -> list[Tensor]:
    """Flat positions of the distances that reach a threshold, (k_i,) for each tensor.

    Args:
        silo: the silo.
        threshold: above zero.
        last: tensor and flat position of the last component for which equality is enough.
        count: how many there are. They are joined as they are found: fetching the memory for them twice takes its time.
    """
    everywhere = torch.empty(count, dtype=torch.int64, device=silo.device)
    counts, below = [0] * len(silo.pairs), just_below(threshold, silo.dtype)
    for i, start, delta in silo.tiles():
        ties = 0 if i > last[0] else delta.numel() if i < last[0] else min(max(last[1] + 1 - start, 0), delta.numel())
        for part, bound, offset in ((delta[:ties], below, start), (delta[ties:], threshold, start + ties)):
            if part.numel():
                at = positions_above(part, bound)
                done = sum(counts)
                torch.add(at, offset, out=everywhere[done : done + at.numel()])
                counts[i] += at.numel()
    assert sum(counts) == count
    return list(everywhere.split(counts))


def just_below(bound: float, dtype: torch.dtype) -> float:
    """The next smaller value of a dtype, or zero: what is above it reaches the bound and is not zero."""
    return max(
        0.0, float(torch.nextafter(*(torch.tensor(value, dtype=dtype, device="cpu") for value in (bound, -math.inf))))
    )


def kth_largest(values: Tensor, k: int) -> Tensor:
    return values.topk(k, sorted=False).values.amin()


def largest(distances: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """Mark the `budget` largest entries of a 1-d tensor of positive ones, the earlier first where they tie.

    Returns:
        The mask, and the least entry marked (0 if none is).
    """
    keep = torch.zeros_like(distances, dtype=torch.bool)
    if budget == 0 or not distances.numel():
        return keep, distances.new_zeros(())
    if distances.numel() <= budget:
        return ~keep, distances.min()
    threshold = kth_largest(distances, budget)
    keep = distances > threshold
    ties = (distances == threshold).nonzero().flatten()
    keep[ties[: budget - int(keep.sum())]] = True
    return keep, threshold
