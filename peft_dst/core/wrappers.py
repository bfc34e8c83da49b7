"""Wrappers of a model whose optimizers step copies of its weights, which the constraint does not reach: they are refused.

DeepSpeed's ZeRO optimizers step flat float32 partitions, and those of its training in half precision float32 masters; what
they make of them is copied over the model's weights. torch's FullyShardedDataParallel (FSDP1) steps slices of flat
parameters. Under either, every parameter would be trained. Of DeepSpeed only stage 0 in float32 steps the model's own.
torch's ZeroRedundancyOptimizer does step them, but in each process some only, with an optimizer within it: a silo's
components would compete before all have moved.

Wrappers say nothing to anybody when they are made. So their constructors are looked at, once the modules that have them are
imported; nothing is imported for it.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .constraint import Constraint
from .weights import SparseWeight


_REMEDY = (
    "To divide the model over processes use FSDP2 (torch's fully_shard; `fsdp_version: 2` in Accelerate's and Trainer's "
    "configuration), to repeat it DDP."
)

_engines: weakref.WeakSet[Any] = weakref.WeakSet()
# What FSDP1 has flattened, with a weight that was to be trained. The weight knows its module, and so it must not be held.
_flattened: weakref.WeakKeyDictionary[nn.Module, weakref.ref[SparseWeight]] = weakref.WeakKeyDictionary()


def install() -> None:
    """Look at every such wrapper that is made from now on."""
    for name in _GUARDS:
        if name in sys.modules:
            _guard(sys.modules[name])
    sys.meta_path.insert(0, _Importing())


def check_wrappers(optimizer: Optimizer) -> None:
    """Check that an optimizer is not about to train a weight under a constraint through a copy.

    Raises:
        NotImplementedError: if it is.
    """
    if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__):
        _check_redundancy(optimizer)
    for engine in list(_engines):
        # What it was given, or made, is what steps; what is around it is called by the engine.
        if optimizer in (engine.optimizer, getattr(engine.optimizer, "optimizer", None)):
            _check_engine(engine)
    if not _flattened:
        return
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for wrapper, flattened in list(_flattened.items()):
        weight = flattened()
        if weight is None or not any(weight in constraint.weights for constraint in Constraint.live):
            continue
        if any(id(parameter) in stepped for parameter in wrapper.parameters()):
            raise _flat(weight.name)


def _check_redundancy(optimizer: Optimizer) -> None:
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for constraint in Constraint.live:
        for silo in constraint.silos:
            if len(silo.weights) > 1 and any(id(weight.parameter) in stepped for weight in silo.weights):
                raise NotImplementedError(
                    f"ZeroRedundancyOptimizer steps only some of the silo {silo.name!r} in each process, so what competes "
                    f"there would not have moved together. {_REMEDY} Or give each tensor a silo of its own "
                    "(siloing='parameter')."
                )


def check_whole(name: str, parameter: Tensor) -> None:
    """Check that a parameter that is to be tuned is what it seems, and not a slice that a wrapper has left in its place.

    Raises:
        NotImplementedError: if it is one.
    """
    if hasattr(parameter, "ds_id"):
        raise NotImplementedError(
            f"{name!r} has been divided by DeepSpeed's ZeRO stage 3, which then steps copies of its own: the constraint "
            f"could not be enforced. {_REMEDY}"
        )
    if getattr(parameter, "_fsdp_flattened", False):
        raise _flat(name)


def _flat(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"{name!r} is trained as a slice of a flat parameter (torch's FullyShardedDataParallel, FSDP1), in which no subset "
        f"can be chosen. {_REMEDY}"
    )


def _trained_in(model: nn.Module) -> list[SparseWeight]:
    """The weights in a model that are under a constraint, and to be trained."""
    found = [w for constraint in list(Constraint.live) for w in constraint.weights if w.parameter.requires_grad]
    if not found:
        return []
    hosts = set(model.modules())
    return [weight for weight in found if weight.module in hosts]


def _check_engine(engine: Any) -> None:
    optimizer = engine.optimizer
    trained = _trained_in(engine.module) if optimizer is not None else []
    # What only holds the parameters for a forward pass (ZeRO stage 3 without an optimizer) has no groups.
    held = {id(p) for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}
    if not trained or any(id(weight.parameter) in held for weight in trained):
        return
    raise NotImplementedError(
        f"DeepSpeed (ZeRO stage {int(engine.zero_optimization_stage())}, {type(optimizer).__name__}) steps copies of the "
        f"weights, e.g. of {trained[0].name!r}, so the constraint cannot be enforced and every parameter would be trained. "
        f"{_REMEDY} (Of DeepSpeed only stage 0 in float32 works, without a bf16 or fp16 section.)"
    )


def _check_before_training(construct: Callable[..., None]) -> Callable[..., None]:
    """DeepSpeed's engine, as it comes out of its constructor, checked."""

    @functools.wraps(construct)
    def construct_and_check(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        _check_engine(self)
        _engines.add(self)

    return construct_and_check


def _check_before_flattening(construct: Callable[..., None]) -> Callable[..., None]:
    """FSDP1's constructor, with what goes into it checked. A model in evaluation mode passes until it is stepped."""

    @functools.wraps(construct)
    def check_and_construct(self: nn.Module, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        trained = _trained_in(module)
        if trained and module.training:
            raise _flat(trained[0].name)
        construct(self, module, *args, **kwargs)
        if trained:
            _flattened[self] = weakref.ref(trained[0])

    return check_and_construct


Guard = Callable[[Callable[..., None]], Callable[..., None]]

#: Module → class of the wrapper there, and what its constructor is to become.
_GUARDS: dict[str, tuple[str, Guard]] = {
    "deepspeed.runtime.engine": ("DeepSpeedEngine", _check_before_training),
    "torch.distributed.fsdp.fully_sharded_data_parallel": ("FullyShardedDataParallel", _check_before_flattening),
}


def guard_constructor(module: str, wrapper: str, guarded: Guard) -> None:
    """Have the constructor of one more wrapper replaced, whenever it is imported. Calling it again changes nothing."""
    if module not in _GUARDS:
        _GUARDS[module] = wrapper, guarded
        if module in sys.modules:
            _guard(sys.modules[module])


def _guard(module: ModuleType) -> None:
    name, guarded = _GUARDS[module.__name__]
    wrapper = getattr(module, name, None)
    if wrapper is not None:
        wrapper.__init__ = guarded(wrapper.__init__)


class _Importing(MetaPathFinder):
    """Guards the wrappers of modules that are imported later."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _GUARDS:
            return None
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_guard(module: ModuleType) -> None:
                execute(module)
                _guard(module)

            spec.loader.exec_module = execute_and_guard  # type: ignore[method-assign]
        return spec
