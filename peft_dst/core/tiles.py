"""Distances of a silo, computed a tile at a time and forgotten; on a CPU in memory that stays in the cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .distances import distance, wide_dtype


# Components of a tile: 512 KiB of float32, which stay in a core's second-level cache together with both operands.
TILE = 1 << 17
# The same on a GPU, where each costs the launches of some kernels, which are to take longer than these: 16 MiB of float32
# or, in large silos, a part of these up to 64.
_SMALLEST, _PART, _LARGEST = 1 << 22, 8, 1 << 24


class NonFiniteDistanceError(FloatingPointError):
    """A distance is NaN or infinite. `position` is the index, among the silo's tensors, of the first such one."""

    def __init__(self, position: int):
        super().__init__(f"non-finite distance in tensor {position} of the silo")
        self.position = position


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns of a floating tensor as integers of the same width: 0.0 and -0.0 differ, NaN equals itself."""
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def tile_size(device: torch.device, size: int) -> int:
    """Components of a tile, a power of two, of a silo of some size on a device."""
    if device.type == "cpu":
        return TILE
    return min(_LARGEST, max(_SMALLEST, (1 << (size // _PART).bit_length()) // 2))


def positions_above(distances: Tensor, bound: float, limit: float = math.inf) -> Tensor:
    """Positions (m,) int64 of the distances (n,) above a bound and not above a limit, ascending."""
    if not distances.is_cpu:
        within = distances > bound if limit == math.inf else (distances > bound) & (distances <= limit)
        return within.nonzero().flatten()
    # Of torch's functions on the CPU neither the comparison nor the search is vectorised: ten times slower.
    array = distances.numpy()
    inside = array > bound if limit == math.inf else (array > bound) & (array <= limit)
    return torch.from_numpy(inside.nonzero()[0])


def count_above(distances: Tensor, bound: float) -> int:
    """Number of the distances (n,) above a bound."""
    return int((distances.numpy() > bound).sum() if distances.is_cpu else (distances > bound).sum())


class Tiles:
    """The tensors of a silo, and their distances tile by tile.

    Args:
        seeds: Θ0 of the silo's tensors, each flat, e.g. [(262144,), (512,)] float32.
        updates: Θ̂, likewise; its dtypes may be wider.
        kind: name of the distance.
        divisors: for each tensor a number that its distances are divided by; None for none.
    """

    def __init__(
        self, seeds: Sequence[Tensor], updates: Sequence[Tensor], kind: str, divisors: Sequence[float] | None = None
    ):
        self.pairs = list(zip(seeds, updates, strict=True))
        self.kind = kind
        self.divisors = divisors
        self.size = sum(seed.numel() for seed in seeds)
        self.dtype = wide_dtype(*seeds, *updates)
        self.uniform = all(wide_dtype(*pair) == self.dtype for pair in self.pairs)
        self.device = updates[0].device
        self._tile = tile_size(self.device, self.size)
        # Narrow operands are widened in place. Memory fetched and freed for each tile would end up in pieces between what
        # is kept of the tiles: on the CPU as much as 8 bytes a component of the silo.
        narrow = any(tensor.dtype != self.dtype for pair in self.pairs for tensor in pair)
        length = min(self._tile, self.size) if narrow else 0
        self._wide = [torch.empty(length, dtype=self.dtype, device=self.device) for _ in range(2)]

    def tiles(self) -> Iterator[tuple[int, int, Tensor]]:
        """(tensor, first flat position, its distances) of every tile in order; the next one overwrites the last."""
        scratch = torch.empty(min(self._tile, self.size), dtype=self.dtype, device=self.device)
        for i, pair in enumerate(self.pairs):
            if not pair[0].numel():
                continue
            start = 0
            for seed, updated in zip(*(tensor.split(self._tile) for tensor in pair), strict=True):
                n = seed.numel()
                yield i, start, self.distance(i, seed, updated, out=scratch if n == scratch.numel() else scratch[:n])
                start += n

    def distance(self, i: int, seed: Tensor, updated: Tensor, out: Tensor | None = None) -> Tensor:
        """Distances of some components of a tensor, in the silo's dtype; in silos of one dtype written to `out`."""
        n = seed.numel()
        if self.uniform and not seed.dtype == updated.dtype == self.dtype and n <= self._wide[0].numel():
            seed, updated = (wide[:n].copy_(part) for wide, part in zip(self._wide, (seed, updated), strict=True))
        delta = distance(self.kind, seed, updated, out=out if self.uniform else None).to(self.dtype)
        return delta if self.divisors is None else delta.div_(self.divisors[i])

    def check_finite(self, maxima: Sequence[Tensor]) -> None:
        """Check the maxima of all distances, in whatever parts; NaN and infinity survive a maximum."""
        if maxima and not math.isfinite(torch.stack(list(maxima)).amax()):
            for i, _, delta in self.tiles():
                if not math.isfinite(delta.amax()):
                    raise NonFiniteDistanceError(i)

    def block_maxima(self, block: int) -> Tensor:
        """Largest distance of every block of consecutive components, tensor by tensor, shape (Σ ⌈n_i / block⌉,).

        Args:
            block: components of a block, a divisor of the tile's. The last one of a tensor may be shorter.

        Raises:
            NonFiniteDistanceError: if any distance is NaN or infinite.
        """
        maxima = torch.empty(sum(self.block_counts(block)), dtype=self.dtype, device=self.device)
        done = 0
        for _, _, delta in self.tiles():
            whole, rest = divmod(delta.numel(), block)
            if whole:
                torch.amax((delta[:-rest] if rest else delta).view(whole, block), 1, out=maxima[done : done + whole])
            if rest:
                torch.amax(delta[-rest:], 0, out=maxima[done + whole])
            done += whole + (rest > 0)
        if maxima.numel():
            self.check_finite([maxima.amax()])
        return maxima

    def block_counts(self, block: int) -> list[int]:
        """Number of blocks of each tensor."""
        return [-(-seed.numel() // block) for seed, _ in self.pairs]

    def in_blocks(self, blocks: Tensor, block: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The distances in some blocks, at most a tile of them at a time.

        Args:
            blocks: their numbers among those of `block_maxima`, ascending (m,) int64.
            block: components of a block.

        Yields:
            (tensor, its distances (c · block,), flat position of the first component of each block (c,)).
        """
        counts = self.block_counts(block)
        ends = torch.searchsorted(blocks, torch.tensor(counts, device=blocks.device).cumsum(0)).tolist()
        before = 0
        for i, (first, end) in enumerate(zip([0, *ends], ends, strict=False)):
            if first < end:
                yield from self._in_blocks_of(i, blocks[first:end] - before, block)
            before += counts[i]

    def _in_blocks_of(self, i: int, rows: Tensor, block: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        seed, updated = self.pairs[i]
        whole, rest = divmod(seed.numel(), block)
        # The last block, where it is shorter, stands behind the whole ones.
        tail = rest > 0 and int(rows[-1]) == whole
        for some in (rows[:-1] if tail else rows).split(self._tile // block):
            if some.numel():
                parts = [t[: whole * block].view(whole, block).index_select(0, some).view(-1) for t in (seed, updated)]
                yield i, self.distance(i, *parts), some * block
        if tail:
            yield i, self.distance(i, seed[-rest:], updated[-rest:]), rows[-1:] * block

    def find_in_blocks(self, blocks: Tensor, block: int, bound: float) -> tuple[list[Tensor], list[Tensor]]:
        """The distances above a bound in some blocks, and their flat positions, (m_i,) for each tensor."""
        distances, positions = self.nothing(self.dtype), self.nothing(torch.int64)
        for i, delta, starts in self.in_blocks(blocks, block):
            at = positions_above(delta, bound)
            distances[i].append(delta.index_select(0, at))
            positions[i].append(starts.index_select(0, at // block).add_(at.remainder_(block)))
        return [torch.cat(d) for d in distances], [torch.cat(p) for p in positions]

    def nothing(self, dtype: torch.dtype) -> list[list[Tensor]]:
        """For every tensor a list to be filled and joined, which already holds an empty one."""
        return [[torch.empty(0, dtype=dtype, device=self.device)] for _ in self.pairs]
