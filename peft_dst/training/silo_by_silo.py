"""One step of a DSTOptimizer: a working copy of one silo after another, and the way back if one of them fails."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..core import Constraint, FixedStep, Silo, SparseWeight, Subset, concerned, gather, scatter, tiled_step
from ..core.adamw import make_step
from ..core.choice import Choice
from ..core.distances import wide_dtype
from ..core.free import VALUES
from ..core.kernels import SiloStep, adamw_step
from ..core.shards import like, local
from ..core.weights import widened
from . import fused
from .released import gradient


if TYPE_CHECKING:
    from .optimizer import DSTOptimizer

HALF = (torch.bfloat16, torch.float16)


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
        self._choices = {constraint: Choice(constraint, self._keep_exact) for constraint, _ in self.concerned}
        self._reuse = reuse
        self._buffer: Tensor | None = None

    def complete(self) -> None:
        """Step every silo that has not been yet, and the parameters under no constraint; none, if one fails."""
        fixed = FixedStep(self.optimizer)
        try:
            for constraint, silos in self.concerned:
                self.silos(constraint, [silo for silo in silos if id(silo) not in self.stepped])
                self._choices[constraint].finish()
            self._step_rest()
            fixed.end()
        except BaseException:
            self.undo()
            fixed.undo()
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
        for device in dict.fromkeys(silo.weights[0].data.device for silo in by_kernels):
            self._by_kernels(constraint, [silo for silo in by_kernels if silo.weights[0].data.device == device])
        rest = [silo for silo in silos if silo not in by_kernels]
        by_tiles = [silo for silo in rest if self._suits_tiles(constraint, silo)]
        if by_tiles:
            self._by_tiles(constraint, by_tiles)
        done = {*by_kernels, *by_tiles}
        for silo in silos:
            if silo not in done:
                self._by_working_copies(constraint, silo)

    def _by_working_copies(self, constraint: Constraint, silo: Silo) -> None:
        working = self._working_copies(silo)
        gradients = [self._gradient(weight) for weight in silo.weights]
        self.optimizer.run(
            {
                weight.parameter: _stand_in(like(copy, weight.parameter), found)
                for weight, copy, found in zip(silo.weights, working, gradients, strict=True)
                if found is not None
            },
            self.groups,
        )
        before = self._remember(silo)
        for weight in silo.weights:
            weight.revert()
        self._choices[constraint].take(silo, working, before)

    def _keep_exact(self, weight: SparseWeight, values: Tensor) -> None:
        if weight.data.dtype in HALF:
            self.optimizer.state[weight.parameter][VALUES] = values

    def _by_tiles(self, constraint: Constraint, silos: list[Silo]) -> None:
        before, values = self._remember_all(silos)
        chosen = tiled_step.choose(self.groups, self.optimizer.state, constraint, silos, values)
        for silo, subsets, made in zip(silos, before, chosen, strict=True):
            silo.write(made.selection, made.values, subsets)
            for weight, exact in zip(silo.weights, made.values, strict=True):
                self._keep_exact(weight, exact)

    def _remember_all(self, silos: list[Silo]) -> tuple[list[list[Subset]], dict[SparseWeight, Tensor]]:
        """The subsets of some silos, and their float32 values."""
        before = [self._remember(silo) for silo in silos]
        values = {
            weight: self._subset_values(weight, subset.values)
            for silo, subsets in zip(silos, before, strict=True)
            for weight, subset in zip(silo.weights, subsets, strict=True)
        }
        return before, values

    def _by_kernels(self, constraint: Constraint, silos: list[Silo]) -> None:
        before, values = self._remember_all(silos)

        def note(steps: list[SiloStep]) -> None:
            for silo, subsets, made in zip(silos, before, steps, strict=True):
                silo.note(made.selection, subsets)
                made_of = zip(silo.weights, made.selection.indices, made.seeds, made.values, strict=True)
                for weight, indices, seeds, exact in made_of:
                    weight.place(indices, seeds)
                    self._keep_exact(weight, exact)

        step = functools.partial(adamw_step, note=note)
        make_step(step, self.groups, self.optimizer.state, constraint, silos, values)

    def _suits_kernels(self, constraint: Constraint, silo: Silo) -> bool:
        optimizer = self.optimizer
        return fused.wanted(optimizer.kernels, silo.weights[0].data.device) and fused.supports(
            optimizer.engine, self.groups, optimizer.state, constraint, silo
        )

    def _suits_tiles(self, constraint: Constraint, silo: Silo) -> bool:
        optimizer = self.optimizer
        return optimizer.kernels is not False and tiled_step.suits_tiles(
            optimizer.engine, self.groups, optimizer.state, constraint, silo
        )

    def _gradient(self, weight: SparseWeight) -> Tensor | None:
        return gradient(weight.parameter) if weight.parameter in self.groups else None

    def _remember(self, silo: Silo) -> list[Subset]:
        before = [Subset.of(weight) for weight in silo.weights]
        self._before += [(w, b, self._values(w.parameter)) for w, b in zip(silo.weights, before, strict=True)]
        return before

    def _subset_values(self, weight: SparseWeight, live: Tensor) -> Tensor:
        """Float32 values (k,) of a weight's current subset, of which the live ones are the roundings."""
        values = self._values(weight.parameter)
        if values is not None and values.dim() and values.shape == weight.shape != weight.noted()[0].shape:
            # Loaded, with the whole weight (`DSTOptimizer.state_dict`).
            values = gather(local(values), weight.noted()[0])
        return widened(live, values)

    def _step_rest(self) -> None:
        """Step the parameters under no constraint."""
        silos = [silo for _, silos in self.concerned for silo in silos]
        constrained = {id(weight.parameter) for silo in silos for weight in silo.weights}
        stand_ins = {}
        for parameter in self.groups:
            if id(parameter) not in constrained and (found := gradient(parameter)) is not None:
                half = parameter.dtype in HALF
                working = widened(parameter.data, self._values(parameter)) if half else parameter.data
                stand_ins[parameter] = _stand_in(working, found)
        if stand_ins:
            self.optimizer.run(stand_ins, self.groups)
        for parameter, stand_in in stand_ins.items():
            if parameter.dtype in HALF:
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
        dtype = wide_dtype(*data)
        copies = []
        for weight, flat in zip(silo.weights, self._stretch(silo, dtype, data[0].device), strict=True):
            copy = _with_strides_of(weight.data, flat).copy_(weight.data)
            if weight.data.dtype in HALF:
                scatter(copy, weight.noted()[0], self._subset_values(weight, weight.values()))
            copies.append(copy)
        return copies

    def _stretch(self, silo: Silo, dtype: torch.dtype, device: torch.device) -> Sequence[Tensor]:
        """Uninitialised memory for every weight of a silo, which the next silo uses again if it may."""
        buffer = self._buffer
        if buffer is None or buffer.numel() < _held(silo) or buffer.dtype != dtype or buffer.device != device:
            # Within a backward pass memory is scarce, and a silo's next to nothing beside the time it takes.
            size = max(_held(s) for _, silos in self.concerned for s in silos) if self._reuse else _held(silo)
            self._buffer = None
            buffer = torch.empty(size, dtype=dtype, device=device)
        self._buffer = buffer if self._reuse else None
        return buffer[: _held(silo)].split([weight.data.numel() for weight in silo.weights])


def _held(silo: Silo) -> int:
    """Number of a silo's components that this process holds."""
    return sum(weight.data.numel() for weight in silo.weights)


def _with_strides_of(data: Tensor, flat: Tensor) -> Tensor:
    """View flat memory in a tensor's shape; also in its memory layout where that has no gaps, as fused kernels want."""
    if data.is_contiguous():
        return flat.view(data.shape)
    return flat.as_strided(data.shape, torch.empty_like(data, device="meta").stride())


def _stand_in(working: Tensor, gradient: Tensor) -> nn.Parameter:
    stand_in = nn.Parameter(working)
    stand_in.grad = gradient.to(working.dtype)
    return stand_in
