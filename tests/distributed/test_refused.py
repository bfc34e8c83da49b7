"""Wrappers that step copies of a model's weights are refused before they change one: DeepSpeed's ZeRO, and FSDP1."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_dst import DSTConfig, DSTOptimizer
from tests.models import batch, bert


def adapted() -> tuple[nn.Module, PeftModel]:
    torch.manual_seed(0)
    base = bert()
    return base, get_peft_model(base, DSTConfig(epsilon=0.02))


def make_optimizer(parameters: list[nn.Parameter], own: bool) -> torch.optim.Optimizer:
    return DSTOptimizer(parameters, torch.optim.SGD, lr=0.1) if own else torch.optim.SGD(parameters, lr=0.1)


def train_another(own: bool) -> None:
    base, model = adapted()
    before = {name: p.clone() for name, p in base.named_parameters()}
    base(**batch("bert")).loss.backward()
    make_optimizer([p for p in model.parameters() if p.requires_grad], own).step()
    assert sum(int((p != before[n]).sum()) for n, p in base.named_parameters()) == model.constraint().budget


# FSDP1


def flatten(rank: int, world: int, original: bool) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    options = {"use_orig_params": original, "device_id": torch.device("cpu")}
    base, model = adapted()
    before = {name: p.clone() for name, p in base.named_parameters()}
    with pytest.raises(NotImplementedError, match=r"'bert\.embeddings.*FSDP1.*fsdp_version: 2"):
        FullyShardedDataParallel(model, **options)
    # Nothing was changed: it trains as it would have without.
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())
    for own in (False, True):
        wrapped = FullyShardedDataParallel(adapted()[1].eval(), **options)
        optimizer = make_optimizer(list(wrapped.parameters()), own)
        wrapped.train()
        wrapped(**batch("bert", rank)).loss.backward()
        parts = [p.clone() for p in wrapped.parameters()]
        with pytest.raises(NotImplementedError, match=r"'bert\.embeddings.*FSDP1.*fsdp_version: 2"):
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(parts, wrapped.parameters(), strict=True))
        # Another model's optimizer is none of its business.
        train_another(own)
        wrapped.module.constraint().retire()
        optimizer.step()
    frozen = adapted()[1].requires_grad_(False)
    FullyShardedDataParallel(frozen, **options)
    if original:
        wrapped = FullyShardedDataParallel(bert(), **options)
        with pytest.raises(NotImplementedError, match="FSDP1"):
            get_peft_model(wrapped.module, DSTConfig(epsilon=0.02))


@pytest.mark.parametrize("original", [False, True])
def test_fsdp1(together, original):
    together(2, flatten, original)


def step_in_parts(rank: int, world: int, siloing: str) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    found = []
    for kind in (torch.optim.AdamW, ZeroRedundancyOptimizer):
        torch.manual_seed(0)
        model = get_peft_model(bert(), DSTConfig(epsilon=0.02, siloing=siloing))
        parameters = [p for p in model.parameters() if p.requires_grad]
        inner = {"optimizer_class": torch.optim.AdamW} if kind is ZeroRedundancyOptimizer else {}
        optimizer = kind(parameters, lr=1e-2, eps=1e-4, **inner)
        before = [p.clone() for p in parameters]
        nn.parallel.DistributedDataParallel(model)(**batch("bert")).loss.backward()
        if inner and siloing != "parameter":
            with pytest.raises(
                NotImplementedError, match=r"ZeroRedundancyOptimizer steps only some of the silo.*FSDP2"
            ):
                optimizer.step()
            assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
            return
        optimizer.step()
        found.append([w.indices for w in model.constraint().weights])
    # What competes is stepped by one process.
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert sum(indices.numel() for indices in found[0]) > 0


@pytest.mark.parametrize("siloing", ["module_and_layer", "parameter"])
def test_zero_redundancy_optimizer(together, siloing):
    together(2, step_in_parts, siloing)


# DeepSpeed, as far as it is seen from here: its engine keeps the model past `__setattr__`, and leaves flat copies of the
# parameters to the optimizer.
ENGINE = """
import torch
from torch import nn

class Zero:
    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.live = [list(group["params"]) for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["params"] = [nn.Parameter(torch.cat([p.detach().reshape(-1) for p in group["params"]]))]
        self.param_groups = optimizer.param_groups

    def step(self):
        for group, live in zip(self.param_groups, self.live):
            group["params"][0].grad = torch.cat([p.grad.reshape(-1) for p in live])
        self.optimizer.step()
        for group, live in zip(self.param_groups, self.live):
            for p, new in zip(live, group["params"][0].split([p.numel() for p in live])):
                p.data.copy_(new.view_as(p))

class DeepSpeedEngine(nn.Module):
    def __init__(self, model, optimizer=None, stage=0):
        super().__init__()
        self.__dict__["module"] = self._modules["module"] = model
        self.stage = stage
        self.optimizer = Zero(optimizer) if stage and optimizer is not None else optimizer

    def zero_optimization_stage(self):
        return self.stage
"""


@pytest.fixture
def deepspeed(tmp_path, monkeypatch) -> ModuleType:
    """A stand-in for `deepspeed.runtime.engine`, found and imported as that is."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
        monkeypatch.delitem(sys.modules, name)
    folder = tmp_path / "deepspeed" / "runtime"
    folder.mkdir(parents=True)
    for package in (folder.parent, folder):
        (package / "__init__.py").touch()
    (folder / "engine.py").write_text(ENGINE)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("deepspeed.runtime.engine")
    assert Path(str(module.__file__)).is_relative_to(tmp_path)
    yield module
    for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
        del sys.modules[name]


@pytest.mark.parametrize("own", [False, True])
def test_an_engine_that_steps_copies_is_refused(deepspeed, own):
    _, model = adapted()
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], own)
    with pytest.raises(NotImplementedError, match=r"ZeRO stage 2.*'bert\.embeddings.*fsdp_version: 2"):
        deepspeed.DeepSpeedEngine(model, optimizer, stage=2)


@pytest.mark.parametrize("own", [False, True])
def test_an_engine_that_was_there_before_the_adapter_is_refused_at_the_step(deepspeed, own):
    base = bert()
    parameters = list(base.parameters())
    engine = deepspeed.DeepSpeedEngine(base, make_optimizer(parameters, own), stage=1)
    get_peft_model(base, DSTConfig(epsilon=0.02))
    base(**batch("bert")).loss.backward()
    before = [p.clone() for p in parameters]
    with pytest.raises(NotImplementedError, match=r"ZeRO stage 1, Zero"):
        engine.optimizer.step()
    train_another(own)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


@pytest.mark.parametrize("own", [False, True])
def test_an_engine_that_steps_the_parameters_keeps_the_constraint(deepspeed, own):
    base, model = adapted()
    before = {name: p.clone() for name, p in base.named_parameters()}
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], own)
    engine = deepspeed.DeepSpeedEngine(model, optimizer)
    base(**batch("bert")).loss.backward()
    engine.optimizer.step()
    moved = sum(int((p != before[name]).sum()) for name, p in base.named_parameters())
    assert moved == model.constraint().budget


def test_an_engine_that_trains_nothing_under_a_constraint_passes(deepspeed):
    _, model = adapted()
    deepspeed.DeepSpeedEngine(model)
    deepspeed.DeepSpeedEngine(nn.Linear(2, 2), torch.optim.SGD([nn.Parameter(torch.zeros(2))]), stage=2)
    model.requires_grad_(False)
    deepspeed.DeepSpeedEngine(model, torch.optim.SGD([nn.Parameter(torch.zeros(2))]), stage=2)


def test_what_zero_3_has_divided_cannot_be_tuned():
    base = bert()
    for parameter in base.parameters():
        parameter.ds_id = 0
    with pytest.raises(NotImplementedError, match=r"'bert\.embeddings.*ZeRO stage 3.*fsdp_version: 2"):
        get_peft_model(base, DSTConfig(epsilon=0.02))


def initialize(rank: int, world: int, stage: int, own: bool, half: bool) -> str:
    """What DeepSpeed itself makes of it: the message of a refusal, or how much two steps have changed."""
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world), "DS_ACCELERATOR": "cpu"}
    import deepspeed

    base, model = adapted()
    before = {name: p.clone() for name, p in base.named_parameters()}
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": half},
    }
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], own)
    try:
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    except NotImplementedError as error:
        return str(error)
    for step in range(2):
        engine.backward(engine(**batch("bert", step)).loss)
        engine.step()
    moved = sum(int((p != before[name]).sum()) for name, p in base.named_parameters())
    return f"{moved} of {model.constraint().budget}"


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not among what the tests install"
)
@pytest.mark.parametrize(("stage", "half"), [(0, False), (0, True), (1, False), (2, True), (3, False)])
@pytest.mark.parametrize("own", [False, True])
def test_deepspeed_itself(together, stage, own, half):
    for answer in together(2, initialize, stage, own, half):
        if stage or half:
            assert re.search(rf"ZeRO stage {stage}.*'bert\.embeddings.*fsdp_version: 2", answer)
        else:
            assert answer == "129 of 129"
