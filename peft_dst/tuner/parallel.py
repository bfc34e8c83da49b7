"""Training in several processes: they are to agree before they start, and fixed subsets to know who averages gradients."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..core import Constraint
from ..core.checksums import join_checksums
from ..core.free import watch
from ..core.wrappers import guard_constructor
from ..delta import MARKER
from .constraints import constraints, processes_of
from .layer import CONSTRAINTS, markers_by_path


# Stands on a base model whose processes have been found to train the same.
_COMPARED = "dst_compared"
# Where DistributedDataParallel looks, on the module that it wraps, for names of what it shall leave alone.
_IGNORED = "_ddp_params_and_buffers_to_ignore"


class _Ignored(set[str]):
    """What DistributedDataParallel leaves alone: besides these names, those of all that belongs to a marker."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or f".{MARKER}." in f".{name}"


def keep_from_ddp() -> None:
    """Keep DistributedDataParallel from broadcasting records: their sizes change where a process has looked at them, and
    every process has the same ones by itself. Nor may it wait for gradients of what is trained of fixed subsets, of which
    autograd knows nothing.
    """
    guard_constructor(DistributedDataParallel.__module__, "DistributedDataParallel", _without_records)


def _without_records(construct: Callable[..., None]) -> Callable[..., None]:
    """DDP's constructor. It looks on the module that it is given only, which may be any around a model, and keeps a copy of
    what is there.
    """

    @functools.wraps(construct)
    def construct_without(self: DistributedDataParallel, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        records = {
            f"{path}.{name}"
            for path, marker in markers_by_path(module)
            for name, _ in (*marker.named_parameters(), *marker.named_buffers())
        }
        if records:
            setattr(module, _IGNORED, {*getattr(module, _IGNORED, ()), *records})
        construct(self, module, *args, **kwargs)
        self.parameters_to_ignore = _Ignored(self.parameters_to_ignore)

    return construct_without


def watch_forward(model: nn.Module) -> None:
    """Look at each forward pass of a base model before it begins."""
    if not any(hook is _before_forward for hook in model._forward_pre_hooks.values()):
        model.register_forward_pre_hook(_before_forward)


def forget_forward(model: nn.Module) -> None:
    """Take away what `watch_forward` registered, and what was noted."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is _before_forward:
            del model._forward_pre_hooks[key]
    model.__dict__.pop(_COMPARED, None)


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
    wrapper, found = DistributedDataParallel._get_active_ddp_module(), constraints(model)
    for constraint in found.values():
        for weight in constraint.weights if constraint.fixed else ():
            weight.averaged_by = None if wrapper is None else weakref.ref(wrapper)
            weight.averaged = wrapper is None or wrapper.require_backward_grad_sync
    trained = [c for c in found.values() if any(weight.parameter.requires_grad for weight in c.weights)]
    # Whoever has adapters but trains none is to hear of it, too, if others do.
    if (found and _COMPARED not in model.__dict__) or not all(_has_agreed(constraint) for constraint in trained):
        _check_agreement(model, trained, wrapper)


def _has_agreed(constraint: Constraint) -> bool:
    if constraint.agreed is None:
        return False
    # Weights that are divided are loaded by all processes together, and whole ones perhaps by one.
    return constraint.agreed == _replaced(constraint) or not any(weight.is_divided for weight in constraint.weights)


def _replaced(constraint: Constraint) -> int:
    return sum(weight.generation for weight in constraint.weights)


@torch.no_grad()
def _check_agreement(model: nn.Module, trained: Sequence[Constraint], wrapper: DistributedDataParallel | None) -> None:
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
    if not groups:
        return
    adapters = {"what is trained": ", ".join(constraint.adapter for constraint in trained) or "no adapter"}
    configs: Any = model.peft_config
    dense = {
        f"modules_to_save (adapter {constraint.adapter!r})": configs[constraint.adapter].modules_to_save
        for constraint in trained
    }
    _compare(groups, {**adapters, **dense, **_all(_description, trained)})
    weights = [weight for constraint in trained for weight in constraint.weights]
    if any(weight.is_divided and weight.seed_checksum.whole is None for weight in weights):
        join_checksums(dict.fromkeys(weights))
        _compare(groups, _all(_checksums, trained))
    for constraint in trained:
        constraint.agreed = _replaced(constraint)
    model.__dict__[_COMPARED] = True


def _all(describe: Callable[[Constraint], dict[str, object]], trained: Sequence[Constraint]) -> dict[str, object]:
    return {
        f"{what} (adapter {constraint.adapter!r})": answer
        for constraint in trained
        for what, answer in describe(constraint).items()
    }


def _compare(groups: Sequence[dist.ProcessGroup], own: dict[str, object]) -> None:
    """Compare something of all processes, by what it is called in a message.

    Raises:
        ValueError: if it is not the same in all.
    """
    answers: list[Any] = [(dist.get_rank(), own)]
    for group in groups:
        parts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, answers, group=group)
        answers = [answer for part in parts for answer in part]
    (base, first), *others = sorted(answers, key=lambda answer: answer[0])
    for rank, other in others:
        if different := [what for what in {**first, **other} if first.get(what) != other.get(what)]:
            what = different[0]
            raise ValueError(
                f"process {rank} does not train what process {base} does: {what} is {other.get(what)} there and "
                f"{first.get(what)} in process {base} ({len(different)} such differences). Give all processes the same "
                "config and base model (one checkpoint; one seed where it is made at random)."
            )


def _checksums(constraint: Constraint) -> dict[str, object]:
    return {f"the checksum of the base's {weight.name!r}": weight.seed_checksum.whole for weight in constraint.weights}


def _description(constraint: Constraint) -> dict[str, object]:
    """All that has to be the same in all processes."""
    described: dict[str, object] = {
        "the distance": constraint.distance,
        "the distance's normalization": constraint.normalization,
        "the threshold": constraint.tracking or "exact",
        "the schedule": repr(constraint.schedule),
        "whether the subset is fixed": constraint.fixed,
        **_checksums(constraint),
    }
    for silo in constraint.silos:
        described[f"the budget of the silo {silo.name!r}"] = silo.budget
        for weight in silo.weights:
            described[f"the shape of {weight.name!r}"] = tuple(weight.shape)
            described[f"the dtype of {weight.name!r}"] = str(weight.data.dtype)
            if constraint.fixed and not weight.is_divided:
                positions = weight.noted()[0]
                described[f"the number of entries in {weight.name!r}"] = positions.numel()
                described[f"the sum of positions in {weight.name!r}"] = int(positions.sum())
    return described
