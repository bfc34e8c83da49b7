"""Training in several processes: they are to agree before they start, and fixed subsets to know who averages gradients."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..core import Constraint
from ..core.free import watch
from .exchange import CONSTRAINTS, constraints, processes_of


def watch_forward(model: nn.Module) -> None:
    """Look at each forward pass of a base model before it begins."""
    if not any(hook is _before_forward for hook in model._forward_pre_hooks.values()):
        model.register_forward_pre_hook(_before_forward)


def _before_forward(model: nn.Module, *unused: Any) -> None:
    for constraint in model.__dict__.get(CONSTRAINTS, {}).values():
        for weight in constraint.weights if constraint.fixed else ():
            if weight.free is not None:
                # Copies of models, and parameters that were replaced, have lost their hooks.
                watch(weight)
    if dist.is_available() and dist.is_initialized():
        _look_around(model)


@torch.compiler.disable  # it has nothing to do with what the model computes
def _look_around(model: nn.Module) -> None:
    wrapper = DistributedDataParallel._get_active_ddp_module()
    for constraint in constraints(model).values():
        for weight in constraint.weights if constraint.fixed else ():
            weight.averaged_by = None if wrapper is None else weakref.ref(wrapper)
            weight.averaged = wrapper is None or wrapper.require_backward_grad_sync
        trained = any(weight.parameter.requires_grad for weight in constraint.weights)
        if trained and not constraint.agreed and torch.is_grad_enabled():
            _agree(model, constraint, wrapper)


@torch.no_grad()
def _agree(model: nn.Module, constraint: Constraint, wrapper: DistributedDataParallel | None) -> None:
    """Check that all processes train the same, once, and tell all of them of the first difference.

    Raises:
        ValueError: if they do not.
    """
    if wrapper is not None:
        groups = [wrapper.process_group]
    elif (processes := processes_of(model)) is not None:
        groups = [processes.mesh.get_group(dimension) for dimension in processes.dimensions]
    else:
        # Whoever averages gradients by hand is on his own.
        return
    constraint.agreed = True
    own = _description(constraint)
    for group in groups:
        answers: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(answers, own, group=group)
        for rank, other in enumerate(answers):
            if different := [what for what in {**answers[0], **other} if answers[0].get(what) != other.get(what)]:
                what = different[0]
                raise ValueError(
                    f"process {rank} of {len(answers)} does not train what process 0 does: {what} is {other.get(what)} "
                    f"there and {answers[0].get(what)} in process 0 ({len(different)} such differences). Give all "
                    "processes the same config and base model (one checkpoint; one seed where it is made at random)."
                )


def _description(constraint: Constraint) -> dict[str, object]:
    """All that has to be the same in all processes, by what it is called in a message."""
    described: dict[str, object] = {
        "the adapter": constraint.adapter,
        "the distance": constraint.distance,
        "the distance's normalization": constraint.normalization,
        "the threshold": constraint.tracking or "exact",
        "the schedule": repr(constraint.schedule),
        "whether the subset is fixed": constraint.fixed,
    }
    for silo in constraint.silos:
        described[f"the budget of the silo {silo.name!r}"] = silo.budget
        for weight in silo.weights:
            described[f"the shape of {weight.name!r}"] = tuple(weight.shape)
            described[f"the dtype of {weight.name!r}"] = str(weight.data.dtype)
            described[f"the checksum of the base's {weight.name!r}"] = weight.whole_checksum
            if constraint.fixed and not weight.is_divided:
                positions = weight.noted()[0]
                described[f"the number of entries in {weight.name!r}"] = positions.numel()
                described[f"the sum of positions in {weight.name!r}"] = int(positions.sum())
    return described
