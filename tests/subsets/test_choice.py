import math
import warnings

import pytest
import torch

from peft_dst.core import SILOINGS, allocate_budgets, partition
from peft_dst.subsets import choose, random_scores


def reference(scores, silos, budgets):
    """A full sort of each silo, in Python's own numbers."""
    chosen = {}
    for silo, names in silos.items():
        entries = [
            (-s, i, at) for i, n in enumerate(names) for at, s in enumerate(scores[n].flatten().tolist()) if s > 0
        ]
        best = sorted(entries)[: budgets[silo]]
        for i, name in enumerate(names):
            chosen[name] = sorted(at for _, tensor, at in best if tensor == i)
    return chosen


def assert_chosen(scores, silos, budgets):
    chosen = choose(scores, silos, budgets)
    assert {name: at.tolist() for name, at in chosen.items()} == reference(scores, silos, budgets)
    assert all(at.dtype == torch.int64 for at in chosen.values())
    return chosen


@pytest.mark.parametrize("epsilon", [1e-4, 1e-3, 0.03, 0.4, 1.0])
@pytest.mark.parametrize("kind", ["random", "ties"])
@pytest.mark.parametrize("siloing", SILOINGS)
def test_equals_a_full_sort(build, siloing, kind, epsilon):
    shapes = {name: parameter.shape for name, parameter in build("bert").named_parameters()}
    silos = partition(list(shapes), siloing)
    sizes = [sum(math.prod(shapes[name]) for name in names) for names in silos.values()]
    budgets = dict(zip(silos, allocate_budgets(sizes, epsilon=epsilon), strict=True))
    scores = {name: random_scores(name, shape, 3) for name, shape in shapes.items()}
    if kind == "ties":
        scores = {name: 0.25 + (score * 3).floor() for name, score in scores.items()}
    chosen = assert_chosen(scores, silos, budgets)
    assert list(chosen) == [name for names in silos.values() for name in names]
    assert sum(at.numel() for at in chosen.values()) == round(epsilon * sum(sizes))


@pytest.mark.parametrize("budget", [1, 700, 5000, 160_000, 262_143, 262_144])
def test_silos_of_several_tiles(budget):
    # More than one tile of distances, and both of the ways to choose.
    scores = {"a": random_scores("a", (200, 1000), 0), "b": random_scores("b", (62_144,), 0)}
    assert_chosen(scores, {"s": ["a", "b"]}, {"s": budget})


def test_ties_go_to_the_lower_tensor_and_index():
    scores = {"b": torch.ones(2, 2), "a": torch.ones(3)}
    chosen = choose(scores, {"s": ["b", "a"]}, {"s": 5})
    assert {name: at.tolist() for name, at in chosen.items()} == {"b": [0, 1, 2, 3], "a": [0]}


def test_silos_do_not_compete():
    scores = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([[10.0], [20.0]]), "unused": torch.ones(1)}
    chosen = choose(scores, {"one": ["a"], "two": ["b"]}, {"one": 2, "two": 0})
    assert {name: at.tolist() for name, at in chosen.items()} == {"a": [1, 2], "b": []}


@pytest.mark.parametrize("budget", [3, 4, 5, 6])
def test_zeros_are_never_chosen(budget):
    """6 is the whole silo, where a score of -0.0 would have other bits than its zero."""
    scores = {"a": torch.tensor([0.0, 1.0, -0.0, 0.5]), "b": torch.tensor([-0.0, 2.0])}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_chosen(scores, {"s": ["a", "b"]}, {"s": budget})
    assert [str(w.message).split(": ")[0] for w in caught] == (
        [f"fewer scores above zero than the budget in 's' 3 of {budget}"] if budget > 3 else []
    )
    assert all(w.filename == __file__ for w in caught)


def test_short_silos_are_named_in_one_warning():
    scores = {str(i): torch.zeros(10) for i in range(8)}
    scores["0"][3:5] = 1.0
    silos = {f"silo_{i}": [str(i)] for i in range(8)}
    with pytest.warns(
        UserWarning, match=r"'silo_0' 2 of 4, 'silo_1' 0 of 4, .*'silo_4' 0 of 4 and 3 more silos: "
    ) as caught:
        choose(scores, silos, dict.fromkeys(silos, 4))
    assert len(caught) == 1


def test_strided_and_empty_scores():
    wide = torch.arange(12.0).view(3, 4)
    scores = {"t": wide.t(), "none": torch.empty(0, 4), "one": torch.tensor(100.0)}
    chosen = choose(scores, {"s": ["t", "none", "one"]}, {"s": 3})
    # Flat positions of the transposed tensor: 11 stands last, 10 three places before it.
    assert {name: at.tolist() for name, at in chosen.items()} == {"t": [8, 11], "none": [], "one": [0]}
    assert choose({"none": torch.empty(0)}, {"s": ["none"]}, {"s": 0})["none"].tolist() == []


def test_the_zeros_take_no_memory(monkeypatch):
    """Neither the seeds handed to `select` nor what it does with them grow with the silo."""
    from peft_dst.subsets import choice

    seeds = []

    def select(zeros, *args):
        seeds.extend(zeros)
        return real(zeros, *args)

    real = choice.select
    monkeypatch.setattr(choice, "select", select)
    n = 3_000_000
    chosen = choose({"w": random_scores("w", (n,), 0)}, {"s": ["w"]}, {"s": 1000})
    assert chosen["w"].numel() == 1000
    assert [(zero.numel(), zero.untyped_storage().nbytes()) for zero in seeds] == [(n, 4)]


@pytest.mark.parametrize("budget", [2, 100, 1500])
def test_selection_allocates_a_tile_and_not_a_silo(budget):
    # 12 MB of scores; a tile is half a megabyte.
    scores = {"w": random_scores("w", (3_000_000,), 0)}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        choose(scores, {"s": ["w"]}, {"s": budget})
    assert max(event.cpu_memory_usage for event in profile.events()) < 1.1 * 2**20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": {}}, r"no score of 'w'. Score it too \(`names`\), or leave it out"),
        ({"scores": {"w": torch.tensor([1.0, float("nan")])}}, "'w' has values from nan"),
        ({"scores": {"w": torch.tensor([1.0, -1.0])}}, r"'w' has values from -1.0 to 1.0; .* not negative"),
        ({"scores": {"w": torch.tensor([1, 2])}}, "'w' is torch.int64"),
        ({"shapes": {"w": (1, 2)}}, r"'w' has shape \(2,\), the parameter \(1, 2\)"),
        ({"budgets": {}}, "differ in 's': give one budget for each silo"),
        ({"budgets": {"s": 1, "t": 1}}, "differ in 't'"),
        ({"budgets": {"s": 3}}, "budget of silo 's' is 3; it has 2 components. Use 0 to 2"),
        ({"budgets": {"s": -1}}, "budget of silo 's' is -1"),
        ({"silos": {"s": ["w", "w"]}}, "'w' is 2 times in the silos"),
        ({"silos": {"s": ["w"], "t": ["w"]}, "budgets": {"s": 1, "t": 1}}, "'w' is 2 times in the silos"),
    ],
)
def test_what_cannot_be_chosen_from_is_refused(change, message):
    arguments = {"scores": {"w": torch.ones(2)}, "silos": {"s": ["w"]}, "budgets": {"s": 1}, "shapes": {"w": (2,)}}
    choose(**arguments)
    with pytest.raises(ValueError, match=message):
        choose(**arguments | change)
