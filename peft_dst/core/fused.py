"""AdamW's step and the choice in one, where there is such a way: which silos can take it, and their state in and out.

Two ways lead past the dense update, with the same results: Triton kernels on a GPU (`kernels`), and tiles in the cache
of a CPU (`adamw_tiles`). Both step and project a silo in one go, so neither working copies nor a dense Θ̂ are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import adamw_tiles, kernels
from .adamw import AdamWScalars, AdamWTensor, NonFiniteStepError, SiloStep, supports_group, supports_tensors
from .constraint import Constraint
from .subset import Silo, Subset
from .weights import SparseWeight


Groups = Mapping[nn.Parameter, Mapping[str, Any]]
State = MutableMapping[Any, dict[str, Any]]
#: Steps some silos under their budgets and a distance.
Way = Callable[[Sequence[Sequence[AdamWTensor]], Sequence[int], str], list[SiloStep]]

MOMENTS = ("exp_avg", "exp_avg_sq")


def groups_of(param_groups: Iterable[Mapping[str, Any]]) -> dict[nn.Parameter, Mapping[str, Any]]:
    """The parameter group of each parameter of an optimizer."""
    return {parameter: group for group in param_groups for parameter in group["params"]}


def find_way(
    engine: Optimizer, groups: Groups, state: State, constraint: Constraint, silo: Silo, by_kernels: bool | None = None
) -> Way | None:
    """The fused way to make an optimizer's step of one silo and the exact selection after it; None if there is none.

    Args:
        engine: the optimizer.
        groups: the parameter group of each of its parameters.
        state: the state of those that have been stepped before. It is begun for the others.
        constraint: the constraint.
        silo: one of its silos.
        by_kernels: the kernels wherever they run, also interpreted; never; or (None) on CUDA.
    """
    if constraint.tracking or silo.budget >= silo.size:
        return None
    for weight in silo.weights:
        parameter = weight.parameter
        if parameter not in groups or parameter.grad is None or not supports_group(engine, groups[parameter]):
            return None
    data = silo.weights[0].data
    if (data.is_cuda if by_kernels is None else by_kernels) and kernels.available(data):
        way: Way = kernels.adamw_step
    elif data.is_cpu and adamw_tiles.suits(silo.size, silo.budget, [groups[w.parameter] for w in silo.weights]):
        way = adamw_tiles.adamw_step
    else:
        return None
    for weight in silo.weights:
        parameter = weight.parameter
        start_state(parameter, groups[parameter], state)
        assert parameter.grad is not None
        if not supports_tensors(weight.data, parameter.grad, *(state[parameter][name] for name in MOMENTS)):
            return None
    return way if len({weight.data.device for weight in silo.weights}) == 1 else None


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
    way: Way,
    groups: Groups,
    state: State,
    constraint: Constraint,
    silos: Sequence[Silo],
    values: Callable[[SparseWeight], Tensor] = SparseWeight.values,
) -> dict[SparseWeight, Tensor]:
    """Step some silos in the way that was found for all of them, and note their new subsets.

    The kernels take all silos at once, for they wait for the device; on a CPU one silo follows another.

    Args:
        way: how.
        groups: the parameter group of each parameter.
        state: the state of each, which is updated.
        constraint: the constraint.
        silos: some of its silos.
        values: the float32 values (k,) of a weight's current subset.

    Returns:
        The exact values, float32 (k,), of each weight's new subset.

    Raises:
        FloatingPointError: if an update is NaN or infinite. The live weights are then as before, the state is not.
    """
    exact = {}
    for part in [silos] if way is kernels.adamw_step else [[silo] for silo in silos]:
        before = [[Subset.of(weight) for weight in silo.weights] for silo in part]
        batch = _batch(groups, state, part, values)
        try:
            steps = way(batch, [silo.budget for silo in part], constraint.distance)
        except NonFiniteStepError as error:
            raise constraint.non_finite(part[error.silo], error.position) from error
        for silo, subsets, made in zip(part, before, steps, strict=True):
            made_of = zip(silo.weights, made.selection.indices, made.seeds, made.values, strict=True)
            for weight, indices, seeds, new in made_of:
                weight.place(indices, seeds)
                exact[weight] = new
            silo.note(made.selection, subsets)
    return exact


def _batch(
    groups: Groups, state: State, silos: Sequence[Silo], values: Callable[[SparseWeight], Tensor]
) -> list[list[AdamWTensor]]:
    """The tensors of some silos, whose steps are counted."""
    weights = [weight for silo in silos for weight in silo.weights]
    counters = [state[weight.parameter]["step"] for weight in weights]
    torch._foreach_add_(counters, 1)
    # On the host the counters cost nothing to read; where an optimizer keeps them on the device, one wait reads them all.
    one_place = len({counter.device for counter in counters}) == 1
    counts = iter(torch.stack(counters).tolist() if one_place else [float(counter) for counter in counters])
    return [
        [_tensor(w, groups[w.parameter], state[w.parameter], next(counts), values(w)) for w in silo.weights]
        for silo in silos
    ]


def _tensor(
    weight: SparseWeight, group: Mapping[str, Any], state: Mapping[str, Any], count: float, values: Tensor
) -> AdamWTensor:
    scalars = AdamWScalars(group["lr"], group["betas"], group["eps"], group["weight_decay"], count)
    gradient = weight.parameter.grad
    assert gradient is not None
    first, second = (state[name] for name in MOMENTS)
    return AdamWTensor(weight.data, gradient, first, second, scalars, weight.indices, weight.seeds, values)
