"""Recipes from files and the command line: what is merged, and what is refused by name."""

from __future__ import annotations

import pytest

from peft_dst.recipes import at, load_recipe, make_recipe, points, to_dict
from peft_dst.recipes.config import differences, option_names, to_yaml
from peft_dst.recipes.methods import CONFIG_OPTIONS
from peft_dst.recipes.options import METHODS, TASKS
from peft_dst.recipes.tasks import KINDS


LEAST = {"model": {"name": "m"}, "task": {"name": "maths", "data": "d"}}


def test_files_lie_over_their_defaults_and_overrides_over_files(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "base.yaml").write_text("model: {name: a, dropout: 0.1}\ntask: {name: maths, data: d}\nseed: 1\n")
    (tmp_path / "other.yaml").write_text("seed: 2\ntraining: {epochs: 7}\ntask: {columns: {question: q}}\n")
    (tmp_path / "deep" / "run.yaml").write_text(
        "defaults: [../base.yaml, ../other.yaml]\nmodel: {name: b}\ntraining: {learning_rate: 1e-3}\n"
    )
    recipe = load_recipe(tmp_path / "deep" / "run.yaml", ["training.batch_size=3", "task.columns.answer=a"])
    assert (recipe.model.name, recipe.model.dropout, recipe.seed) == ("b", 0.1, 2)
    assert (recipe.training.epochs, recipe.training.learning_rate, recipe.training.batch_size) == (7.0, 1e-3, 3)
    assert recipe.task.columns == {"question": "q", "answer": "a"}
    # Whole again from what is written down.
    (tmp_path / "whole.yaml").write_text(to_yaml(recipe))
    assert load_recipe(tmp_path / "whole.yaml") == recipe == make_recipe(to_dict(recipe))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "training.learning_rte=1",
            r"training\.learning_rte, which does not exist; did you mean training\.learning_rate",
        ),
        ("epsilon=1e-3", r"an option epsilon, which does not exist; did you mean method\.epsilon"),
        ("trainin.epochs=1", r"an option trainin, which does not exist; "),
        (
            "training.epochs=many",
            r"training\.epochs: Value 'many' of type 'str' could not be converted to Float; it takes",
        ),
        ("training.batch_size=1.5", r"training\.batch_size: .*could not be converted to Integer"),
        ("training=3", r"training holds options, not 3"),
        ("task.parts=BoolQ", r"task\.parts: "),
        ("method.name=dynamik", r"method\.name must be one of .*got 'dynamik'\. Did you mean 'dynamic'\?"),
        ("task.name=chess", r"task\.name must be one of 'classification'.*got 'chess'"),
        ("training.learning_rate=car", r"training\.learning_rate must be auto, or a number of 0 or more; got 'car'"),
        ("training.learning_rate=-1", r"training\.learning_rate must be auto, or a number"),
        ("training.batch_size=0", r"training\.batch_size must be 1 or more, got 0"),
        ("method.epsilon=2", r"method\.epsilon must be a fraction"),
        ("method.name=transfer", r"set method\.source to its folder"),
        ("method.name=combined", r"set method\.text"),
        ("evaluation.splits=[tests]", r"evaluation\.splits are of train, validation, test; got 'tests'"),
        (
            "sweep={method.epsilom: [1]}",
            r"sweep varies method\.epsilom, .*; did you mean method\.epsilon",
        ),
        ("sweep=[3]", r"sweep takes options and their values, got 3"),
        ("quietly", r"'quietly' is no override; write option=value"),
        ("training.epochs=[", r"'training\.epochs=\[' cannot be read"),
        ("sweep={seed: []}", r"sweep gives seed no values; leave it out"),
        ("evaluation.splits=[]", r"evaluation\.splits is empty; name some of train, validation, test"),
        ("search.option=seed", r"search\.option=seed is nothing to choose on validation data"),
        ("training.max_steps=0", r"training\.max_steps must be 1 or more, got 0"),
        ("training.epochs=-1", r"training\.epochs must be 0 or more, got -1"),
        ("training.head_learning_rate=-0.1", r"training\.head_learning_rate must be 0 or more"),
        ("training.max_grad_norm=.nan", r"training\.max_grad_norm must be 0 or more, got nan"),
        ("training.snapshots=-1", r"training\.snapshots must be 0 or more"),
        ("task.train_size=0", r"task\.train_size must be 1 or more, got 0"),
        ("task.test_size=-5", r"task\.test_size must be 1 or more, got -5"),
        ("method.virtual_tokens=0", r"method\.virtual_tokens must be 1 or more, got 0"),
        ("model.dropout=1.5", r"model\.dropout must be 1 at most, got 1\.5"),
        ("task.validation=test", r"task\.validation=test and task\.test=test have examples in common"),
        ("task.train=train+test[:50%]", r"task\.train=.* and task\.test=test have examples in common"),
        (
            "task.validation=train[:50]",
            r"task\.train=train and task\.validation=train\[:50\] .* chosen by is never trained on",
        ),
        ("task.test=train[:10]", r"task\.train=train and task\.test=train\[:10\] have examples in common"),
    ],
)
def test_what_cannot_be_is_refused_by_name(override, message):
    with pytest.raises(ValueError, match=message):
        make_recipe(LEAST, [override])


def test_splits_of_other_data_are_other_splits():
    with pytest.raises(ValueError, match="have examples in common"):
        make_recipe(LEAST, ["task.test=train[:10]", "task.evaluation_data=d"])
    make_recipe(LEAST, ["task.test=train[:10]", "task.evaluation_data=other"])
    # Parts can be compared when their sizes are known.
    make_recipe(LEAST, ["task.train=train[:60%]", "task.test=train[50%:]"])


def test_a_mapping_takes_the_place_of_another():
    given = {**LEAST, "search": {"option": "training.learning_rate", "at": {"model.tuned": None}}}
    given["task"] = {**LEAST["task"], "columns": {"text": "a"}}
    assert make_recipe(given).search.at == {"model.tuned": None}
    made = make_recipe(given, ["search.at={}", "task.columns={label: b}"])
    assert (made.search.at, made.task.columns) == ({}, {"label": "b"})
    assert made.search.option == "training.learning_rate"
    assert at(make_recipe(given), {"task.columns": {}}).task.columns == {}
    assert make_recipe(given, ["task.columns.label=b"]).task.columns == {"text": "a", "label": "b"}


def test_gradients_are_released_by_one_optimizer():
    make_recipe(LEAST, ["training.release_gradients=true"])
    with pytest.raises(ValueError, match=r"release_gradients is DSTOptimizer's, which method\.name=full does not"):
        make_recipe(LEAST, ["training.release_gradients=true", "method.name=full"])


def test_text_is_text(tmp_path, monkeypatch):
    """Whatever YAML would make of it; and what OmegaConf takes for a reference gives nothing away."""
    monkeypatch.setenv("SECRET", "password")
    given = ["task.prompt=question: {question}", "title=${oc.env:SECRET} ${", "model.revision=1e3", "task.subset=null"]
    recipe = make_recipe(LEAST, given)
    assert (recipe.task.prompt, recipe.model.revision, recipe.task.subset) == ("question: {question}", "1e3", None)
    assert recipe.title == "${oc.env:SECRET} ${"
    file = tmp_path / "recipe.yaml"
    file.write_text("title: ${oc.env:SECRET}\ntask: {name: maths, data: d, prompt: '${question} {question}'}\n"
                    "model: {name: '${task.data}'}\nsweep: {title: ['${seed}']}\n")  # fmt: skip
    recipe = load_recipe(file)
    assert (recipe.title, recipe.model.name) == ("${oc.env:SECRET}", "${task.data}")
    assert recipe.task.prompt == "${question} {question}"
    assert at(recipe, points(recipe)[0]).title == "${seed}"
    file.write_text(to_yaml(recipe))
    assert load_recipe(file) == recipe


def test_files_that_cannot_be(tmp_path):
    file = tmp_path / "a.yaml"
    for text, message in (
        ("model: [", r"a\.yaml is not a YAML file of options"),
        ("- 1\n", r"a\.yaml holds a list, not options by name"),
        ("defaults: a.yaml\n", r"a\.yaml is among its own defaults"),
        ("defaults: b.yaml\n", r"b\.yaml cannot be read: No such file"),
        ("defaults: [3]\n", r"defaults must be a file or a list of files, got 3"),
        ("model: {name: x}\n", r"task\.name must be given"),
        ("modell: {name: x}\n", r"a\.yaml has an option modell, which does not exist"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_recipe(file)


def test_files_cannot_run_code(tmp_path):
    mark = tmp_path / "mark"
    (tmp_path / "a.yaml").write_text(f"seed: !!python/object/apply:os.system ['touch {mark}']\n")
    with pytest.raises(ValueError, match="not a YAML file of options"):
        load_recipe(tmp_path / "a.yaml")
    assert not mark.exists()


def test_what_a_sweep_varies():
    sweep = [{"method.epsilon": [1e-3, 1e-4], "seed": [0, 1]}, {"method.name": ["full"]}]
    recipe = make_recipe(LEAST | {"sweep": sweep, "training": {"learning_rate": 0.1}})
    found = points(recipe)
    assert len(found) == 5
    assert found[1] == {"method.epsilon": 1e-3, "seed": 1}
    assert found[4] == {"method.name": "full"}
    recipes = [at(recipe, point) for point in found]
    assert [r.method.epsilon for r in recipes] == [1e-3, 1e-3, 1e-4, 1e-4, None]
    assert recipes[4].method.name == "full"
    assert points(make_recipe(LEAST)) == [{}]
    with pytest.raises(ValueError, match=r"method\.epsilon must be a fraction"):
        at(recipe, {"method.epsilon": 3})
    # Which sweep a run belongs to, and what it is called, makes no other run of it.
    assert differences(recipes[0], recipe) == ["method.epsilon"]
    assert differences(make_recipe(LEAST), make_recipe(LEAST | {"title": "x", "sweep": {"seed": [1]}})) == []


def test_options_are_explained_and_names_agree():
    for name, entry in option_names().items():
        assert entry.metadata["help"].endswith((".", "…")), name
    assert set(KINDS) == set(TASKS)
    assert len(set(METHODS)) == len(METHODS)
    assert {f"method.{name}" for name in CONFIG_OPTIONS} <= option_names().keys()
