"""What is found on a model that has DST's adapters: their constraints, and the processes that hold its weights together."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn

from ..core import Constraint
from ..core.shards import Together, together
from .layer import CONSTRAINTS, markers


def constraints(model: nn.Module) -> dict[str, Constraint]:
    """The constraints of a model's adapters, by name, whether it is a PeftModel, wrapped otherwise, or injected into."""
    for module in model.modules():
        if CONSTRAINTS in module.__dict__:
            return module.__dict__[CONSTRAINTS]
    return {}


def active_constraints(model: nn.Module) -> list[Constraint]:
    """The constraints of a model's active adapters."""
    found = constraints(model).values()
    return [c for c in found if any(c.adapter in weight.adapters for weight in c.weights)]


def set_training_steps(model: nn.Module, steps: int) -> None:
    """Say how many optimizer steps the whole training has, for a `churn_stop` that is a fraction of it.

    DSTCallback does this under Trainer.

    Args:
        model: a model with DST adapters, of which all are told.
        steps: the number.
    """
    if type(steps) is not int or steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps!r}.")
    for constraint in constraints(model).values():
        constraint.total_steps = steps


def processes_of(model: nn.Module) -> Together | None:
    """The processes that hold a model's tuned weights together; None if this one does alone."""
    return together(
        weight.box for _, marker in markers(model) for weight in marker.weights.values() if weight.is_divided
    )


def in_all_processes(model: nn.Module, what: str) -> AbstractContextManager[None]:
    """Where several processes hold a model's tuned weights together: do something in all of them, or in none."""
    processes = processes_of(model)
    return nullcontext() if processes is None else processes.all_or_none(what)
