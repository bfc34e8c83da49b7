"""The exact choice of a silo's subset: the budget's largest distances, without sorting and without a stored Δ.

Δ is computed in tiles that stay in the cache, and forgotten. What is kept of it depends on the budget k of n components:

* Small budgets keep *block maxima*. Every block holds a component as large as its maximum, so the k-th largest maximum
  is a lower bound of the k-th largest distance, and every winner lies in a block whose maximum reaches it. Only those
  blocks are looked at again.
* Larger budgets first guess, from a sample, a bracket that the k-th largest distance should lie in, keep the
  components inside it and count those above. The counts tell whether the guess was right; if not, a wider one follows.

Nothing is remembered from one step to the next, and neither way ever approximates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .distances import distance, distance_dtype


# Components of a tile: 256 KiB of float32, which stay in a core's second-level cache together with both operands.
TILE = 1 << 16
# Blocks shorter than this are slow to reduce, longer ones make the second look longer than the first is shorter.
_SHORTEST_BLOCK, _LONGEST_BLOCK = 64, 1024
# Up to one free component in this many, block maxima are the faster way.
_SPARSE = 200
# Up to one in this many, everything above the bracket is kept as well, which saves the second pass that finds it.
_FEW = 16
_SAMPLE = 1 << 16


class NonFiniteDistanceError(FloatingPointError):
    """A distance is NaN or infinite. `position` is the index, among the silo's tensors, of the first such one."""

    def __init__(self, position: int):
        super().__init__(f"non-finite distance in tensor {position} of the silo")
        self.position = position


@dataclass(frozen=True)
class Selection:
    """A silo's subset.

    Attributes:
        indices: for each tensor of the silo the flat positions kept, int64, sorted, shape (k_i,).
        threshold: the smallest kept distance, a 0-d tensor (0 where nothing was left out).
    """

    indices: list[Tensor]
    threshold: Tensor


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns of a floating tensor as integers of the same width: 0.0 and -0.0 differ, NaN equals itself."""
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def select(seeds: Sequence[Tensor], updates: Sequence[Tensor], budget: int, kind: str) -> Selection:
    """Choose the components of one silo that keep their update.

    Kept are the `budget` largest distances that are not zero; a tie at the threshold goes to the lower (tensor, flat
    index). A budget of the whole silo keeps every component that moved at all: nothing competes, so ε = 1 is plain
    fine-tuning also where a distance is zero (inverse_relative at a zero seed).

    Args:
        seeds: Θ0 of the silo's tensors, each flat, e.g. [(262144,), (512,)] float32.
        updates: Θ̂, likewise; its dtypes may be wider (float32 for bfloat16 seeds).
        budget: k, 0 <= k <= the number of components.
        kind: name of the distance.

    Raises:
        NonFiniteDistanceError: if any distance is NaN or infinite.
    """
    silo = _Silo(seeds, updates, kind)
    if budget == 0 or budget >= silo.size:
        silo.check_finite([delta.amax() for _, _, delta in silo.tiles()])
        everything = [_moved(*pair) if budget else pair[0].new_empty(0, dtype=torch.int64) for pair in silo.pairs]
        return Selection(everything, torch.zeros((), dtype=silo.dtype, device=silo.device))
    return _by_block_maxima(silo, budget) if budget * _SPARSE <= silo.size else _by_bracket(silo, budget)


def _moved(seed: Tensor, updated: Tensor) -> Tensor:
    return (bits(seed.to(updated.dtype)) != bits(updated)).nonzero().flatten()


class _Silo:
    """The tensors of a silo, and its distances tile by tile."""

    def __init__(self, seeds: Sequence[Tensor], updates: Sequence[Tensor], kind: str):
        self.pairs = list(zip(seeds, updates, strict=True))
        self.kind = kind
        self.size = sum(seed.numel() for seed in seeds)
        self.dtype = distance_dtype(*seeds, *updates)
        self.uniform = all(distance_dtype(*pair) == self.dtype for pair in self.pairs)
        self.device = updates[0].device

    def tiles(self) -> Iterator[tuple[int, int, Tensor]]:
        """(tensor, first flat position, its distances) of every tile in order; the next one overwrites the last."""
        scratch = torch.empty(min(TILE, self.size), dtype=self.dtype, device=self.device)
        for i, pair in enumerate(self.pairs):
            if not pair[0].numel():
                continue
            start = 0
            for seed, updated in zip(*(tensor.split(TILE) for tensor in pair), strict=True):
                n = seed.numel()
                yield i, start, self.distance(seed, updated, out=scratch if n == scratch.numel() else scratch[:n])
                start += n

    def distance(self, seed: Tensor, updated: Tensor, out: Tensor | None = None) -> Tensor:
        """Distances of some components, in the silo's dtype; in silos of one dtype written to `out`."""
        if self.uniform:
            return distance(self.kind, seed, updated, out=out)
        return distance(self.kind, seed, updated).to(self.dtype)

    def check_finite(self, maxima: Sequence[Tensor]) -> None:
        """Check the maxima of all distances, in whatever parts; NaN and infinity survive a maximum."""
        if maxima and not math.isfinite(torch.stack(list(maxima)).amax()):
            for i, _, delta in self.tiles():
                if not math.isfinite(delta.amax()):
                    raise NonFiniteDistanceError(i)


def _by_block_maxima(silo: _Silo, budget: int) -> Selection:
    block = _block_size(silo.size, budget)
    counts = [-(-seed.numel() // block) for seed, _ in silo.pairs]
    everywhere = torch.empty(sum(counts), dtype=silo.dtype, device=silo.device)
    done = 0
    for _, _, delta in silo.tiles():
        whole, rest = divmod(delta.numel(), block)
        if whole:
            torch.amax((delta[:-rest] if rest else delta).view(whole, block), 1, out=everywhere[done : done + whole])
        if rest:
            torch.amax(delta[-rest:], 0, out=everywhere[done + whole])
        done += whole + (rest > 0)
    silo.check_finite([everywhere.amax()])
    bound = float(_kth_largest(everywhere, budget)) if budget < everywhere.numel() else 0.0
    below = _just_below(bound, silo.dtype)
    rows = _positions_above(everywhere, below)
    if rows.numel() > 2 * budget:
        # Many maxima tie at the bound. Each is a tie at the threshold or below it, of which the first are enough.
        ties = (everywhere == bound).nonzero().flatten()[:budget]
        rows = torch.cat([_positions_above(everywhere, bound), ties]).sort().values
    last = torch.searchsorted(rows, torch.tensor(counts, device=rows.device).cumsum(0)).tolist()
    distances, positions, before = [], [], 0
    for i, (first, end) in enumerate(zip([0, *last], last, strict=False)):
        delta, at = _look_again(silo, i, rows[first:end] - before, below, block)
        distances.append(delta)
        positions.append(at)
        before += counts[i]
    keep, threshold = _largest(torch.cat(distances), budget)
    kept = keep.split([delta.numel() for delta in distances])
    return Selection([at[mask] for at, mask in zip(positions, kept, strict=True)], threshold)


def _block_size(n: int, budget: int) -> int:
    """About 1 / (32 ε) components, a power of two: then a thirtieth of the silo is looked at twice."""
    return min(_LONGEST_BLOCK, max(_SHORTEST_BLOCK, 1 << max(0, (n // (32 * budget)).bit_length() - 1)))


def _look_again(silo: _Silo, position: int, rows: Tensor, below: float, block: int) -> tuple[Tensor, Tensor]:
    """Distances above `below` in some blocks of a tensor, by their numbers (m,), and their flat positions, ascending."""
    if not rows.numel():
        return torch.empty(0, dtype=silo.dtype, device=silo.device), rows
    seed, updated = silo.pairs[position]
    whole, rest = divmod(seed.numel(), block)
    # The last block, where it is shorter, stands behind the whole ones.
    tail = rest > 0 and int(rows[-1]) == whole
    distances, positions = [], []
    # Again in tiles: what is gathered stays in the cache, and is never as large as to be fetched from the system.
    for some in (rows[:-1] if tail else rows).split(TILE // block):
        blocks = [t[: whole * block].view(whole, block).index_select(0, some).view(-1) for t in (seed, updated)]
        delta = silo.distance(*blocks)
        at = _positions_above(delta, below)
        distances.append(delta.index_select(0, at))
        positions.append(some.index_select(0, at // block).mul_(block).add_(at.remainder_(block)))
    if tail:
        delta = silo.distance(seed[-rest:], updated[-rest:])
        at = _positions_above(delta, below)
        distances.append(delta.index_select(0, at))
        positions.append(at.add_(whole * block))
    return torch.cat(distances), torch.cat(positions)


def _by_bracket(silo: _Silo, budget: int) -> Selection:
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
    keep, threshold = _largest(torch.cat(distances), budget - above)
    kept = keep.split([d.numel() for d in distances])
    if high == math.inf:
        return Selection([at[mask] for at, mask in zip(positions, kept, strict=True)], threshold)
    # Ties at the threshold go to the first ones: all up to the last one kept, and none behind it.
    ties = [at[mask & (d == threshold)] for at, d, mask in zip(positions, distances, kept, strict=True)]
    last = max(i for i, at in enumerate(ties) if at.numel())
    return Selection(_reach(silo, float(threshold), (last, int(ties[last][-1]))), threshold)


def _sample(silo: _Silo) -> Tensor:
    """Distances of about 2^16 evenly spaced components, in descending order."""
    stride = max(1, silo.size // _SAMPLE)
    # Widths of matrices are multiples of small primes: such a stride would see the same few columns again and again.
    while stride > 1 and math.gcd(stride, 30) > 1:
        stride += 1
    found, before = [], 0
    for seed, updated in silo.pairs:
        start = -before % stride
        if start < seed.numel():
            found.append(silo.distance(seed[start::stride], updated[start::stride]))
        before += seed.numel()
    return torch.cat(found).sort(descending=True).values


def _bracket(sample: Tensor, fraction: float, margin: float) -> tuple[float, float]:
    """Order statistics `margin` standard errors to both sides of a quantile: (low, high), 0 and ∞ beyond the sample."""
    n = sample.numel()
    spread = margin * math.sqrt(n * fraction * (1 - fraction)) + 2
    first, last = int(n * fraction - spread), math.ceil(n * fraction + spread)
    return float(sample[last]) if last < n else 0.0, float(sample[first]) if first > 0 else math.inf


def _look(silo: _Silo, low: float, high: float, enough: int) -> tuple[int, list[Tensor], list[Tensor]]:
    """Count the distances above `high`, and find those from `low` to `high`.

    Where the two are equal, these are all ties, and the first ones, `enough` of them or some more, are found.

    Returns:
        (count, distances, flat positions), the last two with one tensor (m_i,) for each of the silo's.
    """
    maxima, counts, below, missing = [], [], _just_below(low, silo.dtype), enough
    distances: list[list[Tensor]] = [[torch.empty(0, dtype=silo.dtype, device=silo.device)] for _ in silo.pairs]
    positions: list[list[Tensor]] = [[torch.empty(0, dtype=torch.int64, device=silo.device)] for _ in silo.pairs]
    flags, inside = (torch.empty(min(TILE, silo.size), dtype=silo.dtype, device=silo.device) for _ in range(2))
    for i, start, delta in silo.tiles():
        n = delta.numel()
        maxima.append(delta.amax())
        if high < math.inf:
            # Flags of the distances' own dtype: comparing into booleans is many times slower.
            torch.gt(delta, high, out=flags[:n])
            counts.append(flags[:n].sum())
        if low == high and missing <= 0:
            continue
        torch.threshold(delta, below, 0.0, out=inside[:n])
        if high < math.inf:
            inside[:n].addcmul_(inside[:n], flags[:n], value=-1)
        at = bits(inside[:n]).nonzero().flatten()
        missing -= at.numel()
        distances[i].append(delta.index_select(0, at))
        positions[i].append(at.add_(start))
    silo.check_finite(maxima)
    above = int(torch.stack(counts).sum(dtype=torch.int64)) if counts else 0
    return above, [torch.cat(d) for d in distances], [torch.cat(p) for p in positions]


def _reach(silo: _Silo, threshold: float, last: tuple[int, int]) -> list[Tensor]:
    """Flat positions of the distances that reach a threshold, (k_i,) for each tensor.

    Args:
        silo: the silo.
        threshold: above zero.
        last: tensor and flat position of the last component for which equality is enough.
    """
    found: list[list[Tensor]] = [[torch.empty(0, dtype=torch.int64, device=silo.device)] for _ in silo.pairs]
    below = _just_below(threshold, silo.dtype)
    for i, start, delta in silo.tiles():
        ties = 0 if i > last[0] else delta.numel() if i < last[0] else min(max(last[1] + 1 - start, 0), delta.numel())
        if ties:
            found[i].append(_positions_above(delta[:ties], below).add_(start))
        if ties < delta.numel():
            found[i].append(_positions_above(delta[ties:], threshold).add_(start + ties))
    return [torch.cat(parts) for parts in found]


def _just_below(bound: float, dtype: torch.dtype) -> float:
    """The next smaller value of a dtype: what lies above it reaches the bound."""
    return float(torch.nextafter(torch.tensor(bound, dtype=dtype), torch.tensor(-math.inf, dtype=dtype)))


def _positions_above(distances: Tensor, below: float) -> Tensor:
    """Positions (m,) int64 of the non-zero distances above a value. Integers are faster to scan than floats."""
    return bits(torch.threshold(distances, below, 0.0)).nonzero().flatten()


def _kth_largest(values: Tensor, k: int) -> Tensor:
    return values.topk(k, sorted=False).values.amin()


def _largest(distances: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """Mark the `budget` largest entries of a 1-d tensor of positive ones, the earlier first where they tie.

    Returns:
        The mask, and the least entry marked (0 if none is).
    """
    keep = torch.zeros_like(distances, dtype=torch.bool)
    if budget == 0 or not distances.numel():
        return keep, distances.new_zeros(())
    if distances.numel() <= budget:
        return ~keep, distances.min()
    threshold = _kth_largest(distances, budget)
    keep = distances > threshold
    ties = (distances == threshold).nonzero().flatten()
    keep[ties[: budget - int(keep.sum())]] = True
    return keep, threshold
