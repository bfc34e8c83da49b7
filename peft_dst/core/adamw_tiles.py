"""The AdamW step of a silo under the constraint on a CPU, tile by tile, without a dense Θ̂ and without a copy of the seed.

The live weights are the seed but for the subset. So a tile of them is copied into memory that stays in the cache, gets
the subset's exact values, is stepped there by torch's own fused AdamW, and leaves nothing behind but the moments and the
largest Δ of each block. As in `selection`, only the blocks that the k-th largest maximum lets in are looked at again;
their Θ̂ follows from the updated moments, with the same bits.

`torch.optim.AdamW(fused=True)` followed by `select` is the plain twin: everything here is equal to it, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .adamw import AdamWScalars, AdamWTensor, NonFiniteStepError, SiloStep
from .distances import distance
from .selection import Selection, block_size, is_sparse, largest, reaching
from .tiles import NonFiniteDistanceError, positions_above
from .weights import gather, scatter


# Components of a tile for each thread: gradient, moments, weight and Θ̂ of so many fit into a core's second-level cache.
TILE = 1 << 16


def suits(n: int, budget: int, groups: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a silo of n components can go this way, its tensors being in the given parameter groups of AdamW.

    Its budget has to be small enough for block maxima to exclude most blocks. And torch's implementations of AdamW
    differ in last bits: what is computed here is what the fused one computes.
    """
    return is_sparse(n, budget) and all(group.get("fused") is True for group in groups)


@torch.no_grad()
def adamw_step(silos: Sequence[Sequence[AdamWTensor]], budgets: Sequence[int], kind: str) -> list[SiloStep]:
    """Make one AdamW step of some silos under the constraint, one after another, and write their live weights.

    Args:
        silos: for each silo its tensors, in the order in which ties are decided, on the CPU.
        budgets: k of each silo.
        kind: name of the distance.

    Raises:
        NonFiniteStepError: if a Δ is NaN or infinite. The live weights of that silo are then as before the call, those
            of the silos before it are stepped; the moments are updated.
    """
    steps = []
    for position, (tensors, budget) in enumerate(zip(silos, budgets, strict=True)):
        try:
            steps.append(_step_silo(tensors, budget, kind))
        except NonFiniteDistanceError as error:
            raise NonFiniteStepError(position, error.position) from error
    return steps


def _step_silo(tensors: Sequence[AdamWTensor], budget: int, kind: str) -> SiloStep:
    live = [gather(t.weight, t.indices) for t in tensors]
    seeds: list[Tensor] = []
    for t in tensors:
        scatter(t.weight, t.indices, t.seeds)
    try:
        step = _Step(tensors, kind, block_size(sum(t.weight.numel() for t in tensors), budget))
        indices, values, threshold = step.find(step.maxima(), budget)
        seeds += [gather(t.weight, at) for t, at in zip(tensors, indices, strict=True)]
        for t, at, new in zip(tensors, indices, values, strict=True):
            scatter(t.weight, at, new.to(t.weight.dtype))
    except BaseException:
        # Ctrl-C may come at any moment.
        for t, at, seed in zip(tensors, indices if seeds else [], seeds, strict=False):
            scatter(t.weight, at, seed)
        for t, old in zip(tensors, live, strict=True):
            scatter(t.weight, t.indices, old)
        raise
    return SiloStep(Selection(indices, threshold), seeds, values)


def updated_weights(theta: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scalars: AdamWScalars) -> Tensor:
    """θ̂ from θt and the updated moments, all float32 (n,), by the operations of torch's fused kernel on the CPU.

    Between the products and sums of that kernel stands a quotient, so no compiler fuses them.
    """
    # torch's own float32 root is not correctly rounded on the CPU (MKL); one in float64 is, after rounding.
    denominator = exp_avg_sq.double().sqrt_().float().div_(scalars.correction).add_(scalars.eps)
    return (exp_avg * scalars.step).div_(denominator).add_(theta * scalars.decay)


class _Step:
    """The step of one silo, whose live weights are the seed now."""

    def __init__(self, tensors: Sequence[AdamWTensor], kind: str, block: int):
        self.tensors, self.kind, self.block = tensors, kind, block
        self.flat = [t.weight.view(-1) for t in tensors]
        self.moments = [(t.exp_avg.view(-1), t.exp_avg_sq.view(-1)) for t in tensors]
        self.block_counts = [-(-flat.numel() // block) for flat in self.flat]
        self.tile = max(block, TILE * torch.get_num_threads() // block * block)

    def maxima(self) -> Tensor:
        """Update the moments. Returns the largest Δ of each block, tensor by tensor, float32 (Σ ⌈n_i / block⌉,)."""
        maxima, done, block = torch.empty(sum(self.block_counts)), 0, self.block
        for delta in self._tiles():
            whole, rest = divmod(delta.numel(), block)
            if whole:
                torch.amax((delta[:-rest] if rest else delta).view(whole, block), 1, out=maxima[done : done + whole])
            if rest:
                torch.amax(delta[-rest:], 0, out=maxima[done + whole])
            done += whole + (rest > 0)
        if maxima.numel() and not torch.isfinite(maxima.amax()):
            block = int(torch.isfinite(maxima).logical_not_().nonzero()[0])
            ends = torch.tensor(self.block_counts).cumsum(0)
            raise NonFiniteDistanceError(int(torch.searchsorted(ends, block, right=True)))
        return maxima

    def _tiles(self) -> Iterator[Tensor]:
        """Step a tile after another; Δ of each, which the next one overwrites."""
        longest = max((flat.numel() for flat in self.flat), default=0)
        scratch = torch.empty(min(self.tile, longest))
        for t, flat, moments in zip(self.tensors, self.flat, self.moments, strict=True):
            n, s = flat.numel(), t.scalars
            if not n:
                continue
            count = torch.tensor(float(s.count))
            starts = range(0, n, self.tile)
            bounds = torch.searchsorted(t.indices, torch.tensor([*starts, n])).tolist() if len(starts) > 1 else None
            parts = zip(starts, *(x.split(self.tile) for x in (flat, t.grad.view(-1), *moments)), strict=True)
            for number, (start, seed, grad, exp_avg, exp_avg_sq) in enumerate(parts):
                theta = scratch[: seed.numel()].copy_(seed)
                own = slice(*bounds[number : number + 2]) if bounds else slice(None)
                scatter(theta, t.indices[own] - start, t.values[own])
                torch._fused_adamw_(
                    [theta],
                    [grad.float()],
                    [exp_avg],
                    [exp_avg_sq],
                    [],
                    [count],
                    lr=s.lr,
                    beta1=s.betas[0],
                    beta2=s.betas[1],
                    weight_decay=s.weight_decay,
                    eps=s.eps,
                    amsgrad=False,
                    maximize=False,
                )
                yield distance(self.kind, seed, theta, out=theta)

    def find(self, maxima: Tensor, budget: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """The new subset: for each tensor flat positions (k_i,) and θ̂ there, float32 (k_i,); and the threshold."""
        blocks, below = reaching(maxima, budget)
        ends = torch.searchsorted(blocks, torch.tensor(self.block_counts).cumsum(0)).tolist()
        distances, positions, updates, before = [], [], [], 0
        for i, (first, end) in enumerate(zip([0, *ends], ends, strict=False)):
            delta, at, updated = self._look_at(i, blocks[first:end] - before, below)
            distances.append(delta)
            positions.append(at)
            updates.append(updated)
            before += self.block_counts[i]
        keep, threshold = largest(torch.cat([torch.empty(0), *distances]), budget)
        kept = keep.split([delta.numel() for delta in distances])
        return (
            [at[mask] for at, mask in zip(positions, kept, strict=True)],
            [updated[mask] for updated, mask in zip(updates, kept, strict=True)],
            threshold,
        )

    def _look_at(self, i: int, rows: Tensor, below: float) -> tuple[Tensor, Tensor, Tensor]:
        """Δ above a bound in some blocks of a tensor, their flat positions and θ̂ there, each (m,)."""
        found = [[torch.empty(0)], [torch.empty(0, dtype=torch.int64)], [torch.empty(0)]]
        if not rows.numel():
            return found[0][0], found[1][0], found[2][0]
        t, whole = self.tensors[i], self.flat[i].numel() // self.block
        sources = (self.flat[i], *self.moments[i])
        for some in rows.split(max(1, self.tile // self.block)):
            # The last block, where it is shorter, stands behind the whole ones.
            tail = int(some[-1]) == whole
            parts = []
            for source in sources:
                part = source[: whole * self.block].view(whole, self.block)
                part = part.index_select(0, some[:-1] if tail else some).view(-1)
                parts.append(torch.cat([part, source[whole * self.block :]]) if tail else part)
            seed, exp_avg, exp_avg_sq = parts
            theta = seed.to(torch.float32, copy=True)
            slot = torch.searchsorted(some, t.indices // self.block).clamp_max_(some.numel() - 1)
            inside = (some[slot] == t.indices // self.block).nonzero().flatten()
            scatter(theta, slot[inside] * self.block + t.indices[inside] % self.block, t.values[inside])
            updated = updated_weights(theta, exp_avg, exp_avg_sq, t.scalars)
            delta = distance(self.kind, seed, updated, out=theta)
            at = positions_above(delta, below)
            found[0].append(delta[at])
            found[1].append(some[at // self.block] * self.block + at % self.block)
            found[2].append(updated[at])
        delta, at, updated = (torch.cat(parts) for parts in found)
        return delta, at, updated
