"""Distances that are divided by a size or a mean: where that changes something, and a plain reference of the divisors."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_dst.core import Constraint
from peft_dst.core.distances import NORMALIZATIONS


# Siloings and normalisations.
NORMALIZED = [(s, n) for s in ("module", "none") for n in NORMALIZATIONS if s == "none" or not n.startswith("module_")]


def divisors_of(seed: dict[str, Tensor], constraint: Constraint) -> dict[str, float]:
    """For each tuned parameter the size or mean of its module."""
    by_kind, kind = constraint.normalization.startswith("module_"), constraint.normalization.removeprefix("module_")
    modules = {w.name: constraint.modules[w.name][by_kind:] for w in constraint.weights}

    def divisor(module):
        values = torch.cat([seed[name].flatten().double() for name in modules if modules[name] == module])
        return float(values.numel() if kind == "size" else values.abs().mean())

    return {name: divisor(module) for name, module in modules.items()}
