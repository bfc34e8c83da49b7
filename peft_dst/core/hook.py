"""The optimizer hook: enforces every live constraint around the step of any `torch.optim` optimizer.

torch calls two global hooks around each real optimizer step, whoever drives the loop: a plain loop, Accelerate (after
accumulation and clipping), transformers' Trainer. So nothing has to be wrapped, subclassed or passed as a callback; an
optimizer that holds no parameter of a constraint is not touched.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .constraint import Constraint, Silo, StepInProgress


# Steps under way, by optimizer. An optimizer that calls another one's step (Lookahead) has the constraint enforced after
# both; a step that raised leaves its entry, which the next one undoes.
_under_way: weakref.WeakKeyDictionary[Optimizer, list[tuple[Constraint, StepInProgress]]] = weakref.WeakKeyDictionary()
_installed = False


def install() -> None:
    """Enforce every live constraint from now on. Calling it again changes nothing."""
    global _installed
    if not _installed:
        register_optimizer_step_pre_hook(_before_step)
        register_optimizer_step_post_hook(_after_step)
        _installed = True


def _concerned(constraint: Constraint, parameters: set[int]) -> list[Silo]:
    """The silos that a step over these parameters would change, checked to be in a state to be stepped."""
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


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for _, step in _under_way.pop(optimizer, []):
        step.undo()
    parameters = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    concerned = [(c, silos) for c in list(Constraint.live) if (silos := _concerned(c, parameters))]
    if concerned:
        _under_way[optimizer] = [(constraint, constraint.before_step(silos)) for constraint, silos in concerned]


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    steps = _under_way.pop(optimizer, [])
    try:
        for constraint, step in steps:
            constraint.after_step(step)
    except BaseException:
        # An update that is not finite, memory that ran out, Ctrl-C: no weight keeps an update that was not projected.
        for _, step in steps:
            step.undo()
        raise
