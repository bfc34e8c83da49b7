"""An optimizer's step under way: working copies lent and taken back, ended, undone, or recovered from half-way."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .shards import put_local
from .subset import Silo, Subset
from .weights import SparseWeight, Undoable


@dataclass(eq=False)
class StepInProgress:
    """An optimizer's step over some silos, writing into working copies of the weights.

    Attributes:
        silos: the silos whose weights it may change.
        before: the subset of each weight from before the step.
        holders: the step that each weight's working copy was made for: this one, or another one around it.
        seeds: the seed of each weight that was recovered before the step was known to have ended.
        updates: the working copy of each weight, as the optimizer left it.
    """

    silos: list[Silo]
    before: dict[SparseWeight, Subset] = field(default_factory=dict)
    holders: dict[SparseWeight, Undoable] = field(default_factory=dict)
    seeds: dict[SparseWeight, Tensor] = field(default_factory=dict)
    updates: dict[SparseWeight, Tensor] = field(default_factory=dict)

    @property
    def is_outermost(self) -> bool:
        """Whether no other step was under way over any of the weights when this one began."""
        return all(holder is self for holder in self.holders.values())

    def begin(self) -> None:
        for weight in (weight for silo in self.silos for weight in silo.weights):
            # First of all: if there is no memory for it, the weight is not lent.
            before = Subset.of(weight)
            if weight.under_way is None:
                weight.lend()
                weight.under_way = self
            self.before[weight], self.holders[weight] = before, weight.under_way

    def take_back(self) -> dict[SparseWeight, Tensor]:
        """What the optimizer made of the working copies. The live weights are the seed now, and back in their places; those
        that are divided come back at the end, as the working copies have no other place.
        """
        for weight in self.before:
            self.updates[weight] = weight.working
            if weight in self.seeds and weight.is_divided:
                self.updates[weight] = weight.working.clone()
                weight.working.copy_(self.seeds.pop(weight))
                weight.place(weight.indices[:0], weight.seeds[:0])
                weight.under_way = self
            elif weight in self.seeds:
                put_local(weight.parameter, self.seeds.pop(weight))
                weight.place(weight.indices[:0], weight.seeds[:0])
                weight.under_way = self
            elif self.holders[weight] is self and not weight.is_divided:
                weight.take_back()
            weight.revert()
        return self.updates

    def end(self) -> None:
        for weight in self.before:
            self._leave(weight, self.updates[weight])
        self.updates.clear()

    def undo(self) -> None:
        """Put the weights back to what they were before the step, which is over; those that were not recovered yet."""
        for weight, before in self.before.items():
            if weight.under_way is self.holders[weight]:
                working = weight.working
                if self.holders[weight] is self:
                    weight.take_back()
                before.restore(weight)
                self._leave(weight, working)

    def _leave(self, weight: SparseWeight, working: Tensor) -> None:
        holder = self.holders[weight]
        if holder is self:
            weight.take_back()
            weight.under_way = None
        elif isinstance(holder, StepInProgress):
            # The step around this one goes on from the projected weight, and back to it if it fails.
            working.copy_(weight.data)
            holder.before[weight] = Subset.of(weight)

    def recover(self) -> None:
        """Put the weights back to what they were before the step, of which nobody knows whether it is over.

        If it is not, the optimizer goes on writing into the working copies. So these become the live weights, and those
        from before, out of its reach, are kept as the seed to project onto in the end.
        """
        for weight, before in self.before.items():
            if weight.under_way is self:
                before.restore(weight)
                self.seeds[weight] = weight.give_up()
                weight.under_way = None
