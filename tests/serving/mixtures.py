"""What the tests of mixed batches start from: inputs, plain twins, and what those give sample by sample."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from tests.serving.helpers import applied
from tests.test_mixed import inputs


NAMES = ["task0", None, "task1", "task0", "task2", "task1"]


def twins_of(base: nn.Module, folders: list[Path]) -> dict[str | None, nn.Module]:
    """The plain twins, by their deltas' names; None: a copy of the base."""
    return {None: copy.deepcopy(base), **{folder.name: applied(base, folder).eval() for folder in folders}}


def rows(name: str, count: int) -> dict[str, torch.Tensor]:
    """Inputs of so many samples, each of them another."""
    torch.manual_seed(1)
    found = inputs(name)
    for key, tensor in found.items():
        tensor = tensor.repeat(-(-count // len(tensor)), *[1] * (tensor.dim() - 1))[:count]
        if "ids" in key:
            tensor = torch.randint(3, 40, tensor.shape)
        found[key] = tensor
    return found


def one_by_one(plain: dict, names: list, given: dict) -> torch.Tensor:
    """The plain twin: each sample by itself, through a copy with its delta written in."""
    with torch.no_grad():
        return torch.cat(
            [plain[name](**{k: t[i : i + 1] for k, t in given.items()}).logits for i, name in enumerate(names)]
        )
