"""DSTOptimizer: any `torch.optim` optimizer under the constraint, silo by silo, without a copy of the seed.

Outside the subset the live weights are the seed, so nothing else has to be remembered: the optimizer steps on a working
copy of one silo at a time, in float32, and of what it made only the subset is written back. Of bfloat16 and float16
weights the subset's values are kept in float32; the live weight is their rounding. So such a model trains as exactly as
a float32 one, at the price of four bytes for each free component.
"""

from __future__ import annotations

import functools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core import Constraint, Silo, SparseWeight, Subset, concerned, exempt, gather, scatter
from . import fused
from .release import Release, gradient


# Where the state of a parameter keeps the float32 values of its subset (of all of it, if it is under no constraint).
VALUES = "dst_values"
_HALF = (torch.bfloat16, torch.float16)


class DSTOptimizer(Optimizer):
    """Steps another optimizer silo by silo on a float32 working copy, and keeps the constraint exactly.

    The update is that of the wrapped optimizer on a float32 model, including its state, whose floating tensors are
    float32 for bfloat16 and float16 weights. Parameters under no constraint are stepped as they are, with float32 values
    kept for those in half precision.

    Works wherever a `torch.optim` optimizer does: learning rate schedulers, `state_dict`, Trainer's `optimizers=` and
    `optimizer_cls_and_kwargs=`, Accelerate.

    Args:
        params: parameters or parameter groups, see `peft_dst.parameter_groups`.
        optimizer_cls: the optimizer to wrap, e.g. `torch.optim.AdamW`. It has to treat every parameter by itself.
        release_gradients: step each silo inside the backward pass, as soon as the gradients of all of its parameters
            are there, and free them. `step()` then finishes what is left. Nothing may look at the gradients in between,
            so gradient accumulation and clipping, gradient scaling and data parallelism are refused when they are met.
        kernels: step AdamW and selection by one Triton kernel, which never writes the dense update (docs/kernels.md).
            None does so on CUDA, wherever the kernel is the step that was asked for; False never.
        separable: declare that an optimizer from outside `torch.optim` treats every parameter by itself.
        **kwargs: passed to `optimizer_cls`, e.g. lr.

    Raises:
        ValueError: if the optimizer is known or suspected not to treat every parameter by itself.
    """

    def __init__(
        self,
        params: Iterable[Any],
        optimizer_cls: type[Optimizer] = torch.optim.AdamW,
        *,
        release_gradients: bool = False,
        kernels: bool | None = None,
        separable: bool = False,
        **kwargs: Any,
    ):
        _check_separable(optimizer_cls, separable)
        # Checks the options, and later steps on stand-ins.
        self.engine = optimizer_cls(params, **kwargs)
        groups, self.engine.param_groups = self.engine.param_groups, []
        starts, self.engine.state = self.engine.state, defaultdict(dict)
        exempt(self.engine)
        self.kernels = kernels
        self._release: Release | None = None
        super().__init__(groups, self.engine.defaults)
        exempt(self)
        # Some optimizers start with a state (Adagrad), which has to be a float32 one.
        for parameter in starts:
            stand_in = nn.Parameter(torch.empty_like(parameter, dtype=_working_dtype(parameter)))
            group = next(g for g in self.param_groups if any(p is parameter for p in g["params"]))
            self.state[parameter] = optimizer_cls([{**group, "params": [stand_in]}], **kwargs).state[stand_in]
        if release_gradients:
            self._release = Release(functools.partial(SiloBySilo, weakref.proxy(self)))
            self._release.watch(parameter for group in self.param_groups for parameter in group["params"])

    @property
    def releases_gradients(self) -> bool:
        return self._release is not None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if self._release is not None:
            self._release.watch(self.param_groups[-1]["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every silo that has a gradient, then the parameters under no constraint.

        Raises:
            FloatingPointError: if an update is NaN or infinite. The weights under the constraint are put back to what
                they were before the step; the optimizer's state is not.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        step = SiloBySilo(self, reuse=True) if self._release is None else self._release.finish()
        step.complete()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients. If they were released, and `step` was not called since, so is what was made of them."""
        if self._release is not None:
            self._release.forget()
        super().zero_grad(set_to_none)

    def run(self, stand_ins: Mapping[nn.Parameter, nn.Parameter]) -> None:
        """One step of the wrapped optimizer on stand-ins (with gradients) of some parameters."""
        engine = self.engine
        engine.param_groups = [
            {**group, "params": [stand_ins[p] for p in group["params"] if p in stand_ins]}
            for group in self.param_groups
        ]
        own = {p: {k: v for k, v in self.state[p].items() if k != VALUES} for p in stand_ins if p in self.state}
        engine.state = defaultdict(dict, {stand_ins[p]: entries for p, entries in own.items()})
        try:
            engine.step()
            for parameter, stand_in in stand_ins.items():
                if stand_in in engine.state:
                    self.state[parameter].update(engine.state[stand_in])
        finally:
            engine.param_groups, engine.state = [], defaultdict(dict)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # torch casts state to the parameters' dtype, which float32 state of bfloat16 parameters would not survive.
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for name, parameter in zip(names, parameters, strict=True):
            for key, value in state_dict["state"].get(name, {}).items():
                if _is_floating(value) and parameter.dtype in _HALF:
                    self.state[parameter][key] = value.to(parameter.device, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "engine": self.engine, "kernels": self.kernels, "_release": None}

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {super().__repr__().replace(type(self).__name__, type(self.engine).__name__)}"


class SiloBySilo:
    """One step of a DSTOptimizer: which silos it concerns, and what to go back to if it fails half-way.

    Args:
        optimizer: the optimizer.
        reuse: keep the working copies' memory from silo to silo, which saves the time of fetching it from the system.
    """

    def __init__(self, optimizer: DSTOptimizer, reuse: bool = False):
        self.optimizer = optimizer
        self.concerned = concerned(optimizer.param_groups)
        for constraint, _ in self.concerned:
            constraint.recall(optimizer.param_groups)
        self.groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        self.stepped: set[int] = set()
        self._before: list[tuple[SparseWeight, Subset, Tensor | None]] = []
        self._reuse = reuse
        self._buffer: Tensor | None = None

    def complete(self) -> None:
        """Step every silo that has not been yet, and the parameters under no constraint; none, if one fails."""
        try:
            for constraint, silos in self.concerned:
                self.silos(constraint, [silo for silo in silos if id(silo) not in self.stepped])
            self._step_rest()
        except BaseException:
            self.undo()
            raise
        for constraint, _ in self.concerned:
            constraint.complete(self.optimizer.param_groups)

    def silos(self, constraint: Constraint, silos: list[Silo]) -> None:
        """Step those of some silos that have a gradient anywhere."""
        self.stepped.update(id(silo) for silo in silos)
        silos = [silo for silo in silos if any(self._gradient(weight) is not None for weight in silo.weights)]
        for weight in (weight for silo in silos for weight in silo.weights):
            weight.recover()
        by_kernels = [silo for silo in silos if self._suits_kernels(constraint, silo)]
        if by_kernels:
            self._by_kernels(constraint, by_kernels)
        for silo in silos:
            if silo not in by_kernels:
                self._by_working_copies(constraint, silo)

    def _by_working_copies(self, constraint: Constraint, silo: Silo) -> None:
        working = self._working_copies(silo)
        gradients = [self._gradient(weight) for weight in silo.weights]
        self.optimizer.run(
            {
                weight.parameter: _stand_in(copy, found)
                for weight, copy, found in zip(silo.weights, working, gradients, strict=True)
                if found is not None
            }
        )
        before = self._remember(silo)
        for weight in silo.weights:
            weight.revert()
        silo.take(constraint.select(silo, working), working, before)
        for weight, copy in zip(silo.weights, working, strict=True):
            if weight.data.dtype in _HALF:
                self.optimizer.state[weight.parameter][VALUES] = gather(copy, weight.indices)

    def _by_kernels(self, constraint: Constraint, silos: list[Silo]) -> None:
        before = [self._remember(silo) for silo in silos]
        state = self.optimizer.state
        steps = fused.step(self.groups, state, constraint, silos, self._subset_values)
        for silo, subsets, made in zip(silos, before, steps, strict=True):
            silo.note(made.selection, subsets)
            made_of = zip(silo.weights, made.selection.indices, made.seeds, made.values, strict=True)
            for weight, indices, seeds, values in made_of:
                weight.place(indices, seeds)
                if weight.data.dtype in _HALF:
                    state[weight.parameter][VALUES] = values

    def _suits_kernels(self, constraint: Constraint, silo: Silo) -> bool:
        wanted = self.optimizer.kernels
        if wanted is None:
            wanted = silo.weights[0].data.is_cuda
        return wanted and fused.supports(self.optimizer.engine, self.groups, self.optimizer.state, constraint, silo)

    def _gradient(self, weight: SparseWeight) -> Tensor | None:
        return gradient(weight.parameter) if weight.parameter in self.groups else None

    def _remember(self, silo: Silo) -> list[Subset]:
        before = [Subset.of(weight) for weight in silo.weights]
        self._before += [(w, b, self._values(w.parameter)) for w, b in zip(silo.weights, before, strict=True)]
        return before

    def _subset_values(self, weight: SparseWeight) -> Tensor:
        """Float32 values (k,) of a weight's current subset."""
        return _widened(weight.values(), self._values(weight.parameter))

    def _step_rest(self) -> None:
        """Step the parameters under no constraint."""
        silos = [silo for _, silos in self.concerned for silo in silos]
        constrained = {id(weight.parameter) for silo in silos for weight in silo.weights}
        stand_ins = {}
        for parameter in self.groups:
            if id(parameter) not in constrained and (found := gradient(parameter)) is not None:
                half = parameter.dtype in _HALF
                working = _widened(parameter.data, self._values(parameter)) if half else parameter.data
                stand_ins[parameter] = _stand_in(working, found)
        if stand_ins:
            self.optimizer.run(stand_ins)
        for parameter, stand_in in stand_ins.items():
            if parameter.dtype in _HALF:
                parameter.data.copy_(stand_in.data)
                self.optimizer.state[parameter][VALUES] = stand_in.data

    def undo(self) -> None:
        """Put the subsets of the silos stepped so far back to what they were."""
        for weight, subset, values in self._before:
            subset.restore(weight)
            if values is not None:
                self.optimizer.state[weight.parameter][VALUES] = values
        self._before.clear()

    def _values(self, parameter: nn.Parameter) -> Tensor | None:
        return self.optimizer.state.get(parameter, {}).get(VALUES)

    def _working_copies(self, silo: Silo) -> list[Tensor]:
        """Θt of a silo's weights in their shapes, in one stretch of memory."""
        data = [weight.data for weight in silo.weights]
        dtype = _working_dtype(*data)
        copies = []
        for weight, flat in zip(silo.weights, self._stretch(silo, dtype, data[0].device), strict=True):
            copy = _with_strides_of(weight.data, flat).copy_(weight.data)
            if weight.data.dtype in _HALF:
                scatter(copy, weight.indices, self._subset_values(weight))
            copies.append(copy)
        return copies

    def _stretch(self, silo: Silo, dtype: torch.dtype, device: torch.device) -> Sequence[Tensor]:
        """Uninitialised memory for every weight of a silo, which the next silo uses again if it may."""
        buffer = self._buffer
        if buffer is None or buffer.numel() < silo.size or buffer.dtype != dtype or buffer.device != device:
            # Within a backward pass memory is scarce, and a silo's next to nothing beside the time it takes.
            size = max(s.size for _, silos in self.concerned for s in silos) if self._reuse else silo.size
            self._buffer = None
            buffer = torch.empty(size, dtype=dtype, device=device)
        self._buffer = buffer if self._reuse else None
        return buffer[: silo.size].split([weight.data.numel() for weight in silo.weights])


def _with_strides_of(data: Tensor, flat: Tensor) -> Tensor:
    """View flat memory in a tensor's shape; also in its memory layout where that has no gaps, as fused kernels want."""
    if data.is_contiguous():
        return flat.view(data.shape)
    return flat.as_strided(data.shape, torch.empty_like(data, device="meta").stride())


def _stand_in(working: Tensor, gradient: Tensor) -> nn.Parameter:
    stand_in = nn.Parameter(working)
    stand_in.grad = gradient.to(working.dtype)
    return stand_in


def _widened(live: Tensor, values: Tensor | None) -> Tensor:
    """Half-precision values in float32: those that are remembered, wherever they are what the live ones were made of."""
    if values is None or values.shape != live.shape:
        return live.float()
    return torch.where(values.to(live.dtype) == live, values, live.float())


def _working_dtype(*data: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in [tensor.dtype for tensor in data] else torch.float32


def _is_floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _check_separable(optimizer_cls: type[Optimizer], separable: bool) -> None:
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise ValueError(f"optimizer_cls must be an optimizer class such as torch.optim.AdamW, got {optimizer_cls!r}.")
    if issubclass(optimizer_cls, torch.optim.LBFGS):
        raise ValueError(
            "LBFGS moves all parameters together and cannot step silo by silo. Use it without DSTOptimizer: the "
            "constraint holds for every torch optimizer by itself, at the cost of one copy of the tuned weights."
        )
    if not optimizer_cls.__module__.startswith("torch.optim") and not separable:
        raise ValueError(
            f"{optimizer_cls.__name__} is not one of torch.optim's, so whether it treats every parameter by itself is "
            "not known. If it does (no statistics over all parameters, such as Prodigy's distance), pass separable=True. "
            "Else use it without DSTOptimizer: the constraint holds for every optimizer by itself."
        )
