"""The choice of the subsets of several silos at one step: of each by itself, or of all processes together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .across import Candidates, choose_across, find_candidates
from .distances import RELATIVE_FLOOR, normalizer
from .iterative import select_iteratively
from .selection import Selection, select
from .shards import Together, together
from .subset import Silo, Subset
from .tiles import NonFiniteDistanceError
from .weights import SparseWeight, gather


if TYPE_CHECKING:
    from .constraint import Constraint


# Candidates that may wait for one another in a process, at most: 16 bytes each.
_MOST_PENDING = 1 << 26


@dataclass(frozen=True)
class _Pending:
    """A silo that several processes hold together, as this one sees it.

    Attributes:
        silo: the silo.
        before: the subset of each of its weights before the step.
        candidates: what it may be chosen from; None if it is kept.
        kept: what it is here if it is kept; None if it is chosen. Both are there where the subset is empty: then it is
            chosen if it is empty in all processes.
    """

    silo: Silo
    before: Sequence[Subset]
    candidates: Candidates | None
    kept: Candidates | None

    @property
    def failed(self) -> int | None:
        """The first weight with an update that is not finite."""
        found = self.candidates or self.kept
        assert found is not None
        return found.failed


class Choice:
    """One step's choice of subsets.

    `take` looks at a silo after the other and writes its subset, unless other processes hold it too: the subsets of all
    those are chosen, and written, by `finish`, which all processes call together.

    Args:
        constraint: whose subsets they are.
        written: called for each weight when its subset was written, with θ̂ there, (k,).
    """

    def __init__(self, constraint: Constraint, written: Callable[[SparseWeight, Tensor], None] | None = None):
        self.constraint = constraint
        self._written = written
        self._pending: dict[Together, list[_Pending]] = {}
        self._moved = False

    def take(self, silo: Silo, updates: Sequence[Tensor], before: Sequence[Subset]) -> None:
        """Choose the subset of a silo whose live weights are the seed now, and write it into them.

        Args:
            silo: the silo.
            updates: Θ̂ of its weights, in their shapes; float32 for bfloat16 and float16 weights is welcome.
            before: its subset before the step.

        Raises:
            FloatingPointError: if an update is NaN or infinite.
        """
        processes = together(weight.box for weight in silo.weights if weight.is_divided)
        if processes is not None:
            waiting = self._pending.setdefault(processes, [])
            waiting.append(self._look_at(silo, updates, before))
            # All processes have to come to the same answer, so this is not about the candidates that were found.
            if sum(min(one.silo.budget, -(-one.silo.size // processes.size)) for one in waiting) > _MOST_PENDING:
                self._finish(processes, self._pending.pop(processes))
            return
        try:
            selection = self._select(silo, updates, before)
        except NonFiniteDistanceError as error:
            raise self.constraint.non_finite(silo, error.position) from error
        silo.take(selection, updates, before)
        if self._written is not None:
            for weight, updated in zip(silo.weights, updates, strict=True):
                self._written(weight, gather(updated, weight.indices))

    def finish(self) -> None:
        """Choose and write the subsets that are held together with other processes.

        Raises:
            FloatingPointError: if an update is NaN or infinite in any of them.
        """
        for processes, pending in self._pending.items():
            self._finish(processes, pending)
        self.constraint.note_moved(self._moved)

    def _finish(self, processes: Together, pending: Sequence[_Pending]) -> None:
        occupied = self._exchange(processes, pending)
        chosen = {
            one.silo: one.candidates
            for one, before in zip(pending, occupied, strict=True)
            if one.candidates is not None and not (before and one.kept is not None)
        }
        boxes = [[weight.box for weight in silo.weights] for silo in chosen]
        answers = choose_across([*chosen.values()], boxes, [silo.budget for silo in chosen], processes)
        masks = dict(zip(chosen, answers, strict=True))
        for one in pending:
            found, threshold = one.kept, one.silo.threshold
            if one.silo in masks:
                keep, threshold = masks[one.silo]
                found = chosen[one.silo].at(keep)
            assert found is not None
            one.silo.write(Selection(found.indices, threshold), found.values, one.before)
            if self._written is not None:
                for weight, values in zip(one.silo.weights, found.values, strict=True):
                    self._written(weight, values)

    def _exchange(self, processes: Together, pending: Sequence[_Pending]) -> list[bool]:
        """Exchange what has to be known of each silo besides distances: whether it fails anywhere, or has a subset.

        Returns:
            For each silo whether its subset before the step was not empty.

        Raises:
            FloatingPointError: if an update is NaN or infinite in any process.
        """
        most = max(len(one.silo.weights) for one in pending)
        # The first failing tensor is the greatest number; what fails only if the subset is empty everywhere is less.
        failures = [
            0 if one.failed is None else most - one.failed + most * (one.candidates is None or one.kept is None)
            for one in pending
        ]
        occupied = [any(subset.indices.numel() for subset in one.before) for one in pending]
        device = pending[0].silo.weights[0].data.device
        message = torch.tensor([*failures, *occupied, self._moved], dtype=torch.int32, device=device)
        answer = processes.reduce(message, torch.distributed.ReduceOp.MAX).tolist()
        for one, failure, before in zip(pending, answer, answer[len(pending) :], strict=False):
            if failure > most or (failure and not before):
                raise self.constraint.non_finite(one.silo, (2 * most - failure) % most)
        self._moved = bool(answer[-1])
        return [bool(occupied) for occupied in answer[len(pending) : -1]]

    def _look_at(self, silo: Silo, updates: Sequence[Tensor], before: Sequence[Subset]) -> _Pending:
        constraint = self.constraint
        competes = silo.budget < silo.size
        occupied = any(subset.indices.numel() for subset in before)
        # All processes ask for these, whatever is here.
        divisors = divisors_of(silo, constraint) if competes else None
        if competes and (constraint.chooses(False) or not occupied):
            seeds, flat = [weight.flat() for weight in silo.weights], [updated.reshape(-1) for updated in updates]
            candidates = find_candidates(seeds, flat, silo.budget, constraint.distance, divisors)
            kept = None if constraint.chooses(False) else candidates.at([slice(0)] * len(silo.weights))
            return _Pending(silo, before, candidates, kept)
        failed = None
        try:
            indices = self._select(silo, updates, before).indices
        except NonFiniteDistanceError as error:
            indices, failed = [subset.indices for subset in before], error.position
        values = [gather(updated, at) for updated, at in zip(updates, indices, strict=True)]
        return _Pending(silo, before, None, Candidates(indices, values, values, failed))

    def _select(self, silo: Silo, updates: Sequence[Tensor], before: Sequence[Subset]) -> Selection:
        constraint = self.constraint
        # Where nothing competes, all that moved is kept, whenever it moved.
        empty = not any(subset.indices.numel() for subset in before)
        if silo.budget < silo.size and not constraint.chooses(empty):
            return self._keep(silo, updates, before)
        seeds, flat = [weight.flat() for weight in silo.weights], [updated.reshape(-1) for updated in updates]
        divisors = divisors_of(silo, constraint)
        if constraint.tracking:
            m, r = constraint.tracking
            return select_iteratively(seeds, flat, silo.budget, constraint.distance, silo.tracked, m, r, divisors)
        return select(seeds, flat, silo.budget, constraint.distance, divisors)

    def _keep(self, silo: Silo, updates: Sequence[Tensor], before: Sequence[Subset]) -> Selection:
        """The subset from before, unless an update in it is not finite."""
        finite, moved = [], []
        for updated, subset in zip(updates, before, strict=True):
            values = gather(updated, subset.indices)
            finite.append(torch.isfinite(values).all())
            moved.append((values.to(subset.values.dtype) != subset.values).any())
        # One wait reads them all.
        found = torch.stack([*finite, *moved]).tolist()
        if not all(found[: len(finite)]):
            raise NonFiniteDistanceError(found.index(False))
        self._moved = self._moved or any(found[len(finite) :])
        return Selection([subset.indices for subset in before], silo.threshold)


def divisors_of(silo: Silo, constraint: Constraint) -> list[float] | None:
    """What the distances of each weight of a silo are divided by; None where they are not normalised.

    The live weights are the seed now.
    """
    if constraint.normalization is None:
        return None
    seeds = [weight.generation for weight in silo.weights]
    if silo.divisors is None or silo.divided != seeds:
        silo.divided = seeds
        by_kind, figure = normalizer(constraint.normalization)
        modules = {weight.name: constraint.modules[weight.name][by_kind:] for weight in silo.weights}
        members: dict[tuple[str, ...], list[SparseWeight]] = {}
        for weight in silo.weights:
            members.setdefault(modules[weight.name], []).append(weight)
        found = {}
        for module, weights in members.items():
            size = sum(weight.shape.numel() for weight in weights)
            if figure == "size":
                found[module] = float(size)
            else:
                mean = _total(weights) / size
                found[module] = mean if mean > RELATIVE_FLOOR else 1.0
        silo.divisors = [found[modules[weight.name]] for weight in silo.weights]
    return silo.divisors


def _total(weights: Sequence[SparseWeight]) -> float:
    """Sum of the absolute values of some weights, wherever they are held."""
    processes = together(weight.box for weight in weights)
    counted = [weight for weight in weights if processes is None or processes.counts(weight.box)]
    sums = [weight.data.abs().sum(dtype=torch.float64) for weight in counted]
    total = torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.float64, device=weights[0].data.device)
    return float(total if processes is None else processes.reduce(total))
