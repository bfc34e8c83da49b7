"""The optimizer hook: enforces every live constraint around the step of any `torch.optim` optimizer.

torch calls two global hooks around each real optimizer step, whoever drives the loop: a plain loop, Accelerate (after
accumulation and clipping), transformers' Trainer. So nothing has to be wrapped, subclassed or passed as a callback; an
optimizer that holds no parameter of a constraint is not touched.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .constraint import Constraint, check_moment, concerned
from .free import FixedStep
from .step import StepInProgress
from .tiled_step import TiledStep
from .wrappers import check_wrappers
from .wrappers import install as watch_wrappers


# Steps under way, by optimizer. An optimizer that calls another one's step (Lookahead) has the constraint enforced after
# both, one that calls the step of its own superclass after its own; a step that raised leaves its entry, which the next one
# undoes.
_under_way: weakref.WeakKeyDictionary[Optimizer, list[tuple[Constraint, StepInProgress]]] = weakref.WeakKeyDictionary()
_fixed: weakref.WeakKeyDictionary[Optimizer, FixedStep] = weakref.WeakKeyDictionary()
_tiled: weakref.WeakKeyDictionary[Optimizer, TiledStep] = weakref.WeakKeyDictionary()
# Optimizers that keep the constraint by themselves.
_exempt: weakref.WeakSet[Optimizer] = weakref.WeakSet()
# Optimizers whose states are saved and loaded with all of their parameters, also after a step that raised.
_whole_states: weakref.WeakSet[Optimizer] = weakref.WeakSet()
_installed = False


def exempt(optimizer: Optimizer) -> None:
    """Leave an optimizer alone, which keeps the constraint by itself."""
    _exempt.add(optimizer)


def install() -> None:
    """Enforce every live constraint from now on. Calling it again changes nothing."""
    global _installed
    if not _installed:
        register_optimizer_step_pre_hook(_before_step)
        register_optimizer_step_post_hook(_after_step)
        watch_wrappers()
        _installed = True


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if _is_inherited(optimizer):
        return
    _undo(_under_way.pop(optimizer, []))
    _give_back(optimizer)
    _tiled.pop(optimizer, None)
    _fixed.pop(optimizer, None)
    check_wrappers(optimizer)
    if optimizer in _exempt or _is_skipped(optimizer):
        return
    fixed = _fixed[optimizer] = FixedStep(optimizer)
    tiled = _tiled[optimizer] = TiledStep(optimizer, (*args[1:], *kwargs.values()))
    steps: list[tuple[Constraint, StepInProgress]] = []
    try:
        found = concerned(optimizer.param_groups)
        check_moment(found, optimizer.param_groups)
        for constraint, silos in found:
            if all(weight.under_way is None for silo in silos for weight in silo.weights):
                constraint.recall(optimizer.param_groups)
            steps.append((constraint, constraint.before_step(tiled.take(constraint, silos))))
        tiled.begin()
    except BaseException:
        _undo(steps)
        _give_back(optimizer)
        raise
    if (fixed.hidden or tiled.hidden) and optimizer not in _whole_states:
        _whole_states.add(optimizer)
        optimizer.register_state_dict_pre_hook(_give_back)
        optimizer.register_load_state_dict_pre_hook(_give_back)
    if steps:
        _under_way[optimizer] = steps


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if _is_inherited(optimizer):
        return
    steps = _under_way.pop(optimizer, [])
    _give_back(optimizer)
    fixed, tiled = _fixed.pop(optimizer, None), _tiled.pop(optimizer, None)
    try:
        for constraint, step in steps:
            constraint.after_step(step)
        if tiled is not None:
            tiled.end()
        if fixed is not None:
            fixed.end()
    except BaseException:
        # An update that is not finite, memory that ran out, Ctrl-C: no weight keeps an update that was not projected, nor
        # one beside others that are undone.
        _undo(steps)
        if tiled is not None:
            tiled.undo()
        if fixed is not None:
            fixed.undo()
        raise
    for constraint, step in steps:
        step.end()
        if step.is_outermost:
            constraint.complete(optimizer.param_groups)


def _is_inherited(optimizer: Optimizer) -> bool:
    """Whether the step that calls a hook is within another one of the same optimizer, which calls them too.

    torch hooks the `step` of every class that an optimizer is made of, and a subclass may call the one that it inherits. A
    count of those begun would not tell this from a step that has raised, of which nobody is told: so it is looked up
    in the stack whether the other one is still there.
    """
    hooked = sys._getframe(2)
    frame = hooked.f_back
    while frame is not None:
        if frame.f_code is hooked.f_code and frame.f_locals.get("self") is optimizer:
            return True
        frame = frame.f_back
    return False


def _give_back(optimizer: Optimizer, *unused: Any) -> None:
    """Give an optimizer all of its parameters back, those that were hidden last first."""
    for step in (_tiled.get(optimizer), _fixed.get(optimizer)):
        if step is not None:
            step.restore()


def _is_skipped(optimizer: Optimizer) -> bool:
    """Whether a GradScaler found infinite gradients and leaves it to the optimizer (a fused one) to change nothing.

    Other optimizers' steps it does not call at all. Neither is a step: nothing is chosen or counted.
    """
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _undo(steps: Iterable[tuple[Constraint, StepInProgress]]) -> None:
    for _, step in steps:
        step.undo()
