"""Adapters made from others, against PEFT's own functions on dense differences."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import merge_utils
from torch import Tensor, nn

from peft_dst import DSTConfig
from peft_dst.tuner.weighted import combine
from tests.models import assert_same, bert, logits, train, tuned_model, weights


ADAPTERS, WEIGHTS = ["a", "b", "c"], [0.5, 1.25, -0.75]


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1).double() for tensor in tensors.values()])


@pytest.fixture
def model(build):
    return tuned_model(build, "bert", ADAPTERS)[0]


def dense(model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """The seed (n,), and each adapter's difference to it, dense (n,)."""
    with model.disable_adapter():
        seed = flat(weights(model))
    differences = []
    for adapter in ADAPTERS:
        model.set_adapter(adapter)
        differences.append(flat(weights(model)) - seed)
    return seed, differences


def combined(model: nn.Module, kind: str, **options) -> Tensor:
    """The difference to the seed (n,) of the combined adapter, which is removed again."""
    model.add_weighted_adapter(ADAPTERS, WEIGHTS, "new", kind, **options)
    seed, _ = dense(model)
    model.set_adapter("new")
    difference = flat(weights(model)) - seed
    assert (difference != 0).sum() == model.constraint("new").budget == model.peft_config["new"].num_free_parameters
    model.set_adapter("a")
    model.delete_adapter("new")
    return difference


@pytest.mark.parametrize("kind", ["linear", "cat", "union"])
def test_a_weighted_sum(model, kind):
    _, differences = dense(model)
    wanted = merge_utils.task_arithmetic(differences, torch.tensor(WEIGHTS, dtype=torch.float64))
    assert torch.allclose(combined(model, kind), wanted, rtol=0, atol=1e-7)
    overlap = sum((difference != 0).long() for difference in differences)
    assert {1, 2} <= set(overlap.tolist())


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("kind", ["ties", "magnitude_prune"])
@pytest.mark.parametrize("density", [0.3, 0.7])
def test_pruned_by_size(model, kind, density, sign):
    """A density is a share of the entries: dense, the same number of components is a smaller share."""
    _, differences = dense(model)
    entries = int((differences[0] != 0).sum())
    assert all(int((difference != 0).sum()) == entries for difference in differences)
    share = (int(density * entries) + 0.5) / differences[0].numel()
    factors = torch.tensor(WEIGHTS, dtype=torch.float64)
    options = {"majority_sign_method": sign} if kind == "ties" else {}
    wanted = getattr(merge_utils, kind)(differences, factors, share, **options)
    found = combined(model, kind, density=density, majority_sign_method=sign)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-7)


def test_density_one_keeps_all(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(combined(model, "magnitude_prune", density=1.0), combined(model, "linear"))


def test_combinations_by_hand():
    entries = [
        (torch.tensor([1, 4, 7]), torch.tensor([3.0, -1.0, 2.0], dtype=torch.float64)),
        (torch.tensor([4, 7, 9]), torch.tensor([5.0, -4.0, 1.0], dtype=torch.float64)),
    ]
    union, linear = combine(entries, [2.0, 1.0], "linear")
    assert union.tolist() == [1, 4, 7, 9]
    assert linear.tolist() == [6.0, 3.0, 0.0, 1.0]
    # Signs by the sums 3, 4, -2, 1; the mean of what has that sign.
    assert combine(entries, [2.0, 1.0], "ties", 1.0)[1].tolist() == [6.0, 5.0, -4.0, 1.0]
    # By number there is a tie at 4 and at 7, which goes to plus.
    assert combine(entries, [2.0, 1.0], "ties", 1.0, "frequency")[1].tolist() == [6.0, 5.0, 4.0, 1.0]
    # Two thirds are two of three entries: -1 and 1 go.
    assert combine(entries, [2.0, 1.0], "magnitude_prune", 0.67)[1].tolist() == [6.0, 5.0, 0.0, 0.0]


def test_pruned_at_random():
    torch.manual_seed(1)
    indices = torch.arange(0, 40_000, 2)
    entries = [(indices, torch.full((20_000,), value, dtype=torch.float64)) for value in (1.0, 2.0)]
    _, linear = combine(entries, [1.0, 1.0], "dare_linear", 0.25)
    assert set(linear.tolist()) == {0.0, 4.0, 8.0, 12.0}
    assert linear.mean() == pytest.approx(3.0, rel=0.05)
    assert (linear > 0).double().mean() == pytest.approx(1 - 0.75**2, rel=0.05)
    _, ties = combine(entries, [1.0, 1.0], "dare_ties", 0.25)
    # Where both were kept, their mean.
    assert set(ties.tolist()) == {0.0, 4.0, 6.0, 8.0}


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties"])
def test_pruned_at_random_in_a_model(model, kind):
    _, differences = dense(model)
    found = combined(model, kind, density=0.5)
    union = sum(difference.abs() for difference in differences) != 0
    assert 0 < (found != 0).sum() < union.sum()
    assert not found[~union].any()


def test_weights_of_one_are_all_adapters_at_once(model):
    model.add_weighted_adapter(ADAPTERS, [1.0, 1.0, 1.0], "new")
    assert model.active_adapters == ["c"]
    model.set_adapter("new")
    found = flat(weights(model))
    model.base_model.set_adapter(ADAPTERS)
    assert torch.allclose(found, flat(weights(model)), rtol=0, atol=1e-7)


def test_one_adapter_with_weight_one_is_a_copy(model):
    model.add_weighted_adapter(["b"], [1.0], "new")
    model.set_adapter("b")
    wanted = weights(model)
    model.set_adapter("new")
    assert_same(weights(model), wanted)


def test_saved_loaded_and_merged_like_any_other(model, build, tmp_path):
    model.add_weighted_adapter(ADAPTERS, WEIGHTS, "new", "ties", density=0.8)
    model.set_adapter("new")
    wanted = logits(model, "bert")
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path / "new")
    assert torch.equal(logits(loaded, "bert"), wanted)
    assert torch.equal(logits(loaded.merge_and_unload(), "bert"), wanted)


@pytest.mark.parametrize("targets", [("query", "value"), ("query", r".*dense")])
def test_sources_that_tune_different_modules(build, targets, tmp_path):
    configs = [
        DSTConfig(
            epsilon=0.1, target_modules=t if "*" in t else [t], init_weights=False, modules_to_save=["classifier"]
        )
        for t in targets
    ]
    model = get_peft_model(build("bert"), configs[0], "a")
    model.add_adapter("b", configs[1])
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new")
    with model.disable_adapter():
        seed = weights(model)
    wanted = dict(seed)
    for name in "ab":
        model.set_adapter(name)
        wanted |= {key: tensor for key, tensor in weights(model).items() if not torch.equal(tensor, seed[key])}
    model.set_adapter("new")
    found = weights(model)
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[key], wanted[key], rtol=0, atol=1e-6) for key in found)
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path / "new")
    assert torch.equal(logits(loaded, "bert"), logits(model, "bert"))


def test_dense_copies_must_be_the_same(build):
    model, _ = tuned_model(build, "bert", ("a", "b"), modules_to_save=["classifier"])
    before = copy.deepcopy(dict(model.state_dict()))
    with pytest.raises(ValueError, match="'classifier' has different dense copies for a, b"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new")
    assert model.peft_config.keys() == {"a", "b"}
    assert_same(before, dict(model.state_dict()))
    copies = model.base_model.model.classifier.modules_to_save
    model.add_weighted_adapter(["b"], [0.5], "less")
    assert torch.equal(copies["less"].weight, copies["b"].weight)
    copies["b"].load_state_dict(copies["a"].state_dict())
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "new")
    assert torch.equal(copies["new"].weight, copies["a"].weight)


BAD = {
    "unknown": ((["a", "d"], [1.0, 1.0], "new"), {}, r"Adapter d does not exist\. There are a, b, c\."),
    "none": (([], [], "new"), {}, "no adapters were given"),
    "twice": ((["a", "a"], [1.0, 1.0], "new"), {}, "names one of a, a twice"),
    "existing": ((["a", "b"], [1.0, 1.0], "c"), {}, "Adapter c already exists"),
    "weights": ((["a", "b"], [1.0], "new"), {}, "2 adapters need as many weights, got 1"),
    "nan": ((["a", "b"], [1.0, math.nan], "new"), {}, r"weights must be finite, got \[1.0, nan\]"),
    "infinite": ((["a", "b"], [-math.inf, 1.0], "new"), {}, r"weights must be finite, got \[-inf, 1.0\]"),
    "huge": ((["a", "b"], [1e300, 1.0], "new"), {}, "gives '.*' the value -?inf at position .* torch.float32"),
    "kind": ((["a", "b"], [1.0, 1.0], "new", "svd"), {}, "Invalid combination_type: svd"),
    "density": ((["a", "b"], [1.0, 1.0], "new", "ties"), {}, "give a density with 0 < density <= 1, got None"),
    "range": ((["a", "b"], [1.0, 1.0], "new", "ties"), {"density": 1.5}, "give a density with .* got 1.5"),
    "sign": ((["a", "b"], [1.0, 1.0], "new"), {"majority_sign_method": "x"}, "must be 'total' or 'frequency', got 'x'"),
    "nothing": ((["a", "b"], [0.0, 0.0], "new"), {}, "the combination leaves no entry"),
}


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    model = get_peft_model(bert(), DSTConfig(epsilon=0.02, init_weights=False), "a")
    model.add_adapter("b", DSTConfig(epsilon=0.02, init_weights=False))
    model.add_adapter("c", DSTConfig(epsilon=0.02, init_weights=False))
    return model


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_change_nothing(untrained, case):
    arguments, options, message = BAD[case]
    before = copy.deepcopy(dict(untrained.state_dict()))
    with pytest.raises(ValueError, match=message):
        untrained.add_weighted_adapter(*arguments, **options)
    assert untrained.peft_config.keys() == {"a", "b", "c"}
    assert_same(before, dict(untrained.state_dict()))


def test_what_overflows_leaves_no_trace(build):
    """A value that float16 holds, three times."""
    model = get_peft_model(build("bert").half(), DSTConfig(epsilon=0.02), "a")
    weight = model.get_base_model().bert.pooler.dense.weight
    weight.grad = torch.zeros_like(weight)
    weight.grad[0, 5] = -30_000.0
    torch.optim.SGD([weight], lr=1.0).step()
    before, names = copy.deepcopy(dict(model.state_dict())), [name for name, _ in model.named_modules()]
    for factor, value in ((3.0, "inf"), (-3.0, "-inf")):
        with pytest.raises(
            ValueError, match=rf"'bert.pooler.dense.weight' the value {value} at position 5, .*float16\. Give"
        ):
            model.add_weighted_adapter(["a"], [factor], "new")
        assert model.peft_config.keys() == {"a"}
        assert [name for name, _ in model.named_modules()] == names
        assert_same(before, dict(model.state_dict()))
    model.add_weighted_adapter(["a"], [2.0], "new")


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_dense_copies_of_all_sources_are_taken(build, order):
    options = {"epsilon": 0.02, "target_modules": ["attention"]}
    model, _ = tuned_model(build, **options, modules_to_save=["classifier"], adapters=("a",))
    model.add_adapter("b", DSTConfig(**options, modules_to_save=["pooler"]))
    model.set_adapter("b")
    train(model, "bert")
    model.add_weighted_adapter(list(order), [float(name == "b") for name in order], "c")
    copies = model.base_model.model.bert.pooler.modules_to_save
    assert_same(dict(copies["b"].state_dict()), dict(copies["c"].state_dict()))
    copies = model.base_model.model.classifier.modules_to_save
    assert_same(dict(copies["a"].state_dict()), dict(copies["c"].state_dict()))
