"""The fused step within a DSTOptimizer: what becomes of a step that is interrupted, or cannot be made."""

from __future__ import annotations

import itertools

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_dst import DSTConfig, DSTOptimizer
from peft_dst.core import SparseWeight, adamw, kernels
from peft_dst.training import fused
from tests.models import assert_same, weights


@pytest.fixture(autouse=True)
def interpreted():
    if not kernels.available(torch.empty(1)):
        pytest.skip("Triton is not installed, or not to be interpreted")


def trained(steps=2, **options):
    """Two linear layers, each tensor a silo of its own, after some steps; with their seed."""
    torch.manual_seed(0)
    base = nn.ModuleDict({name: nn.Linear(8, 8) for name in "ab"}).to(options.pop("dtype", torch.float32))
    seed = weights(base)
    model = get_peft_model(base, DSTConfig(epsilon=0.25, target_modules=["a", "b"], siloing="parameter"))
    optimizer = DSTOptimizer([p for p in model.parameters() if p.requires_grad], lr=1e-2, **options)
    for _ in range(steps):
        step(base, optimizer)
    return model, base, seed, optimizer


def step(base, optimizer):
    for parameter in base.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_that_is_interrupted_anywhere_is_undone(dtype, monkeypatch):
    """Ctrl-C before or after any of the kernels, and of the notes that are taken of what they wrote."""
    model, base, seed, optimizer = trained(kernels=True, dtype=dtype)
    left = -1

    def interruptible(function):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            result = function(*args, **kwargs)
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            return result

        return call

    monkeypatch.setattr(kernels._Batch, "_launch", interruptible(kernels._Batch._launch))
    monkeypatch.setattr(kernels, "_from_bits", interruptible(kernels._from_bits))
    monkeypatch.setattr(SparseWeight, "place", interruptible(SparseWeight.place))
    before = weights(base)
    for moment in itertools.count(1):
        left = moment
        try:
            step(base, optimizer)
            break
        except KeyboardInterrupt:
            left = -1
        assert_same(weights(base), before)
        with model.disable_adapter():
            assert_same(weights(base), seed)
    assert moment > 24
    assert sum(silo.free() for silo in model.constraint().silos) == model.constraint().budget
    left = -1
    with model.disable_adapter():
        assert_same(weights(base), seed)


@pytest.fixture
def no_compiler(monkeypatch):
    """Every kernel fails to be compiled, as without a C compiler; the number of attempts is told."""
    attempts = []

    def fail(*args):
        attempts.append(args)
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(kernels._Batch, "_launch", fail)
    kernels.failure.cache_clear()
    fused.warn_once.cache_clear()
    yield attempts
    kernels.failure.cache_clear()
    fused.warn_once.cache_clear()


def test_kernels_that_were_asked_for_and_cannot_be_compiled(no_compiler):
    model, base, _, optimizer = trained(0, kernels=True)
    before = weights(base)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"(?s)Failed to find C compiler.*kernels=False"):
            step(base, optimizer)
    assert len(no_compiler) == 1
    assert not optimizer.state
    assert_same(weights(base), before)
    assert not kernels.available(base["a"].weight)
    optimizer.kernels = False
    step(base, optimizer)
    assert model.constraint().silos[0].free() == 16


def test_kernels_that_cannot_be_compiled_are_left_out(no_compiler, monkeypatch):
    """On CUDA nobody asked for them."""
    model, base, _, optimizer = trained(0)
    monkeypatch.setattr(fused, "BY_DEFAULT", "cpu")
    with pytest.warns(RuntimeWarning, match=r"(?s)Failed to find C compiler.*C compiler.*kernels=False") as caught:
        step(base, optimizer)
    step(base, optimizer)
    assert len(caught) == len(no_compiler) == 1
    assert model.constraint().steps == 2
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}


@pytest.mark.parametrize("trouble", ["Triton Error [CUDA]: out of memory", torch.OutOfMemoryError("out of memory")])
def test_what_the_device_raises_is_not_taken_for_a_lack_of_a_compiler(trouble, no_compiler, monkeypatch):
    """It is raised as it is, and the kernels are used when it is over."""
    _, base, _, optimizer = trained(0, kernels=True)
    with monkeypatch.context() as patched:

        def fail(*args):
            raise trouble if isinstance(trouble, Exception) else RuntimeError(trouble)

        patched.setattr(kernels._Batch, "_launch", fail)
        with pytest.raises(RuntimeError, match=r"out of memory$"):
            step(base, optimizer)
    assert not optimizer.state
    with pytest.raises(RuntimeError, match="Failed to find C compiler"):
        step(base, optimizer)
    assert len(no_compiler) == 1


def test_kernels_that_the_driver_does_not_load_are_left_out(monkeypatch, no_compiler):
    model, base, _, optimizer = trained(0)
    monkeypatch.setattr(fused, "BY_DEFAULT", "cpu")

    def fail(*args):
        raise RuntimeError("Triton Error [CUDA]: device kernel image is invalid")

    monkeypatch.setattr(kernels._Batch, "_launch", fail)
    with pytest.warns(RuntimeWarning, match=r"device kernel image is invalid.*kernels=False"):
        step(base, optimizer)
    assert model.constraint().steps == 1


def test_a_step_that_cannot_be_prepared_is_not_counted(monkeypatch):
    _, base, _, optimizer = trained(1, kernels=True)

    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(adamw, "AdamWTensor", fail)
    with pytest.raises(torch.OutOfMemoryError):
        step(base, optimizer)
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}


def test_the_factors_of_a_step_are_computed_once_for_a_group():
    _, base, _, optimizer = trained(1, kernels=True)
    own = [base["b"].bias]
    optimizer.param_groups[0]["params"] = [p for p in optimizer.param_groups[0]["params"] if p is not own[0]]
    optimizer.add_param_group({"params": own, "lr": 0.1})

    def computed():
        """Hits and misses of a step of four tensors."""
        adamw.adamw_scalars.cache_clear()
        step(base, optimizer)
        return adamw.adamw_scalars.cache_info()[:2]

    assert computed() == (2, 2)
    # One of the three tensors that a group has is ahead of the others.
    optimizer.state[base["a"].bias]["step"] += 5
    assert computed() == (1, 3)


def test_the_live_values_of_a_subset_are_gathered_once(monkeypatch):
    _, base, _, optimizer = trained(1, kernels=True)
    gathered = []
    values = SparseWeight.values
    monkeypatch.setattr(SparseWeight, "values", lambda weight: gathered.append(weight) or values(weight))
    step(base, optimizer)
    assert len(gathered) == len(set(gathered)) == 4
