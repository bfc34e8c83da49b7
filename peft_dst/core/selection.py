"""The exact choice of a silo's subset: the budget's largest distances, without sorting and without a stored Δ.

Every block of components holds at least one as large as the block's maximum, so the budget's k-th largest *block
maximum* is a lower bound of the k-th largest distance, and every winner lies in a block whose maximum reaches it. One
pass over the weights, in tiles that stay in the cache, computes the maxima; only the blocks that reach the bound are
looked at again. Nothing is remembered from one step to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .distances import distance


# Components a tile of the first pass: 256 KiB of float32, which stays in a core's second-level cache with its operands.
_TILE = 1 << 16


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
        updates: Θ̂, likewise.
        budget: k, 0 <= k <= the number of components.
        kind: name of the distance.

    Raises:
        NonFiniteDistanceError: if any distance is NaN or infinite.
    """
    n = sum(seed.numel() for seed in seeds)
    block = _block_size(n, budget)
    maxima = [_block_maxima(seed, updated, kind, block) for seed, updated in zip(seeds, updates, strict=True)]
    everywhere = torch.cat(maxima)
    # NaN and infinity survive maximum and sum; the second look is for a sum of finite maxima that overflows.
    if not torch.isfinite(everywhere.sum()) and not torch.isfinite(everywhere).all():
        raise NonFiniteDistanceError(next(i for i, m in enumerate(maxima) if not torch.isfinite(m).all()))
    if budget >= n:
        moved = [
            (bits(seed) != bits(updated)).nonzero().flatten() for seed, updated in zip(seeds, updates, strict=True)
        ]
        return Selection(moved, everywhere.new_zeros(()))
    bound = everywhere.topk(budget).values[-1] if 0 < budget < everywhere.numel() else everywhere.new_zeros(())
    found = [
        _reaching(seed, updated, m, bound, kind, block) for seed, updated, m in zip(seeds, updates, maxima, strict=True)
    ]
    keep, threshold = _largest(torch.cat([distances for distances, _ in found]), budget)
    kept = keep.split([distances.numel() for distances, _ in found])
    return Selection([at[mask] for (_, at), mask in zip(found, kept, strict=True)], threshold)


def _block_size(n: int, budget: int) -> int:
    """About 1 / (8 ε) components, a power of two from 8 to 1024: then an eighth of the silo is looked at twice."""
    return 1 << min(10, max(3, (n // (8 * max(budget, 1))).bit_length() - 1))


def _block_maxima(seed: Tensor, updated: Tensor, kind: str, block: int) -> Tensor:
    """Largest distance of each block of consecutive components; the last block may be shorter. Shape (⌈n / block⌉,)."""
    maxima = []
    for start in range(0, seed.numel(), _TILE):
        delta = distance(kind, seed[start : start + _TILE], updated[start : start + _TILE])
        whole = delta.numel() // block * block
        if whole:
            maxima.append(delta[:whole].view(-1, block).amax(1))
        if whole < delta.numel():
            maxima.append(delta[whole:].amax().view(1))
    return torch.cat(maxima) if maxima else distance(kind, seed, updated)


def _reaching(
    seed: Tensor, updated: Tensor, maxima: Tensor, bound: Tensor, kind: str, block: int
) -> tuple[Tensor, Tensor]:
    """Non-zero distances of a tensor that reach the bound, and their flat positions, ascending."""
    whole = seed.numel() // block
    marked = (maxima >= bound) & (maxima > 0)
    rows = marked[:whole].nonzero().flatten()
    blocks = [tensor[: whole * block].view(-1, block)[rows].view(-1) for tensor in (seed, updated)]
    if whole < marked.numel() and marked[-1]:
        # The last block, which is shorter, stands behind the whole ones.
        blocks = [torch.cat([part, t[whole * block :]]) for part, t in zip(blocks, (seed, updated), strict=True)]
    delta = distance(kind, *blocks)
    at = ((delta >= bound) & (delta > 0)).nonzero().flatten()
    rows = torch.cat([rows, rows.new_tensor([whole])])
    return delta[at], rows[at // block] * block + at % block


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
    threshold = distances.topk(budget).values[-1]
    keep = distances > threshold
    ties = (distances == threshold).nonzero().flatten()
    keep[ties[: budget - int(keep.sum())]] = True
    return keep, threshold
