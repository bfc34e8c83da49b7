"""The step of Alg. 1, dense and plain: what the fast path must equal, bit for bit, after every step.

Everything is written out: full copies, one stable sort a silo, no tiles, no shared helpers but the distance. Use it
to check the library, to read the method, or to compare another implementation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .distances import distance


def reference_step(
    seed: Mapping[str, Tensor],
    updated: Mapping[str, Tensor],
    silos: Mapping[str, Sequence[str]],
    budgets: Mapping[str, int],
    kind: str,
    divisors: Mapping[str, float] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Project fully updated parameters onto the constraint (Eq. 7).

    Args:
        seed: Θ0, name → tensor of any shape.
        updated: Θ̂, the parameters after the optimizer's full update.
        silos: silo → names of its tensors; ties go to the earlier tensor, then the lower flat index.
        budgets: silo → number of components that may differ.
        kind: the distance.
        divisors: name → what its distances are divided by.

    Returns:
        (parameters, subset): the projected parameters, and for every name the sorted flat indices kept (int64).
    """
    parameters: dict[str, Tensor] = {}
    subset: dict[str, Tensor] = {}
    for silo, names in silos.items():
        sizes = [seed[name].numel() for name in names]
        theta0 = torch.cat([seed[name].flatten() for name in names])
        theta_hat = torch.cat([updated[name].flatten() for name in names])
        delta = torch.cat([distance(kind, seed[name].flatten(), updated[name].flatten()) for name in names])
        if divisors is not None:
            delta /= torch.cat([torch.full((n,), divisors[m]) for m, n in zip(names, sizes, strict=True)])
        if budgets[silo] >= sum(sizes):
            # No competition: whatever moved may stay.
            keep = (
                theta_hat.view(torch.uint8)
                .view(-1, theta_hat.element_size())
                .ne(theta0.view(torch.uint8).view(-1, theta0.element_size()))
                .any(1)
            )
        else:
            order = torch.sort(delta, descending=True, stable=True).indices[: budgets[silo]]
            keep = torch.zeros(sum(sizes), dtype=torch.bool)
            keep[order] = delta[order] > 0
        theta = torch.where(keep, theta_hat, theta0)
        for name, part, kept in zip(names, theta.split(sizes), keep.split(sizes), strict=True):
            parameters[name] = part.view(seed[name].shape)
            subset[name] = kept.nonzero().flatten()
    return parameters, subset
