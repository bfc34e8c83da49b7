"""What competes and what is free: silos, with their budgets, and the subset that stands in their live weights now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .selection import Selection
from .weights import SparseWeight, gather


@dataclass(frozen=True)
class Subset:
    """A weight's subset at some moment: flat positions and the values there, both (k,)."""

    indices: Tensor
    values: Tensor

    @classmethod
    def of(cls, weight: SparseWeight) -> Subset:
        values = weight.values()
        return cls(weight.indices, values)

    def restore(self, weight: SparseWeight) -> None:
        """Make it the weight's subset again, whatever that is now. Exact."""
        weight.apply(self.indices, self.values)


@dataclass(eq=False)
class Silo:
    """Parameters that compete with one another, and how many of their components may differ from the seed.

    Attributes:
        name: e.g. "encoder.layer.3.attention".
        weights: the silo's tensors, in model order.
        budget: number of free components.
        threshold: smallest kept distance of the last selection, 0-d tensor.
        previous: the subset before the last selection, one index tensor a weight.
        divisors: what the distances of each weight are divided by, once it is known; `divided` tells from which seeds.
        tracked: threshold of the last step, where that is where the next one starts from (Alg. 2).
    """

    name: str
    weights: list[SparseWeight]
    budget: int
    threshold: Tensor = field(default_factory=lambda: torch.zeros((), device="cpu"))
    previous: list[Tensor] = field(default_factory=list)
    divisors: list[float] | None = None
    divided: list[int] = field(default_factory=list)
    tracked: float | None = None

    @property
    def size(self) -> int:
        """Number of components, wherever they are held."""
        return sum(weight.shape.numel() for weight in self.weights)

    def free(self) -> int:
        """Number of components held here that differ from the seed now."""
        return sum(weight.indices.numel() for weight in self.weights)

    def take(self, selection: Selection, updates: Sequence[Tensor], before: Sequence[Subset]) -> None:
        """Write the selected components of Θ̂ into the live weights, which are the seed now.

        Args:
            selection: the subset.
            updates: Θ̂ of each weight, in its shape.
            before: what the subset was before the step.
        """
        if self.budget < self.size:
            values = [gather(updated, at) for updated, at in zip(updates, selection.indices, strict=True)]
            self.write(selection, values, before)
            return
        for weight, indices, updated in zip(self.weights, selection.indices, updates, strict=True):
            weight.overwrite(indices, updated)
        self.note(selection, before)

    def write(self, selection: Selection, values: Sequence[Tensor], before: Sequence[Subset]) -> None:
        """The same, of which nothing but the selected components, for each weight (k_i,), is known any more."""
        for weight, indices, own in zip(self.weights, selection.indices, values, strict=True):
            weight.apply(indices, own)
        self.note(selection, before)

    def note(self, selection: Selection, before: Sequence[Subset]) -> None:
        """Note a selection that has been written, for the figures and for whoever asks for the records."""
        self.previous, self.threshold = [subset.indices for subset in before], selection.threshold
        for weight in self.weights:
            weight.stepped = True

    def arrived(self) -> list[int]:
        """For each weight the number of components held here that the last step brought into the subset."""
        if not self.previous:
            return [0] * len(self.weights)
        return [
            int(torch.isin(weight.indices, before.to(weight.indices.device), invert=True).sum())
            for weight, before in zip(self.weights, self.previous, strict=True)
        ]

    def churn(self) -> float:
        """Share of the current subset, as far as it is held here, that the last step brought in (0 for an empty subset)."""
        return sum(self.arrived()) / max(self.free(), 1)
