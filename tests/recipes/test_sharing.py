"""A folder that several sweeps share, and what a stopped or damaged run leaves in it."""

from __future__ import annotations

import json
import re

import pytest

from peft_dst.recipes import make_recipe, sweep, train
from peft_dst.recipes.record import results
from tests import toys

from .scripted import scripted


@pytest.fixture
def options(tmp_path):
    made = toys.classification(tmp_path)
    made["training"] |= {"max_steps": 2}
    return made


SEARCH = ["search.option=training.learning_rate", "search.trials=3"]


def weights(folder):
    """Learning rates of the runs that have kept what they trained."""
    kept = [run for run in (folder / "runs").iterdir() if (run / "adapter").is_dir()]
    return sorted(float(re.search(r"learning_rate=([\d.]+)", run.name)[1]) for run in kept)


def test_a_search_leaves_what_another_sweep_made(options, tmp_path, monkeypatch):
    """Only its own trials lose their weights; not runs at the rates that it tries, tested or not."""
    seen = scripted(monkeypatch, lambda recipe: 0.5)
    for splits, rate in (("[validation, test]", 0.005), ("[validation]", 0.02)):
        grid = [f"evaluation.splits={splits}", f"sweep={{training.learning_rate: [{rate}]}}"]
        sweep(make_recipe(options, grid), tmp_path / "sweep", workers=0)
    seen.clear()
    (point,) = sweep(make_recipe(options, SEARCH), tmp_path / "sweep", workers=0)["points"]
    assert point["chosen"] == 0.01
    assert {recipe.training.learning_rate for recipe in seen} == {0.01}
    assert weights(tmp_path / "sweep") == [0.005, 0.01, 0.02]
    other = sweep(make_recipe(options, [*SEARCH, "seed=1", "method.epsilon=0.1"]), tmp_path / "other", workers=0)
    assert len(other["points"][0]["trials"]) == 3
    assert weights(tmp_path / "other") == [0.01]


def test_a_discarded_trial_becomes_a_run(options, tmp_path):
    """It is trained again, to the same figures; the next search leaves it alone."""
    found = sweep(make_recipe(options, SEARCH), tmp_path / "sweep", workers=0)["points"][0]
    (discarded, *_), chosen = [rate for rate, _ in found["trials"] if rate != found["chosen"]], found["chosen"]
    assert weights(tmp_path / "sweep") == [chosen]
    grid = [f"sweep={{training.learning_rate: [{discarded}]}}"]
    summary = sweep(make_recipe(options, grid), tmp_path / "sweep", workers=0)
    assert summary["failures"] == {}
    (point,) = summary["points"]
    assert point["metrics"].keys() == {"validation", "test"}
    assert [[discarded, point["metrics"]["validation"]["accuracy"]["mean"]]] == [
        trial for trial in found["trials"] if trial[0] == discarded
    ]
    again = sweep(make_recipe(options, SEARCH), tmp_path / "sweep", workers=0)
    assert again["points"][0]["metrics"] == found["metrics"]
    assert weights(tmp_path / "sweep") == sorted([chosen, discarded])


def test_the_last_sweep_removes_the_cache(options, tmp_path, monkeypatch):
    """While another one works in the folder it stays; what a killed one left does not count."""
    folder = tmp_path / "sweep"
    cache = folder / "cache"
    (folder / ".users").mkdir(parents=True)
    (folder / ".users" / "killed").touch()
    inner = []

    def figure(recipe):
        cache.mkdir(exist_ok=True)
        (cache / "scores.safetensors").touch()
        if recipe.method.epsilon == 0.02:
            inner.append(sweep(make_recipe(options, ["method.epsilon=0.1"]), folder, workers=0))
            assert (cache / "scores.safetensors").exists()
        return 0.5

    scripted(monkeypatch, figure)
    summary = sweep(make_recipe(options), folder, workers=0)
    assert [made["failures"] for made in (summary, *inner)] == [{}, {}]
    assert len(inner) == 1
    assert not cache.exists()
    assert not (folder / ".users").exists()


def test_a_damaged_result_is_named_and_made_again(options, tmp_path, monkeypatch):
    seen = scripted(monkeypatch, lambda recipe: 0.5)
    sweep(make_recipe(options), tmp_path / "sweep", workers=0)
    (run,) = (tmp_path / "sweep" / "runs").iterdir()
    for text in ('{"metrics": {', "[]"):
        (run / "results.json").write_text(text)
        with pytest.raises(ValueError, match=r"results\.json is damaged \(.*\); remove it to run this again"):
            results(run)
        seen.clear()
        with pytest.warns(
            UserWarning, match=rf"{run.name}/results\.json is damaged .*; the file is now damaged_results"
        ):
            summary = sweep(make_recipe(options), tmp_path / "sweep", workers=0)
        assert (len(seen), summary["points"][0]["seeds"]) == (1, [0])
        assert (run / "damaged_results.json").read_text() == text


def test_a_run_killed_as_it_began_or_at_its_end(options, tmp_path):
    """It can be run; and nothing stays that was needed on the way."""
    run = tmp_path / "run"
    run.mkdir()
    for name in (".lock", "config.yaml.123.tmp"):
        (run / name).touch()
    record = train(make_recipe(options), run)
    for name in ("checkpoints", "cache"):
        (run / name / "inner").mkdir(parents=True)
    assert train(make_recipe(options), run) == record
    assert not (run / "checkpoints").exists()
    assert not (run / "cache").exists()
    sweep(make_recipe(options), tmp_path / "sweep", workers=0)
    (run,) = (tmp_path / "sweep" / "runs").iterdir()
    (run / "cache").mkdir()
    sweep(make_recipe(options), tmp_path / "sweep", workers=0)
    assert not (run / "cache").exists()


def test_a_run_that_never_began_owns_nothing(options, tmp_path):
    """After a wrong option the right one needs no other folder; what holds something else is left alone."""
    with pytest.raises(ValueError, match="no module of that name"):
        train(make_recipe(options, ["model.head=[nothing]"]), tmp_path / "run")
    record = train(make_recipe(options), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == record
    (tmp_path / "mine" / "cache").mkdir(parents=True)
    with pytest.raises(ValueError, match="is not empty, and holds no run"):
        train(make_recipe(options), tmp_path / "mine")


def test_figures_after_the_head_come_out_of_a_search(options, tmp_path):
    """Of the run that was a trial, too."""
    options["training"] |= {"head_first": {"epochs": 1}}
    recipe = make_recipe(options, ["evaluation.after_head=true", *SEARCH, "sweep={seed: [0, 1]}"])
    (point,) = sweep(recipe, tmp_path / "sweep", workers=0)["points"]
    found = point["metrics_after_head"]
    assert found.keys() == {"validation", "test"}
    assert [len(figures["accuracy"]["values"]) for figures in found.values()] == [2, 2]
