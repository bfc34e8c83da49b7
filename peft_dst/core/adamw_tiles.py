"""The fused AdamW step under the constraint on the CPU, without a dense Θ̂: torch's own kernel, on tiles of zeros.

What AdamW adds to a weight depends on its gradient and moments alone. So the kernel steps zeros, in a tile of memory that
stays in the cache, and what it leaves there is the update u. Times the seed that is the distance, but for rounding, and of
these *products* only the largest of each block is kept. Outside the subset the live weight is the seed; it is read once and
never written, so that the pass moves fewer bytes than the dense step.

Products bound distances from both sides. Lower bounds of the maxima, together with the distances of the current subset
(entry by entry), bound the threshold, as all these are distances of different components; blocks whose upper bounds reach
it are looked at again. There, as in the current subset, θ̂ is computed from the updated moments by the kernel's
arithmetic, to the last bit. So the outcome is what `select` finds on what `torch.optim.AdamW(fused=True)` makes.

Components are counted in *padded positions*: the tensors of all silos one behind the other, each one's last block filled
up. So blocks never straddle tensors, and the order is that in which ties are decided.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .adamw import AdamWOptions, AdamWTensor, NonFiniteStepError, adamw_scalars
from .distances import RELATIVE_FLOOR, distance
from .selection import Selection, block_size, just_below, kth_largest, largest, select
from .tiles import positions_above


# Half a unit in the last place, relative to what was rounded.
_HALF_ULP = 2.0**-24
# How far a product may be from a distance, relative to itself: the roundings of u, Δ, both products and the bounds.
_ROUNDING = 2.0**-20
# Where more than one component in so many is to be looked at again, Θ̂ as a whole is the faster way.
_MANY = 2
# Components of a tile: 1 MiB of float32. Of the other operands nothing has to stay in the cache.
_TILE = 1 << 18
# Components that are looked at again at one time.
_PORTION = 1 << 20
# Whatever the defaults for these are.
_FLOAT: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


class Chosen(NamedTuple):
    """A silo's new subset, and θ̂ of each of its tensors there, float32 (k_i,)."""

    selection: Selection
    values: list[Tensor]


class _Piece(NamedTuple):
    """What of a tensor fits a tile, flat. `length` is that of its blocks, the last one filled up."""

    length: int
    options: AdamWOptions
    weight: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class _Entries(NamedTuple):
    """Some components: padded positions int64, distances and θ̂ float32, each (m,)."""

    positions: Tensor
    distances: Tensor
    updated: Tensor

    def at(self, where: Tensor | slice) -> _Entries:
        return _Entries(*(part[where] for part in self))


@torch.no_grad()
def step_and_select(silos: Sequence[Sequence[AdamWTensor]], budgets: Sequence[int], kind: str) -> list[Chosen]:
    """Make one AdamW step of the moments of some silos, and choose their subsets as `select` would on the dense Θ̂.

    Args:
        silos: for each silo its tensors, in the order in which ties are decided.
        budgets: k of each silo, 0 <= k < its size.
        kind: name of the distance.

    Raises:
        NonFiniteStepError: if a distance is NaN or infinite. The moments are updated.
    """
    batch = _Batch(silos, budgets, kind)
    maxima = batch.first_pass()
    current = batch.current()
    batch.check_finite(maxima, current)
    return batch.choose(maxima, current)


class _Batch:
    """The tensors of a call in padded positions.

    Attributes:
        tensors: those of all silos.
        block: components of a block, which divides a tile.
        begins: number of the first block of each tensor, and of what would come next.
        silo_begins: the same of each silo.
        constants: of each tensor what its update and θt are multiplied and divided by, float32 (tensors, 4).
    """

    def __init__(self, silos: Sequence[Sequence[AdamWTensor]], budgets: Sequence[int], kind: str):
        self.silos = silos
        self.tensors = [tensor for silo in silos for tensor in silo]
        self.budgets = budgets
        self.kind = kind
        self.block = block_size(sum(t.weight.numel() for t in self.tensors), max(sum(budgets), 1))
        self.begins = [0, *itertools.accumulate(-(-t.weight.numel() // self.block) for t in self.tensors)]
        firsts = [0, *itertools.accumulate(len(silo) for silo in silos)]
        self.silo_begins = [self.begins[first] for first in firsts]
        self.constants = torch.tensor([_constants(t.options) for t in self.tensors], **_FLOAT)

    def first_pass(self) -> Tensor:
        """Update all moments, and return the largest product of each block outside the current subset, float32."""
        maxima = torch.empty(self.begins[-1], **_FLOAT)
        buffers = [torch.empty(_TILE, **_FLOAT) for _ in range(3)]
        tiles = list(self._tiles())
        lengths = [sum(piece.length for piece in pieces) for pieces in tiles]
        begins = [0, *itertools.accumulate(lengths)]
        padded = self._padded([t.indices for t in self.tensors])
        ends = np.searchsorted(padded, begins)
        subset = torch.from_numpy(padded - np.repeat(begins[:-1], np.diff(ends))).split(np.diff(ends).tolist())
        parts_of_maxima = maxima.split([length // self.block for length in lengths])
        for pieces, length, inside, own in zip(tiles, lengths, subset, parts_of_maxima, strict=True):
            product = buffers[0][:length].zero_()
            parts = self._parts(product, pieces)
            self._step(parts, pieces, buffers[1])
            self._multiply(product, pieces, parts, buffers[2])
            if inside.numel():
                product.index_fill_(0, inside, 0.0)
            torch.amax(product.abs_().view(-1, self.block), 1, out=own)
        return maxima

    def _tiles(self) -> Iterator[list[_Piece]]:
        """Pieces that are stepped together: a tile of them at most, with the same rates."""
        pieces: list[_Piece] = []
        room = _TILE
        for t in self.tensors:
            flat = (_split(part.view(-1)) for part in (t.weight, t.grad, t.exp_avg, t.exp_avg_sq))
            for parts in zip(*flat, strict=True):
                length = -(-parts[0].numel() // self.block) * self.block
                if pieces and (length > room or pieces[-1].options[:4] != t.options[:4]):
                    yield pieces
                    pieces, room = [], _TILE
                pieces.append(_Piece(length, t.options, *parts))
                room -= length
        if pieces:
            yield pieces

    def _parts(self, tile: Tensor, pieces: Sequence[_Piece]) -> list[Tensor]:
        """Where the pieces lie in a tile."""
        if len(pieces) == 1:
            return [tile[: pieces[0].weight.numel()]]
        begins = itertools.accumulate((piece.length for piece in pieces), initial=0)
        return [tile[begin : begin + piece.weight.numel()] for begin, piece in zip(begins, pieces, strict=False)]

    def _step(self, zeros: list[Tensor], pieces: Sequence[_Piece], buffer: Tensor) -> None:
        """Make updates of zeros."""
        grads = [piece.grad for piece in pieces]
        if any(grad.dtype != torch.float32 for grad in grads):
            wide = self._parts(buffer, pieces)
            torch._foreach_copy_(wide, grads)
            grads = wide
        moments = [piece.exp_avg for piece in pieces], [piece.exp_avg_sq for piece in pieces]
        _fused_adamw(zeros, grads, *moments, [piece.options for piece in pieces], 0.0)

    def _multiply(self, product: Tensor, pieces: Sequence[_Piece], updates: list[Tensor], buffer: Tensor) -> None:
        """Make products of updates."""
        if self.kind == "absolute":
            return
        seeds = [piece.weight for piece in pieces]
        if self.kind == "inverse_relative" and all(seed.dtype == torch.float32 for seed in seeds):
            torch._foreach_mul_(updates, seeds)
            return
        wide = buffer[: product.numel()].zero_()
        torch._foreach_copy_(self._parts(wide, pieces), seeds)
        if self.kind == "inverse_relative":
            product.mul_(wide)
        else:
            product.div_(wide.abs_().clamp_min_(RELATIVE_FLOOR))

    def _padded(self, positions: Sequence[Tensor]) -> np.ndarray:
        """Padded positions of flat ones of each tensor."""
        return np.concatenate(
            [at.numpy() + begin * self.block for at, begin in zip(positions, self.begins, strict=False)]
        )

    def current(self) -> _Entries:
        """The current subset after the step."""
        first, second = (
            torch.cat([part.view(-1).index_select(0, t.indices) for part, t in zip(parts, self.tensors, strict=True)])
            for parts in zip(*((t.exp_avg, t.exp_avg_sq) for t in self.tensors), strict=True)
        )
        seeds = torch.cat([t.seeds for t in self.tensors]).float()
        constants = self.constants.repeat_interleave(_counts([t.indices.numel() for t in self.tensors]), 0)
        updated = _updated(torch.cat([t.values for t in self.tensors]), first, second, constants.unbind(1))
        positions = torch.from_numpy(self._padded([t.indices for t in self.tensors]))
        return _Entries(positions, distance(self.kind, seeds, updated), updated)

    def check_finite(self, maxima: Tensor, current: _Entries) -> None:
        """Raise if a product or a distance is NaN or infinite."""
        if math.isfinite(maxima.sum()) and math.isfinite(current.distances.sum()):
            return
        wrong = [torch.isfinite(maxima).logical_not_().nonzero().flatten()]
        wrong.append(current.positions[torch.isfinite(current.distances).logical_not_()] // self.block)
        if (blocks := torch.cat(wrong)).numel():
            self._raise(int(blocks.min()))

    def _raise(self, block: int) -> None:
        position = int(np.searchsorted(self.begins, block, side="right")) - 1
        silo = 0
        while position >= len(self.silos[silo]):
            position -= len(self.silos[silo])
            silo += 1
        raise NonFiniteStepError(silo, position)

    def choose(self, maxima: Tensor, current: _Entries) -> list[Chosen]:
        """The new subsets."""
        slack = torch.tensor([self._slack(t) for t in self.tensors], **_FLOAT)
        slack = slack.repeat_interleave(_counts(self.begins).diff())
        lower = (maxima * (1 - _ROUNDING)).sub_(slack).clamp_min_(0.0)
        upper = maxima.mul_(1 + _ROUNDING).add_(slack)
        for number, t in enumerate(self.tensors):
            if t.options.lr == 0:
                # Nothing moves but the current subset.
                upper[self.begins[number] : self.begins[number + 1]] = 0.0
        blocks, below, whole = [], [], set()
        for number, mine in enumerate(self._by_silo(current)):
            own = slice(*self.silo_begins[number : number + 2])
            least = self._bound(torch.cat([mine.distances, lower[own]]), self.budgets[number])
            reach = positions_above(upper[own], least)
            if reach.numel() * _MANY > own.stop - own.start:
                whole.add(number)
                reach = reach[:0]
            blocks.append(reach + own.start)
            below.append(least)
        found = self._second_look(blocks, below, current)
        moved = current.at(current.distances > 0)
        looked = zip(self._by_silo(moved), self._by_silo(found), strict=True)
        return [
            self._choose_on_the_whole(number) if number in whole else self._merge(number, mine, others)
            for number, (mine, others) in enumerate(looked)
        ]

    def _by_silo(self, entries: _Entries) -> list[_Entries]:
        ends = np.searchsorted(entries.positions.numpy(), np.multiply(self.silo_begins, self.block)).tolist()
        return [entries.at(slice(*pair)) for pair in itertools.pairwise(ends)]

    @staticmethod
    def _bound(known: Tensor, budget: int) -> float:
        """What every distance in the new subset is above, given some lower bounds of distances of different components."""
        if budget == 0:
            return math.inf
        return just_below(float(kth_largest(known, budget)) if budget < known.numel() else 0.0, torch.float32)

    def _second_look(self, blocks: Sequence[Tensor], below: Sequence[float], current: _Entries) -> _Entries:
        """Components outside the current subset, in some blocks of each silo, whose distances are above a silo's bound."""
        limits = torch.tensor(below, **_FLOAT).repeat_interleave(_counts([len(own) for own in blocks]))
        rows = _PORTION // self.block
        portions = zip(torch.cat(list(blocks)).split(rows), limits.split(rows), strict=True)
        parts = [self._look_at(*portion) for portion in portions if portion[0].numel()]
        if not parts:
            return current.at(slice(0))
        found = _Entries(*(torch.cat(part) for part in zip(*parts, strict=True)))
        if current.positions.numel():
            slot = torch.searchsorted(current.positions, found.positions).clamp_max_(current.positions.numel() - 1)
            found = found.at(current.positions[slot] != found.positions)
        return found

    def _look_at(self, blocks: Tensor, limits: Tensor) -> _Entries:
        owners = np.searchsorted(self.begins, blocks.numpy(), side="right") - 1
        firsts = [*np.flatnonzero(np.diff(owners, prepend=-1)).tolist(), len(owners)]
        operands = [torch.zeros(blocks.numel(), self.block, **_FLOAT) for _ in range(3)]
        for begin, end in itertools.pairwise(firsts):
            t, first = self.tensors[owners[begin]], self.begins[owners[begin]]
            for own, part in zip(operands, (t.weight, t.exp_avg, t.exp_avg_sq), strict=True):
                self._gather(part.view(-1), blocks[begin:end] - first, own[begin:end])
        constants = self.constants[torch.from_numpy(owners)].unsqueeze(2).unbind(1)
        theta, first, second = operands
        updated = _updated(theta, first, second, constants)
        delta = distance(self.kind, theta, updated)
        at = torch.from_numpy(np.flatnonzero(delta.numpy() > limits[:, None].numpy()))
        positions = blocks[at // self.block] * self.block + at % self.block
        return _Entries(positions, delta.view(-1)[at], updated.view(-1)[at])

    def _gather(self, flat: Tensor, rows: Tensor, out: Tensor) -> None:
        """Some blocks of a tensor, widened; zeros behind the last one where it is shorter."""
        whole, rest = divmod(flat.numel(), self.block)
        if rest and int(rows[-1]) == whole:
            out[-1, :rest] = flat[-rest:]
            rows, out = rows[:-1], out[:-1]
        if rows.numel():
            out.copy_(flat[: whole * self.block].view(whole, self.block).index_select(0, rows))

    def _merge(self, number: int, current: _Entries, found: _Entries) -> Chosen:
        """A silo's new subset out of the current one and what else reaches the bound."""
        entries = _Entries(*(torch.cat(pair) for pair in zip(current, found, strict=True)))
        # Two runs in order: merged in one pass.
        entries = entries.at(torch.from_numpy(np.argsort(entries.positions.numpy(), kind="stable")))
        keep, threshold = largest(entries.distances, self.budgets[number])
        entries = entries.at(keep)
        first, last = self._tensors_of(number)
        starts = np.multiply(self.begins[first : last + 1], self.block)
        ends = np.searchsorted(entries.positions.numpy(), starts).tolist()
        mine = [entries.at(slice(*pair)) for pair in itertools.pairwise(ends)]
        indices = [own.positions - int(start) for own, start in zip(mine, starts, strict=False)]
        return Chosen(Selection(indices, threshold), [own.updated for own in mine])

    def _choose_on_the_whole(self, number: int) -> Chosen:
        """The same from a dense Θ̂."""
        first, last = self._tensors_of(number)
        seeds, updates = [], []
        for t, constants in zip(self.tensors[first:last], self.constants[first:last], strict=True):
            flat = t.weight.view(-1)
            theta = flat.to(torch.float32, copy=True).index_copy_(0, t.indices, t.values)
            seeds.append(flat.index_copy(0, t.indices, t.seeds))
            updates.append(_updated(theta, t.exp_avg.view(-1), t.exp_avg_sq.view(-1), constants.unbind()))
        selection = select(seeds, updates, self.budgets[number], self.kind)
        return Chosen(selection, [u.index_select(0, at) for u, at in zip(updates, selection.indices, strict=True)])

    def _tensors_of(self, number: int) -> tuple[int, int]:
        first = sum(len(silo) for silo in self.silos[:number])
        return first, first + len(self.silos[number])

    def _slack(self, t: AdamWTensor) -> float:
        """How far a product may be from a distance besides: by the rounding of θ̂, which is as large as a seed, by weight
        decay, and by the roundings of its factor and of the seed times it.
        """
        decay = abs(t.options.lr * t.options.weight_decay)
        part = _HALF_ULP if decay == 0 else decay + 3 * _HALF_ULP
        return (
            1.01 * part * {"inverse_relative": t.bound**2, "absolute": t.bound, "relative": 1.0}[self.kind] + 2.0**-120
        )


@functools.cache
def rounds_as_torch() -> bool:
    """Whether θ̂ is computed here as torch's kernel computes it, in this build and on this processor."""
    generator = torch.Generator("cpu").manual_seed(0)
    # Whole vectors of any width, and what is left behind them.
    theta, grad, first, second = (torch.randn(1031, generator=generator, **_FLOAT) for _ in range(4))
    options = AdamWOptions(1e-2, 0.9, 0.999, 1e-8, 0.1, 3.0)
    updated, moments = theta.clone(), (first, second.square_())
    _fused_adamw([updated], [grad], [moments[0]], [moments[1]], [options], options.weight_decay)
    zeros, later = torch.zeros_like(theta), [moment.clone() for moment in moments]
    _fused_adamw([zeros], [grad], [later[0]], [later[1]], [options._replace(step=4.0)], 0.0)
    constants = [torch.tensor(_constants(options._replace(step=step)), **_FLOAT).unbind() for step in (3.0, 4.0)]
    own = _updated(theta, *moments, constants[0])
    update = _updated(zeros.new_zeros(()), later[0], later[1], constants[1])
    return torch.equal(own, updated) and torch.equal(update, zeros)


def _fused_adamw(
    weights: list[Tensor],
    grads: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    options: Sequence[AdamWOptions],
    weight_decay: float,
) -> None:
    """One step by torch's kernel, in place, of tensors that have the rates in common."""
    lr, beta1, beta2, eps = options[0][:4]
    torch._fused_adamw_(
        weights,
        grads,
        first,
        second,
        [],
        [_count(own.step) for own in options],
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )


def _split(flat: Tensor) -> Sequence[Tensor]:
    """A tensor in tiles. Most fit one, and torch's own way takes its time."""
    return (flat,) if flat.numel() <= _TILE else flat.split(_TILE)


def _constants(options: AdamWOptions) -> tuple[float, float, float, float]:
    scalars = adamw_scalars(options)
    return scalars.decay, scalars.step, scalars.correction, scalars.eps


@functools.lru_cache(maxsize=8)
def _count(step: float) -> Tensor:
    return torch.tensor(step, **_FLOAT)


def _counts(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def _updated(theta: Tensor, first: Tensor, second: Tensor, constants: Sequence[Tensor]) -> Tensor:
    """θ̂ as torch's fused kernel makes it of θt and the updated moments, all float32 of one shape."""
    decay, factor, correction, eps = constants
    # Some of torch's own roots on the CPU are off by a last bit, but not those in its kernel.
    root = torch.from_numpy(np.sqrt(second.numpy()))
    return (first * factor).div_(root.div_(correction).add_(eps)).add_(theta * decay)
