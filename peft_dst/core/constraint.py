"""One adapter's constraint, and what happens around an optimizer step to keep it (Alg. 1 of the DST paper)."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .iterative import select_iteratively
from .selection import Selection, select
from .step import StepInProgress
from .subset import Silo
from .tiles import NonFiniteDistanceError
from .weights import SparseWeight


# Where an optimizer's first parameter group concerned keeps tracked thresholds: adapter → silo → threshold. They are state
# of training, like the moments beside them, and so saved and resumed with these.
THRESHOLDS = "dst_thresholds"


class Constraint:
    """Keeps at most `budget` components of each silo different from the seed, choosing them anew at every step.

    Call `before_step`, then the optimizer's step, then `after_step` with what the first returned; the optimizer itself
    never learns of the subset, so its moments are those of the dense update (Section 3 of the paper). In between it
    writes into working copies of the weights of the silos concerned. Outside the subset the live weights are the seed,
    so the copies are all that is needed, and afterwards only the subset is written.

    Args:
        adapter: name of the adapter whose values the subset's are.
        silos: the partition of the tuned parameters with its budgets.
        distance: name of the distance to the seed.
        kinds: kind of module of each weight, by its name; for figures only.
        tracking: the (m, r) of Alg. 2, to track thresholds and keep the budgets approximately; None keeps them exactly.
    """

    #: Every constraint that somebody holds, copies and unpickled ones included: the optimizer hook looks them up here.
    live: ClassVar[weakref.WeakSet[Constraint]] = weakref.WeakSet()

    def __init__(
        self,
        adapter: str,
        silos: list[Silo],
        distance: str,
        kinds: Mapping[str, str],
        tracking: tuple[int, float] | None = None,
    ):
        self.adapter = adapter
        self.tracking = tracking
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

    def recall(self, param_groups: Iterable[Mapping[str, Any]]) -> None:
        """Take up the tracked thresholds that an optimizer's groups hold, which come with its saved state."""
        if self.tracking:
            for thresholds in (
                group[THRESHOLDS].get(self.adapter, {}) for group in param_groups if THRESHOLDS in group
            ):
                for silo in self.silos:
                    silo.tracked = thresholds.get(silo.name, silo.tracked)

    def complete(self, param_groups: Iterable[dict[str, Any]]) -> None:
        """Count a step that has come to its end, and leave its thresholds in the groups of the optimizer that made it."""
        self.steps += 1
        if self.tracking:
            for silo in self.silos:
                silo.tracked = float(silo.threshold)
            own = {id(weight.parameter) for weight in self.weights}
            group = next(g for g in param_groups if any(id(parameter) in own for parameter in g["params"]))
            group.setdefault(THRESHOLDS, {})[self.adapter] = {silo.name: silo.tracked for silo in self.silos}

    def before_step(self, silos: list[Silo]) -> StepInProgress:
        """Lend the optimizer working copies of the given silos' weights, for it to write Θ̂ into."""
        step = StepInProgress(silos)
        try:
            step.begin()
        except BaseException:
            step.undo()
            raise
        return step

    def after_step(self, step: StepInProgress) -> None:
        """Project the step's silos onto the constraint: the subset takes Θ̂, all else stays at Θ0 (Eq. 7).

        Raises:
            FloatingPointError: if an update is NaN or infinite; `step.undo()` then puts the weights back to what they
                were before the step. The optimizer's state is not ours to restore.
        """
        updates = step.take_back()
        selections = [self.select(silo, [updates[weight] for weight in silo.weights]) for silo in step.silos]
        for silo, selection in zip(step.silos, selections, strict=True):
            before = [step.before[weight] for weight in silo.weights]
            silo.take(selection, [updates[weight] for weight in silo.weights], before)
        step.end(updates)

    def select(self, silo: Silo, updates: list[Tensor]) -> Selection:
        """The subset of a silo whose live weights are the seed now.

        Args:
            silo: the silo.
            updates: Θ̂ of its weights, in their shapes; float32 for bfloat16 and float16 weights is welcome.

        Raises:
            FloatingPointError: if an update is NaN or infinite.
        """
        try:
            seeds, flat = [weight.flat() for weight in silo.weights], [updated.reshape(-1) for updated in updates]
            if self.tracking:
                return select_iteratively(seeds, flat, silo.budget, self.distance, silo.tracked, *self.tracking)
            return select(seeds, flat, silo.budget, self.distance)
        except NonFiniteDistanceError as error:
            raise self.non_finite(silo, error.position) from error

    def non_finite(self, silo: Silo, position: int) -> FloatingPointError:
        """What to say of a distance that is NaN or infinite, in the weight at a position of a silo."""
        culprit = silo.weights[position]
        if not torch.isfinite(culprit.data).all():
            return FloatingPointError(
                f"{culprit.name!r} holds non-finite values before any training (a mask?), which have no distance. "
                "Leave it out with exclude_modules. The tuned weights were put back to what they were."
            )
        return FloatingPointError(
            f"the optimizer's update of {culprit.name!r} is NaN or infinite. The weights under the constraint were "
            "put back to what they were before this step; modules_to_save and the optimizer's state were not. Lower "
            "the learning rate, clip the gradient norm, or (under fp16) let a GradScaler skip such steps; then "
            "resume from the last checkpoint."
        )


def concerned(param_groups: Iterable[Mapping[str, Any]]) -> list[tuple[Constraint, list[Silo]]]:
    """The live constraints, with those of their silos that a step of an optimizer with these groups would change.

    Raises:
        RuntimeError: if a weight is in no state to be stepped: its adapter is disabled, or not the only active one.
        NotImplementedError: if a weight is sharded.
    """
    parameters = {id(parameter) for group in param_groups for parameter in group["params"]}
    found = [(constraint, _to_step(constraint, parameters)) for constraint in list(Constraint.live)]
    return [(constraint, silos) for constraint, silos in found if silos]


def _to_step(constraint: Constraint, parameters: set[int]) -> list[Silo]:
    silos = constraint.silos_of(parameters)
    for silo in silos:
        for weight in silo.weights:
            if constraint.adapter not in weight.adapters and not weight.disabled:
                return []
            if weight.disabled and weight.parameter.grad is not None:
                raise RuntimeError(
                    f"an optimizer is stepping {weight.name!r} while its adapter is disabled: the step would change the "
                    "seed itself. Leave `disable_adapter()` (or enable the adapters) before optimizer.step()."
                )
            if len(weight.adapters) > 1:
                raise RuntimeError(
                    f"an optimizer is stepping {weight.name!r} while the adapters {', '.join(weight.adapters)} are all "
                    "active: a change could not be attributed to one of them. Activate the one to train, with "
                    "set_adapter(name)."
                )
            if isinstance(weight.data, DTensor):
                raise NotImplementedError(
                    f"{weight.name!r} is sharded (DTensor), and selection across shards is not supported yet. Train "
                    "with data parallelism (DDP) or on one device."
                )
    return [silo for silo in silos if not any(weight.disabled for weight in silo.weights)]
