"""What does not work on divided weights says so in every process, before anything is changed."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from peft_dst import DSTConfig, DSTOptimizer, fix_subset, overlap, score_parameters, start_from
from tests.distributed.sharded import divide, make, optimizer_of, step, subsets
from tests.models import BUILDERS, batch


REFUSED = {"match": r"does not work on weights that are divided"}


def track(rank, world, kind):
    model = make(world, "bert", {"epsilon": 0.02, "threshold": "iterative"})
    optimizer = optimizer_of(model, kind)
    before = [weight.data.clone() for weight in model.constraint().weights]
    with pytest.raises(NotImplementedError, match=r"threshold='iterative' does not work.*threshold='exact'"):
        step(rank, world, model, optimizer, "bert", 0)
    assert all(torch.equal(a, w.data) for a, w in zip(before, model.constraint().weights, strict=True))


@pytest.mark.parametrize("kind", ["hook", "AdamW"])
def test_tracked_thresholds(together, kind):
    together(2, track, kind)


def give(rank, world):
    """A subset to a divided model, before and after it gets its adapter."""
    for options in ({"selection": "random"}, {"selection": "fisher"}, {"init_weights": False}):
        base = BUILDERS["bert"]()
        divide(base)
        with pytest.raises(NotImplementedError, **REFUSED):
            get_peft_model(base, DSTConfig(epsilon=0.02, **options))
        assert not any("_sparse" in name for name, _ in base.named_modules())
    model = make(world, "bert", {"epsilon": 0.02, "selection": "fisher"})
    weight = next(iter(model.constraint().weights))
    with pytest.raises(NotImplementedError, **REFUSED):
        fix_subset(model, {w.name: torch.rand(w.shape) for w in model.constraint().weights})
    with pytest.raises(NotImplementedError, match=r"scoring does not work"):
        score_parameters(model.get_base_model(), [batch("bert", 0)], names=[weight.name], progress=False)
    model = make(world, "bert", {"epsilon": 0.02})
    with pytest.raises(NotImplementedError, **REFUSED):
        start_from(model, {weight.name: torch.tensor([0])})
    assert not any(indices.numel() for indices, _ in subsets(model).values())


def test_given_subsets(together):
    together(2, give)


def divide_afterwards(rank, world):
    base = BUILDERS["bert"]()
    model = get_peft_model(base, DSTConfig(epsilon=0.02, selection="random"))
    divide(base)
    with pytest.raises(NotImplementedError, match="has a fixed subset, whose gradients are gathered before"):
        model(**batch("bert", 0)).loss.backward()


def test_a_static_subset_that_is_divided_afterwards(together):
    together(2, divide_afterwards)


def compare(rank, world):
    model = make(world, "bert", {"epsilon": 0.02})
    with pytest.raises(
        NotImplementedError, match="overlap of a model's adapter does not work on weights that are divided"
    ):
        overlap((model, "default"), {})


def test_overlap(together):
    together(2, compare)


def combine(rank, world):
    model = make(world, "bert", {"epsilon": 0.02})
    step(rank, world, model, optimizer_of(model, "hook"), "bert", 0)
    before = subsets(model)
    with pytest.raises(NotImplementedError, match="add_weighted_adapter does not work"):
        model.add_weighted_adapter(["default"], [0.5], "half")
    assert list(model.peft_config) == ["default"]
    rows = batch("bert", 0)
    names = ["default", "__base__"] * (len(rows["input_ids"]) // 2)
    with torch.no_grad(), pytest.raises(NotImplementedError, match=r"adapter_names\) does not work"):
        model.eval()(**rows, adapter_names=names)
    after = subsets(model)
    assert all(torch.equal(a, b) for name in before for a, b in zip(before[name], after[name], strict=True))


def test_sums_of_adapters_and_mixed_batches(together):
    together(2, combine)


def release(rank, world):
    model = make(world, "bert", {"epsilon": 0.02})
    with pytest.raises(RuntimeError, match="release_gradients=False"):
        DSTOptimizer(model.parameters(), release_gradients=True)


def test_released_gradients(together):
    together(2, release)
