"""Training in several processes: they are to agree before they start, and fixed subsets to know who averages gradients."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..core import Constraint
from ..core.free import watch
from ..core.weights import join_checksums
from .exchange import CONSTRAINTS, constraints, processes_of
from .layer import markers_by_path


# Where DistributedDataParallel looks, on the module that it wraps, for names of what it shall leave alone.
_IGNORED = "_ddp_params_and_buffers_to_ignore"


class _KeptFromDDP:
    """Names of the records in a base model, as they are when somebody asks: wrappers put theirs into them.

    Args:
        model: the base model.
        others: what was to be left alone before.
    """

    def __init__(self, model: nn.Module, others: Iterable[str]):
        self.model = model
        self.others = list(others)

    def __iter__(self) -> Iterator[str]:
        yield from self.others
        for path, marker in markers_by_path(self.model):
            for part in ("dst_indices", "dst_values", "dst_free"):
                for adapter, parameters in marker.tuned.items():
                    names = [f"{path}.{part}.{adapter}.{parameter}" for parameter in parameters]
                    yield from (*names, *(f"base_model.model.{name}" for name in names))


def keep_from_ddp(model: nn.Module) -> None:
    """Keep DistributedDataParallel from broadcasting records: their sizes change where a process has looked at them, and
    every process has the same ones by itself. Nor may it wait for gradients of what is trained of fixed subsets, of which
    autograd knows nothing.
    """
    # PeftModel finds the attribute here.
    others = getattr(model, _IGNORED, ())
    if not isinstance(others, _KeptFromDDP):
        setattr(model, _IGNORED, _KeptFromDDP(model, others))


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
    if not torch.is_grad_enabled():
        # A reference pass between a forward pass and its backward pass says nothing about that one.
        return
    wrapper = DistributedDataParallel._get_active_ddp_module()
    for constraint in constraints(model).values():
        for weight in constraint.weights if constraint.fixed else ():
            weight.averaged_by = None if wrapper is None else weakref.ref(wrapper)
            weight.averaged = wrapper is None or wrapper.require_backward_grad_sync
        trained = any(weight.parameter.requires_grad for weight in constraint.weights)
        if trained and not _has_agreed(constraint):
            _check_agreement(model, constraint, wrapper)


def _has_agreed(constraint: Constraint) -> bool:
    if constraint.agreed is None:
        return False
    # Weights that are divided are loaded by all processes together, and whole ones perhaps by one.
    return constraint.agreed == _replaced(constraint) or not any(weight.is_divided for weight in constraint.weights)


def _replaced(constraint: Constraint) -> int:
    return sum(weight.generation for weight in constraint.weights)


@torch.no_grad()
def _check_agreement(model: nn.Module, constraint: Constraint, wrapper: DistributedDataParallel | None) -> None:
    """Check that all processes train the same, and tell all of them of the first difference.

    Raises:
        ValueError: if they do not.
    """
    processes = processes_of(model)
    mesh = None if processes is None else processes.mesh
    # Along all dimensions of a mesh: replicas are to agree, too.
    groups = [] if mesh is None else [mesh.get_group(dimension) for dimension in range(mesh.ndim)]
    groups += [] if wrapper is None else [wrapper.process_group]
    # Whoever averages gradients by hand is on his own.
    answers = [_description(constraint)] if groups else []
    for group in groups:
        parts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, answers, group=group)
        answers = [answer for part in parts for answer in part]
    for rank, other in enumerate(answers):
        first = answers[0]
        if different := [what for what in {**first, **other} if first.get(what) != other.get(what)]:
            what = different[0]
            raise ValueError(
                f"process {rank} of {len(answers)} does not train what process 0 does: {what} is {other.get(what)} there "
                f"and {first.get(what)} in process 0 ({len(different)} such differences). Give all processes the same "
                "config and base model (one checkpoint; one seed where it is made at random)."
            )
    join_checksums(constraint.weights)
    constraint.agreed = _replaced(constraint) if groups else None


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
