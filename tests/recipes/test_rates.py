"""The learning rate where none is given: which, where it is settled, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from peft_dst import DSTConfig
from peft_dst.config import DEFAULT_EPSILON
from peft_dst.recipes import at, load_recipe, make_recipe, settled, train
from peft_dst.recipes.options import METHODS
from peft_dst.recipes.rates import BY_EPSILON, FIXED, KINDS, by_rule
from peft_dst.training.callback import training_advice
from tests import toys


RESULTS = Path(__file__).parents[2] / "results" / "minilm"
LEAST = {"model": {"name": "m"}, "task": {"name": "classification", "data": "d"}}


def rate(*overrides):
    return settled(make_recipe(LEAST, overrides)).training.learning_rate


def test_there_is_a_rule_for_every_method():
    assert set(METHODS) == FIXED.keys() | KINDS.keys()
    assert set(KINDS.values()) == BY_EPSILON.keys()
    for kind, known in BY_EPSILON.items():
        method = next(name for name in KINDS if KINDS[name] == kind)
        assert [by_rule(method, epsilon) for epsilon in known] == list(known.values())
        # The larger the budget, the lower the rate, and never outside what was measured.
        found = [by_rule(method, 10 ** (-7 + i / 10)) for i in range(71)]
        assert found == sorted(found, reverse=True)
        assert {found[0], found[-1]} == {known[min(known)], known[max(known)]}


def test_between_two_budgets(monkeypatch):
    """Half-way between them, on logarithmic scales, is the geometric mean: here 1e-2, or the member nearest to it."""
    monkeypatch.setitem(BY_EPSILON, "moving", {1e-4: 1e-1, 1e-2: 1e-3})
    assert [by_rule("dynamic", epsilon) for epsilon in (1e-5, 1e-4, 1e-3, 1e-2)] == [1e-1, 1e-1, 1e-2, 1e-3]
    # 1e-1 · 10^(-2 · 0.35) = 2.0e-2; 10^(-2 · 0.45) makes 1.26e-2, nearer to 1e-2 than to 2e-2.
    assert [by_rule("dynamic", 1e-4 * 10 ** (2 * part)) for part in (0.35, 0.45)] == [2e-2, 1e-2]


# CB and RTE are no judges. Of the 50 examples that CB's rates were chosen by, three points are one and a half; and RTE is
# learnt by no method at any rate, so that what was chosen there is chance.
UNDECIDED = {"methods_cb", "methods_rte"}
# LoRA was searched around one rate on TREC and SST-2, and the 1e-3 that WNUT-17 wants was not among those tried.
FURTHER = {("methods_wnut17", "lora", 1e-3): 0.051}


@pytest.mark.parametrize("task", sorted({path.stem for path in RESULTS.glob("methods_*.json")} - UNDECIDED))
def test_it_is_what_the_sweeps_chose(task):
    """At the rule's rate a method was at most three points below its best one, on validation data, with one exception."""
    compared = 0
    for point in json.loads((RESULTS / f"{task}.json").read_text())["points"]:
        if point["search"] == "training.learning_rate":
            options = point["options"]
            rule = by_rule(options["method.name"], options.get("method.epsilon", 1e-3))
            tried = {rate: figure for rate, figure in point["trials"] if figure is not None}
            assert rule in tried, point["title"]
            most = FURTHER.get((task, options["method.name"], options.get("method.epsilon")), 0.03)
            assert tried[rule] >= max(tried.values()) - most, point["title"]
            compared += 1
    assert compared


@pytest.mark.parametrize("method", ["dynamic", "first_step"])
def test_other_distances_want_other_rates(method):
    """On TREC the rule's rate is up to nine points below the one that a search finds for the relative distance."""
    assert rate(f"method.name={method}", "method.distance=inverse_relative") == by_rule(method, DEFAULT_EPSILON)
    for distance in ("relative", "absolute"):
        with pytest.raises(
            ValueError, match=f"a rule for the distance inverse_relative; {distance} wants another rate"
        ):
            rate(f"method.name={method}", f"method.distance={distance}")
    assert rate("method.name=pruning", "method.distance=relative") == FIXED["pruning"]


def test_it_is_settled_by_method_and_budget():
    assert rate("method.epsilon=1e-3") == by_rule("dynamic", 1e-3)
    assert rate("method.name=random", "method.epsilon=1e-4") == by_rule("random", 1e-4)
    assert rate("method.name=full") == FIXED["full"]
    assert rate("method.name=lora", "method.rank=4", "method.num_free_parameters=7") == by_rule("lora", DEFAULT_EPSILON)
    assert rate("training.learning_rate=0.3", "training.optimizer=sgd") == 0.3
    assert rate("method.name=full", "method.num_free_parameters=7") == FIXED["full"], "its rate goes by no budget"
    pruned = settled(make_recipe(LEAST, ["method.name=diff_pruning"]))
    assert (pruned.training.learning_rate, pruned.method.pruning_learning_rate) == (
        by_rule("diff_pruning", DEFAULT_EPSILON),
        FIXED["full"],
    )
    given = settled(make_recipe(LEAST, ["method.name=diff_pruning", "method.pruning_learning_rate=0.5"]))
    assert given.method.pruning_learning_rate == 0.5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.optimizer=sgd", "auto is a rule for adamw, not for sgd"),
        (
            "method.num_free_parameters=100,method.rank=8",
            r"goes by method\.epsilon, not by method\.num_free_parameters",
        ),
        ("method.num_free_parameters=100", r"goes by method\.epsilon, not by method\.num_free_parameters"),
    ],
)
def test_without_a_rule_it_is_refused_before_anything_is_written(override, message, tmp_path):
    recipe = make_recipe(LEAST, override.split(","))
    with pytest.raises(ValueError, match=message):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_every_point_of_a_sweep_has_its_own():
    recipe = make_recipe(LEAST | {"sweep": {"method.name": ["dynamic", "full"]}})
    assert recipe.training.learning_rate == "auto"
    assert at(recipe, {"method.name": "full"}).training.learning_rate == FIXED["full"]


def test_a_run_says_what_it_took(tmp_path):
    recipe = make_recipe(toys.classification(tmp_path), ["training.max_steps=1", "training.learning_rate=auto"])
    record = train(recipe, tmp_path / "run")
    expected = by_rule("dynamic", recipe.method.epsilon)
    assert record["recipe"]["training"]["learning_rate"] == expected
    assert load_recipe(tmp_path / "run" / "config.yaml").training.learning_rate == expected
    assert train(recipe, tmp_path / "run") == record, "the same recipe goes on with it"


@pytest.mark.parametrize("epsilon", [0.001, 0.02, 0.05, 0.1, 0.2, 1.0])
def test_a_rate_by_rule_is_no_low_one(epsilon, build):
    model = get_peft_model(build("bert"), DSTConfig(epsilon=epsilon))
    optimizer = torch.optim.AdamW(model.parameters(), lr=by_rule("dynamic", epsilon), weight_decay=0.0)
    assert training_advice(model, model.base_model.constraint(), optimizer) == []
