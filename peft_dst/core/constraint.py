"""One adapter's constraint, and what happens around an optimizer step to keep it (Alg. 1 of the DST paper)."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .selection import NonFiniteDistanceError, Selection, select
from .weights import SparseWeight, scatter


@dataclass(eq=False)
class Silo:
    """Parameters that compete with one another, and how many of their components may differ from the seed.

    Attributes:
        name: e.g. "encoder.layer.3.attention".
        weights: the silo's tensors, in model order.
        budget: number of free components.
        threshold: smallest kept distance of the last selection, 0-d tensor.
        previous: the subset before the last selection, one index tensor a weight.
    """

    name: str
    weights: list[SparseWeight]
    budget: int
    threshold: Tensor = field(default_factory=lambda: torch.zeros(()))
    previous: list[Tensor] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(weight.data.numel() for weight in self.weights)

    def free(self) -> int:
        """Number of components that differ from the seed now."""
        return sum(weight.indices.numel() for weight in self.weights)

    def churn(self) -> float:
        """Share of the current subset that was not in the one before the last step (0 for an empty subset)."""
        if not self.free():
            return 0.0
        new = sum(
            int(torch.isin(weight.indices, before.to(weight.indices.device), invert=True).sum())
            for weight, before in zip(self.weights, self.previous, strict=False)
        )
        return new / self.free()


@dataclass
class _Snapshot:
    """A weight before the step: its dense seed, and what stood at its subset."""

    seed: Tensor
    indices: Tensor
    values: Tensor


@dataclass(eq=False)
class StepInProgress:
    """What must be known to project the weights once the optimizer has stepped."""

    silos: list[Silo]
    snapshots: dict[SparseWeight, _Snapshot]
    ended: bool = False

    def undo(self) -> None:
        """Put the weights, and what is noted of them, back to what they were before the step; once."""
        if not self.ended:
            for weight, before in self.snapshots.items():
                _write(weight, before.seed, before.indices, before.values)
                weight.place(before.indices, before.seed[before.indices])
            self.end()

    def end(self) -> None:
        self.ended = True
        for weight, before in self.snapshots.items():
            outer = weight.under_way
            if outer is self:
                weight.under_way = None
            elif isinstance(outer, StepInProgress):
                # Whether the outer step is going on or has raised: what to go back to is now the state after this one.
                outer.snapshots[weight] = _Snapshot(before.seed, weight.indices, weight.values())


class Constraint:
    """Keeps at most `budget` components of each silo different from the seed, choosing them anew at every step.

    Call `before_step`, then the optimizer's step, then `after_step` with what the first returned; the optimizer itself
    never learns of the subset, so its moments are those of the dense update (Section 3 of the paper). In between, one
    dense copy of the weights of the silos concerned is held.

    Args:
        adapter: name of the adapter whose values the subset's are.
        silos: the partition of the tuned parameters with its budgets.
        distance: name of the distance to the seed.
        kinds: kind of module of each weight, by its name; for figures only.
    """

    #: Every constraint that somebody holds, copies and unpickled ones included: the optimizer hook looks them up here.
    live: ClassVar[weakref.WeakSet[Constraint]] = weakref.WeakSet()

    def __init__(self, adapter: str, silos: list[Silo], distance: str, kinds: Mapping[str, str]):
        self.adapter = adapter
        self.silos = silos
        self.kinds = dict(kinds)
        self.distance = distance
        self.steps = 0
        self.live.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.live.add(self)

    @property
    def weights(self) -> Iterable[SparseWeight]:
        return (weight for silo in self.silos for weight in silo.weights)

    @property
    def budget(self) -> int:
        """Number of free parameters, over all silos."""
        return sum(silo.budget for silo in self.silos)

    def silos_of(self, parameters: set[int]) -> list[Silo]:
        """The silos that an optimizer over the parameters of these `id`s may change."""

        def moves(parameter: torch.nn.Parameter) -> bool:
            # A parameter that was frozen after the backward pass still has a gradient, and is stepped.
            return id(parameter) in parameters and (parameter.requires_grad or parameter.grad is not None)

        return [silo for silo in self.silos if any(moves(weight.parameter) for weight in silo.weights)]

    def retire(self) -> None:
        """No longer enforce the constraint, whoever still holds it: its adapter has left the model."""
        self.live.discard(self)

    def before_step(self, silos: list[Silo]) -> StepInProgress:
        """Note Θ0 and Θt of the given silos, before the optimizer writes Θ̂ over them."""
        snapshots = {}
        for silo in silos:
            for weight in silo.weights:
                # Within another step (an optimizer that calls another, or one that raised half-way) the live weight no
                # longer tells the seed, but that step's snapshot does: the seed never changes.
                outer = weight.under_way
                seed = outer.snapshots[weight].seed if isinstance(outer, StepInProgress) else weight.seed_copy()
                snapshots[weight] = _Snapshot(seed, weight.indices, weight.values())
        step = StepInProgress(silos, snapshots)
        for weight in snapshots:
            if weight.under_way is None:
                weight.under_way = step
        return step

    def after_step(self, step: StepInProgress) -> None:
        """Project the step's silos onto the constraint: the subset keeps Θ̂, all else returns to Θ0 (Eq. 7).

        Raises:
            FloatingPointError: if an update is NaN or infinite. The weights are put back to what they were before the
                step; the optimizer's state is not ours to restore.
        """
        selections = [self._select(silo, step) for silo in step.silos]
        for silo, selection in zip(step.silos, selections, strict=True):
            _commit(silo, selection, step)
        step.end()
        self.steps += 1

    def _select(self, silo: Silo, step: StepInProgress) -> Selection:
        seeds = [step.snapshots[weight].seed for weight in silo.weights]
        try:
            return select(seeds, [weight.flat() for weight in silo.weights], silo.budget, self.distance)
        except NonFiniteDistanceError as error:
            culprit = silo.weights[error.position]
            step.undo()
            if not torch.isfinite(step.snapshots[culprit].seed).all():
                raise FloatingPointError(
                    f"{culprit.name!r} holds non-finite values before any training (a mask?), which have no distance. "
                    "Leave it out with exclude_modules. The tuned weights were put back to what they were."
                ) from error
            raise FloatingPointError(
                f"the optimizer's update of {culprit.name!r} is NaN or infinite. The weights under the constraint were "
                "put back to what they were before this step; modules_to_save and the optimizer's state were not. Lower "
                "the learning rate, clip the gradient norm, or (under fp16) let a GradScaler skip such steps; then "
                "resume from the last checkpoint."
            ) from error


def _write(weight: SparseWeight, seed: Tensor, indices: Tensor, values: Tensor) -> None:
    """Make the live weight the dense seed (n,) with values (k,) at indices (k,)."""
    weight.data.copy_(seed.view(weight.data.shape))
    scatter(weight.data, indices, values)


def _commit(silo: Silo, selection: Selection, step: StepInProgress) -> None:
    everything = silo.budget >= silo.size
    silo.previous = [weight.indices for weight in silo.weights]
    silo.threshold = selection.threshold
    for weight, indices in zip(silo.weights, selection.indices, strict=True):
        seed = step.snapshots[weight].seed
        seeds = seed[indices]
        if not everything:
            _write(weight, seed, indices, weight.flat()[indices])
        weight.place(indices, seeds)
        weight.stepped = True
