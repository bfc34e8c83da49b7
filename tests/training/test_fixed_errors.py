"""Steps over static subsets that fail, or are refused: what stands then, and what is said."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model

from peft_dst import DSTConfig, fix_subset
from peft_dst.core import free, scatter
from tests.models import assert_same, loss, trainable, weights
from tests.training.test_fixed import fixed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_are_refused_and_nothing_changes(value, build):
    model = fixed(build)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    loss(model, "bert").backward()
    optimizer.step()
    before = weights(model.get_base_model())
    optimizer.param_groups[0]["params"][-1].grad = None
    culprit = next(w for w in model.constraint().weights if w.free is not None)
    culprit.free.grad.fill_(value)
    with pytest.raises(FloatingPointError, match=culprit.name.replace(".", r"\.")):
        optimizer.step()
    assert_same(weights(model.get_base_model()), before)
    assert torch.equal(culprit.free.detach(), culprit.values())


def test_non_finite_values_leave_the_others_their_precision(build):
    model = get_peft_model(build("bert").bfloat16(), DSTConfig(epsilon=0.02, selection="random"))
    optimizer = torch.optim.SGD(trainable(model), lr=1.0)
    one, other = [weight for weight in model.constraint().weights if weight.free is not None][:2]
    step = torch.full_like(one.free, -(2.0**-20))
    one.free.grad, other.free.grad = step.clone(), torch.zeros_like(other.free)
    optimizer.step()
    exact = one.free.detach().clone()
    assert not torch.equal(exact, exact.bfloat16().float())
    one.free.grad, other.free.grad = step, torch.full_like(other.free, torch.nan)
    with pytest.raises(FloatingPointError):
        optimizer.step()
    assert torch.equal(one.free.detach(), exact)


def interrupted(optimizer):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(stop)


@pytest.mark.parametrize("again", ["the same optimizer", "another one"])
def test_an_adapter_loaded_after_an_interrupted_step(again, build, tmp_path):
    """What was loaded counts, whether or not the step is known to have ended."""
    model = fixed(build)
    with torch.no_grad():
        for weight in model.constraint().weights:
            if weight.free is not None:
                weight.data.flatten()[weight.indices] += 1.0
                weight.stepped = True
    model.save_pretrained(tmp_path)
    model = fixed(build)
    first = torch.optim.SGD(trainable(model), lr=0.0)
    interrupted(first)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    before = weights(model.get_base_model())
    optimizer = first if again == "the same optimizer" else torch.optim.SGD(trainable(model), lr=0.0)
    loss(model, "bert").backward()
    optimizer.step()
    assert_same(weights(model.get_base_model()), before)
    assert any((before[name] != seed).any() for name, seed in weights(build("bert")).items())


def test_the_state_of_an_optimizer_whose_step_was_interrupted(build):
    model = fixed(build)
    # With the weights, as Trainer makes it.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss(model, "bert").backward()
    optimizer.step()
    whole = [len(group["params"]) for group in optimizer.state_dict()["param_groups"]]
    saved = copy.deepcopy(optimizer.state_dict())
    interrupted(optimizer)
    assert [len(group["params"]) for group in optimizer.state_dict()["param_groups"]] == whole
    interrupted(optimizer)
    optimizer.load_state_dict(saved)
    assert_same(
        {f"{i}.{key}": value for i, state in optimizer.state_dict()["state"].items() for key, value in state.items()},
        {f"{i}.{key}": value for i, state in saved["state"].items() for key, value in state.items()},
    )


def test_an_optimizer_without_the_values_is_refused(build):
    model = fixed(build)
    optimizer = torch.optim.SGD([w.parameter for w in model.constraint().weights], lr=0.1)
    loss(model, "bert").backward()
    with pytest.raises(RuntimeError, match="not the values of its fixed subset"):
        optimizer.step()


def test_a_subset_that_was_not_chosen_is_asked_for(build):
    model = get_peft_model(build("bert"), DSTConfig(epsilon=0.02, selection="fisher"))
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    loss(model, "bert").backward()
    with pytest.raises(RuntimeError, match="fix_subset"):
        optimizer.step()


def test_data_parallelism_is_refused(build, monkeypatch):
    model = fixed(build)
    for name, answer in (("is_available", True), ("is_initialized", True), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda answer=answer: answer)
    with pytest.raises(NotImplementedError, match="under DistributedDataParallel"):
        loss(model, "bert").backward()


def test_steps_while_disabled_or_with_two_adapters_are_refused(build):
    model = fixed(build)
    seed = weights(build("bert"))
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    with model.disable_adapter():
        loss(model, "bert").backward()
        with pytest.raises(RuntimeError, match="adapter is disabled"):
            optimizer.step()
        assert_same(weights(model.get_base_model()), seed)
    optimizer.zero_grad()
    model.add_adapter("b", DSTConfig(epsilon=0.02, selection="random", selection_seed=1))
    model.base_model.set_adapter(["default", "b"])
    loss(model, "bert").backward()
    with pytest.raises(RuntimeError, match="are all active"):
        optimizer.step()


def test_an_optimizer_of_a_replaced_subset_is_refused(build):
    model = get_peft_model(build("bert"), DSTConfig(num_free_parameters=150, selection="fisher", siloing="none"))
    shapes = {name: parameter.shape for name, parameter in build("bert").named_parameters()}
    fix_subset(model, {name: torch.rand(shape) for name, shape in shapes.items()})
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    fix_subset(model, {name: torch.rand(shape) for name, shape in shapes.items()})
    loss(model, "bert").backward()
    with pytest.raises(RuntimeError, match="replaced after the optimizer was made"):
        optimizer.step()


def test_lbfgs_is_refused(build):
    model = fixed(build)
    optimizer = torch.optim.LBFGS(trainable(model))
    with pytest.raises(NotImplementedError, match="LBFGS"):
        optimizer.step(lambda: loss(model, "bert"))


def test_the_values_of_an_inactive_adapter_are_not_stepped(build):
    model = fixed(build)
    first = trainable(model)
    model.add_adapter("b", DSTConfig(epsilon=0.02, selection="random", selection_seed=1))
    loss(model, "bert").backward()
    model.set_adapter("b")
    optimizer = torch.optim.SGD({id(p): p for p in (*first, *trainable(model))}.values(), lr=0.1)
    loss(model, "bert").backward()
    with pytest.raises(RuntimeError, match="not active"):
        optimizer.step()


def test_float16_values_beyond_its_range_are_refused(build):
    model = get_peft_model(build("bert").half(), DSTConfig(epsilon=0.02, selection="random"))
    optimizer = torch.optim.SGD(trainable(model), lr=1.0)
    before = weights(model.get_base_model())
    for weight in model.constraint().weights:
        if weight.free is not None:
            weight.free.grad = torch.full_like(weight.free, 1e6)
    with pytest.raises(FloatingPointError):
        optimizer.step()
    assert_same(weights(model.get_base_model()), before)


def test_a_step_that_is_interrupted_while_it_is_written(build, monkeypatch):
    model = fixed(build)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    loss(model, "bert").backward()
    before = weights(model.get_base_model())
    written = []

    def second(*arguments):
        if len(written) == 1:
            monkeypatch.undo()
            raise KeyboardInterrupt
        written.append(arguments)
        scatter(*arguments)

    monkeypatch.setattr(free, "scatter", second)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert_same(weights(model.get_base_model()), before)
    assert all(torch.equal(w.free, w.values()) for w in model.constraint().weights if w.free is not None)


def test_two_models_in_one_optimizer_step_together_or_not_at_all(build):
    one, two = fixed(build), fixed(build)
    before = weights(one.get_base_model()), weights(two.get_base_model())
    optimizer = torch.optim.SGD([*trainable(one), *trainable(two)], lr=0.1)
    (loss(one, "bert") + loss(two, "bert")).backward()
    next(p for p in reversed(trainable(two)) if p.grad is not None).grad.fill_(float("nan"))
    with pytest.raises(FloatingPointError):
        optimizer.step()
    assert_same(weights(one.get_base_model()), before[0])
    assert_same(weights(two.get_base_model()), before[1])
