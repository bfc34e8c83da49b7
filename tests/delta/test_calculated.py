"""Sums, compositions and differences are adapters as well: PEFT loads them, whatever their sources were trained with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_dst import DSTConfig
from peft_dst.delta import SparseDelta
from tests.models import logits, train


TASKS = {"bert": "SEQ_CLS", "roberta": "TOKEN_CLS"}
HEAD = "base_model.model.classifier."


@pytest.fixture
def trained(build, tmp_path):
    """Train an adapter and read it, with its seeds."""

    def make(name="bert", first=0, **options):
        options = {"epsilon": None if options.get("selection") == "bitfit" else 0.02, **options}
        model = get_peft_model(build(name), DSTConfig(**options))
        train(model, name, first=first)
        folder = tmp_path / f"trained-{first}"
        model.save_pretrained(folder)
        return SparseDelta.load(folder).with_seeds(build(name))

    return make


@pytest.fixture
def assert_loads(build, tmp_path):
    """Save a delta, and compare what PEFT makes of it with its entries, and a head, in the base."""

    def check(delta, name="bert", head=None):
        expected = build(name)
        delta.apply(expected)
        expected.load_state_dict(
            {key.removeprefix("base_model.model."): value for key, value in (head or {}).items()}, strict=False
        )
        delta.save(tmp_path / "made")
        loaded = PeftModel.from_pretrained(build(name), tmp_path / "made")
        assert torch.equal(logits(loaded, name), logits(expected, name))
        assert not torch.equal(logits(loaded, name), logits(build(name), name))
        return loaded

    return check


def calculations(a, b):
    return {"add": a.add(b), "compose": a.compose(b), "difference": a.difference(b)}


@pytest.mark.parametrize("name", TASKS)
def test_heads_that_are_not_alike(trained, assert_loads, name):
    """Of two tasks' heads there is no sum; what is laid over another, or leads to it, brings its own."""
    a, b = (trained(name, first, task_type=TASKS[name], modules_to_save=["classifier"]) for first in (0, 10))
    assert a.dense.keys() == {f"{HEAD}weight", f"{HEAD}bias"}
    made = calculations(a, b)
    assert not made["add"].dense
    assert made["add"].config.get("task_type") is None
    assert_loads(made["add"], name)
    assert_loads(made["compose"], name, b.dense)
    loaded = assert_loads(made["compose"].restrict(lambda key: "layer" in key), name, b.dense)
    assert loaded.peft_config["default"].task_type == TASKS[name]
    assert dict(made["difference"].dense) == dict(b.dense)


def test_a_head_that_all_have(trained, assert_loads):
    a, b = (trained(first=first, task_type="SEQ_CLS") for first in (0, 10))
    b = replace(b, dense=a.dense)
    for made in calculations(a, b).values():
        assert dict(made.dense) == dict(a.dense)
    assert_loads(a.add(b), head=a.dense)
    assert_loads(a.add(b).reduced().scale(0.5), head=a.dense)


def test_a_head_that_one_has(trained, assert_loads):
    """A task's adapter over one for a language, or the other way round."""
    task = trained(task_type="SEQ_CLS")
    other = trained(first=10, exclude_modules=["classifier"])
    for made in (task.add(other), other.add(task), task.compose(other), other.compose(task)):
        assert_loads(made, head=task.dense)
    assert dict(other.difference(task).dense) == dict(task.dense)
    assert not task.difference(other).dense


def test_a_head_that_another_tunes(trained, assert_loads):
    """No adapter has both; the entries stay."""
    task = trained(task_type="SEQ_CLS")
    other = trained(first=10)
    assert "classifier.weight" in other
    for made in (task.add(other), task.compose(other), other.compose(task)):
        assert "classifier.weight" in made
        assert not made.dense
        assert_loads(made)


def test_tasks_without_a_head_of_their_own(trained, assert_loads):
    a, b = (trained("gpt2", first, task_type="CAUSAL_LM") for first in (0, 10))
    for made in calculations(a, b).values():
        assert made.config["task_type"] == "CAUSAL_LM"
    loaded = assert_loads(a.add(b), "gpt2")
    assert type(loaded).__name__ == "PeftModelForCausalLM"
    assert a.add(trained("gpt2", 20)).config.get("task_type") is None


@pytest.mark.parametrize(
    "options",
    [
        {"selection": "bitfit"},
        {"exclude_modules": ["query"]},
        {"layers_to_transform": [1]},
        {"target_modules": ["query"], "distance": "relative"},
        {"threshold": "iterative", "churn_stop": 2},
    ],
)
def test_options_of_the_first_one_are_not_those_of_the_result(trained, assert_loads, options):
    first = trained(**options)
    second = trained(first=10)
    for made in calculations(first, second).values():
        assert made.config["num_free_parameters"] == made.num_entries
        # What it was trained with is of no concern; where its entries are is all that loading needs to know.
        assert not made.config.keys() & {
            "selection",
            "distance",
            "threshold",
            "churn_interval",
            "churn_stop",
            "epsilon",
        }
    assert_loads(first.add(second))
    assert_loads(first.compose(second))


def test_the_base_s_name_stays(trained):
    a, b = trained(), trained(first=10)
    a = replace(a, config={**a.config, "base_model_name_or_path": "somewhere", "revision": "main"})
    for made in (a.add(b), a.compose(b), a.difference(b), replace(b, config={}).add(a)):
        assert (made.config["base_model_name_or_path"], made.config["revision"]) == ("somewhere", "main")
    assert not replace(a, config={}).add(replace(b, config={})).config


def test_nothing_is_an_adapter_as_well(trained, build, tmp_path):
    """As the difference of a task to itself: it fits the base, and changes nothing."""
    a = trained()
    nothing = a.difference(a)
    assert len(nothing) == 0
    nothing.save(tmp_path / "made")
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path / "made")
    assert torch.equal(logits(loaded, "bert"), logits(build("bert"), "bert"))
    assert sum(weight.indices.numel() for weight in loaded.constraint().weights) == 0
