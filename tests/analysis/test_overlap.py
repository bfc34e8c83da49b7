"""Overlap of two subsets (Eq. 9): hand-computed cases, saved and live adapters, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_dst import DSTConfig
from peft_dst.analysis import Count, overlap, overlaps
from tests.models import bert, checkpoint_layers, compile_layers, llama, train
from tests.quantised.bases import StandIn


Q = "model.layers.0.self_attn.q_proj.weight"
K = "model.layers.1.self_attn.k_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"
A = {Q: [0, 3, 5, 9], K: [1], UP: [7, 8]}
B = {Q: [3, 4, 9], UP: [2, 7, 8, 9], NORM: [0]}
SIZES = {Q: 10, K: 10, UP: 20, NORM: 4}


def test_a_hand_computed_case():
    result = overlap(A, B, sizes=SIZES)
    assert result.parameters == {
        Q: Count(4, 3, 2, 12 / 10),
        K: Count(1, 0, 0, 0.0),
        UP: Count(2, 4, 2, 8 / 20),
        NORM: Count(0, 1, 0, 0.0),
    }
    assert result.total == Count(7, 8, 4, 1.2 + 0.4)
    assert (result.total.of_a, result.total.of_b) == (4 / 7, 4 / 8)
    assert (result.total.chance_of_a, result.total.chance_of_b) == (1.6 / 7, 1.6 / 8)
    assert result.kinds == {
        "attention": Count(5, 3, 2, 1.2),
        "feed_forward": Count(2, 4, 2, 0.4),
        "norm": Count(0, 1, 0, 0.0),
    }
    assert result.layers == {
        "model.layers.0": Count(4, 3, 2, 1.2),
        "model.layers.1": Count(3, 4, 2, 0.4),
        "": Count(0, 1, 0, 0.0),
    }
    assert (result.only_in_a, result.only_in_b) == ((K,), (NORM,))
    lines = str(result).splitlines()
    assert lines[2].split() == ["total", "7", "8", "4", "57.14%", "22.86%", "50.00%", "20.00%"]
    assert lines[6].split() == ["norm", "0", "1", "0", "-", "-", "0.00%", "0.00%"]
    assert lines[-2].split() == ["outside", "any", "layer", "0", "1", "0", "-", "-", "0.00%", "0.00%"]
    assert lines[-1] == "tensors with entries in A only: 1, in B only: 1"


def test_both_directions_are_one_another():
    one, other = overlap(A, B, sizes=SIZES).total, overlap(B, A, sizes=SIZES).total
    assert (one.a, one.b, one.both, one.chance) == (other.b, other.a, other.both, other.chance)
    assert one.of_a == other.of_b


def test_without_sizes_there_is_no_chance():
    result = overlap(A, B)
    assert result.total == Count(7, 8, 4, None)
    assert math.isnan(result.total.chance_of_a)
    # Where only some are known, so are only some sums.
    result = overlap(A, B, sizes={Q: 10, K: 10})
    assert result.kinds["attention"].chance == 1.2
    assert result.kinds["feed_forward"].chance is result.total.chance is None
    assert "57.14%          -" in str(result)


def test_nothing_in_common_with_nothing():
    result = overlap({}, {Q: []})
    assert result.total == Count(0, 0, 0, 0.0)
    assert math.isnan(result.total.of_a)
    assert result.parameters == {}


def test_random_subsets_overlap_as_chance_has_it():
    numel, a, b = 2000, 300, 500
    found = []
    for seed in range(40):
        order = torch.Generator().manual_seed(seed)
        one, other = (torch.randperm(numel, generator=order)[:k].sort().values for k in (a, b))
        found.append(overlap({Q: one}, {Q: other}, sizes={Q: numel}).total.both)
    assert sum(found) / len(found) == pytest.approx(a * b / numel, rel=0.05)


def test_equals_python_sets():
    order = torch.Generator().manual_seed(0)
    one, other = (torch.randint(50, (20,), generator=order).unique() for _ in range(2))
    both = set(one.tolist()) & set(other.tolist())
    assert overlap({Q: one.int()}, {Q: other}).total.both == len(both) > 0


def test_folders_and_models_say_the_same(build, tmp_path):
    model = get_peft_model(build("bert"), DSTConfig(epsilon=0.02), "a")
    train(model, "bert")
    model.add_adapter("b", DSTConfig(epsilon=0.05, distance="absolute"))
    model.set_adapter("b")
    train(model, "bert", first=9)
    # The active adapter is read from the live weights, the other from its record.
    live = overlap((model, "a"), (model, "b"))
    model.save_pretrained(tmp_path)
    base = build("bert")
    assert overlap(tmp_path / "a", str(tmp_path / "b"), sizes=base) == live
    assert overlap(tmp_path / "a", (model, "b")) == live
    assert (live.total.a, live.total.b) == tuple(model.base_model.constraint(n).budget for n in "ab")
    indices = {
        adapter: {
            weight.name: set(marker.records(adapter)[parameter].indices.tolist())
            for marker in model.modules()
            if hasattr(marker, "records")
            for parameter, weight in marker.weights.items()
        }
        for adapter in ("a", "b")
    }
    sizes = {name: p.numel() for name, p in base.named_parameters()}
    assert live.total.both == sum(len(indices["a"][n] & indices["b"][n]) for n in sizes) > 0
    chance = sum(len(indices["a"][n]) * len(indices["b"][n]) / sizes[n] for n in sizes)
    assert live.total.chance == pytest.approx(chance, rel=1e-12)
    assert overlap((model, "a"), (model, "a")).total.of_a == 1.0
    # Loaded, and not yet used.
    assert (
        overlap((PeftModel.from_pretrained(base, tmp_path / "b", "b"), "b"), tmp_path / "a").total.both
        == live.total.both
    )


def test_adapters_of_different_modules_share_nothing(build, tmp_path):
    for module in ("attention", "intermediate"):
        model = get_peft_model(build("bert"), DSTConfig(epsilon=0.02, target_modules=[module]))
        train(model, "bert")
        model.save_pretrained(tmp_path / module)
    result = overlap(tmp_path / "attention", tmp_path / "intermediate")
    assert result.total.both == 0 < result.total.a
    assert len(result.only_in_a) + len(result.only_in_b) == len(result.parameters)


def test_names_that_the_rules_do_not_read():
    names = {"blocks.0.mixer.weight": [1], "blocks.1.mixer.weight": [1]}
    pattern = r"(?P<layer>blocks\.\d+)\.(?P<module>mix)"
    result = overlap(names, names, silo_pattern=pattern)
    assert list(result.kinds) == ["mix"]
    assert list(result.layers) == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize(
    ("subset", "message"),
    [
        ([3, 1], "strictly ascending"),
        ([3, 3], "strictly ascending"),
        ([-1, 2], "negative"),
        (torch.tensor([1.0]), "vector of integers"),
        (torch.tensor([True, False]), "nonzero"),
        (torch.tensor([[1, 2]]), r"shape \(1, 2\)"),
    ],
)
def test_mappings_that_are_no_subsets(subset, message):
    with pytest.raises(ValueError, match=message):
        overlap(A, {Q: subset})


def test_different_bases(build):
    models = [get_peft_model(model, DSTConfig(epsilon=0.5)) for model in (build("bert"), bert(vocab_size=62), llama())]
    for model, name in zip(models, ("bert", "bert", "llama"), strict=True):
        train(model, name)
    bigger, other = ((model, "default") for model in models[1:])
    first = (models[0], "default")
    with pytest.raises(ValueError, match=r"word_embeddings.weight'.*\(976, 992\).*different bases"):
        overlap(first, bigger)
    with pytest.raises(ValueError, match=r"\(976, none\).*different bases"):
        overlap(first, other)
    with pytest.raises(
        ValueError, match=r"'model.layers.0.self_attn.q_proj.weight' has 9 comp.*position 9: .*another base"
    ):
        overlap(A, B, sizes={Q: 9})
    with pytest.raises(ValueError, match="do not agree"):
        overlap(first, first, sizes={"bert.embeddings.word_embeddings.weight": 3})


def test_adapters_that_are_not_there(build, tmp_path):
    model = get_peft_model(build("bert"), DSTConfig(epsilon=0.02))
    with pytest.raises(ValueError, match=r"b: the model has no DST adapter 'other'; it has default"):
        overlap((model, "default"), (model, "other"))
    with pytest.raises(ValueError, match=r"adapter_config.json cannot be read.*folder of a saved adapter"):
        overlap(tmp_path, tmp_path)
    train(model, "bert")
    model.save_pretrained(tmp_path)
    fresh = get_peft_model(build("bert"), DSTConfig.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match="its tensors were not loaded"):
        overlap((fresh, "default"), tmp_path)


def test_several_each_with_each():
    c = {Q: [0, 9], UP: []}
    found = overlaps([A, B, c, {}], ["one", "other", "third", "none"], sizes=SIZES)
    nan = pytest.approx(math.nan, nan_ok=True)
    assert found.names == ("one", "other", "third", "none")
    assert found.entries == (7, 8, 2, 0)
    assert found.shared == ((1, 4 / 7, 2 / 7, 0), (4 / 8, 1, 1 / 8, 0), (1, 1 / 2, 1, 0), (nan,) * 4)
    assert found.chance[0][1:] == (1.6 / 7, (4 * 2 / 10) / 7, 0)
    assert found.chance[2][0] == 4 * 2 / 10 / 2
    lines = str(found).splitlines()
    assert lines[1].split() == ["one", "other", "third", "none"]
    assert lines[3].split() == ["one", "100.0%", "57.1%", "28.6%", "0.0%"]
    assert lines[6].split() == ["none", "-", "-", "-", "-"]
    assert lines[7] == "by chance: 0.0% to 40.0%"
    assert "chance" not in str(overlaps([A, B], ["one", "other"]))


def test_long_names_are_numbered():
    lines = str(overlaps([A, B], ["one", "b" * 25], sizes=SIZES)).splitlines()
    assert lines[1].split() == ["(1)", "(2)"]
    assert lines[4].split() == ["(2)", "50.0%", "100.0%"]
    assert lines[-2:] == ["(1) one", f"(2) {'b' * 25}"]


def test_which_two_of_several_do_not_go_together(saved):
    folder, _, _ = saved()
    other = get_peft_model(llama(), DSTConfig(epsilon=0.02, init_weights=False))
    with pytest.raises(ValueError, match=r"^first and third: .* belong to different bases"):
        overlaps([folder, folder, (other, "default")], ["first", "second", "third"], sizes=bert())
    with pytest.raises(ValueError, match="2 subsets need as many names, got 1"):
        overlaps([A, B], ["one"])


@pytest.mark.parametrize("wrap", [compile_layers, checkpoint_layers, "whole"])
def test_wrapped_models(wrap, build, tmp_path):
    """Torch's wrappers put their own names into those of parameters; adapters have none of them."""
    model = get_peft_model(build("llama"), DSTConfig(epsilon=0.02), "a")
    model.add_adapter("b", DSTConfig(epsilon=0.05, init_weights=False))
    train(model, "llama")
    model.save_pretrained(tmp_path)
    plain = overlap((model, "a"), (model, "b"))
    base = build("llama")
    for one in (model.get_base_model(), base):
        if wrap != "whole":
            wrap(one)
    if wrap == "whole":
        model, base = (torch.compile(one, backend="eager") for one in (model, base))
    assert overlap((model, "a"), (model, "b")) == plain
    assert overlap(tmp_path / "a", tmp_path / "b", sizes=base) == plain
    assert overlap(tmp_path / "a", (model, "b"), sizes=base) == plain


def test_weights_that_are_stored_in_less(build):
    """Of four bits each: two components share a byte."""
    base = build("llama")
    for layer in base.model.layers:
        packed = torch.zeros(layer.mlp.up_proj.weight.numel() // 2, 1).as_subclass(StandIn)
        layer.mlp.up_proj.weight = torch.nn.Parameter(packed, requires_grad=False)
    name, numel = "model.layers.0.mlp.up_proj.weight", 32 * 16
    found = overlap({name: [0, 1, numel - 1]}, {name: [1, 2]}, sizes=base)
    assert found.total == Count(3, 2, 1, 6 / numel)
