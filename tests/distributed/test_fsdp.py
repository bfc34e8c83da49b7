"""FSDP2: weights that two or four processes hold together end up as those of one process do."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard

from peft_dst import DSTConfig, DSTOptimizer
from tests.models import BUILDERS, batch


STEPS = 4


def divide(model: nn.Module) -> None:
    """fully_shard of every layer, and of the rest."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for layer in module:
                fully_shard(layer)
    fully_shard(model)


def train(rank: int, world: int, architecture: str, options: dict, own: bool, dtype=torch.float32) -> dict:
    torch.manual_seed(0)
    base = BUILDERS[architecture]().to(dtype)
    model = get_peft_model(base, DSTConfig(**options))
    if world > 1:
        divide(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = DSTOptimizer(parameters, torch.optim.AdamW, lr=1e-2) if own else torch.optim.AdamW(parameters, lr=1e-2)
    for step in range(STEPS):
        rows = {k: v[rank::world] for k, v in batch(architecture, step).items()}
        model(**rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = {}
    for weight in model.constraint().weights:
        found[weight.name] = weight.joined(*(weight.box and (weight.indices, weight.values())))
    return found


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_processes_agree_with_one(together, architecture, own):
    options = {"epsilon": 0.02}
    (alone,) = together(1, train, architecture, options, own)
    for found in together(2, train, architecture, options, own):
        for name, (indices, values) in alone.items():
            assert torch.equal(indices, found[name][0]), name
            torch.testing.assert_close(values, found[name][1], rtol=1e-4, atol=1e-6)
