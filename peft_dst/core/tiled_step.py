"""Between optimizers and `adamw_tiles`: which silos are stepped there, and how that is done in an optimizer's place."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from .adamw import Groups, State, make_step, supports
from .adamw_tiles import Chosen, rounds_as_torch, step_and_select
from .constraint import Constraint
from .hiding import Hidden
from .selection import SPARSE
from .subset import Silo, Subset
from .weights import SparseWeight


def suits_tiles(engine: Optimizer, groups: Groups, state: State, constraint: Constraint, silo: Silo) -> bool:
    """Whether `choose` makes an optimizer's step of one silo, to the last bit. If so, it is prepared.

    That is: torch's fused AdamW of weights on the CPU, and a budget small enough for block maxima to be of use.
    """
    return (
        silo.budget * SPARSE <= silo.size
        and silo.weights[0].data.device.type == "cpu"
        and all(groups.get(weight.parameter, {}).get("fused") for weight in silo.weights)
        and supports(engine, groups, state, constraint, silo)
        and rounds_as_torch()
    )


def choose(
    groups: Groups, state: State, constraint: Constraint, silos: list[Silo], values: Mapping[SparseWeight, Tensor]
) -> list[Chosen]:
    """Update the moments of some silos, all of which suit, and choose their subsets (`adamw.make_step`). Nothing else is
    changed.
    """
    return make_step(step_and_select, groups, state, constraint, silos, values)


class TiledStep:
    """The step of some silos in an optimizer's place: what it would make of them is known before it steps the rest.

    Their parameters are out of its groups meanwhile, and written when its step has come to its end. So nothing is to be
    undone if it does not.

    Args:
        optimizer: the optimizer.
        arguments: those of its step.

    Attributes:
        hidden: the parameters that are missing in the optimizer's groups meanwhile.
    """

    def __init__(self, optimizer: Optimizer, arguments: tuple[Any, ...]):
        # Steps under way are known by their optimizers, which must not be kept by that.
        self._optimizer = weakref.ref(optimizer)
        # A closure computes the gradients within the step; other hooks may still clip them, or look at what the step made:
        # the optimizer's own, and of those of all optimizers whatever is not ours, of which there is one each.
        # A GradScaler may leave it to a fused optimizer to unscale them.
        self._may = (
            all(argument is None for argument in arguments)
            and not optimizer._optimizer_step_pre_hooks
            and not optimizer._optimizer_step_post_hooks
            and max(len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)) <= 1
            and getattr(optimizer, "grad_scale", None) is None
        )
        self._silos: dict[Constraint, list[Silo]] = {}
        self._chosen: list[tuple[Silo, list[Subset], Chosen]] = []
        self.hidden = Hidden()

    def take(self, constraint: Constraint, silos: list[Silo]) -> list[Silo]:
        """Take on those of a constraint's silos that suit, and return the others."""
        mine = [silo for silo in silos if self._may and self._suits(constraint, silo)]
        if mine:
            self._silos[constraint] = mine
        return [silo for silo in silos if silo not in mine]

    def _suits(self, constraint: Constraint, silo: Silo) -> bool:
        # What is float32 here is so in a plain step, too, and what another step holds is a working copy.
        return all(
            weight.under_way is None
            and weight.data.dtype == torch.float32
            and (weight.parameter.grad is None or weight.parameter.grad.dtype == torch.float32)
            for weight in silo.weights
        ) and suits_tiles(self.optimizer, self.groups, self.optimizer.state, constraint, silo)

    @functools.cached_property
    def groups(self) -> Groups:
        """The parameter group of each of the optimizer's parameters; asked for before any are hidden."""
        return {parameter: group for group in self.optimizer.param_groups for parameter in group["params"]}

    @property
    def optimizer(self) -> Optimizer:
        optimizer = self._optimizer()
        assert optimizer is not None
        return optimizer

    @torch.no_grad()
    def begin(self) -> None:
        """Choose the subsets, and hide the parameters from the optimizer.

        Raises:
            FloatingPointError: if an update is NaN or infinite.
        """
        for constraint, silos in self._silos.items():
            before = [[Subset.of(weight) for weight in silo.weights] for silo in silos]
            values = {
                weight: subset.values
                for silo, subsets in zip(silos, before, strict=True)
                for weight, subset in zip(silo.weights, subsets, strict=True)
            }
            chosen = choose(self.groups, self.optimizer.state, constraint, silos, values)
            self._chosen += zip(silos, before, chosen, strict=True)
        mine = {id(weight.parameter) for silo, _, _ in self._chosen for weight in silo.weights}
        self.hidden.hide(self.optimizer, mine)

    def restore(self) -> None:
        """Give the optimizer its parameters back."""
        self.hidden.restore()

    @torch.no_grad()
    def end(self) -> None:
        """Write the new subsets."""
        self.restore()
        for silo, before, chosen in self._chosen:
            silo.write(chosen.selection, chosen.values, before)

    @torch.no_grad()
    def undo(self) -> None:
        """Write the former subsets."""
        self.restore()
        for silo, before, _ in self._chosen:
            for weight, subset in zip(silo.weights, before, strict=True):
                subset.restore(weight)
