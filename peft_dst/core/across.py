"""The exact choice of subsets across processes that hold the silos' tensors together.

Whatever is among a silo's k largest distances is also among the k largest of those that its own process holds. So each
process first makes the choice of `selection` on what it holds; what comes out are its candidates. Distances are not
negative, and so their bit patterns are in their order: histograms of the candidates' bits, eleven at a time and summed
over the processes, find the bit pattern of the k-th largest of all. Positions among ties are found in the same way. What
is sent is 2,048 counts a silo and round, of all silos in one message; no distance and no weight ever is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
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

# Keys that are looked at at once, at most.
_PIECE = 1 << 22


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

    def at(self, keep: Sequence[Tensor | slice]) -> Candidates:
        """Some of each tensor's: those that are marked, bool (k_i,), or a range of them."""
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
    search = _Search(processes, budgets)
    keys = [[bits(delta.to(dtype)) for delta in silo.distances] for silo in silos]
    counted = [[processes.counts(box) for box in own] for own in boxes]
    wanted = torch.tensor(budgets, device=device)
    threshold, rest, ties = search.kth_largest(_chosen(keys, counted), wanted, 63 if wide else 31)
    keep = [[key > limit for key in own] for own, limit in zip(keys, threshold, strict=True)]
    tied = [[(key == limit) & (key > 0) for key in own] for own, limit in zip(keys, threshold, strict=True)]
    crowded = (ties > rest).tolist()
    if any(crowded):
        # More tie than may be kept. The lowest positions are the largest of their complements.
        most = max(sum(box.whole.numel() for box in own) for own in boxes)
        complements = [
            [most - at for at in _positions(silo, own, ties)] if among else [at.new_empty(0) for at in silo.indices]
            for silo, own, ties, among in zip(silos, boxes, tied, crowded, strict=True)
        ]
        last, _, _ = search.kth_largest(_chosen(complements, counted), rest, most.bit_length())
        for own, complement, limit, among in zip(tied, complements, last, crowded, strict=True):
            for tie, at in zip(own, complement, strict=True) if among else ():
                tie[tie.clone()] = at >= limit
    threshold = torch.where(wanted > 0, threshold, 0)
    limits = threshold.view(torch.float64) if wide else threshold.int().view(torch.float32)
    return [
        ([above | tie for above, tie in zip(*masks, strict=True)], limit)
        for *masks, limit in zip(keep, tied, limits, strict=True)
    ]


def _chosen(keys: Sequence[Sequence[Tensor]], chosen: Sequence[Sequence[bool]]) -> list[tuple[int, Tensor]]:
    """Of the keys of each silo's tensors those that are marked, each with its silo's number."""
    return [
        (silo, key)
        for silo, (own, marks) in enumerate(zip(keys, chosen, strict=True))
        for key, mark in zip(own, marks, strict=True)
        if mark
    ]


def _positions(silo: Candidates, boxes: Sequence[Box], masks: Sequence[Tensor]) -> list[Tensor]:
    """Of the candidates that are marked, the flat positions in the silo's whole tensors, one behind the other."""
    found, before = [], 0
    for at, box, mask in zip(silo.indices, boxes, masks, strict=True):
        found.append(box.outwards(at[mask]) + before)
        before += box.whole.numel()
    return found


class _Search:
    """The k-th largest keys of several silos at once, by histograms of a digit after another.

    Args:
        processes: which hold the keys together.
        budgets: how many keys of each silo a process may hold at most.
    """

    def __init__(self, processes: Together, budgets: Sequence[int]):
        self.processes = processes
        self.silos = len(budgets)
        self.counts_in = torch.int32 if sum(budgets) * processes.size < 2**31 else torch.int64

    def kth_largest(
        self, keys: Sequence[tuple[int, Tensor]], wanted: Tensor, width: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Search.

        Args:
            keys: that this process holds, with the number of their silo; non-negative, of at most `width` bits, (m_i,).
            wanted: k of each silo, int64 (silos,).
            width: bits of a key.

        Returns:
            For each silo its k-th largest key, 0 if it has fewer keys, or none is wanted the largest that there can be;
            how many of the keys that equal it are among the k largest; and how many there are.
        """
        groups = [_with_owners(group) for group in _grouped(keys)]
        prefix, rest = torch.zeros_like(wanted), wanted.clone()
        ties, known = torch.zeros_like(prefix), width
        for shift in itertools.chain(range(width - _DIGIT, 0, -_DIGIT), [0]):
            counts = wanted.new_zeros(self.silos * _BINS)
            digits = (1 << known - shift) - 1
            for owner, key in groups:
                counts += torch.bincount((key >> shift & digits) + owner * _BINS, minlength=self.silos * _BINS)
            counts = self.processes.reduce(counts.view(self.silos, _BINS).to(self.counts_in)).long()
            # How many keys are in a bin or in one above it.
            reaching = counts.flip(1).cumsum(1).flip(1)
            # Where there are fewer than wanted, that is bin zero, and all of it.
            found = (reaching >= rest[:, None]).sum(1).sub_(1).clamp_min_(0)[:, None]
            ties = counts.gather(1, found).squeeze(1)
            rest = rest - (reaching.gather(1, found).squeeze(1) - ties)
            prefix, known = prefix << (known - shift) | found.squeeze(1), shift
            if shift:
                # Of the others nothing more is asked.
                inside = [key >> known == prefix[owner] for owner, key in groups]
                groups = [(owner[mask], key[mask]) for (owner, key), mask in zip(groups, inside, strict=True)]
        return prefix, rest, ties


def _grouped(keys: Sequence[tuple[int, Tensor]]) -> Iterator[list[tuple[int, Tensor]]]:
    """Pieces of keys that are looked at at once, many small ones or a large one: what is made of a key on the way to its
    bin is larger than the key.
    """
    group: list[tuple[int, Tensor]] = []
    size = 0
    for silo, piece in ((silo, piece) for silo, own in keys for piece in own.split(_PIECE)):
        if group and size + piece.numel() > _PIECE:
            yield group
            group, size = [], 0
        group.append((silo, piece))
        size += piece.numel()
    if group:
        yield group


def _with_owners(group: Sequence[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
    """For each key of a group its silo, int32 (m,); and the keys, (m,)."""
    device = group[0][1].device
    silos = torch.tensor([silo for silo, _ in group], dtype=torch.int32, device=device)
    if len(group) == 1:
        return silos.expand(group[0][1].shape), group[0][1]
    lengths = [piece.numel() for _, piece in group]
    owners = silos.repeat_interleave(torch.tensor(lengths, device=device), output_size=sum(lengths))
    return owners, torch.cat([piece for _, piece in group])
