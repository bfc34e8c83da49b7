"""What one step of AdamW under the constraint takes and gives: the common ground of the CPU's and the GPU's way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .selection import Selection
from .tiles import NonFiniteDistanceError


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class AdamWScalars:
    """The options of a parameter group, and what AdamW multiplies and divides by in one step of it.

    All are Python floats, computed as `torch.optim` does, each to be rounded to float32 where it is used.

    Attributes:
        lr, betas, eps, weight_decay: of the group.
        count: number of the step now to be made, from 1.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    count: float

    @property
    def decay(self) -> float:
        """1 - lr · weight_decay."""
        return 1 - self.lr * self.weight_decay

    @property
    def lerp(self) -> float:
        """Weight of the gradient in the first moment, 1 - β1.

        Where that is 0.5 or more it is less 1, and the result is counted from the gradient (as torch's lerp does).
        """
        # torch takes the complement of a weight that is already rounded.
        weight = float(torch.tensor(1 - self.betas[0], dtype=torch.float32))
        return weight if weight < 0.5 else weight - 1

    @property
    def beta2(self) -> float:
        return self.betas[1]

    @property
    def weight2(self) -> float:
        """1 - β2."""
        return 1 - self.betas[1]

    @property
    def correction(self) -> float:
        """√(1 - β2^count)."""
        return (1 - self.betas[1] ** self.count) ** 0.5

    @property
    def step(self) -> float:
        """-lr / (1 - β1^count)."""
        return -self.lr / (1 - self.betas[0] ** self.count)


@dataclass(frozen=True)
class AdamWTensor:
    """One tensor of a silo before the step. All tensors are contiguous and on one device; no seed is needed but these.

    Attributes:
        weight: live weight Θt, any shape, float32, bfloat16 or float16.
        grad: its gradient, same shape, any of these dtypes.
        exp_avg, exp_avg_sq: first and second moment, same shape, float32; updated in place.
        scalars: of its parameter group, for the step now to be made.
        indices: flat positions of the current subset, int64 (k,), sorted.
        seeds: seed values there, (k,) in the weight's dtype.
        values: exact values there, float32 (k,), of which the live weight is the rounding.
    """

    weight: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    scalars: AdamWScalars
    indices: Tensor
    seeds: Tensor
    values: Tensor


@dataclass(frozen=True)
class SiloStep:
    """A silo after the step.

    Attributes:
        selection: the new subset, as `select` would choose it on the dense Θ̂, and its threshold.
        seeds: for each tensor its seed values at the new subset, (k_i,) in the weight's dtype.
        values: for each tensor θ̂ there, float32 (k_i,); the live weight is its rounding.
    """

    selection: Selection
    seeds: list[Tensor]
    values: list[Tensor]


class NonFiniteStepError(NonFiniteDistanceError):
    """As its parent; `silo` is the index, among the silos of the call, of the one concerned."""

    def __init__(self, silo: int, position: int):
        super().__init__(position)
        self.silo = silo


def supports_group(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether the fused step is the step of this optimizer for one of its parameter groups.

    It is for AdamW, and for Adam without weight decay; a subclass may do anything, so none is taken. Neither amsgrad,
    maximize, differentiable and capturable, nor rates that are tensors.
    """
    if type(optimizer) not in (torch.optim.AdamW, torch.optim.Adam):
        return False
    if any(group.get(option) for option in ("amsgrad", "maximize", "differentiable", "capturable")):
        return False
    if any(isinstance(value, Tensor) for value in (group["lr"], *group["betas"], group["weight_decay"])):
        return False
    return group["weight_decay"] == 0 or bool(group.get("decoupled_weight_decay", type(optimizer) is torch.optim.AdamW))


def supports_tensors(weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> bool:
    """Whether one parameter's tensors suit the fused step: layout, dtypes, shapes, one device."""
    tensors = (weight, grad, exp_avg, exp_avg_sq)
    return (
        all(t.layout == torch.strided and t.is_contiguous() and t.device == weight.device for t in tensors)
        and all(t.shape == weight.shape for t in tensors)
        and weight.dtype in DTYPES
        and grad.dtype in DTYPES
        and exp_avg.dtype == exp_avg_sq.dtype == torch.float32
    )
