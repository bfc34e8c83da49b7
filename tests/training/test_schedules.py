"""Churn less often than at every step, and normalised distances: equal to a dense reference, and resumed."""

from __future__ import annotations

import copy
import functools
import math
from contextlib import nullcontext

import pytest
import torch
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback

from peft_dst import DSTCallback, DSTConfig, DSTOptimizer, set_training_steps, start_from
from peft_dst.core.choice import Choice
from peft_dst.core.reference import reference_step
from tests.models import assert_same, loss, weights
from tests.normalized import NORMALIZED, divisors_of
from tests.training.test_trainer import Rows, arguments


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0, fused=True)


def dense(build, name, constraint, chosen, steps, divisors=None):
    """Weights after every step of the plain method, in which the subset is chosen at some steps and kept at others."""
    model = build(name)
    optimizer, seed = adamw(model.parameters()), weights(model)
    silos = {silo.name: [w.name for w in silo.weights] for silo in constraint.silos}
    budgets = {silo.name: silo.budget for silo in constraint.silos}
    for step in range(1, steps + 1):
        loss(model, name, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        updated = weights(model)
        if step in chosen:
            updated, subset = reference_step(seed, updated, silos, budgets, constraint.distance, divisors)
        else:
            for key, at in subset.items():
                kept = seed[key].flatten().clone()
                kept[at] = updated[key].flatten()[at]
                updated[key] = kept.view(seed[key].shape)
        with torch.no_grad():
            for key, value in updated.items():
                model.get_parameter(key).copy_(value)
        yield weights(model)


@pytest.mark.parametrize("make", [adamw, lambda p: DSTOptimizer(p, lr=1e-2, weight_decay=0.0, fused=True)])
@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({"churn_interval": 2}, {1, 3, 5}),
        ({"churn_stop": 2}, {1, 2}),
        ({"churn_stop": 0.5, "churn_interval": 2}, {1, 3}),
        ({"selection": "first_step"}, {1}),
    ],
)
def test_equals_the_dense_reference(options, chosen, make, build):
    for name in ("bert", "gpt2"):
        model = get_peft_model(build(name), DSTConfig(epsilon=0.02, **options))
        if isinstance(options.get("churn_stop"), float):
            set_training_steps(model, 6)
        optimizer = make([p for p in model.parameters() if p.requires_grad])
        for step, wanted in enumerate(dense(build, name, model.constraint(), chosen, 6), 1):
            loss(model, name, step).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert_same(weights(model.get_base_model()), wanted)
            churn = sum(silo.churn() for silo in model.constraint().silos)
            assert (churn > 0) == (step in chosen)


def test_a_kept_subset_is_looked_at_by_one_wait_a_silo(build, monkeypatch):
    """On a GPU each answer that the host asks for costs a wait, and layers have many tensors."""

    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            waits.append(function._opname) if function._opname in ("_local_scalar_dense", "equal") else None
            return function(*args, **(kwargs or {}))

    waits, lists, keep, tolist = [], [], Choice._keep, torch.Tensor.tolist

    def watched(choice, silo, *args):
        with Waits(), monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "tolist", lambda tensor: lists.append(silo) or tolist(tensor))
            return keep(choice, silo, *args)

    monkeypatch.setattr(Choice, "_keep", watched)
    model = get_peft_model(build("bert"), DSTConfig(epsilon=0.02, selection="first_step"))
    optimizer = adamw([p for p in model.parameters() if p.requires_grad])
    for step in range(2):
        loss(model, "bert", step).backward()
        optimizer.step()
    assert lists == model.constraint().silos
    assert not waits


def halves(model, make):
    """Two optimizers that share every silo, as Muon for matrices and AdamW for all else do."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [make([p for p in parameters if p.dim() == 2]), make([p for p in parameters if p.dim() < 2])]


def both_step(model, optimizers, step):
    loss(model, "bert", step).backward()
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad()


def subset(model):
    return [weight.indices.tolist() for weight in model.constraint().weights]


makes_of_both = pytest.mark.parametrize(
    "make", [adamw, lambda p: DSTOptimizer(p, lr=1e-2, weight_decay=0.0, fused=True)]
)


@makes_of_both
def test_two_optimizers_choose_in_the_same_first_step(make, build):
    """The second one chooses from what the first has kept and what it moved itself: the same as from all."""
    model = get_peft_model(build("bert"), DSTConfig(epsilon=0.02, selection="first_step"))
    optimizers = halves(model, make)
    for step, wanted in enumerate(dense(build, "bert", model.constraint(), {1}, 3), 1):
        both_step(model, optimizers, step)
        assert_same(weights(model.get_base_model()), wanted)
        assert model.constraint().steps == step
    assert any(weight.indices.numel() for weight in model.constraint().weights if len(weight.shape) == 1)


@makes_of_both
def test_two_optimizers_choose_in_the_same_steps(make, build):
    model = get_peft_model(build("bert"), DSTConfig(epsilon=0.02, churn_interval=2))
    optimizers = halves(model, make)
    for step in range(1, 6):
        before = subset(model)
        both_step(model, optimizers, step)
        assert (subset(model) != before) == (step in {1, 3, 5})
    assert model.constraint().steps == 5


def test_two_optimizers_interrupted_and_resumed(build):
    def begin():
        model = get_peft_model(build("bert"), DSTConfig(epsilon=0.02, churn_interval=2))
        return model, halves(model, adamw)

    model, optimizers = begin()
    for step in range(1, 4):
        both_step(model, optimizers, step)
    resumed, others = begin()
    resumed.load_state_dict(model.state_dict())
    for optimizer, other in zip(optimizers, others, strict=True):
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(4, 7):
        both_step(model, optimizers, step)
        both_step(resumed, others, step)
        assert_same(weights(resumed.get_base_model()), weights(model.get_base_model()))
    assert resumed.constraint().steps == 6


def test_another_optimizer_goes_on_counting(build):
    model = get_peft_model(build("bert"), DSTConfig(epsilon=0.02, selection="first_step"))
    parameters = [p for p in model.parameters() if p.requires_grad]
    for step in range(1, 4):
        both_step(model, [adamw(parameters)], step)
        assert model.constraint().steps == step


def test_a_given_subset_is_kept_by_two_optimizers(build):
    """Both of them, in the first step that moves anything."""
    other = get_peft_model(build("bert"), DSTConfig(epsilon=0.02))
    both_step(other, halves(other, adamw), 9)
    model = get_peft_model(build("bert"), DSTConfig(epsilon=0.02, churn_stop=2))
    start_from(model, {weight.name: weight.indices for weight in other.constraint().weights})
    given = subset(other)
    optimizers = halves(model, adamw)
    both_step(model, optimizers, 1)
    assert subset(model) == given
    both_step(model, optimizers, 2)
    assert subset(model) != given


@pytest.mark.parametrize("make", [torch.optim.SGD, functools.partial(DSTOptimizer, optimizer_cls=torch.optim.SGD)])
def test_a_given_subset_outlives_a_step_that_was_undone(make, build):
    """That one moved something, the next one nothing (a learning rate of 0), and only the third one counts."""
    model, other = (get_peft_model(build("bert"), DSTConfig(epsilon=0.02, siloing="none")) for _ in range(2))
    start_from(model, {"classifier.weight": torch.arange(3)})
    optimizer = make([p for m in (model, other) for p in m.parameters() if p.requires_grad], lr=0.1)
    before = subset(model)
    for value in (torch.nan, 0.0, 1.0):
        optimizer.zero_grad()
        loss(model, "bert").backward()
        loss(other, "bert").backward()
        other.get_base_model().classifier.weight.grad[0, 0] = value
        optimizer.param_groups[0]["lr"] = 0.1 if value else 0.0
        with pytest.raises(FloatingPointError) if math.isnan(value) else nullcontext():
            optimizer.step()
        assert subset(model) == before
    optimizer.step()
    assert subset(model) != before


def test_a_first_step_without_a_change_is_not_the_first_choice(build):
    """Under a warm-up the first learning rate is 0; a subset chosen from nothing would stay empty."""
    model = get_peft_model(build("bert"), DSTConfig(epsilon=0.02, selection="first_step"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    for lr in (0.0, 0.1, 0.1):
        optimizer.param_groups[0]["lr"] = lr
        loss(model, "bert").backward()
        optimizer.step()
        assert sum(silo.free() for silo in model.constraint().silos) == (model.constraint().budget if lr else 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_updates_of_a_kept_subset(value, build):
    model = get_peft_model(build("bert"), DSTConfig(epsilon=0.02, selection="first_step"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss(model, "bert").backward()
    optimizer.step()
    before = weights(model.get_base_model())
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.fill_(value)
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        optimizer.step()
    assert_same(weights(model.get_base_model()), before)


@pytest.mark.parametrize(("siloing", "kind"), NORMALIZED)
@pytest.mark.parametrize("epsilon", [0.003, 0.2])
def test_normalised_distances_equal_the_dense_reference(epsilon, siloing, kind, build):
    for name in ("bert", "t5"):
        config = DSTConfig(epsilon=epsilon, siloing=siloing, distance_normalization=kind)
        model = get_peft_model(build(name), config)
        divisors = divisors_of(weights(build(name)), model.constraint())
        optimizer = adamw([p for p in model.parameters() if p.requires_grad])
        for step, wanted in enumerate(dense(build, name, model.constraint(), range(99), 3, divisors), 1):
            loss(model, name, step).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert_same(weights(model.get_base_model()), wanted)


def test_normalisation_is_the_adapters_own(build):
    """A norm's module is that of what stands beside it, among the parameters that the adapter tunes itself."""
    options = {"epsilon": 0.02, "siloing": "none", "distance_normalization": "size"}
    b = DSTConfig(target_modules=["layernorm_before", "fc1"], **options)
    alone = get_peft_model(build("vit"), b).constraint().modules
    both = get_peft_model(build("vit"), DSTConfig(target_modules=["q_proj"], **options))
    both.add_adapter("b", b)
    assert both.constraint("b").modules == alone
    assert {kind for _, kind in alone.values()} == {"feed_forward"}


def test_normalisation_by_hand():
    """Two modules, of 2 and 4 components, moved as far: divided by their sizes the smaller one wins."""

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = torch.nn.Linear(2, 1, bias=False)
            self.mlp = torch.nn.Linear(4, 1, bias=False)

    def moved(**options):
        base = Two()
        torch.nn.init.constant_(base.attention.weight, 1.0)
        torch.nn.init.constant_(base.mlp.weight, 4.0)
        options |= {"num_free_parameters": 2, "siloing": "none", "distance": "absolute"}
        model = get_peft_model(base, DSTConfig(**options))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        base.attention.weight.grad, base.mlp.weight.grad = torch.full((1, 2), 1.0), torch.full((1, 4), 1.5)
        optimizer.step()
        return [weight.indices.tolist() for silo in model.constraint().silos for weight in silo.weights]

    assert moved() == [[], [0, 1]]
    # 1 / 2 against 1.5 / 4, and 1 / 1 against 1.5 / 4.
    assert moved(distance_normalization="size") == [[0, 1], []]
    assert moved(distance_normalization="mean") == [[0, 1], []]


def test_normalisation_by_kind_of_module_by_hand():
    """Attention has 2 components in each of two layers, the feed-forward 3 in one: it is smaller than attention in both
    layers together, and larger than that of one.
    """

    class Layer(torch.nn.Module):
        def __init__(self, i):
            super().__init__()
            self.attention = torch.nn.Linear(2, 1, bias=False)
            if not i:
                self.mlp = torch.nn.Linear(3, 1, bias=False)

    def moved(kind):
        base = torch.nn.Module()
        base.layers = torch.nn.ModuleList([Layer(0), Layer(1)])
        first, mlp, second = base.layers[0].attention.weight, base.layers[0].mlp.weight, base.layers[1].attention.weight
        for parameter, value in ((first, 1.0), (mlp, 2.0), (second, 9.0)):
            torch.nn.init.constant_(parameter, value)
        options = {"num_free_parameters": 2, "siloing": "none", "distance": "absolute", "distance_normalization": kind}
        model = get_peft_model(base, DSTConfig(**options))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        for parameter, gradient in ((first, 1.0), (mlp, 1.2), (second, 0.5)):
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
        return {
            w.name.removesuffix(".weight"): w.indices.tolist()
            for silo in model.constraint().silos
            for w in silo.weights
        }

    def only(name):
        return {n: [0, 1] if n == name else [] for n in ("layers.0.attention", "layers.0.mlp", "layers.1.attention")}

    # 1 / 2 against 1.2 / 3 and 0.5 / 2; 1 / 4 against 1.2 / 3.
    assert moved("size") == only("layers.0.attention")
    assert moved("module_size") == only("layers.0.mlp")
    # 1 / 1 against 1.2 / 2 and 0.5 / 9; 1 / 5 against 1.2 / 2.
    assert moved("mean") == only("layers.0.attention")
    assert moved("module_mean") == only("layers.0.mlp")


def test_interrupted_and_resumed_equals_uninterrupted(build, tmp_path):
    def run(folder, resume=None, stop=None):
        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop = state.global_step == stop

        torch.manual_seed(3)
        model = get_peft_model(build("bert"), DSTConfig(epsilon=0.02, churn_interval=3, churn_stop=0.9))
        args = arguments(folder, save_strategy="steps", save_steps=5)
        trainer = Trainer(model, args, train_dataset=Rows("bert"), callbacks=[Stop(), DSTCallback()])
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", stop=5)
    resumed = run(tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-5"))
    assert resumed.constraint().steps == whole.constraint().steps == 12
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))


def test_a_fraction_without_a_total_is_refused_before_anything_changes(build):
    model = get_peft_model(build("bert"), DSTConfig(epsilon=0.02, churn_stop=0.5, modules_to_save=["classifier"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = weights(model.get_base_model())
    loss(model, "bert").backward()
    with pytest.raises(RuntimeError, match="set_training_steps"):
        optimizer.step()
    # The head and the moments neither.
    assert_same(weights(model.get_base_model()), before)
    assert not optimizer.state
    assert not any(silo.free() for silo in model.constraint().silos)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "6"])
def test_numbers_of_steps_that_are_none(steps, build):
    model = get_peft_model(build("bert"), DSTConfig(epsilon=0.02, churn_stop=0.5))
    set_training_steps(model, 6)
    with pytest.raises(ValueError, match=f"steps must be a positive integer, got {steps!r}"):
        set_training_steps(model, steps)
    assert model.constraint().total_steps == 6
