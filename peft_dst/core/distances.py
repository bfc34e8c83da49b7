"""Component-wise distance of updated weights to their seed (Table 1 of the DST paper)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor


Distance = Literal["inverse_relative", "relative", "absolute"]
DISTANCES: tuple[str, ...] = get_args(Distance)
# What distances may be divided by instead of having silos (Appendix B): size or mean of a kind of module in one layer, or
# of all modules of the kind (`normalizer`).
Normalization = Literal["size", "mean", "module_size", "module_mean"]
NORMALIZATIONS: tuple[str, ...] = get_args(Normalization)

# A seed of (almost) zero counts as this in the relative distance. Far below any weight that matters, and large enough
# for the quotient to stay finite in float32 up to |θ̂ − θ0| = 2^27. So a component that leaves zero ranks above all
# others, as the limit of the formula has it, zeros rank among themselves by how far they moved, and 0 / 0 is 0.
RELATIVE_FLOOR = 2.0**-100


def normalizer(normalization: str) -> tuple[bool, str]:
    """Whether all modules of a kind have one divisor, whatever their layers; and whether it is a "size" or a "mean"."""
    kind, _, figure = normalization.rpartition("_")
    return bool(kind), figure


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """What is computed in, of such tensors: float64 if one of them is, else float32.

    A difference of two bfloat16 values is not representable in bfloat16 in general, and would tie with its neighbours.
    """
    return torch.float64 if torch.float64 in [tensor.dtype for tensor in tensors] else torch.float32


def distance(kind: str, seed: Tensor, updated: Tensor, out: Tensor | None = None) -> Tensor:
    """Distance Δ of each component to its seed.

    Args:
        kind: "inverse_relative" |θ0 · (θ̂ − θ0)| (Eq. 5, the paper's default), "relative" |(θ̂ − θ0) / θ0|, or
            "absolute" |θ̂ − θ0|.
        seed: θ0, any shape and floating dtype, e.g. (4096,) bfloat16.
        updated: θ̂, same shape.
        out: where to write Δ, same shape; float64 if either of the others is, or float32.

    Returns:
        Δ, same shape, non-negative, in `wide_dtype` (or out's dtype).
    """
    if not seed.dtype == updated.dtype == torch.float32:
        dtype = wide_dtype(seed, updated)
        seed, updated = seed.to(dtype), updated.to(dtype)
    delta = torch.sub(updated, seed, out=out)
    if kind == "absolute":
        return delta.abs_()
    if kind == "inverse_relative":
        return delta.mul_(seed).abs_()
    if kind == "relative":
        return delta.abs_().div_(seed.abs().clamp_min_(RELATIVE_FLOOR))
    raise ValueError(f"unknown distance {kind!r}: use one of {', '.join(DISTANCES)}")
