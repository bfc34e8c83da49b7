"""Steps that the hook makes before the optimizer does, and hides from it.

Where the optimizer is torch's fused AdamW, its step and the choice can be made in one (`fused`), with the same bits and
without working copies. The optimizer itself then finds no gradients for the silos stepped so, and leaves them alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_pre_hooks

from . import adamw_tiles, fused
from .constraint import Constraint
from .subset import Silo, Subset
from .weights import SparseWeight


def can_go_ahead(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether what the optimizer is about to do is known: the step of torch's AdamW, from the gradients there are now.

    Args:
        optimizer: the optimizer.
        args: positional arguments of its `step`, itself first, as torch's hooks get them.
        kwargs: the others.
    """
    return (
        type(optimizer) in (torch.optim.AdamW, torch.optim.Adam)
        # A closure makes other gradients.
        and all(argument is None for argument in (*args[1:], *kwargs.values()))
        # Under a GradScaler the fused step unscales the gradients, or is left out, by itself.
        and getattr(optimizer, "grad_scale", None) is None
        and getattr(optimizer, "found_inf", None) is None
        # Somebody else's hooks may want to see the gradients, or change them.
        and not optimizer._optimizer_step_pre_hooks
        and len(_global_optimizer_pre_hooks) == 1
    )


class StepAhead:
    """The step of some silos, made in the place of an optimizer that is about to step.

    Args:
        optimizer: the optimizer.
        constraint: the constraint.
        silos: those of its silos that the optimizer would step.
    """

    def __init__(self, optimizer: Optimizer, constraint: Constraint, silos: list[Silo]):
        self.optimizer, self.constraint, self.silos = optimizer, constraint, silos
        self._before: list[tuple[SparseWeight, Subset]] = []
        self._hidden: list[tuple[nn.Parameter, Tensor]] = []

    @torch.no_grad()
    def begin(self) -> list[Silo]:
        """Step what can be, and hide its gradients. Returns the silos that are left to the optimizer."""
        groups = fused.groups_of(self.optimizer.param_groups)
        left = []
        for silo in self.silos:
            if not self._suits(silo) or self._way(groups, silo) is not adamw_tiles.adamw_step:
                left.append(silo)
                continue
            before = [(weight, Subset.of(weight)) for weight in silo.weights]
            fused.step(adamw_tiles.adamw_step, groups, self.optimizer.state, self.constraint, [silo])
            self._before += before
            for parameter in (weight.parameter for weight in silo.weights):
                assert parameter.grad is not None
                self._hidden.append((parameter, parameter.grad))
                parameter.grad = None
        return left

    def _way(self, groups: fused.Groups, silo: Silo) -> fused.Way | None:
        return fused.find_way(self.optimizer, groups, self.optimizer.state, self.constraint, silo, by_kernels=False)

    @staticmethod
    def _suits(silo: Silo) -> bool:
        # The moments of bfloat16 and float16 weights are the optimizer's own, in their dtype.
        return all(weight.under_way is None and weight.data.dtype == torch.float32 for weight in silo.weights)

    def end(self) -> None:
        """Give the gradients back."""
        for parameter, gradient in self._hidden:
            if parameter.grad is None:
                parameter.grad = gradient
        self._hidden.clear()

    def undo(self) -> None:
        """Put the weights back to what they were before the step, and the gradients into their places."""
        for weight, subset in self._before:
            subset.restore(weight)
        self._before.clear()
        self.end()
