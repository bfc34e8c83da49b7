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
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..core import Constraint, exempt, scatter
from ..core.constraint import check_moment
from ..core.distances import wide_dtype
from ..core.free import VALUES
from ..core.shards import like
from ..core.weights import widened
from .release import Release
from .silo_by_silo import SiloBySilo


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
            None does so on CUDA, wherever the kernel is the step that was asked for and Triton can compile it; True refuses
            to step where it cannot; False never. On the CPU a fused AdamW is stepped tile by tile, but for False.
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
            stand_in = nn.Parameter(torch.empty_like(parameter, dtype=wide_dtype(parameter)))
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
        if self._release is None:
            step = SiloBySilo(self, reuse=True)
            check_moment(step.concerned, self.param_groups)
        else:
            step = self._release.finish()
        step.complete()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients. If they were released, and `step` was not called since, so is what was made of them."""
        if self._release is not None:
            self._release.forget()
        super().zero_grad(set_to_none)

    def run(
        self, stand_ins: Mapping[nn.Parameter, nn.Parameter], groups: Mapping[nn.Parameter, dict[str, Any]]
    ) -> None:
        """One step of the wrapped optimizer on stand-ins (with gradients) of some parameters.

        Args:
            stand_ins: by the parameters that they stand for.
            groups: the group of each parameter of the optimizer.
        """
        engine = self.engine
        members: dict[int, list[nn.Parameter]] = {id(group): [] for group in self.param_groups}
        for parameter, stand_in in stand_ins.items():
            members[id(groups[parameter])].append(stand_in)
        engine.param_groups = [{**group, "params": members[id(group)]} for group in self.param_groups]
        own = {p: {k: v for k, v in self.state[p].items() if k != VALUES} for p in stand_ins if p in self.state}
        engine.state = defaultdict(dict, {stand_ins[p]: entries for p, entries in own.items()})
        try:
            engine.step()
            for parameter, stand_in in stand_ins.items():
                if stand_in in engine.state:
                    self.state[parameter].update(engine.state[stand_in])
        finally:
            engine.param_groups, engine.state = [], defaultdict(dict)

    def state_dict(self) -> dict[str, Any]:
        """As torch's. Where several processes hold a half-precision weight together, the float32 values of its subset are
        in it as a float32 copy of the whole weight, divided as that is, so that any number of processes can take it up.
        """
        found = super().state_dict()
        divided = {id(w.parameter): w for c in Constraint.live for w in c.weights if w.is_divided and w.adapters}
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in enumerate(parameters):
            own = found["state"].get(number, {})
            if id(parameter) in divided and VALUES in own and not isinstance(own[VALUES], DTensor):
                weight = divided[id(parameter)]
                copy = weight.data.float()
                scatter(copy, weight.noted()[0], widened(weight.values(), own[VALUES]))
                found["state"][number] = {**own, VALUES: like(copy, parameter)}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # torch casts state to the parameters' dtype, which neither float32 state of bfloat16 parameters nor bytes survive.
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for name, parameter in zip(names, parameters, strict=True):
            for key, value in state_dict["state"].get(name, {}).items():
                if isinstance(value, Tensor) and value.dtype != self.state[parameter][key].dtype:
                    self.state[parameter][key] = value.to(parameter.device, copy=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copy keeps the constraint by itself as well.
        exempt(self)
        exempt(self.engine)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "engine": self.engine, "kernels": self.kernels, "_release": None}

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {super().__repr__().replace(type(self).__name__, type(self.engine).__name__)}"


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
