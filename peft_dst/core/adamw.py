"""What the fused AdamW steps (`kernels`, `adamw_tiles`) have in common: which silos they can step, and with what state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .constraint import Constraint
from .kernels import supports_group
from .subset import Silo


Groups = Mapping[nn.Parameter, Mapping[str, Any]]
State = MutableMapping[Any, dict[str, Any]]

MOMENTS = ("exp_avg", "exp_avg_sq")


def supports(
    engine: Optimizer, groups: Groups, state: State, constraint: Constraint, silo: Silo, suit: Callable[..., bool]
) -> bool:
    """Whether an optimizer's step of one silo and the exact selection after it can be made at once. If so, it is prepared.

    Args:
        engine: the optimizer.
        groups: the parameter group of each of its parameters.
        state: the state of those that have been stepped before; that of the others in the silo is begun if they can.
        constraint: the constraint.
        silo: one of its silos.
        suit: whether a weight, its gradient and its moments, if there are any yet, are what the step works on.
    """
    if constraint.tracking or constraint.normalization or silo.budget >= silo.size:
        return False
    if any(weight.is_divided for weight in silo.weights):
        return False
    if not constraint.chooses(not silo.free()):
        return False
    for weight in silo.weights:
        parameter = weight.parameter
        if parameter not in groups or parameter.grad is None or not supports_group(engine, groups[parameter]):
            return False
        own = state.get(parameter, {})
        moments = [own[name] for name in MOMENTS] if "step" in own else []
        if not suit(weight.data, parameter.grad, *moments):
            return False
    # Not before all of them suit: working copies of the silo may be float64, and so would be their moments.
    for weight in silo.weights:
        start_state(weight.parameter, groups[weight.parameter], state)
    return True


def start_state(parameter: nn.Parameter, group: Mapping[str, Any], state: State) -> None:
    """Give a parameter the state that torch's AdamW begins with, in float32, if it has none yet."""
    if "step" not in state[parameter]:
        device = parameter.device if group.get("fused") else "cpu"
        state[parameter]["step"] = torch.zeros((), dtype=torch.float32, device=device)
        for name in MOMENTS:
            state[parameter][name] = torch.zeros_like(
                parameter, dtype=torch.float32, memory_format=torch.preserve_format
            )
