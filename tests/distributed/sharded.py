"""Models that FSDP2 has divided, trained and looked at alike by however many processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from peft import PeftModel, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard

from peft_dst import DSTConfig, DSTOptimizer
from tests.models import BUILDERS, batch


STEPS = 4


def divide(model: nn.Module, **options: object) -> None:
    """fully_shard of every layer, and of the rest."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    # From within: a layer of T5's has a list in it.
    for layer in (layer for layers in reversed(lists) for layer in layers):
        fully_shard(layer, **options)
    fully_shard(model, **options)


def make(world: int, architecture: str, options: dict, dtype: torch.dtype = torch.float32) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(BUILDERS[architecture]().to(dtype), DSTConfig(**options))
    if world > 1:
        divide(model)
        assert all(weight.is_divided for weight in model.constraint().weights)
    return model


def optimizer_of(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    # Adam divides by the size of gradients. With its usual eps the smallest ones' rounding would show.
    if kind == "hook":
        return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-4)
    options = {"eps": 1e-4} if kind == "AdamW" else {}
    return DSTOptimizer(parameters, getattr(torch.optim, kind), lr=1e-2, **options)


def step(
    rank: int, world: int, model: nn.Module, optimizer: torch.optim.Optimizer, architecture: str, number: int
) -> None:
    """One step on a batch of which each process has its share."""
    rows = {k: v[rank::world].contiguous() for k, v in batch(architecture, number).items()}
    model(**rows).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def subsets(model: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Name → positions in the whole tensor, and the values there. To be called by all processes."""
    own = {w.name: (w.noted()[0], w.values(), w.box) for w in model.constraint().weights}
    own = {name: (box.outwards(positions), values) for name, (positions, values, box) in own.items()}
    if dist.get_world_size() == 1:
        return own
    # At once: one by one they would send some hundred messages.
    parts: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return {name: _merge([part[name] for part in parts]) for name in own}


def _merge(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries of one tensor, each once: what is repeated is the same in all processes."""
    positions, values = (torch.cat(part) for part in zip(*parts, strict=True))
    merged, at = positions.unique(return_inverse=True)
    found = torch.empty(merged.shape, dtype=values.dtype).index_put_((at,), values)
    assert torch.equal(found[at], values)
    return merged, found


def assert_agree(alone, divided, rtol=1e-4, atol=1e-6):
    assert sum(indices.numel() for indices, _ in alone.values()) > 0
    for name, (indices, values) in alone.items():
        assert torch.equal(indices, divided[name][0]), name
        torch.testing.assert_close(values, divided[name][1], rtol=rtol, atol=atol)
