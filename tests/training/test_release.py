"""Gradients released in the backward pass: what cannot be honoured is refused, and what was done is undone."""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
import weakref

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model

from peft_dst import DSTConfig, DSTOptimizer, score_parameters
from tests.models import assert_same, batch, loss, weights


@pytest.fixture
def setup(build):
    model = get_peft_model(build("bert"), DSTConfig(epsilon=0.02))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = DSTOptimizer(parameters, lr=1e-2, release_gradients=True)
    loss(model, "bert").backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, parameters, optimizer


def test_gradients_are_gone_after_the_backward_pass(setup):
    model, parameters, optimizer = setup
    alive = []
    for parameter in parameters:
        parameter.register_hook(lambda g: alive.append(weakref.ref(g)))
    loss(model, "bert", 1).backward()
    assert len(alive) == len(parameters)
    assert not any(ref() is not None for ref in alive)
    assert not any(type(p.grad) is torch.Tensor for p in parameters)
    optimizer.step()
    optimizer.zero_grad()
    assert all(p.grad is None for p in parameters)


def test_accumulation_is_refused(setup):
    model, _, _ = setup
    before = weights(model.base_model.model)
    (loss(model, "bert", 1) / 2).backward()
    assert any(not torch.equal(before[n], w) for n, w in weights(model.base_model.model).items())
    with pytest.raises(RuntimeError, match=r"second gradient .*release_gradients=False"):
        (loss(model, "bert", 2) / 2).backward()
    assert_same(weights(model.base_model.model), before)


def test_a_missing_zero_grad_is_refused(setup):
    model, _, optimizer = setup
    loss(model, "bert", 1).backward()
    optimizer.step()
    tuned = weights(model.base_model.model)
    with pytest.raises(RuntimeError, match="zero_grad"):
        loss(model, "bert", 2).backward()
    assert_same(weights(model.base_model.model), tuned)
    model.zero_grad()
    loss(model, "bert", 2).backward()
    optimizer.step()


def _scaler():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))
    return scaler


@pytest.mark.parametrize(
    "touch",
    [
        lambda m, p, o: torch.nn.utils.clip_grad_norm_(p, 1e-3),
        lambda m, p, o: torch.nn.utils.clip_grad_value_(p, 1.0),
        lambda m, p, o: _scaler().unscale_(o),
        lambda m, p, o: Accelerator().clip_grad_norm_(p, 1e-3),
        lambda m, p, o: sum(q.grad.norm() for q in p),
        lambda m, p, o: [q.grad.mul_(0.5) for q in p],
    ],
    ids=["clip_norm", "clip_value", "grad_scaler", "accelerate", "norm", "scale"],
)
def test_reading_released_gradients_is_refused(touch, setup):
    model, parameters, optimizer = setup
    loss(model, "bert", 1).backward()
    with pytest.raises(RuntimeError, match=r"used and freed in the backward pass.*release_gradients=False"):
        touch(model, parameters, optimizer)


def test_the_norm_of_released_gradients_is_known(setup):
    """Trainer asks for it at every step, to log it; and a limit that is not reached changes nothing."""
    model, parameters, optimizer = setup
    loss(model, "bert", 1).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    assert torch.equal(torch.nn.utils.clip_grad_norm_(parameters, float("inf")), norm)
    assert torch.equal(Accelerator().clip_grad_norm_(parameters, 2 * float(norm)), norm)
    with pytest.raises(RuntimeError, match="used and freed"):
        torch.nn.utils.clip_grad_norm_(parameters, 0.5 * float(norm))
    with pytest.raises(RuntimeError, match="used and freed"):
        torch.nn.utils.get_total_norm([p.grad for p in parameters], norm_type=1.0)
    # Undone, and the same once more with gradients that stay.
    optimizer.zero_grad()
    optimizer._release = None
    del setup, optimizer
    gc.collect()
    loss(model, "bert", 1).backward()
    assert torch.equal(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]), norm)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_instead_of_step_undoes(set_to_none, setup):
    """A loop that skips a batch (its loss was not finite, say) after the backward pass."""
    model, _, optimizer = setup
    before = weights(model.base_model.model)
    loss(model, "bert", 1).backward()
    optimizer.zero_grad(set_to_none=set_to_none)
    assert_same(weights(model.base_model.model), before)
    loss(model, "bert", 2).backward()
    optimizer.step()


def test_a_backward_pass_that_fails_half_way(setup):
    model, parameters, optimizer = setup
    before = weights(model.base_model.model)
    seed_side = next(p for p in parameters if p.shape == (61, 16))
    handle = seed_side.register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss(model, "bert", 1).backward()
    handle.remove()
    optimizer.zero_grad()
    assert_same(weights(model.base_model.model), before)
    loss(model, "bert", 1).backward()
    optimizer.step()


def test_several_processes_are_refused(setup, monkeypatch):
    model, parameters, _ = setup
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="release_gradients=False for distributed"):
        DSTOptimizer(parameters, lr=1e-2, release_gradients=True)
    before = weights(model.base_model.model)
    with pytest.raises(RuntimeError, match="release_gradients=False for distributed"):
        loss(model, "bert", 1).backward()
    assert_same(weights(model.base_model.model), before)


def test_an_optimizer_that_is_gone_steps_no_more(build):
    model = get_peft_model(build("bert"), DSTConfig(epsilon=0.02))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    reference = weakref.ref(DSTOptimizer(parameters, lr=1e-2, release_gradients=True))
    gc.collect()
    assert reference() is None
    before = weights(model.base_model.model)
    loss(model, "bert", 1).backward()
    assert_same(weights(model.base_model.model), before)
    assert all(type(p.grad) is torch.Tensor for p in parameters if p.grad is not None)


def test_an_optimizer_that_is_gone_leaves_no_hooks(build):
    model = get_peft_model(build("bert"), DSTConfig(epsilon=0.02))
    for _ in range(3):
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = DSTOptimizer(parameters[1:], lr=1e-2, release_gradients=True)
        optimizer.add_param_group({"params": parameters[:1]})
        loss(model, "bert").backward()
        optimizer.step()
        optimizer.zero_grad()
        del optimizer
        gc.collect()
        assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters)
    assert all(score.isfinite().all() for score in score_parameters(model, [batch("bert")], progress=False).values())


def test_added_parameters_are_watched_too(build):
    model = get_peft_model(build("bert"), DSTConfig(epsilon=0.02, siloing="parameter"))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = DSTOptimizer(parameters[:5], lr=1e-2, release_gradients=True)
    optimizer.add_param_group({"params": parameters[5:], "lr": 1e-3})
    loss(model, "bert").backward()
    assert all(type(p.grad).__name__ == "ReleasedGradient" for p in parameters if p.grad is not None)
    optimizer.step()
    assert model.constraint().steps == 1


def test_frozen_parameters_may_be_among_them(build):
    """Also when they are unfrozen later: their silo then steps in step()."""
    one, other = (get_peft_model(build("bert"), DSTConfig(epsilon=0.02)) for _ in range(2))
    frozen = [m.base_model.model.bert.pooler.dense.weight for m in (one, other)]
    optimizers = []
    for model, parameter, release in ((one, frozen[0], False), (other, frozen[1], True)):
        parameter.requires_grad_(False)
        parameters = [p for n, p in model.named_parameters() if "_sparse" not in n]
        optimizers.append(DSTOptimizer(parameters, lr=1e-2, release_gradients=release))
    for step in range(4):
        for model, parameter, optimizer in zip((one, other), frozen, optimizers, strict=True):
            parameter.requires_grad_(step > 1)
            loss(model, "bert", step).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_same(weights(one.base_model.model), weights(other.base_model.model))


def test_gradients_of_another_optimizer_are_left_to_it(build):
    """Two optimizers over the tensors of one silo: only those of the one that steps in the backward pass are released. Once
    the other's can be displaced by its step, which its gradients must not see, it waits for the end.
    """
    model = get_peft_model(build("bert"), DSTConfig(epsilon=0.02, siloing="none"))
    twin = build("bert")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # The gradients of the lower half come last.
    others = parameters[: len(parameters) // 2]
    mine = parameters[len(parameters) // 2 :]
    optimizer = DSTOptimizer(mine, lr=1e-2, release_gradients=True)
    plain = torch.optim.SGD(others, lr=1.0)
    loss(model, "bert").backward()
    assert any(type(p.grad) is not torch.Tensor for p in mine)
    assert all(type(p.grad) is torch.Tensor for p in others if p.grad is not None)
    optimizer.step()
    plain.step()
    assert model.constraint().silos[0].free() <= model.constraint().budget
    assert sum(w.indices.numel() for w in model.constraint().weights if any(w.parameter is p for p in others)) > 10
    model.zero_grad()
    optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = 1.0
    twin.load_state_dict(weights(model.get_base_model()))
    loss(model, "bert", 1).backward()
    loss(twin, "bert", 1).backward()
    for weight in model.constraint().weights:
        gradient = twin.get_parameter(weight.name).grad
        if any(weight.parameter is parameter for parameter in others) and gradient is not None:
            assert torch.equal(weight.parameter.grad, gradient)
    optimizer.step()
    plain.step()
    assert model.constraint().steps == 2


@pytest.mark.parametrize("begun", [False, True], ids=["first", "later"])
def test_gradients_that_come_in_several_threads_wait_for_one_another(begun):
    """Autograd has a thread for each device, all within one backward pass; here two passes, each over silos of its own."""

    def make():
        torch.manual_seed(0)
        base = torch.nn.ModuleDict({name: torch.nn.Linear(8, 8) for name in "abcd"})
        model = get_peft_model(base, DSTConfig(epsilon=0.25, target_modules=list("abcd"), siloing="parameter"))
        return base, DSTOptimizer([p for p in model.parameters() if p.requires_grad], lr=1e-2, release_gradients=True)

    def backward(base, names):
        for name in names:
            base[name](torch.ones(2, 8)).square().sum().backward()

    (one, alone), (base, optimizer) = make(), make()
    backward(one, "abcd")
    alone.step()
    if begun:
        backward(base, "a")
    meeting = threading.Barrier(2)

    def meet(inner, *args):
        # Nobody else comes here meanwhile, or the two go on together.
        with contextlib.suppress(threading.BrokenBarrierError):
            meeting.wait(0.2)
            met.append(inner)
        return inner(*args)

    met: list = []
    run, begin = optimizer.run, optimizer._release._begin
    optimizer.run = functools.partial(meet, run)
    optimizer._release._begin = functools.partial(meet, begin)
    threads = [threading.Thread(target=backward, args=(base, names)) for names in ("b" if begun else "ab", "cd")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not met
    optimizer.step()
    assert_same(weights(base), weights(one))


@pytest.mark.parametrize("make", [torch.optim.AdamW, DSTOptimizer])
def test_an_optimizer_for_each_parameter_is_refused_within_the_backward_pass(make, build):
    """Its silo's other gradients, still to come, would be of weights that its step has changed."""
    model = get_peft_model(build("bert"), DSTConfig(epsilon=0.02))
    optimizers = {p: make([p], lr=1e-2) for p in model.parameters() if p.requires_grad}
    hooks = [p.register_post_accumulate_grad_hook(lambda p: optimizers[p].step()) for p in optimizers]
    before = weights(model.get_base_model())
    with pytest.raises(NotImplementedError, match=r"has other tensors to train.*release_gradients=True"):
        loss(model, "bert").backward()
    assert_same(weights(model.get_base_model()), before)
    assert not any(optimizer.state for optimizer in optimizers.values())
    for hook in hooks:
        hook.remove()
    # After it each may take its turn.
    loss(model, "bert").backward()
    for optimizer in optimizers.values():
        optimizer.step()
    assert model.constraint().steps == 1


@pytest.mark.parametrize("make", [torch.optim.AdamW, DSTOptimizer])
def test_an_optimizer_for_each_silo_steps_within_the_backward_pass(make, build):
    """With a silo for each tensor the result is that of one optimizer."""
    models = [get_peft_model(build("bert"), DSTConfig(epsilon=0.02, siloing="parameter")) for _ in range(2)]
    whole = make([p for p in models[0].parameters() if p.requires_grad], lr=1e-2)
    optimizers = {p: make([p], lr=1e-2) for p in models[1].parameters() if p.requires_grad}
    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    for step in range(3):
        for model in models:
            loss(model, "bert", step).backward()
        whole.step()
        for model in models:
            model.zero_grad()
        assert_same(weights(models[1].get_base_model()), weights(models[0].get_base_model()))
    assert [model.constraint().steps for model in models] == [3, 3]
