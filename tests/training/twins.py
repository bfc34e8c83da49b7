"""Dense twins: the same training without an adapter, projected by the plain reference after every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from peft_dst.core import Constraint
from peft_dst.core.reference import reference_step
from tests.models import weights


class Dense:
    """An ordinary model under a constraint that nothing but `core.reference` keeps.

    Args:
        model: the model, with the seed's weights.
        constraint: of a DST twin: its silos, budgets and distance are used, nothing else.
    """

    def __init__(self, model: nn.Module, constraint: Constraint):
        self.model = model
        self.seed = weights(model)
        self.silos = {silo.name: [weight.name for weight in silo.weights] for silo in constraint.silos}
        self.budgets = {silo.name: silo.budget for silo in constraint.silos}
        self.distance = constraint.distance

    @torch.no_grad()
    def project(self) -> None:
        """To be called after every step of the optimizer."""
        projected, _ = reference_step(self.seed, weights(self.model), self.silos, self.budgets, self.distance)
        for name, value in projected.items():
            self.model.get_parameter(name).copy_(value)


class Project(TrainerCallback):
    """A dense twin under Trainer."""

    def __init__(self, twin: Dense):
        self.twin = twin

    def on_optimizer_step(self, *unused: Any, **also_unused: Any) -> None:
        self.twin.project()


def differing(model: nn.Module, seed: dict[str, Tensor]) -> int:
    """How many components under a model's constraint differ from the seed; none but them may."""
    now = {name.replace(".original_module", ""): t for name, t in weights(model.get_base_model()).items()}
    tuned = {weight.name for weight in model.constraint().weights}
    for name in seed.keys() - tuned:
        assert torch.equal(now[name], seed[name]), f"{name} is not tuned, and differs"
    return sum(int((now[name] != seed[name]).sum()) for name in tuned)
