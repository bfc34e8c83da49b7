"""Training a subset that never changes: its values are parameters of their own, and all that is trained.

The live weights get gradients like any others, because that is how autograd reaches the subset. But each is gathered at
the subset's positions as soon as it is complete, and freed; so an optimizer sees k values with k gradients, and keeps
moments of that size. After its step the values are written into the live weights, which themselves are kept out of its
reach.

Values are float32 (float64 for float64 weights): a bfloat16 weight is the rounding of its value here.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .constraint import Constraint, check_steppable
from .distances import wide_dtype
from .hiding import Hidden
from .weights import SparseWeight, gather, scatter, widened


# Where an optimizer's state of a parameter keeps the float32 values of a half-precision weight's subset.
VALUES = "dst_values"
# The tensors that this process put there, by `id`: any other was loaded.
_ours: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


def free_values(values: Tensor) -> nn.Parameter:
    """A parameter to train the values (k,) of a fixed subset by."""
    with torch.inference_mode(False):
        return nn.Parameter(values.detach().clone().to(wide_dtype(values)))


def watch(weight: SparseWeight) -> None:
    """Gather the weight's gradients from now on, whenever one has been accumulated."""
    parameter = weight.parameter
    if parameter.requires_grad and (weight.watched is None or weight.watched[0] is not parameter):
        hook = functools.partial(_after_accumulation, weakref.ref(weight))
        weight.watched = parameter, parameter.register_post_accumulate_grad_hook(hook)


def unwatch(weight: SparseWeight) -> None:
    """Leave the weight's gradients where they are from now on."""
    if weight.watched is not None:
        weight.watched[1].remove()
        weight.watched = None


def _after_accumulation(found: weakref.ref[SparseWeight], parameter: Tensor) -> None:
    weight = found()
    if weight is None or weight.parameter is not parameter:
        return
    if weight.averaged_by is not None and weight.averaged_by() is not None:
        if weight.averaged:
            _queue(functools.partial(_queue, functools.partial(collect, weight)))
        return
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        raise NotImplementedError(
            f"{weight.name!r} has a fixed subset, whose gradients are gathered before anything averages them over "
            "processes. Train static selections under DistributedDataParallel or in one process, or use "
            "selection='dynamic'."
        )
    collect(weight)


def _queue(callback: Callable[[], None]) -> None:
    """Call something at the end of the backward pass; from there on, after what is queued already: DDP's averaging."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


@torch.no_grad()
def collect(weight: SparseWeight) -> None:
    """Move the gradient of a weight with a fixed subset to the subset's values, adding to what they have."""
    gradient = weight.parameter.grad
    if weight.free is None or weight.free_at is None or gradient is None:
        return
    if gradient.layout != torch.strided:
        gradient = gradient.to_dense()
    gathered = gather(gradient, weight.free_at.to(gradient.device)).to(weight.free.dtype)
    if weight.free.grad is None:
        weight.free.grad = gathered
    else:
        weight.free.grad.add_(gathered)
    weight.parameter.grad = None


class FixedStep:
    """An optimizer's step over the values of fixed subsets.

    From its making to `restore`, the weights that hold such values are not among the optimizer's parameters: whatever it
    does to parameters without a gradient, it cannot do to the seed. The exact values of bfloat16 and float16 weights also
    go into the optimizer's state (`VALUES`), to be resumed with it.

    Args:
        optimizer: the optimizer.

    Attributes:
        hidden: the parameters that are missing in the optimizer's groups meanwhile.

    Raises:
        RuntimeError: if a subset was not given yet, its values are not the optimizer's though its weights are, they were
            replaced since, or a weight is in no state to be stepped.
        NotImplementedError: if a weight is sharded, or the optimizer evaluates its closure at several points.
    """

    def __init__(self, optimizer: Optimizer):
        self.state = optimizer.state
        self.constraints: list[tuple[Constraint, list[SparseWeight]]] = []
        self.hidden = Hidden()
        self._begun: list[SparseWeight] = []
        # What stood in the live weights when they began to be written.
        self._before: dict[SparseWeight, Tensor] = {}
        fixed = [constraint for constraint in Constraint.live if constraint.fixed]
        if not fixed:
            return
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        dense: set[int] = set()
        for constraint in fixed:
            ready = [weight for weight in constraint.weights if _is_ready(constraint, weight, held)]
            mine = [weight for weight in ready if weight.free is not None and id(weight.free) in held]
            if not mine:
                _check_not_forgotten(constraint, ready)
                continue
            if isinstance(optimizer, torch.optim.LBFGS):
                raise NotImplementedError(
                    "LBFGS evaluates its closure while it moves the parameters, and fixed subsets reach the model only "
                    "after a step. Use another optimizer, or selection='first_step'."
                )
            dense.update(id(weight.parameter) for weight in ready)
            self.constraints.append((constraint, mine))
            for weight in ready:
                self._prepare(weight)
        self.hidden.hide(optimizer, dense)

    @torch.no_grad()
    def _prepare(self, weight: SparseWeight) -> None:
        """Have the values follow the live weight, wherever that is no longer their rounding (an adapter loaded again)."""
        if weight.free is None:
            # Nothing of it is in the subset.
            weight.parameter.grad = None
            return
        # A copy of a model has lost its hooks; its gradients are still whole.
        collect(weight)
        watch(weight)
        around = weight.stepping() if weight.stepping is not None else None
        if around is not None:
            return
        weight.stepping = weakref.ref(self)
        self._begun.append(weight)
        live, values = weight.values(), weight.free.data
        exact = self.state.get(weight.free, {}).get(VALUES)
        if exact is not None and exact.shape == values.shape and _ours.get(id(exact)) is not exact:
            values.copy_(exact)
        values.copy_(widened(live, values))

    def restore(self) -> None:
        """Give the optimizer its parameters back; the step is over."""
        self.hidden.restore()
        for weight in self._begun:
            if weight.stepping is not None and weight.stepping() is self:
                weight.stepping = None
        self._begun.clear()

    @torch.no_grad()
    def undo(self) -> None:
        """Give the optimizer its parameters back, and the live weights and values what they were before the step."""
        self.restore()
        for weight, values in self._before.items():
            scatter(weight.data, weight.indices, values)
        for weight in (weight for _, weights in self.constraints for weight in weights):
            assert weight.free is not None
            weight.free.data.copy_(widened(weight.values(), self.state.get(weight.free, {}).get(VALUES)))

    @torch.no_grad()
    def end(self) -> None:
        """Write what the optimizer made of the values. Whatever it raises, `undo` is to be called then.

        Raises:
            FloatingPointError: if a value is NaN or infinite.
        """
        self.restore()
        weights = [weight for _, weights in self.constraints for weight in weights]
        rounded = {weight: _rounded(weight) for weight in weights}
        finite = [torch.isfinite(values).all() for values in rounded.values()]
        # One wait reads them all, wherever the weights are.
        if finite and not torch.stack([ok.to(finite[0].device) for ok in finite]).all():
            culprit = weights[[bool(ok) for ok in finite].index(False)]
            constraint = next(constraint for constraint, own in self.constraints if culprit in own)
            silo = next(silo for silo in constraint.silos if culprit in silo.weights)
            raise constraint.non_finite(silo, silo.weights.index(culprit))
        self._before = {weight: weight.values() for weight in weights}
        for weight, values in rounded.items():
            scatter(weight.data, weight.indices, values)
            weight.stepped = True
        for weight in weights:
            self._keep_exact(weight)
        for constraint, _ in self.constraints:
            constraint.steps += 1

    def _keep_exact(self, weight: SparseWeight) -> None:
        if weight.data.element_size() == 2 and weight.free is not None and weight.free.grad is not None:
            exact = weight.free.detach().clone()
            _ours[id(exact)] = exact
            self.state[weight.free][VALUES] = exact


def _rounded(weight: SparseWeight) -> Tensor:
    assert weight.free is not None
    return weight.free.data.to(weight.data.dtype)


def _is_ready(constraint: Constraint, weight: SparseWeight, held: set[int]) -> bool:
    """Whether a weight is one that an optimizer, which holds parameters of these `id`s, may step through its values."""
    value = weight.frees.get(constraint.adapter)
    if any(id(old()) in held for old in weight.superseded if old() is not None):
        raise RuntimeError(
            f"the subset of {weight.name!r} was replaced after the optimizer was made, which holds the old one's values. "
            "Make the optimizer anew."
        )
    holds_value, holds_weight = value is not None and id(value) in held, id(weight.parameter) in held
    if not (holds_value or holds_weight):
        return False
    gradient = weight.parameter.grad if holds_weight else None
    if gradient is None and holds_value and value is not None:
        gradient = value.grad
    if weight.disabled:
        check_steppable(weight, gradient)
        return False
    if constraint.adapter not in weight.adapters:
        if holds_value and value is not None and value.grad is not None:
            raise RuntimeError(
                f"the values of the adapter {constraint.adapter!r} in {weight.name!r} have a gradient, but the adapter is "
                "not active, so their step would reach no weight. Step one adapter at a time, while it is active, and "
                "call zero_grad() before switching."
            )
        return False
    check_steppable(weight, gradient)
    return True


def _check_not_forgotten(constraint: Constraint, ready: Sequence[SparseWeight]) -> None:
    """An optimizer that holds the weights of a fixed subset, but not its values, would train nothing."""
    trained = [w for w in ready if w.parameter.requires_grad or w.parameter.grad is not None]
    if not trained:
        return
    if not any(weight.frees.get(constraint.adapter) is not None for weight in constraint.weights):
        raise RuntimeError(
            f"the adapter {constraint.adapter!r} has a static selection whose subset was not chosen yet. Choose it with "
            "peft_dst.fix_subset(model, scores), then make the optimizer. (low_cpu_mem_usage=True is for adapters that are "
            "loaded: with it, none is chosen.)"
        )
    raise RuntimeError(
        f"the optimizer holds {trained[0].name!r} but not the values of its fixed subset, which are what is trained. Make "
        "the optimizer after the subset was chosen or loaded (transformers' load_adapter loads at the first forward pass), "
        "from the model's parameters() or peft_dst.parameter_groups."
    )
