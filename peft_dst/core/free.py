"""Training a subset that never changes: its values are parameters of their own, and all that is trained.

The live weights get gradients like any others, because that is how autograd reaches the subset. But each is gathered at
the subset's positions as soon as it is complete, and freed; so an optimizer sees k values with k gradients, and keeps
moments of that size. After its step the values are written into the live weights.

Values are float32 (float64 for float64 weights): a bfloat16 weight is the rounding of its value here.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .constraint import Constraint, check_steppable
from .weights import SparseWeight, gather, scatter


# Where an optimizer's state of a parameter keeps the float32 values of a half-precision weight's subset.
VALUES = "dst_values"


def free_values(values: Tensor) -> nn.Parameter:
    """A parameter to train the values (k,) of a fixed subset by."""
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    return nn.Parameter(values.detach().to(wide, copy=True))


def watch(weight: SparseWeight) -> None:
    """Gather the weight's gradients from now on, whenever one has been accumulated."""
    parameter = weight.parameter
    if weight.watched_parameter is not parameter and parameter.requires_grad:
        # The hook lives as long as the parameter; the weight may leave it.
        parameter.register_post_accumulate_grad_hook(functools.partial(_after_accumulation, weakref.ref(weight)))
        weight.watched_parameter = parameter


def _after_accumulation(found: weakref.ref[SparseWeight], parameter: Tensor) -> None:
    weight = found()
    if weight is not None and weight.parameter is parameter:
        collect(weight)


@torch.no_grad()
def collect(weight: SparseWeight) -> None:
    """Move the gradient of a weight with a fixed subset to the subset's values, adding to what they have.

    Raises:
        NotImplementedError: in data parallelism, where gradients of single processes would be gathered.
    """
    gradient = weight.parameter.grad
    if weight.free is None or gradient is None or weight.disabled:
        return
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_world_size() > 1:
        raise NotImplementedError(
            f"{weight.name!r} has a fixed subset, whose gradients are gathered before data parallelism averages them. "
            "Train static selections in one process, or use selection='dynamic'."
        )
    if gradient.layout != torch.strided:
        gradient = gradient.to_dense()
    gathered = gather(gradient, weight.indices).to(weight.free.dtype)
    if weight.free.grad is None:
        weight.free.grad = gathered
    else:
        weight.free.grad.add_(gathered)
    weight.parameter.grad = None


@torch.no_grad()
def _before_step(weights: Sequence[SparseWeight], state: Mapping[Any, dict[str, Any]]) -> None:
    """Make the values ready for a step of an optimizer over them.

    The live weights may have changed since the last one (an adapter loaded again); where they are no longer the rounding of
    the values, these follow.
    """
    for weight in weights:
        # A copy of a model has lost its hook; its gradient is still whole.
        collect(weight)
        watch(weight)
        assert weight.free is not None
        live, values = weight.values(), weight.free.data
        if (exact := state.get(weight.free, {}).get(VALUES)) is not None and exact.shape == values.shape:
            values.copy_(exact)
        values.copy_(torch.where(values.to(live.dtype) == live, values, live.to(values.dtype)))


@torch.no_grad()
def _after_step(weights: Sequence[SparseWeight]) -> SparseWeight | None:
    """Write the values into the live weights, if all are finite.

    Returns:
        The first weight of which they are not; then nothing is written, and the values are those of the live weights.
    """
    free = [weight.free.data for weight in weights if weight.free is not None]
    finite = [torch.isfinite(values).all() for values in free]
    if finite and not torch.stack(finite).all():
        for weight, values in zip(weights, free, strict=True):
            values.copy_(weight.values())
        return weights[[bool(ok) for ok in finite].index(False)]
    for weight, values in zip(weights, free, strict=True):
        data = weight.data
        scatter(data, weight.indices, values.to(data.dtype))
        weight.stepped = True
    return None


class FixedStep:
    """An optimizer's step over the values of fixed subsets.

    The exact values of bfloat16 and float16 weights also go into the optimizer's state (`VALUES`), to be resumed with it.

    Args:
        optimizer: the optimizer.

    Raises:
        RuntimeError: if a subset was not given yet, its values are not the optimizer's though its weights are, or a weight
            is in no state to be stepped.
        NotImplementedError: if a weight is sharded.
    """

    def __init__(self, optimizer: Optimizer):
        self.state = optimizer.state
        parameters = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self.constraints: list[tuple[Constraint, list[SparseWeight]]] = []
        for constraint in [c for c in Constraint.live if c.fixed]:
            own = [w for w in constraint.weights if w.free is not None and w.adapters == (constraint.adapter,)]
            mine = [weight for weight in own if id(weight.free) in parameters]
            if not mine:
                _check_not_forgotten(constraint, own, parameters)
            for weight in mine:
                check_steppable(weight, weight.parameter.grad)
            if mine := [weight for weight in mine if not weight.disabled]:
                _before_step(mine, self.state)
                self.constraints.append((constraint, mine))

    def end(self) -> None:
        """Write what the optimizer made of the values.

        Raises:
            FloatingPointError: if a value is NaN or infinite. Live weights and values are then as before the step.
        """
        for constraint, weights in self.constraints:
            culprit = _after_step(weights)
            if culprit is not None:
                silo = next(silo for silo in constraint.silos if culprit in silo.weights)
                raise constraint.non_finite(silo, silo.weights.index(culprit))
            constraint.steps += 1
            for weight in weights:
                values = weight.free
                if weight.data.element_size() == 2 and values is not None and values.grad is not None:
                    self.state[values][VALUES] = values.detach().clone()


def _check_not_forgotten(constraint: Constraint, own: list[SparseWeight], parameters: set[int]) -> None:
    """An optimizer that holds the weights of a fixed subset, but not its values, would train nothing."""
    held = [
        weight
        for weight in constraint.weights
        if id(weight.parameter) in parameters
        and weight.adapters == (constraint.adapter,)
        and weight.parameter.requires_grad
        and not weight.disabled
    ]
    if not held:
        return
    if not own:
        raise RuntimeError(
            f"the adapter {constraint.adapter!r} has a static selection whose subset was not chosen yet. Choose it with "
            "peft_dst.fix_subset(model, scores), then make the optimizer."
        )
    raise RuntimeError(
        f"the optimizer holds {held[0].name!r} but not the values of its fixed subset, which are what is trained. Make "
        "the optimizer after the subset was chosen, from the model's parameters() or peft_dst.parameter_groups."
    )
