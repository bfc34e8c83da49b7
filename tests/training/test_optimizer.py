"""DSTOptimizer: silo by silo, and still the same as the hook, as an uninterrupted run, and as float32."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from peft_dst import DSTConfig, DSTOptimizer, parameter_groups
from peft_dst.core import choice as choice_module
from peft_dst.core import kernels
from peft_dst.core.reference import reference_step
from tests.models import BUILDERS, Outer, assert_same, batch, loss, weights
from tests.training.resuming import assert_resumed_equals_uninterrupted


OPTIMIZERS = {
    "adadelta": (torch.optim.Adadelta, {"lr": 1.0}),
    "adafactor": (torch.optim.Adafactor, {"lr": 0.1}),
    "adagrad": (torch.optim.Adagrad, {"lr": 1e-2, "initial_accumulator_value": 0.1}),
    "adam": (torch.optim.Adam, {"lr": 1e-2, "amsgrad": True}),
    "adamax": (torch.optim.Adamax, {"lr": 1e-2}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2}),
    "adamw_foreach": (torch.optim.AdamW, {"lr": 1e-2, "foreach": True, "weight_decay": 0.1}),
    "adamw_fused": (torch.optim.AdamW, {"lr": 1e-2, "fused": True}),
    "asgd": (torch.optim.ASGD, {"lr": 1e-1}),
    "nadam": (torch.optim.NAdam, {"lr": 1e-2}),
    "radam": (torch.optim.RAdam, {"lr": 1e-2}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 1e-2, "momentum": 0.5}),
    "rprop": (torch.optim.Rprop, {"lr": 1e-2}),
    "sgd": (torch.optim.SGD, {"lr": 1e-1, "momentum": 0.9}),
}
EPSILONS = (1e-3, 0.3, 1.0)


def wrapped(build, name="bert", dtype=torch.float32, **options):
    model = get_peft_model(build(name).to(dtype), DSTConfig(**{"epsilon": 0.02, **options}))
    return model, [parameter for parameter in model.parameters() if parameter.requires_grad]


def subsets(model):
    return {weight.name: weight.indices for weight in model.constraint().weights}


def assert_same_training(one, other, name, optimizers, steps=3):
    for step in range(steps):
        for model, optimizer in zip((one, other), optimizers, strict=True):
            loss(model, name, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_same(weights(one.base_model.model), weights(other.base_model.model))
        assert_same(subsets(one), subsets(other))


@pytest.mark.parametrize("release", [False, True], ids=["plain", "release"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_equals_the_hook_bit_for_bit(kind, release, build):
    optimizer_cls, options = OPTIMIZERS[kind]
    # Every pair of an optimizer, a way to release and a siloing.
    siloing = ("module_and_layer", "none")[([*OPTIMIZERS].index(kind) + release) % 2]
    (one, parameters), (other, others) = wrapped(build, siloing=siloing), wrapped(build, siloing=siloing)
    plain = optimizer_cls(parameters, **options)
    ours = DSTOptimizer(others, optimizer_cls, release_gradients=release, **options)
    assert_same_training(one, other, "bert", (plain, ours))
    for p, q in zip(parameters, others, strict=True):
        assert plain.state[p].keys() == ours.state[q].keys()
        for key, value in plain.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(ours.state[q][key]))
    assert one.constraint().steps == other.constraint().steps == 3


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_every_architecture(architecture, epsilon, build):
    # Every pair of an architecture, an epsilon and a way to release.
    release = (sorted(BUILDERS).index(architecture) + EPSILONS.index(epsilon)) % 2 == 0
    one, parameters = wrapped(build, architecture, epsilon=epsilon)
    other, others = wrapped(build, architecture, epsilon=epsilon)
    plain = torch.optim.AdamW(parameters, lr=1e-2)
    assert_same_training(one, other, architecture, (plain, DSTOptimizer(others, lr=1e-2, release_gradients=release)))
    assert [s.churn() for s in one.constraint().silos] == [s.churn() for s in other.constraint().silos]


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.transposed = nn.Parameter(torch.randn(6, 40).t())
        self.inner.scale = nn.Parameter(torch.tensor(2.0))
        self.inner.unused = nn.Parameter(torch.randn(5))
        self.inner.nothing = nn.Parameter(torch.empty(0, 3))

    def forward(self, x):
        return (x @ self.inner.transposed * self.inner.scale).square().sum()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("release", [False, True], ids=["plain", "release"])
def test_odd_layouts_and_parameters_without_gradient(release, fused):
    base = Odd()
    one, other = (
        get_peft_model(b, DSTConfig(num_free_parameters=7, siloing="none")) for b in (base, copy.deepcopy(base))
    )
    plain, ours = (
        make([p for p in m.parameters() if p.requires_grad], lr=0.1, fused=fused, **options)
        for m, make, options in ((one, torch.optim.AdamW, {}), (other, DSTOptimizer, {"release_gradients": release}))
    )
    x = torch.randn(5, 40)
    for _ in range(3):
        for model, optimizer in ((one, plain), (other, ours)):
            model(x).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_same(weights(one.base_model.model), weights(other.base_model.model))


class Exact:
    """What a float32 optimizer makes of the same gradients: Θ in float32, projected by the dense reference."""

    def __init__(self, model, make_optimizer):
        self.constraint = model.constraint()
        self.live = {w.name: w.parameter for w in self.constraint.weights}
        self.seed = {name: p.detach().float().clone() for name, p in self.live.items()}
        self.theta = {name: nn.Parameter(value.clone()) for name, value in self.seed.items()}
        self.optimizer = make_optimizer(list(self.theta.values()))

    def step(self):
        for name, parameter in self.theta.items():
            gradient = self.live[name].grad
            parameter.grad = None if gradient is None else gradient.float()
        self.optimizer.step()
        silos = {s.name: [w.name for w in s.weights] for s in self.constraint.silos}
        budgets = {s.name: s.budget for s in self.constraint.silos}
        updated = {name: p.detach() for name, p in self.theta.items()}
        projected, self.subset = reference_step(self.seed, updated, silos, budgets, self.constraint.distance)
        with torch.no_grad():
            for name, value in projected.items():
                self.theta[name].copy_(value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["adamw", "adamw_fused", "adafactor", "adagrad", "sgd"])
def test_half_precision_steps_as_exactly_as_float32(kind, dtype, build):
    """The float32 values behind the subset never see the rounding: only the live weights, in the forward pass, do."""
    optimizer_cls, options = OPTIMIZERS[kind]
    options = {**options, "lr": options["lr"] / 30}
    model, parameters = wrapped(build, dtype=dtype)
    ours = DSTOptimizer(parameters, optimizer_cls, **options)
    exact = Exact(model, lambda p: optimizer_cls(p, **options))
    for step in range(5):
        loss(model, "bert", step).backward()
        exact.step()
        ours.step()
        for weight in model.constraint().weights:
            theta = exact.theta[weight.name].detach()
            assert torch.equal(weight.data, theta.to(dtype))
            assert torch.equal(weight.indices, exact.subset[weight.name])
            if weight.parameter.grad is not None:
                kept = ours.state[weight.parameter]["dst_values"]
                assert kept.dtype == torch.float32
                assert torch.equal(kept, theta.view(-1)[weight.indices])
        ours.zero_grad()


def test_half_precision_without_it_loses_small_updates():
    """The reason for all this: of updates below 1/256 of a weight bfloat16 keeps nothing."""
    moved = {}
    for name, make in (("hook", torch.optim.SGD), ("exact", lambda p, lr: DSTOptimizer(p, torch.optim.SGD, lr=lr))):
        linear = nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
        nn.init.ones_(linear.weight)
        model = get_peft_model(nn.Sequential(linear), DSTConfig(num_free_parameters=6))
        optimizer = make([p for p in model.parameters() if p.requires_grad], lr=2**-10)
        for _ in range(64):
            model(torch.eye(8, dtype=torch.bfloat16)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        moved[name] = (1 - linear.weight.detach().float()).sum().item()
    assert moved == {"hook": 0.0, "exact": 6 * 64 * 2**-10}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_parameters_step_as_in_float32(dtype, build):
    torch.manual_seed(0)
    model = get_peft_model(
        build("bert").to(dtype), DSTConfig(epsilon=0.02, task_type="SEQ_CLS", modules_to_save=["classifier"])
    )
    head = model.base_model.model.classifier.modules_to_save["default"].weight
    exact = nn.Parameter(head.detach().float().clone())
    ours = DSTOptimizer(parameter_groups(model, lr=1e-2, head_lr=1e-4), lr=1e-2)
    theirs = torch.optim.AdamW([exact], lr=1e-4, weight_decay=0.0)
    for step in range(6):
        loss(model, "bert", step).backward()
        exact.grad = head.grad.float()
        ours.step()
        theirs.step()
        ours.zero_grad()
        assert torch.equal(head, exact.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw", "adafactor", "sgd"])
def test_saved_and_resumed_equals_uninterrupted(kind, dtype, build, tmp_path):
    optimizer_cls, options = OPTIMIZERS[kind]

    def make():
        model, parameters = wrapped(build, dtype=dtype)
        optimizer = DSTOptimizer(parameters, optimizer_cls, **options)
        return model, optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))

    assert_resumed_equals_uninterrupted(make, tmp_path)


def test_values_that_no_longer_belong_to_the_weights_are_not_used(build):
    """Another adapter's values, or newly loaded ones, stand in the weights: those count, not what is remembered."""
    model, parameters = wrapped(build, dtype=torch.bfloat16)
    optimizer = DSTOptimizer(parameters, torch.optim.SGD, lr=0.1)
    loss(model, "bert").backward()
    optimizer.step()
    weight = max(model.constraint().weights, key=lambda w: w.indices.numel())
    weight.apply(weight.indices, weight.values() * 2)
    expected = weight.values().float() - 0.1 * weight.parameter.grad.view(-1)[weight.indices].float()
    old = weight.indices
    optimizer.step()
    kept = torch.isin(weight.indices, old)
    values = optimizer.state[weight.parameter]["dst_values"]
    assert kept.any()
    assert torch.equal(values[kept], expected[torch.isin(old, weight.indices)])


def test_interrupted_in_a_later_silo_undoes_the_earlier_ones(build, monkeypatch):
    for error in (MemoryError, KeyboardInterrupt):
        model, parameters = wrapped(build, dtype=torch.bfloat16)
        seed = weights(model.base_model.model)
        optimizer = DSTOptimizer(parameters, lr=1e-2)
        loss(model, "bert").backward()
        optimizer.step()
        before, values = weights(model.base_model.model), [optimizer.state[p]["dst_values"] for p in parameters]
        original, calls = choice_module.select, []

        def failing(*args, original=original, calls=calls, error=error):
            calls.append(args)
            if len(calls) == 3:
                raise error
            return original(*args)

        monkeypatch.setattr(choice_module, "select", failing)
        with pytest.raises(error):
            optimizer.step()
        monkeypatch.setattr(choice_module, "select", original)
        assert_same(weights(model.base_model.model), before)
        assert all(optimizer.state[p]["dst_values"] is v for p, v in zip(parameters, values, strict=True))
        with model.disable_adapter():
            assert_same(weights(model.base_model.model), seed)


@pytest.mark.parametrize("release", [False, True], ids=["plain", "release"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_gradients_leave_the_weights_alone(value, release, build):
    model, parameters = wrapped(build)
    base = model.base_model.model
    optimizer = DSTOptimizer(parameters, lr=1e-2, release_gradients=release)
    loss(model, "bert").backward()
    optimizer.step()
    optimizer.zero_grad()
    before = weights(base)
    handle = base.bert.encoder.layer[0].output.dense.weight.register_hook(
        lambda g: g.index_fill(0, torch.tensor(3), value)
    )

    def step():
        loss(model, "bert", 1).backward()
        optimizer.step()

    for _ in range(2):
        with pytest.raises(FloatingPointError, match=r"'bert.encoder.layer.0.output.dense.weight' is NaN or infinite"):
            step()
        assert_same(weights(base), before)
        # The optimizer's moments are the user's to restore, as with any optimizer: the second step fails without it.
        handle.remove()
        optimizer.zero_grad()


def test_inside_another_optimizer(build):
    (one, parameters), (other, others) = wrapped(build), wrapped(build)
    plain, ours = Outer(torch.optim.SGD(parameters, lr=1.0)), Outer(DSTOptimizer(others, torch.optim.SGD, lr=1.0))
    assert_same_training(one, other, "bert", (plain, ours))


def test_a_closure_is_evaluated_once_before_the_step(build):
    model, parameters = wrapped(build)
    optimizer, calls = DSTOptimizer(parameters, lr=1e-2), []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        value = loss(model, "bert")
        value.backward()
        return value

    assert optimizer.step(closure).requires_grad
    assert len(calls) == 1
    assert model.constraint().steps == 1


def test_which_optimizers_can_be_wrapped(build):
    class Mine(torch.optim.SGD):
        pass

    _, parameters = wrapped(build)
    with pytest.raises(ValueError, match="LBFGS moves all parameters together"):
        DSTOptimizer(parameters, torch.optim.LBFGS, lr=1.0)
    with pytest.raises(ValueError, match=r"Mine is not one of torch\.optim's.*separable=True"):
        DSTOptimizer(parameters, Mine, lr=1.0)
    assert "SGD" in repr(DSTOptimizer(parameters, torch.optim.SGD, lr=1.0))
    DSTOptimizer(parameters, Mine, separable=True, lr=1.0)
    with pytest.raises(ValueError, match="must be an optimizer class"):
        DSTOptimizer(parameters, "adamw")
    with pytest.raises(ValueError, match="Invalid learning rate"):
        DSTOptimizer(parameters, torch.optim.AdamW, lr=-1.0)


def test_copies_and_pickles(build):
    model, parameters = wrapped(build)
    optimizer = DSTOptimizer(parameters, lr=1e-2)
    loss(model, "bert").backward()
    optimizer.step()
    model2, optimizer2 = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (model2, optimizer2)):
        o.zero_grad()
        loss(m, "bert", 1).backward()
        o.step()
    assert_same(weights(model.base_model.model), weights(model2.base_model.model))


def test_a_copy_enforces_the_constraint_once(build):
    model, parameters = wrapped(build, churn_interval=2)
    optimizer = DSTOptimizer(parameters, torch.optim.SGD, lr=0.1)
    copied = copy.deepcopy((model, optimizer))
    for step in range(4):
        for m, o in ((model, optimizer), copied):
            loss(m, "bert", step).backward()
            o.step()
            o.zero_grad()
        assert copied[0].constraint().steps == model.constraint().steps == step + 1
        assert_same(weights(copied[0].base_model.model), weights(model.base_model.model))


def two_groups(parameters):
    """Of which each option differs, and is large enough to be seen in a step."""
    return [
        {"params": parameters[::2], "lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.99), "eps": 1e-3},
        {"params": parameters[1::2], "lr": 3e-2, "weight_decay": 0.5, "betas": (0.5, 0.9), "eps": 1e-2},
    ]


def assert_close_in_common(one, w, other, v):
    """Compare exact values of two optimizers' weights where both subsets are; return the number of these components."""
    exact, found = (o.state.get(x.parameter, {}).get("dst_values", x.values()) for o, x in ((one, w), (other, v)))
    in_common = torch.isin(w.indices, v.indices)
    exact, found = exact[in_common], found[torch.isin(v.indices, w.indices)]
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-7)
    return int(in_common.sum())


@pytest.mark.parametrize(("dtype", "release"), [(torch.float32, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_kernels_choose_as_the_working_copies_do(device, dtype, release, build):
    """Float32 arithmetic differs in last bits between the two (docs/kernels.md), so subsets agree but for near ties."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if not kernels.available(torch.empty(1, device=device)):
        pytest.skip("Triton is not installed, or not to be interpreted")
    (one, parameters), (other, others) = (wrapped(build, dtype=dtype) for _ in range(2))
    one.to(device), other.to(device)
    plain = DSTOptimizer(two_groups(parameters), kernels=False)
    ours = DSTOptimizer(two_groups(others), kernels=True, release_gradients=release)
    seed = weights(build("bert").to(dtype=dtype, device=device))
    for step in range(3):
        for model, optimizer in ((one, plain), (other, ours)):
            model(**{k: v.to(device) for k, v in batch("bert", step).items()}).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        same = total = 0
        for w, v in zip(one.constraint().weights, other.constraint().weights, strict=True):
            same += assert_close_in_common(plain, w, ours, v)
            total += w.indices.numel()
            if w.parameter in plain.state:
                assert int(plain.state[w.parameter]["step"]) == int(ours.state[v.parameter]["step"]) == step + 1
                if dtype == torch.bfloat16:
                    assert torch.equal(ours.state[v.parameter]["dst_values"].to(dtype), v.values())
        assert same >= 0.97 * total
        assert [silo.free() for silo in other.constraint().silos] == [silo.budget for silo in other.constraint().silos]
    with other.disable_adapter():
        assert_same(weights(other.base_model.model), seed)


def test_the_kernels_leave_what_is_not_theirs(build):
    """Silos with parameters that have no gradient, and other optimizers, are stepped on working copies as always."""
    if not kernels.available(torch.empty(1)):
        pytest.skip("Triton is not installed, or not to be interpreted")
    for optimizer_cls, options in ((torch.optim.SGD, {"lr": 0.1}), (torch.optim.AdamW, {"lr": 1e-2, "amsgrad": True})):
        (one, parameters), (other, others) = (wrapped(build) for _ in range(2))
        plain = DSTOptimizer(parameters, optimizer_cls, **options)
        assert_same_training(one, other, "bert", (plain, DSTOptimizer(others, optimizer_cls, kernels=True, **options)))


@pytest.mark.parametrize("all_of_it", [True, False], ids=["the model", "a weight"])
def test_the_kernels_leave_float64_to_working_copies(all_of_it, build):
    """Also a silo of which one tensor alone is, whose others would suit them."""
    if not kernels.available(torch.empty(1)):
        pytest.skip("Triton is not installed, or not to be interpreted")
    models, optimizers, rest = [], [], torch.float64 if all_of_it else torch.float32
    for kernel in (False, True):
        base = build("bert")
        norm = base.bert.embeddings.LayerNorm
        (base if all_of_it else norm).double()
        norm.register_forward_hook(lambda module, args, output: output.to(rest))
        norm.register_forward_pre_hook(lambda module, args: (args[0].to(module.weight.dtype),))
        models.append(get_peft_model(base, DSTConfig(epsilon=0.05, siloing="module")))
        parameters = [p for p in models[-1].parameters() if p.requires_grad]
        optimizers.append(DSTOptimizer(two_groups(parameters), kernels=kernel))
    assert any(
        len({w.data.dtype for w in silo.weights}) == 1 + (not all_of_it) for silo in models[0].constraint().silos
    )
    for step in range(2):
        for model, optimizer in zip(models, optimizers, strict=True):
            loss(model, "bert", step).backward()
            optimizer.step()
            optimizer.zero_grad()
        same = total = 0
        for w, v in zip(*(model.constraint().weights for model in models), strict=True):
            if all_of_it:
                assert torch.equal(v.data, w.data)
            same += assert_close_in_common(optimizers[0], w, optimizers[1], v)
            total += w.indices.numel()
        assert same >= 0.97 * total


def test_non_finite_updates_in_the_kernels(build):
    if not kernels.available(torch.empty(1)):
        pytest.skip("Triton is not installed, or not to be interpreted")
    model, parameters = wrapped(build)
    base = model.base_model.model
    optimizer = DSTOptimizer(parameters, lr=1e-2, kernels=True)
    loss(model, "bert").backward()
    optimizer.step()
    before = weights(base)
    base.bert.encoder.layer[0].output.dense.weight.grad[2, 3] = float("nan")
    with pytest.raises(FloatingPointError, match=r"'bert.encoder.layer.0.output.dense.weight' is NaN or infinite"):
        optimizer.step()
    assert_same(weights(base), before)
