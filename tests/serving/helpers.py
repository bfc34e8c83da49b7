"""What the tests of serving start from: adapters of one base, plain twins, and waiting for threads."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from peft import get_peft_model
from torch import nn

from peft_dst import DSTConfig
from peft_dst.delta import SparseDelta
from peft_dst.serving import DeltaPool
from tests.models import BUILDERS, train


def deltas_of(name: str, folder: Path, count: int = 3, dtype: torch.dtype = torch.float32, **options: object) -> list:
    """A base, and folders of adapters of it, trained on different data."""
    torch.manual_seed(0)
    base = BUILDERS[name]().to(dtype).eval()
    found = []
    for i in range(count):
        model = get_peft_model(copy.deepcopy(base), DSTConfig(epsilon=0.05, **options))
        train(model, name, first=10 * i)
        model.save_pretrained(folder / f"task{i}")
        found.append(folder / f"task{i}")
    return [base, *found]


def pool_of(base: nn.Module, folders: Iterable[Path], **options: int) -> DeltaPool:
    """A pool of these deltas, each called like its folder."""
    made = DeltaPool(base, **options)
    for folder in folders:
        made.add(folder.name, folder)
    return made


def bits_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone().view(torch.uint8) for name, p in model.named_parameters()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def applied(base: nn.Module, folder: Path) -> nn.Module:
    """The plain twin: a copy of the base with a delta written into it tensor by tensor."""
    model = copy.deepcopy(base)
    delta = SparseDelta.load(folder)
    delta.apply(model)
    for key, tensor in delta.dense.items():
        path, _, attribute = key.removeprefix("base_model.model.").rpartition(".")
        # What it is tied to stays: modules_to_save are copies.
        setattr(model.get_submodule(path), attribute, nn.Parameter(tensor))
    return model


BATCH = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def answer(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=BATCH).logits


def until(true: Callable[[], object]) -> None:
    """Wait for other threads to make it so."""
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)
