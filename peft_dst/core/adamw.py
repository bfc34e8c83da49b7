"""What the fused AdamW steps (`kernels`, `adamw_tiles`) have in common: for which silos they are, and on what."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .constraint import Constraint
from .subset import Silo
from .tiles import NonFiniteDistanceError
from .weights import SparseWeight


Groups = Mapping[nn.Parameter, Mapping[str, Any]]
State = MutableMapping[Any, dict[str, Any]]
Made = TypeVar("Made")

MOMENTS = ("exp_avg", "exp_avg_sq")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class AdamWOptions(NamedTuple):
    """Options of a parameter group, and the number of the step, counted from 1."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: float


class AdamWScalars(NamedTuple):
    """What AdamW multiplies and divides by in one step of one parameter group, each rounded to float32 where it is used.

    Attributes:
        decay: 1 - lr · weight_decay.
        lerp: weight of the gradient in the first moment, 1 - β1; where that is 0.5 or more it is less 1, and the result is
            counted from the gradient (as torch's lerp does).
        beta2: β2.
        weight2: 1 - β2.
        correction: √(1 - β2^step).
        eps: ε of AdamW.
        step: -lr / (1 - β1^step).
    """

    decay: float
    lerp: float
    beta2: float
    weight2: float
    correction: float
    eps: float
    step: float


# Of a group's tensors they are the same, unless some of them began later.
@functools.lru_cache
def adamw_scalars(options: AdamWOptions) -> AdamWScalars:
    """The factors of a step, in Python floats as `torch.optim` computes them."""
    lr, beta1, beta2, eps, weight_decay, step = options
    # torch takes the complement of a weight that is already rounded.
    weight = float(torch.tensor(1 - beta1, dtype=torch.float32, device="cpu"))
    return AdamWScalars(
        decay=1 - lr * weight_decay,
        lerp=weight if weight < 0.5 else weight - 1,
        beta2=beta2,
        weight2=1 - beta2,
        correction=(1 - beta2**step) ** 0.5,
        eps=eps,
        step=-lr / (1 - beta1**step),
    )


@dataclass(frozen=True)
class AdamWTensor:
    """One tensor of a silo before the step. All tensors are contiguous and on one device; no seed is needed but these.

    Attributes:
        weight: live weight Θt, any shape, float32, bfloat16 or float16.
        grad: its gradient, same shape, any of these dtypes.
        exp_avg, exp_avg_sq: first and second moment, same shape, float32; updated in place.
        options: for the step now to be made.
        indices: flat positions of the current subset, int64 (k,), sorted.
        seeds: seed values there, (k,) in the weight's dtype.
        values: exact values there, float32 (k,), of which the live weight is the rounding.
        bound: no |θ0| is larger; of use on the CPU alone.
    """

    weight: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    options: AdamWOptions
    indices: Tensor
    seeds: Tensor
    values: Tensor
    bound: float = math.inf


class NonFiniteStepError(NonFiniteDistanceError):
    """As its parent; `silo` is the index, among the silos of the call, of the one concerned."""

    def __init__(self, silo: int, position: int):
        super().__init__(position)
        self.silo = silo


def supports(engine: Optimizer, groups: Groups, state: State, constraint: Constraint, silo: Silo) -> bool:
    """Whether an optimizer's step of one silo and the exact selection after it can be made at once. If so, it is prepared.

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


def supports_group(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether the fused steps are the step of this optimizer for one of its parameter groups.

    They are for AdamW, and for Adam without weight decay; a subclass may do anything, so none is taken. Neither amsgrad,
    maximize, differentiable and capturable, nor rates that are tensors.
    """
    if type(optimizer) not in (torch.optim.AdamW, torch.optim.Adam):
        return False
    if any(group.get(option) for option in ("amsgrad", "maximize", "differentiable", "capturable")):
        return False
    if any(isinstance(value, Tensor) for value in (group["lr"], *group["betas"], group["weight_decay"])):
        return False
    return group["weight_decay"] == 0 or bool(group.get("decoupled_weight_decay", type(optimizer) is torch.optim.AdamW))


def supports_tensors(weight: Tensor, grad: Tensor, *moments: Tensor) -> bool:
    """Whether one parameter's tensors are what the fused steps work on: layout, dtypes, shapes, one device. Its moments are
    given if there are any yet.
    """
    tensors = (weight, grad, *moments)
    return (
        all(t.layout == torch.strided and t.is_contiguous() and t.device == weight.device for t in tensors)
        and all(t.shape == weight.shape for t in tensors)
        and weight.dtype in _DTYPES
        and grad.dtype in _DTYPES
        and all(moment.dtype == torch.float32 for moment in moments)
    )


def start_state(parameter: nn.Parameter, group: Mapping[str, Any], state: State) -> None:
    """Give a parameter the state that torch's AdamW begins with, in float32, if it has none yet."""
    if "step" not in state[parameter]:
        device = parameter.device if group.get("fused") else "cpu"
        state[parameter]["step"] = torch.zeros((), dtype=torch.float32, device=device)
        for name in MOMENTS:
            state[parameter][name] = torch.zeros_like(
                parameter, dtype=torch.float32, memory_format=torch.preserve_format
            )


def make_step(
    step: Callable[[list[list[AdamWTensor]], list[int], str], Made],
    groups: Groups,
    state: State,
    constraint: Constraint,
    silos: list[Silo],
    values: Mapping[SparseWeight, Tensor],
) -> Made:
    """Make a fused step of some silos, all of them supported.

    Args:
        step: the step: of the tensors of each silo, their budgets, and the name of the distance.
        groups: the parameter group of each parameter.
        state: the state of each, which is updated.
        constraint: the constraint.
        silos: some of its silos.
        values: the float32 values (k,) of each weight's current subset.

    Raises:
        FloatingPointError: if an update is NaN or infinite. The state is updated then, too.
    """
    counters = [state[weight.parameter]["step"] for silo in silos for weight in silo.weights]
    # On the host the counters cost nothing to read; where an optimizer keeps them on the device, one wait reads them all.
    one_place = len({counter.device for counter in counters}) == 1
    counts = iter(torch.stack(counters).tolist() if one_place else [float(counter) for counter in counters])
    batch = [
        [
            _tensor(weight, groups[weight.parameter], state[weight.parameter], values[weight], next(counts) + 1)
            for weight in silo.weights
        ]
        for silo in silos
    ]
    torch._foreach_add_(counters, 1)
    try:
        return step(batch, [silo.budget for silo in silos], constraint.distance)
    except NonFiniteStepError as error:
        raise constraint.non_finite(silos[error.silo], error.position) from error


def _tensor(
    weight: SparseWeight, group: Mapping[str, Any], state: Mapping[str, Any], values: Tensor, step: float
) -> AdamWTensor:
    data, grad = weight.data, weight.parameter.grad
    assert grad is not None
    options = AdamWOptions(*map(float, (group["lr"], *group["betas"], group["eps"], group["weight_decay"], step)))
    first, second = (state[name] for name in MOMENTS)
    bound = weight.seed_bound() if data.is_cpu else math.inf
    # The notes on the weight have followed it when its values were asked for.
    indices, seeds = weight.indices, weight.seeds
    return AdamWTensor(data, grad, first, second, options, indices, seeds, values, bound)
