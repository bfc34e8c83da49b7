"""Gradients released in the backward pass: each silo steps as soon as its gradients are there.

What a training loop usually does between the backward pass and the step can then no longer be done. Nothing of it may
pass unnoticed: a stand-in takes the place of a released gradient, and whoever touches it is told.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core import Constraint, Silo, SparseWeight
from .released import ReleasedGradient
from .silo_by_silo import SiloBySilo


class Release:
    """Lets a DSTOptimizer step inside the backward pass.

    A *round* is what happens from the first gradient to `step()`: each parameter may get one gradient in it. Autograd has
    a thread for each device, so gradients may come at the same time; they are taken one after the other.

    Args:
        begin: makes a step over the optimizer's silos, at the first gradient of a round.
    """

    def __init__(self, begin: Callable[[], SiloBySilo]):
        _check_not_parallel()
        self._begin = begin
        self._parameters: list[nn.Parameter] = []
        self._round: SiloBySilo | None = None
        self._arrived: set[int] = set()
        self._homes: dict[int, tuple[Constraint, Silo]] = {}
        self._hooks: list[RemovableHandle] = []
        self.lock = threading.Lock()
        # The parameters may live longer, and be scored or given to another optimizer.
        weakref.finalize(self, _remove, self._hooks).atexit = False

    def watch(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take note of the gradients of some more parameters."""
        # The parameters, which hold the hooks, must not keep an optimizer alive that nobody else holds.
        me = weakref.ref(self)
        for parameter in parameters:
            if not parameter.requires_grad:
                # Should it be unfrozen later, `step()` finds its gradient as it finds all others that did not come here.
                continue
            self._parameters.append(parameter)
            self._hooks += (
                parameter.register_hook(functools.partial(_before_accumulation, me, parameter)),
                parameter.register_post_accumulate_grad_hook(functools.partial(_after_accumulation, me)),
            )

    def check(self, parameter: nn.Parameter) -> None:
        """Check that a gradient on its way is the parameter's first of this round.

        Raises:
            RuntimeError: if not. What this round's gradients made of the weights is undone.
        """
        if id(parameter) in self._arrived or type(parameter.grad) is ReleasedGradient:
            self.forget()
            raise RuntimeError(
                "a parameter got a second gradient before optimizer.step() and zero_grad(), but with "
                "release_gradients=True the first one has been used already. Gradient accumulation, a second backward "
                "pass and reentrant checkpointing of shared layers need release_gradients=False. The tuned weights were "
                "put back to what they were before the first of these gradients, the optimizer's state was not."
            )

    def receive(self, parameter: nn.Parameter) -> None:
        """Take note of a parameter's gradient, and step its silo if that was the last one missing."""
        if self._round is None:
            _check_not_parallel()
            self._round = self._begin()
            self._homes = {
                id(w.parameter): (c, s) for c, silos in self._round.concerned for s in silos for w in s.weights
            }
        self._arrived.add(id(parameter))
        if id(parameter) not in self._homes:
            return
        constraint, silo = self._homes[id(parameter)]
        if all(self._may_move(weight) for weight in silo.weights):
            try:
                self._round.silos(constraint, [silo])
            except BaseException:
                self.forget()
                raise
            for p in (weight.parameter for weight in silo.weights):
                if p in self._round.groups and p.grad is not None:
                    p.grad = ReleasedGradient.of(p.grad)

    def _may_move(self, weight: SparseWeight) -> bool:
        """Whether the weight's gradient is there, or does not come, or a step without it leaves the weight what it is: one
        that another optimizer holds, and of which nothing is in the subset, which it could lose.
        """
        assert self._round is not None
        parameter = weight.parameter
        if id(parameter) in self._arrived or not parameter.requires_grad:
            return True
        return parameter not in self._round.groups and not weight.indices.numel()

    def finish(self) -> SiloBySilo:
        """End the round: the step under way, with what is left to do."""
        step = self._begin() if self._round is None else self._round
        self._round = None
        self._arrived.clear()
        return step

    def forget(self) -> None:
        """End the round without a step: what its gradients made of the weights is undone, and they are gone."""
        if self._round is not None:
            self._round.undo()
        self._round = None
        self._arrived.clear()
        for parameter in self._parameters:
            if type(parameter.grad) is ReleasedGradient:
                parameter.grad = None


def _remove(hooks: list[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()


def _before_accumulation(release: weakref.ref[Release], parameter: nn.Parameter, unused: Tensor) -> None:
    if (found := release()) is not None:
        with found.lock:
            found.check(parameter)


def _after_accumulation(release: weakref.ref[Release], parameter: nn.Parameter) -> None:
    if (found := release()) is not None:
        with found.lock, torch.no_grad():
            found.receive(parameter)


def _check_not_parallel() -> None:
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        raise RuntimeError(
            "release_gradients=True steps before the gradients of several processes are averaged. Make the DSTOptimizer "
            "with release_gradients=False for distributed training."
        )
