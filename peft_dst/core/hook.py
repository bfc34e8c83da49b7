"""The optimizer hook: enforces every live constraint around the step of any `torch.optim` optimizer.

torch calls two global hooks around each real optimizer step, whoever drives the loop: a plain loop, Accelerate (after
accumulation and clipping), transformers' Trainer. So nothing has to be wrapped, subclassed or passed as a callback; an
optimizer that holds no parameter of a constraint is not touched.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .ahead import StepAhead, can_go_ahead
from .constraint import Constraint, concerned
from .step import StepInProgress


@dataclass
class _UnderWay:
    """What the hook does around one optimizer step.

    Attributes:
        lent: constraints with steps into working copies.
        ahead: constraints with silos that were stepped before the optimizer, and hidden from it.
    """

    lent: list[tuple[Constraint, StepInProgress]] = field(default_factory=list)
    ahead: list[tuple[Constraint, StepAhead]] = field(default_factory=list)

    def undo(self) -> None:
        for _, step in self.lent:
            step.undo()
        for _, ahead in self.ahead:
            ahead.undo()


# Steps under way, by optimizer. An optimizer that calls another one's step (Lookahead) has the constraint enforced after
# both; a step that raised leaves its entry, and the next one undoes what went into working copies.
_under_way: weakref.WeakKeyDictionary[Optimizer, _UnderWay] = weakref.WeakKeyDictionary()
# Optimizers that keep the constraint by themselves.
_exempt: weakref.WeakSet[Optimizer] = weakref.WeakSet()
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
        _installed = True


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for _, step in _under_way.pop(optimizer, _UnderWay()).lent:
        step.undo()
    if optimizer in _exempt:
        return
    found = concerned(optimizer.param_groups)
    if not found:
        return
    now = _UnderWay()
    may_go_ahead = can_go_ahead(optimizer, args, kwargs)
    try:
        for constraint, silos in found:
            constraint.recall(optimizer.param_groups)
            if may_go_ahead:
                ahead = StepAhead(optimizer, constraint, silos)
                now.ahead.append((constraint, ahead))
                silos = ahead.begin()
            now.lent.append((constraint, constraint.before_step(silos)))
    except BaseException:
        now.undo()
        raise
    _under_way[optimizer] = now


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    now = _under_way.pop(optimizer, _UnderWay())
    try:
        for constraint, step in now.lent:
            constraint.after_step(step)
        for _, ahead in now.ahead:
            ahead.end()
        for constraint, _ in now.lent:
            constraint.complete(optimizer.param_groups)
    except BaseException:
        # An update that is not finite, memory that ran out, Ctrl-C: no weight keeps an update that was not projected.
        now.undo()
        raise
