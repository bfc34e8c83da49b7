"""The constraint is exact: after every optimizer step of every kind the model equals a plain dense reference."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from peft_dst import DSTConfig, DSTOptimizer
from peft_dst.core import DISTANCES, SILOINGS
from peft_dst.core.reference import reference_step
from tests.models import BUILDERS, Outer, assert_same, loss, weights


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.01, fused=True),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0, foreach=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-1),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9),
}
ARCHITECTURES = ("bert", "t5", "gpt2", "llama", "mixtral", "vit")
EPSILONS = (1e-5, 1e-3, 1e-2, 0.3, 1.0)
STEPS = 3


class Twin:
    """The same model trained with a dense update and the reference's projection after every step."""

    def __init__(self, model: nn.Module, constraint, make_optimizer):
        self.model = model.requires_grad_(True)
        self.optimizer = make_optimizer(list(model.parameters()))
        self.seed = weights(model)
        self.kind = constraint.distance
        self.silos = {silo.name: [w.name for w in silo.weights] for silo in constraint.silos}
        self.budgets = {silo.name: silo.budget for silo in constraint.silos}

    def step(self, name: str, step: int) -> dict[str, Tensor]:
        loss(self.model, name, step).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.project(weights(self.model))

    def project(self, updated: dict[str, Tensor]) -> dict[str, Tensor]:
        parameters, subset = reference_step(self.seed, updated, self.silos, self.budgets, self.kind)
        with torch.no_grad():
            for key, value in parameters.items():
                self.model.get_parameter(key).copy_(value)
        return subset


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_the_dense_reference_after_every_step(name, optimizer, build):
    """Every combination of any three of architecture, optimizer, distance, siloing and budget."""
    size = sum(p.numel() for p in build(name).parameters())
    for config in configs(size, ARCHITECTURES.index(name) - list(OPTIMIZERS).index(optimizer)):
        check(name, config, OPTIMIZERS[optimizer], build)


def configs(size: int, turn: int) -> Iterator[DSTConfig]:
    """Those whose turn it is: one of six, which is as few as hold every combination of three."""
    values = (enumerate(DISTANCES), enumerate(SILOINGS), enumerate(EPSILONS))
    for (d, distance), (s, siloing), (e, epsilon) in itertools.product(*values):
        if (d + s + e + turn) % 6 == 0:
            # The tiny models have fewer than 1 / ε parameters; one free parameter is as small as it gets.
            budget = {"epsilon": epsilon} if round(epsilon * size) else {"num_free_parameters": 1}
            yield DSTConfig(**budget, siloing=siloing, distance=distance)


def check(name: str, config: DSTConfig, make_optimizer, build) -> None:
    base = build(name)
    seed = weights(base)
    model = get_peft_model(base, config)
    constraint = model.constraint()
    twin = Twin(build(name), constraint, make_optimizer)
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
    for step in range(STEPS):
        loss(model, name, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        subset = twin.step(name, step)
        assert_same(weights(base), weights(twin.model))
        for silo in constraint.silos:
            for weight in silo.weights:
                assert torch.equal(weight.indices, subset[weight.name])
                assert torch.equal(weight.seeds, seed[weight.name].flatten()[weight.indices])
                changed = (weight.data != seed[weight.name]).flatten().nonzero().flatten()
                assert torch.equal(changed, weight.indices) or config.epsilon == 1.0
            assert silo.free() <= silo.budget
    for key, value in seed.items():
        outside = torch.ones(value.numel(), dtype=torch.bool)
        outside[subset[key]] = False
        assert torch.equal(base.get_parameter(key).flatten()[outside], value.flatten()[outside])


@pytest.mark.parametrize("distance", DISTANCES)
def test_exactly_the_budget_differs(distance, architecture, build):
    model = build(architecture)
    seed = weights(model)
    # No zero seeds and a gradient everywhere, so that no distance is zero.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    seed = weights(model)
    model = get_peft_model(model, DSTConfig(epsilon=0.01, distance=distance))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    budget = round(0.01 * sum(p.numel() for p in seed.values()))
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        now = weights(model.get_base_model())
        assert sum(int((now[k] != seed[k]).sum()) for k in seed) == budget == model.constraint().budget
        for silo in model.constraint().silos:
            assert sum(int((now[w.name] != seed[w.name]).sum()) for w in silo.weights) == silo.budget


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_epsilon_one_is_plain_fine_tuning(architecture, optimizer, build):
    plain, base = build(architecture), build(architecture)
    make_optimizer = OPTIMIZERS[optimizer]
    # Each distance with every architecture and every optimizer.
    distance = [*DISTANCES][(sorted(BUILDERS).index(architecture) + [*OPTIMIZERS].index(optimizer)) % len(DISTANCES)]
    model = get_peft_model(base, DSTConfig(epsilon=1.0, distance=distance))
    optimizers = [make_optimizer([p for p in m.parameters() if p.requires_grad]) for m in (plain, model)]
    for step in range(4):
        for m, optimizer in zip((plain, model), optimizers, strict=True):
            loss(m, architecture, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_same(weights(base), weights(plain))
    seed = weights(build(architecture))
    with model.disable_adapter():
        assert_same(weights(base), seed)


def test_two_optimizers_over_one_silo(build):
    base = build("bert")
    seed = weights(base)
    model = get_peft_model(base, DSTConfig(epsilon=0.01, siloing="none"))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizers = [torch.optim.AdamW(parameters[::2], lr=1e-2), torch.optim.SGD(parameters[1::2], lr=1.0)]
    for step in range(3):
        loss(model, "bert", step).backward()
        for optimizer in optimizers:
            optimizer.step()
            now = weights(base)
            assert sum(int((now[k] != seed[k]).sum()) for k in seed) <= model.constraint().budget
        model.zero_grad()


def test_an_optimizer_that_steps_another(build):
    """The constraint is enforced after the inner step, and again after what the outer one does to the weights."""
    base = build("bert")
    model = get_peft_model(base, DSTConfig(epsilon=0.01))
    twin = Twin(build("bert"), model.constraint(), lambda p: torch.optim.SGD(p, lr=1.0))
    optimizer = Outer(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0))
    for step in range(2):
        loss(model, "bert", step).backward()
        optimizer.step()
        model.zero_grad()
        twin.step("bert", step)
        twin.project({name: 1.25 * value for name, value in weights(twin.model).items()})
        assert_same(weights(base), weights(twin.model))


class Around(torch.optim.AdamW):
    """A subclass that changes the weights before and after the step that it inherits."""

    def step(self, closure=None):
        self.scale(1.25)
        out = super().step(closure)
        self.scale(0.75)
        return out

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(factor)


def test_a_subclass_that_calls_the_step_it_inherits(build):
    """Each class whose `step` torch has hooked calls the hooks, so within one step they may run twice."""
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    base = build("bert")
    model = get_peft_model(base, DSTConfig(epsilon=0.01, churn_interval=2))
    make = functools.partial(Around, lr=1e-2)
    twin = Twin(build("bert"), model.constraint(), make)
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    loss(model, "bert").backward()
    optimizer.step()
    twin.step("bert", 0)
    assert_same(weights(base), weights(twin.model))
    assert model.constraint().steps == 1


def test_a_fixed_subset_under_a_subclass_that_calls_the_step_it_inherits(build):
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    base = build("bert")
    seed = weights(base)
    model = get_peft_model(base, DSTConfig(epsilon=0.01, selection="random"))
    optimizer = Around([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)
    loss(model, "bert").backward()
    optimizer.step()
    for weight in model.constraint().weights:
        wanted = seed[weight.name].flatten().clone()
        wanted[weight.indices] = wanted[weight.indices] * 1.25 * 0.75
        assert torch.equal(weight.data.flatten(), wanted)


def test_a_subclass_of_which_the_inherited_step_raised(build):
    """What is left of it is undone by the next step, and not taken for a step around it."""

    class Failing(Around):
        fails = True

        def scale(self, factor: float) -> None:
            if self.fails and factor < 1:
                raise RuntimeError("out of memory")
            super().scale(factor)

    base = build("bert")
    model = get_peft_model(base, DSTConfig(epsilon=0.01))
    twin = Twin(build("bert"), model.constraint(), lambda p: Around(p, lr=1e-2))
    optimizer = Failing([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loss(model, "bert").backward()
    with pytest.raises(RuntimeError, match="out of memory") as raised:
        optimizer.step()
    optimizer.state.clear()
    optimizer.fails = False
    optimizer.step()
    # Its frames are still there.
    assert raised.tb is not None
    twin.step("bert", 0)
    assert_same(weights(base), weights(twin.model))


def test_a_step_that_raised_does_not_switch_the_constraint_off(build):
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("out of memory")

    base = build("bert")
    seed = weights(base)
    model = get_peft_model(base, DSTConfig(epsilon=0.01))
    parameters = [p for p in model.parameters() if p.requires_grad]
    failing, working = Failing(parameters, lr=0.1), torch.optim.SGD(parameters, lr=0.1)
    for optimizer in (failing, working, failing, working):
        loss(model, "bert").backward()
        if optimizer is failing:
            with pytest.raises(RuntimeError, match="out of memory"):
                optimizer.step()
        else:
            optimizer.step()
        model.zero_grad()
        now = weights(base)
        assert sum(int((now[k] != seed[k]).sum()) for k in seed) <= model.constraint().budget
    # For all that is known they were steps within the failing one, which is the one that would count.
    assert model.constraint().steps == 0


def test_a_step_without_change_keeps_the_subset(build):
    # GradScaler lets a fused optimizer step with unchanged weights when gradients overflow.
    model = get_peft_model(build("bert"), DSTConfig(epsilon=0.01))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss(model, "bert").backward()
    optimizer.step()
    before = weights(model.get_base_model())
    optimizer.zero_grad()
    optimizer.step()
    assert_same(before, weights(model.get_base_model()))


def test_non_contiguous_and_zero_dimensional_parameters():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Module()
            self.inner.transposed = nn.Parameter(torch.randn(6, 40).t())
            self.inner.scale = nn.Parameter(torch.tensor(2.0))
            self.inner.nothing = nn.Parameter(torch.empty(0, 3))

        def forward(self, x):
            return (x @ self.inner.transposed * self.inner.scale).square().sum()

    base = Odd()
    seed = weights(base)
    assert not base.inner.transposed.is_contiguous()
    model = get_peft_model(base, DSTConfig(num_free_parameters=7, siloing="none"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(torch.randn(5, 40)).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert sum(int((base.get_parameter(n) != v).sum()) for n, v in seed.items()) == 7
    tuned = weights(base)
    with model.disable_adapter():
        assert_same(weights(base), seed)
    assert_same(weights(base), tuned)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_gradients_leave_the_weights_alone(value, build):
    base = build("bert")
    model = get_peft_model(base, DSTConfig(epsilon=0.01))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loss(model, "bert").backward()
    optimizer.step()
    before = weights(base)
    subset = [w.indices.clone() for w in model.constraint().weights]
    base.bert.encoder.layer[1].output.dense.weight.grad[3, 4] = value
    with pytest.raises(FloatingPointError, match=r"'bert.encoder.layer.1.output.dense.weight' is NaN or infinite"):
        optimizer.step()
    assert_same(weights(base), before)
    assert all(torch.equal(w.indices, i) for w, i in zip(model.constraint().weights, subset, strict=True))


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, lr=0.01), lambda p: DSTOptimizer(p, torch.optim.SGD, lr=0.01)]
)
def test_a_step_that_fails_in_one_of_several_models_is_undone_in_all(make, build):
    """The others' subsets, exact values and counts of steps are those from before."""
    options = [{"selection": "first_step"}, {"selection": "random"}, {"threshold": "iterative"}]
    models = [get_peft_model(build("bert"), DSTConfig(epsilon=0.01, **one)) for one in options]
    models[1].to(torch.bfloat16)
    groups = [{"params": [p for p in model.parameters() if p.requires_grad]} for model in models]
    optimizer = make(groups)

    def state():
        tensors = {f"{i}.{n}": t for i, m in enumerate(models) for n, t in weights(m.get_base_model()).items()}
        fixed = {
            f"free.{w.name}": w.free.detach().clone() for w in models[1].constraint().weights if w.free is not None
        }
        return (
            tensors | fixed,
            [m.constraint().steps for m in models],
            [w.indices for w in models[0].constraint().weights],
        )

    for broken in (None, 0, 1, 2):
        before = state()
        optimizer.zero_grad()
        for step, model in enumerate(models):
            loss(model, "bert", step).backward()
        if broken is None:
            optimizer.step()
            continue
        if models[broken].constraint().fixed:
            next(w.free for w in models[broken].constraint().weights if w.free is not None).grad.fill_(torch.nan)
        else:
            models[broken].get_base_model().classifier.weight.grad.fill_(torch.nan)
        with pytest.raises(FloatingPointError):
            optimizer.step()
        after = state()
        assert_same(after[0], before[0])
        assert after[1] == before[1] == [1, 1, 1]
        assert all(torch.equal(*pair) for pair in zip(after[2], before[2], strict=True))


def test_statistics(build):
    model = get_peft_model(build("llama"), DSTConfig(epsilon=0.01))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before: list[set[tuple[str, int]]] = []
    for step in range(3):
        loss(model, "llama", step).backward()
        optimizer.step()
        optimizer.zero_grad()
        silo = model.constraint().silos[0]
        before.append({(w.name, int(i)) for w in silo.weights for i in w.indices})
        if step:
            assert silo.churn() == len(before[-1] - before[-2]) / len(before[-1])
        distances = [(w.seeds.float() * (w.values() - w.seeds)).abs().min() for w in silo.weights if w.indices.numel()]
        assert float(silo.threshold) == float(min(distances))


def test_builders_cover_the_promised_architectures():
    assert {"bert", "roberta", "t5", "gpt2", "llama", "mixtral", "qwen_moe", "vit"} == set(BUILDERS)
