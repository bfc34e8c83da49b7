"""The exact choice of subsets across processes that hold the silos' tensors together.

Whatever is among a silo's k largest distances is also among the k largest of those that its own process holds. So each
process first makes the choice of `selection` on what it holds; what comes out are its candidates. Distances are not
negative, and so their bit patterns are in their order: histograms of the candidates' bits, eleven at a time and summed
over the processes, find the bit pattern of the k-th largest of all. Positions among ties are found in the same way. What
is sent is 2,048 counts a silo and round, of all silos in one message; no distance and no weight ever is.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .selection import select
from .shards import Box, Together
from .tiles import NonFiniteDistanceError, Tiles, bits
from .weights import gather


#: Bits of a key that one round tells apart.
_DIGIT = 11
_BINS = 1 << _DIGIT


@dataclass(frozen=True)
class Candidates:
    """Of the components of a silo that this process holds, those that may be kept.

    Attributes:
        indices: for each tensor the flat positions in what this process holds of it, int64 (k_i,), sorted.
        values: θ̂ there, (k_i,).
        distances: Δ there, (k_i,), above zero.
        failed: index of the first tensor in which a distance is NaN or infinite; None if all are finite.
    """

    indices: list[Tensor]
    values: list[Tensor]
    distances: list[Tensor]
    failed: int | None = None

    def at(self, keep: Sequence[Tensor]) -> Candidates:
        """Those that are marked, for each tensor bool (k_i,)."""
        indices, values, distances = (
            [own[mask] for own, mask in zip(part, keep, strict=True)]
            for part in (self.indices, self.values, self.distances)
        )
        return Candidates(indices, values, distances)


def find_candidates(
    seeds: Sequence[Tensor], updates: Sequence[Tensor], budget: int, kind: str, divisors: Sequence[float] | None = None
) -> Candidates:
    """The candidates of one silo.

    Args:
        seeds: Θ0 of what this process holds of the silo's tensors, each flat.
        updates: Θ̂, likewise.
        budget: k of the whole silo.
        kind: name of the distance.
        divisors: for each tensor a number that its distances are divided by; None for none.
    """
    own = sum(seed.numel() for seed in seeds)
    try:
        indices = select(seeds, updates, min(budget, own), kind, divisors).indices
    except NonFiniteDistanceError as error:
        nothing = [update.new_empty(0) for update in updates]
        return Candidates([part.long() for part in nothing], nothing, nothing, error.position)
    tiles = Tiles(seeds, updates, kind, divisors)
    found = Candidates([], [], [])
    for i, (at, seed, update) in enumerate(zip(indices, seeds, updates, strict=True)):
        value = gather(update, at)
        delta = tiles.distance(i, gather(seed, at), value)
        # Where everything here is kept, that may be at no distance.
        moved = delta > 0
        found.indices.append(at[moved])
        found.values.append(value[moved])
        found.distances.append(delta[moved])
    return found


def choose_across(
    silos: Sequence[Candidates], boxes: Sequence[Sequence[Box]], budgets: Sequence[int], processes: Together
) -> list[tuple[list[Tensor], Tensor]]:
    """The subsets of some silos, chosen from all processes' candidates. To be called by all of them together.

    Kept are each silo's `budget` largest distances; a tie at the threshold goes to the lower (tensor, flat index in the
    whole tensor), as in `select`.

    Args:
        silos: the candidates of each silo.
        boxes: for each silo what this process holds of its tensors.
        budgets: k of each silo.
        processes: which hold the silos together.

    Returns:
        For each silo which candidates are kept here, for each tensor bool (k_i,), and the smallest distance that any
        process keeps, 0-d (0 where none was left out).
    """
    if not silos:
        return []
    device = silos[0].distances[0].device
    wide = any(delta.dtype == torch.float64 for silo in silos for delta in silo.distances)
    dtype = torch.float64 if wide else torch.float32
    keys, owners, counted, positions = [], [], [], []
    for number, (silo, own) in enumerate(zip(silos, boxes, strict=True)):
        before = 0
        for at, delta, box in zip(silo.indices, silo.distances, own, strict=True):
            keys.append(bits(delta.to(dtype)).long())
            owners.append(torch.full_like(at, number))
            counted.append(torch.full_like(at, processes.counts(box), dtype=torch.bool))
            positions.append(box.outwards(at) + before)
            before += box.whole.numel()
    key, owner, counts, position = (torch.cat(parts) for parts in (keys, owners, counted, positions))
    wanted = torch.tensor(budgets, device=device)
    search = _Search(processes, owner[counts], len(silos), sum(budgets))
    threshold, rest, ties = search.kth_largest(key[counts], wanted, 63 if wide else 31)
    keep = key > threshold[owner]
    tied = (key == threshold[owner]) & (key > 0)
    if bool((ties > rest).any()):
        # In some silos more tie than may be kept. The lowest positions are the largest of their complements.
        sizes = [sum(box.whole.numel() for box in own) for own in boxes]
        crowded = (ties > rest)[owner] & tied
        complement = max(sizes) - position
        among = _Search(processes, owner[crowded & counts], len(silos), sum(budgets))
        last, _, _ = among.kth_largest(complement[crowded & counts], rest, max(sizes).bit_length())
        keep |= torch.where(crowded, complement >= last[owner], tied)
    else:
        keep |= tied
    threshold = torch.where(wanted > 0, threshold, 0)
    limits = threshold.view(torch.float64) if wide else threshold.int().view(torch.float32)
    masks = iter(keep.split([at.numel() for silo in silos for at in silo.indices]))
    return [([next(masks) for _ in silo.indices], limit) for silo, limit in zip(silos, limits, strict=True)]


class _Search:
    """The k-th largest keys of several silos at once, by histograms of a digit after another.

    Args:
        processes: which hold the keys together.
        owner: silo of each key that this process holds, int64 (m,).
        silos: number of silos.
        most: how many keys a process may hold at most.
    """

    def __init__(self, processes: Together, owner: Tensor, silos: int, most: int):
        self.processes = processes
        self.owner = owner
        self.silos = silos
        self.counts_in = torch.int32 if most * processes.size < 2**31 else torch.int64

    def kth_largest(self, keys: Tensor, wanted: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Search.

        Args:
            keys: non-negative, of fewer bits than `width` says, int64 (m,).
            wanted: k of each silo, int64 (silos,).
            width: bits of a key.

        Returns:
            For each silo its k-th largest key, 0 if it has fewer keys, or none is wanted the largest that there can be;
            how many of the keys that equal it are among the k largest; and how many there are.
        """
        device = keys.device
        prefix, rest = torch.zeros(self.silos, dtype=torch.int64, device=device), wanted.clone()
        ties, known = torch.zeros_like(prefix), width
        for shift in itertools.chain(range(width - _DIGIT, 0, -_DIGIT), [0]):
            inside = keys >> known == prefix[self.owner]
            digit = keys[inside] >> shift & (1 << known - shift) - 1
            counts = torch.bincount(self.owner[inside] * _BINS + digit, minlength=self.silos * _BINS)
            counts = self.processes.reduce(counts.view(self.silos, _BINS).to(self.counts_in)).long()
            # How many keys are in a bin or in one above it.
            reaching = counts.flip(1).cumsum(1).flip(1)
            # Where there are fewer than wanted, that is bin zero, and all of it.
            found = (reaching >= rest[:, None]).sum(1).sub_(1).clamp_min_(0)[:, None]
            ties = counts.gather(1, found).squeeze(1)
            rest = rest - (reaching.gather(1, found).squeeze(1) - ties)
            prefix, known = prefix << (known - shift) | found.squeeze(1), shift
        return prefix, rest, ties
