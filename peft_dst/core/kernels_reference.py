"""The fused step's formulas in plain torch, one operation at a time: what the kernels must equal, bit for bit.

The order of operations is that of `torch.optim.AdamW(foreach=True)` on CUDA. torch itself fuses some products and sums
(lerp, addcmul, addcdiv), and takes roots on the CPU that are off by a last bit here and there, so it differs from this
in the last bits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .adamw import AdamWScalars
from .distances import distance
from .tiles import bits


def moments_reference(grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scalars: AdamWScalars) -> None:
    """Update the moments, float32 (n,), in place; the gradient (n,) may be of any floating dtype."""
    g = grad.float()
    base = exp_avg if scalars.lerp > 0 else g
    exp_avg.copy_(base + scalars.lerp * (g - exp_avg))
    exp_avg_sq.copy_(exp_avg_sq * scalars.beta2 + scalars.weight2 * (g * g))


def updated_reference(theta: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scalars: AdamWScalars) -> Tensor:
    """θ̂, float32 (n,), from θt (n,) in any floating dtype and the updated moments."""
    # torch's own float32 root is not correctly rounded on the CPU (MKL); one in float64 is, after rounding. And a
    # divisor that is a number would be turned into a factor on CUDA.
    root = exp_avg_sq.double().sqrt().float()
    denominator = root / torch.full_like(exp_avg_sq, scalars.correction) + scalars.eps
    return theta.float() * scalars.decay + scalars.step * (exp_avg / denominator)


def adamw_maxima_reference(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scalars: AdamWScalars, kind: str, block: int
) -> Tensor:
    """The first pass over one flat tensor (n,): moments updated in place, the largest Δ of each block returned.

    Returns:
        Maxima, float32 (⌈n / block⌉,). Marked weights (all bits set) count 0; NaN and infinity survive.
    """
    moments_reference(grad, exp_avg, exp_avg_sq, scalars)
    delta = distance(kind, weight.float(), updated_reference(weight, exp_avg, exp_avg_sq, scalars))
    delta = torch.where(bits(weight) == -1, 0.0, delta)
    return pad(delta, (0, -delta.numel() % block)).view(-1, block).amax(1)
