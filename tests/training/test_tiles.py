"""AdamW(fused=True) on the CPU steps tile by tile, in the optimizer hook and in DSTOptimizer, and nobody can tell."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from peft_dst import DSTConfig, DSTOptimizer
from peft_dst.core import Silo, hook, tiled_step
from tests.models import assert_same, trainable, weights


FUSED = {"lr": 1e-2, "fused": True}


def model(dtype=torch.float32, **options):
    """Two layers, each with its bias a silo, and a dense head."""
    torch.manual_seed(0)
    base = nn.ModuleDict({"a": nn.Linear(60, 70), "b": nn.Linear(70, 50), "head": nn.Linear(50, 3)}).to(dtype)
    config = DSTConfig(epsilon=0.004, target_modules=["a", "b"], modules_to_save=["head"], **options)
    return get_peft_model(base, config)


def backward(own, step):
    torch.manual_seed(step)
    for parameter in own.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None


@pytest.fixture
def silos(monkeypatch):
    """How many silos each call has stepped on tiles."""
    found = []
    choose = tiled_step.choose

    def note(groups, state, constraint, silos, values):
        found.append(len(silos))
        return choose(groups, state, constraint, silos, values)

    monkeypatch.setattr(tiled_step, "choose", note)
    return found


@pytest.fixture
def without(monkeypatch):
    """Steps on working copies alone, while it is entered."""

    def run(step):
        with monkeypatch.context() as patch:
            patch.setattr(tiled_step, "SPARSE", 1 << 30)
            step()

    return run


def assert_same_state(one, other):
    for own, others in zip(one.state.values(), other.state.values(), strict=True):
        assert own.keys() == others.keys()
        for name in own:
            assert torch.equal(own[name], others[name]), name


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("distance", ["inverse_relative", "relative", "absolute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "hook"])
def test_it_is_the_step_on_working_copies(cls, distance, dtype, silos, without):
    through_hook = dtype == "hook"
    dtype = torch.float32 if through_hook else dtype
    decay = {} if cls is torch.optim.Adam else {"weight_decay": 0.1}

    def make(parameters):
        groups = [{"params": parameters[:1], "lr": 3e-2}, {"params": parameters[1:]}]
        return cls(groups, **FUSED, **decay) if through_hook else DSTOptimizer(groups, cls, **FUSED, **decay)

    one, other = model(dtype, distance=distance), model(dtype, distance=distance)
    optimizers = [make(trainable(own)) for own in (one, other)]
    for step in range(6):
        backward(one, step)
        backward(other, step)
        optimizers[0].step()
        without(optimizers[1].step)
        assert_same(weights(one), weights(other))
        for mine, theirs in zip(one.constraint().silos, other.constraint().silos, strict=True):
            assert torch.equal(mine.threshold, theirs.threshold)
            assert mine.arrived() == theirs.arrived()
    assert_same_state(*optimizers)
    assert silos == [2] * 6
    assert one.constraint().steps == other.constraint().steps == 6


def with_closure(own, optimizer):
    optimizer.step(lambda: torch.zeros(()))


def plain(own, optimizer):
    optimizer.step()


class Subclass(torch.optim.AdamW):
    pass


@pytest.mark.parametrize(
    ("make", "step"),
    [
        (lambda p: torch.optim.AdamW(p, **FUSED), with_closure),
        (lambda p: torch.optim.AdamW(p, lr=1e-2), plain),
        (lambda p: torch.optim.AdamW(p, **FUSED, amsgrad=True), plain),
        (lambda p: Subclass(p, **FUSED), plain),
        (lambda p: DSTOptimizer(p, **FUSED, kernels=False), plain),
        (lambda p: DSTOptimizer(p, Subclass, **FUSED, separable=True), plain),
    ],
)
def test_where_it_would_be_another_step_it_is_not_taken(make, step, silos):
    own = model()
    optimizer = make(trainable(own))
    for number in range(2):
        backward(own, number)
        step(own, optimizer)
    assert not silos
    assert own.constraint().steps == 2


@pytest.mark.parametrize("register", ["register_step_pre_hook", "register_step_post_hook"])
def test_hooks_of_the_optimizer_see_the_gradients_and_the_updates_that_they_always_saw(register, silos):
    """A hook may clip gradients after ours has run, or look at what the optimizer has written."""
    own, seen = model(), []
    optimizer = torch.optim.AdamW(trainable(own), **FUSED)

    def look(optimizer, args, kwargs):
        seen.append([group["params"] for group in optimizer.param_groups])
        for parameter in trainable(own):
            parameter.grad.mul_(0.5)

    getattr(optimizer, register)(look)
    backward(own, 0)
    optimizer.step()
    assert not silos
    assert seen[0] == [trainable(own)]


@pytest.mark.parametrize("register", [register_optimizer_step_pre_hook, register_optimizer_step_post_hook])
def test_hooks_of_all_optimizers_see_them_too(register, silos):
    own, seen = model(), []
    optimizer = torch.optim.AdamW(trainable(own), **FUSED)
    backward(own, 0)
    hooked = register(lambda *args: seen.append([group["params"] for group in optimizer.param_groups]))
    try:
        optimizer.step()
    finally:
        hooked.remove()
    assert not silos
    assert seen == [[trainable(own)]]
    optimizer.step()
    assert silos


def test_a_scaler_leaves_fused_optimizers_to_unscale(silos):
    own, twin = model(), model()
    optimizers = [torch.optim.AdamW(trainable(each), **FUSED) for each in (own, twin)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    backward(own, 0)
    backward(twin, 0)
    for parameter in trainable(own):
        parameter.grad.mul_(1024.0)
    scaler.step(optimizers[0])
    assert not silos
    optimizers[1].step()
    assert silos
    assert_same(weights(own), weights(twin))


@pytest.fixture
def stepped():
    """A model with its optimizer after two steps, its weights then, and its seed."""
    own = model()
    seed = weights(own)
    optimizer = torch.optim.AdamW(trainable(own), **FUSED)
    for step in range(2):
        backward(own, step)
        optimizer.step()
    return own, optimizer, weights(own), seed


def out_of_memory(*args, **kwargs):
    raise MemoryError


def tuned(found):
    return {name: tensor for name, tensor in found.items() if "head" not in name}


def test_a_step_that_raises_has_changed_no_tuned_weight(stepped, monkeypatch):
    own, optimizer, before, _ = stepped
    parameters = [list(group["params"]) for group in optimizer.param_groups]
    backward(own, 2)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "_init_group", out_of_memory)
        with pytest.raises(MemoryError):
            optimizer.step()
    assert_same(weights(own), before)
    # Whoever saves the optimizer now saves all of it.
    assert len(optimizer.state_dict()["state"]) == len(parameters[0])
    assert [list(group["params"]) for group in optimizer.param_groups] == parameters
    backward(own, 3)
    optimizer.step()
    assert own.constraint().steps == 3


def test_after_a_step_that_raised_the_next_one_has_all_parameters(stepped, monkeypatch):
    own, optimizer, before, _ = stepped
    backward(own, 2)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "_init_group", out_of_memory)
        with pytest.raises(MemoryError):
            optimizer.step()
    backward(own, 3)
    optimizer.step()
    assert all(
        (weights(own)[name] != before[name]).any() for name in before if "weight" in name and "original" not in name
    )


def test_an_update_that_is_not_finite(stepped):
    own, optimizer, before, seed = stepped
    backward(own, 2)
    own.get_base_model()["b"].weight.grad[3, 3] = torch.nan
    with pytest.raises(FloatingPointError, match=r"'b\.weight' is NaN or infinite"):
        optimizer.step()
    assert_same(weights(own), before)
    assert len(optimizer.param_groups[0]["params"]) == len(trainable(own))
    with own.disable_adapter():
        assert_same(tuned(weights(own)), tuned(seed))


@pytest.mark.parametrize("silo", [0, 1])
def test_a_step_that_is_interrupted_while_it_is_written(silo, stepped, monkeypatch):
    own, optimizer, before, seed = stepped
    write, calls = Silo.write, []

    def interrupted(self, *args):
        calls.append(self)
        if len(calls) == silo + 1:
            raise KeyboardInterrupt
        write(self, *args)

    backward(own, 2)
    with monkeypatch.context() as patch:
        patch.setattr(Silo, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    assert len(calls) == silo + 1
    assert_same(tuned(weights(own)), tuned(before))
    with own.disable_adapter():
        assert_same(tuned(weights(own)), tuned(seed))
    backward(own, 3)
    optimizer.step()
    assert sum(each.free() for each in own.constraint().silos) == own.constraint().budget


def test_a_step_that_raised_keeps_nothing_alive(monkeypatch):
    own = model()
    optimizer = torch.optim.AdamW(trainable(own), **FUSED)
    backward(own, 0)
    monkeypatch.setattr(torch.optim.AdamW, "_init_group", out_of_memory)
    with pytest.raises(MemoryError):
        optimizer.step()
    assert optimizer in hook._tiled
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None


def test_a_copy_of_the_optimizer_steps_its_own_model(stepped):
    """The bound of a seed is that of the weights at hand, also after these were replaced by others."""
    own, optimizer, _, _ = stepped
    copied, again = copy.deepcopy((own, optimizer))
    for step in (2, 3):
        backward(own, step)
        backward(copied, step)
        optimizer.step()
        again.step()
    assert_same(weights(own), weights(copied))


def test_the_bound_of_a_seed_follows_the_seed():
    own = model()
    weight = own.constraint().silos[0].weights[0]
    assert weight.seed_bound() == float(weight.data.abs().max())
    state = {name: 100 * tensor for name, tensor in own.get_base_model().state_dict().items() if "dst" not in name}
    own.get_base_model().load_state_dict(state, strict=False)
    assert weight.seed_bound() >= float(weight.data.abs().max())
