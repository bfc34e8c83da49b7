"""One adapter's constraint, and what happens around an optimizer step to keep it (Alg. 1 of the DST paper)."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from .choice import Choice
from .schedule import EVERY_STEP, Schedule
from .shards import check_held_alone, divide_again
from .step import StepInProgress
from .subset import Silo
from .weights import SparseWeight


# Where an optimizer's first parameter group concerned keeps tracked thresholds: adapter → silo → threshold. They are state
# of training, like the moments beside them, and so saved and resumed with these.
THRESHOLDS = "dst_thresholds"
# Likewise the number of steps, where the subset is not chosen at each: adapter → steps.
STEPS = "dst_steps"

Group = TypeVar("Group", bound=Mapping[str, Any])


class Constraint:
    """Keeps at most `budget` components of each silo different from the seed, choosing them anew at every step.

    Call `before_step`, then the optimizer's step, then `after_step` with what the first returned, then `end` on that; the
    optimizer itself never learns of the subset, so its moments are those of the dense update (Section 3 of the paper). It
    writes into working copies of the weights of the silos concerned. Outside the subset the live weights are the seed,
    so the copies are all that is needed, and afterwards only the subset is written.

    Args:
        adapter: name of the adapter whose values the subset's are.
        silos: the partition of the tuned parameters with its budgets.
        distance: name of the distance to the seed.
        modules: layer and kind of module of each weight, by its name.
        tracking: the (m, r) of Alg. 2, to track thresholds and keep the budgets approximately; None keeps them exactly.
        schedule: at which steps the subset is chosen.
        normalization: what distances are divided by (Appendix B of the paper): the number of components of the weight's
            module ("size"), the mean of its absolute seed values ("mean"; 1 where that is zero), those of all modules of
            its kind ("module_size", "module_mean"), or nothing (None).
        fixed: whether the subset is given and never changes. Its values are then trained as parameters of their own
            (`free`), and the weights themselves are not.

    Attributes:
        begun: whether the subset was given before training. The first step that moves anything keeps it.
        total_steps: number of steps of the whole training, where it is known.
        agreed: how often its seeds had been replaced when all processes that train together were found to train the
            same; None before.
        steps: number of the last step that has come to its end, from 1; 0 before. Where several optimizers hold the weights
            together, what all of them do is one step, which ends more than once; of a fixed subset each does one.
        number: of all constraints that were made in this process, copies included, how many were there before.
    """

    #: Every constraint that somebody holds, copies and unpickled ones included: the optimizer hook looks them up here.
    live: ClassVar[weakref.WeakSet[Constraint]] = weakref.WeakSet()
    _numbers: ClassVar[Iterator[int]] = itertools.count()

    def __init__(
        self,
        adapter: str,
        silos: list[Silo],
        distance: str,
        modules: Mapping[str, tuple[str, str]],
        tracking: tuple[int, float] | None = None,
        schedule: Schedule = EVERY_STEP,
        normalization: str | None = None,
        fixed: bool = False,
    ):
        self.adapter = adapter
        self.tracking = tracking
        self.silos = silos
        self.modules = dict(modules)
        self.distance = distance
        self.schedule = schedule
        self.normalization = normalization
        self.fixed = fixed
        self.steps = 0
        self.begun = False
        self._moved = False
        # The step in which the subset given before training was kept, once it has moved.
        self._kept: int | None = None
        # The number of steps before the one to be made, and the weights in the optimizers of the last step made.
        self._before = 0
        self._latest: set[SparseWeight] = set()
        self.total_steps: int | None = None
        self.agreed: int | None = None
        # What optimizers' groups hold by adapters' names, wherever there is something of this one.
        self._notes: list[dict[str, Any]] = []
        self._enlist()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._enlist()

    def _enlist(self) -> None:
        self.number = next(self._numbers)
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
        """No longer enforce the constraint, whoever still holds it: its adapter has left the model. What stands of it in
        optimizers' groups goes too, lest another adapter of its name take that up.
        """
        self.live.discard(self)
        for notes in self._notes:
            notes.pop(self.adapter, None)
        self._notes.clear()

    def recall(self, param_groups: Iterable[Mapping[str, Any]]) -> None:
        """Take up what an optimizer's groups hold of this constraint, which comes with its saved state.

        Weights that are held by several optimizers make one step when all of these have: each has its own count. One that
        has none yet is in its first step with others that hold other weights, or goes on where another one ended.
        """
        groups = _holding(self, param_groups)
        if self.tracking:
            thresholds = groups[0][0].get(THRESHOLDS, {}).get(self.adapter, {})
            for silo in self.silos:
                silo.tracked = thresholds.get(silo.name, silo.tracked)
        joins = bool(self._latest) and all(self._latest.isdisjoint(held) for _, held in groups)
        self._before = self.steps - joins
        # What a step that was undone has moved counts for nothing.
        self._moved = False
        if not self.schedule.every_step:
            self._before = groups[0][0].get(STEPS, {}).get(self.adapter, self._before)

    def chooses(self, empty: bool) -> bool:
        """Whether a silo's subset is chosen anew at the step now to be made.

        Args:
            empty: whether nothing is in it: nothing has moved yet (as under a learning rate of 0 at first).
        """
        step = self._before + 1
        scheduled = self.schedule.chooses(step, self.total_steps)
        return empty or (scheduled and not self.begun and step != self._kept)

    def note_moved(self, moved: bool) -> None:
        """Take note whether a step has moved any value of a subset that it kept."""
        self._moved = self._moved or moved

    def complete(self, param_groups: Iterable[dict[str, Any]]) -> None:
        """Count a step that has come to its end, and leave what is to be recalled in the optimizer's groups."""
        groups = _holding(self, param_groups)
        if self._before >= self.steps:
            self._latest = set()
        self._latest.update(*(held for _, held in groups))
        self.steps = self._before + 1
        if self.begun and self._moved:
            self.begun, self._kept = False, self.steps
        if self.tracking:
            for silo in self.silos:
                silo.tracked = float(silo.threshold)
            self._note(groups[0][0], THRESHOLDS, {silo.name: silo.tracked for silo in self.silos})
        if not self.schedule.every_step:
            self._note(groups[0][0], STEPS, self.steps)

    def _note(self, group: dict[str, Any], what: str, value: object) -> None:
        """Leave something in an optimizer's group, to be recalled and saved."""
        notes = group.setdefault(what, {})
        notes[self.adapter] = value
        if all(notes is not known for known in self._notes):
            self._notes.append(notes)

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

        Then `step.end()` makes it last; until then `step.undo()` puts the weights back to what they were before. The
        optimizer's state is not ours to restore.

        Raises:
            FloatingPointError: if an update is NaN or infinite.
        """
        updates = step.take_back()
        before = {silo: [step.before[weight] for weight in silo.weights] for silo in step.silos}
        choice = Choice(self)
        for silo in step.silos:
            choice.take(silo, [updates[weight] for weight in silo.weights], before[silo])
        choice.finish()

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


def _holding(constraint: Constraint, param_groups: Iterable[Group]) -> list[tuple[Group, set[SparseWeight]]]:
    """Those of an optimizer's groups that hold any of a constraint's weights, with these. Notes are in the first one."""
    own = {id(weight.parameter): weight for weight in constraint.weights}
    found = [(group, {own[id(p)] for p in group["params"] if id(p) in own}) for group in param_groups]
    return [(group, held) for group, held in found if held]


def _check_told_apart(constraints: Iterable[Constraint], param_groups: Iterable[Mapping[str, Any]]) -> None:
    """Check that no group of an optimizer is to hold notes on two constraints of one name."""
    places: dict[tuple[int, str, str], Constraint] = {}
    for constraint in constraints:
        kept = {THRESHOLDS: bool(constraint.tracking), STEPS: not constraint.schedule.every_step}
        groups = _holding(constraint, param_groups) if any(kept.values()) else []
        for what in (what for what, is_kept in kept.items() if is_kept and groups):
            if places.setdefault((id(groups[0][0]), what, constraint.adapter), constraint) is not constraint:
                raise ValueError(
                    f"two models with an adapter {constraint.adapter!r} are in one parameter group of an optimizer, which "
                    "keeps the thresholds (threshold='iterative') or the number of steps (churn_interval, churn_stop, "
                    "selection='first_step') of one only. Give each model a parameter group of its own, or its adapter "
                    "another name."
                )


def concerned(param_groups: Iterable[Mapping[str, Any]]) -> list[tuple[Constraint, list[Silo]]]:
    """The live constraints that choose their subset, in the order in which they were made, with those of their silos that a
    step with these groups would change.

    Raises:
        RuntimeError: if a weight is in no state to be stepped: its adapter is disabled, or not the only active one; or if
            the schedule needs the length of training, which nobody has told.
        NotImplementedError: if a silo spans several devices, or its threshold is tracked and processes hold it together.
        ValueError: if what is to be kept in a group could not be told from what is kept there of another constraint.
    """
    parameters = {id(parameter) for group in param_groups for parameter in group["params"]}
    # What a forward pass without gradients has left gathered is not what optimizers hold. Within a backward pass, where
    # gradients are released, what is gathered is needed.
    if torch._C._current_graph_task_id() == -1:
        divide_again({w.module for constraint in Constraint.live for w in constraint.weights if w.is_managed})
    # The set's own order is that of addresses, and processes that choose together are to come to each at the same time.
    ordered = sorted(Constraint.live, key=lambda constraint: constraint.number)
    found = [(c, silos) for c in ordered if not c.fixed and (silos := _to_step(c, parameters))]
    if found:
        _check_told_apart(ordered, param_groups)
    for constraint, _ in found:
        # Whether that is known is told before anything has moved.
        constraint.chooses(empty=False)
    return found


def check_moment(found: Iterable[tuple[Constraint, list[Silo]]], param_groups: Iterable[Mapping[str, Any]]) -> None:
    """Check that a step within a backward pass changes no weight whose gradient may be still to come.

    Args:
        found: what `concerned` found for the optimizer's groups.
        param_groups: the groups.

    Raises:
        NotImplementedError: if it might: a silo has trainable tensors that are not the optimizer's.
    """
    if torch._C._current_graph_task_id() == -1:
        return
    parameters = {id(parameter) for group in param_groups for parameter in group["params"]}
    for silo in (silo for _, silos in found for silo in silos):
        others = (w for w in silo.weights if w.parameter.requires_grad and id(w.parameter) not in parameters)
        if (weight := next(others, None)) is not None:
            raise NotImplementedError(
                f"an optimizer is stepping within the backward pass, but the silo {silo.name!r} has other tensors to "
                f"train, such as {weight.name!r}, which that step would change before their gradients are there. Make one "
                "DSTOptimizer(..., release_gradients=True) of all parameters, which steps each silo when its last "
                "gradient has come, or give each tensor a silo of its own (siloing='parameter')."
            )


def _to_step(constraint: Constraint, parameters: set[int]) -> list[Silo]:
    silos = constraint.silos_of(parameters)
    for silo in silos:
        devices = {str(weight.data.device) for weight in silo.weights}
        for weight in silo.weights:
            if constraint.adapter not in weight.adapters and not weight.disabled:
                _check_at_rest(constraint, parameters)
                return []
            check_steppable(weight, weight.parameter.grad)
            # Where it had no memory when the adapter was added.
            weight.seed_checksum.watch()
        if constraint.tracking:
            check_held_alone(
                (weight.parameter for weight in silo.weights), "threshold='iterative'", "Use threshold='exact'."
            )
        if len(devices) > 1:
            raise NotImplementedError(
                f"the silo {silo.name!r} spans the devices {', '.join(sorted(devices))}; what competes must be on one. "
                "Train with siloing='module_and_layer' or 'parameter', or a silo_pattern by which no silo spans several."
            )
    return [silo for silo in silos if not any(weight.disabled for weight in silo.weights)]


def _check_at_rest(constraint: Constraint, parameters: set[int]) -> None:
    """Check that an optimizer over these does not step weights in which no adapter is: the seed itself would move."""
    for weight in constraint.weights:
        if id(weight.parameter) in parameters and not weight.adapters and weight.parameter.grad is not None:
            raise RuntimeError(
                f"an optimizer is stepping {weight.name!r}, whose adapter {constraint.adapter!r} is not active: the step "
                "would change the seed itself. Step one adapter at a time, while it is active, and call zero_grad() before "
                "switching."
            )


def check_steppable(weight: SparseWeight, gradient: Tensor | None) -> None:
    """Check that an optimizer may step a weight.

    Raises:
        RuntimeError: if its adapter is disabled, or not the only active one, or it was resized or has no memory.
    """
    weight.check_memory()
    weight.seed_checksum.check_shape()
    if weight.disabled and gradient is not None:
        raise RuntimeError(
            f"an optimizer is stepping {weight.name!r} while its adapter is disabled (or shows rescaled): the step would "
            "change the seed itself. Leave `disable_adapter()` or `rescale_adapter_scale` (or enable the adapters) before "
            "optimizer.step()."
        )
    if len(weight.adapters) > 1:
        raise RuntimeError(
            f"an optimizer is stepping {weight.name!r} while the adapters {', '.join(weight.adapters)} are all "
            "active: a change could not be attributed to one of them. Activate the one to train, with "
            "set_adapter(name)."
        )
