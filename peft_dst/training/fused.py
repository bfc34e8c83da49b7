"""Between DSTOptimizer and the fused AdamW kernels: which silos they can step, and the state that goes in and out."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core import Constraint, Silo, SparseWeight
from ..core.kernels import (
    AdamWScalars,
    AdamWTensor,
    NonFiniteStepError,
    SiloStep,
    adamw_scalars,
    adamw_step,
    failure,
    supports_group,
    supports_tensors,
)


Groups = Mapping[nn.Parameter, Mapping[str, Any]]
State = MutableMapping[Any, dict[str, Any]]

MOMENTS = ("exp_avg", "exp_avg_sq")
# Where the kernels are used unasked.
BY_DEFAULT = "cuda"


def wanted(kernels: bool | None, device: torch.device) -> bool:
    """Whether the kernels are to step what is on a device, wherever they can.

    Args:
        kernels: what `DSTOptimizer` was told.
        device: the device. The first time that it is met, a kernel is tried there.

    Raises:
        RuntimeError: if they were asked for and cannot be compiled.
    """
    if not (device.type == BY_DEFAULT if kernels is None else kernels):
        return False
    error = failure(device)
    if error is not None and kernels:
        raise RuntimeError(_remedy(device, error)) from error
    if error is not None:
        warn_once(device, error)
    return error is None


@functools.cache
def warn_once(device: torch.device, error: Exception) -> None:
    warnings.warn(f"{_remedy(device, error)} Until then steps go that way.", RuntimeWarning, stacklevel=2)


def _remedy(device: torch.device, error: Exception) -> str:
    return (
        f"Triton cannot compile a kernel for {device}: {str(error).rstrip('.')}. It needs a C compiler (gcc or clang, or "
        "what CC names) and Python's headers, which slim images lack. Install them, or make the DSTOptimizer with "
        "kernels=False, which steps on working copies."
    )


def supports(engine: Optimizer, groups: Groups, state: State, constraint: Constraint, silo: Silo) -> bool:
    """Whether the kernels can make an optimizer's step of one silo and the exact selection after it. If so, it is prepared.

    Args:
        engine: the optimizer.
        groups: the parameter group of each of its parameters.
        state: the state of those that have been stepped before; that of the others in the silo is begun if they can.
        constraint: the constraint.
        silo: one of its silos.
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
        if not supports_tensors(weight.data, parameter.grad, *moments):
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


def step(
    groups: Groups,
    state: State,
    constraint: Constraint,
    silos: list[Silo],
    values: Mapping[SparseWeight, Tensor],
    note: Callable[[list[SiloStep]], None],
) -> None:
    """Step some silos, all of them supported.

    Args:
        groups: the parameter group of each parameter.
        state: the state of each, which is updated.
        constraint: the constraint.
        silos: some of its silos.
        values: the float32 values (k,) of each weight's current subset.
        note: takes note of their new subsets, right before these are written (`adamw_step`).

    Raises:
        FloatingPointError: if an update is NaN or infinite. The live weights are then as before, the state is not.
    """
    weights = [weight for silo in silos for weight in silo.weights]
    counters = [state[weight.parameter]["step"] for weight in weights]
    # On the host the counters cost nothing to read; where an optimizer keeps them on the device, one wait reads them all.
    one_place = len({counter.device for counter in counters}) == 1
    counts = iter(torch.stack(counters).tolist() if one_place else [float(counter) for counter in counters])
    # Of each group's tensors they are the same, unless some of them began later.
    scalars: dict[tuple[int, float], AdamWScalars] = {}
    batch: list[list[AdamWTensor]] = []
    for silo in silos:
        batch.append([])
        for weight in silo.weights:
            group, count = groups[weight.parameter], next(counts) + 1
            own = scalars.get((id(group), count))
            if own is None:
                own = adamw_scalars(group["lr"], group["betas"], group["eps"], group["weight_decay"], count)
                scalars[id(group), count] = own
            batch[-1].append(_tensor(weight, own, state[weight.parameter], values[weight]))
    torch._foreach_add_(counters, 1)
    try:
        adamw_step(batch, [silo.budget for silo in silos], constraint.distance, note)
    except NonFiniteStepError as error:
        raise constraint.non_finite(silos[error.silo], error.position) from error


def _tensor(weight: SparseWeight, scalars: AdamWScalars, state: Mapping[str, Any], values: Tensor) -> AdamWTensor:
    gradient = weight.parameter.grad
    assert gradient is not None
    first, second = (state[name] for name in MOMENTS)
    return AdamWTensor(weight.data, gradient, first, second, scalars, weight.indices, weight.seeds, values)
