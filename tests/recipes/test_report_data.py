"""Reports: what is read of results, and what is refused."""

from __future__ import annotations

import copy
import json
import shutil

import pytest

from peft_dst.recipes import make_recipe, report, sweep, to_dict
from peft_dst.recipes.report import data, shapes
from peft_dst.recipes.report.data import Spread
from tests import toys
from tests.recipes.summaries import BODY, point, section, summary, write


def test_points_are_read():
    chosen = {"trials": [[0.1, 0.5], [0.2, None]], "chosen": 0.1, "switching": 0.25}
    made = section(
        point([0.5, 0.7], 100, **chosen, entries={"attention": {"": 3}}, method_name="random", method_epsilon=1e-4),
        point([0.5], 7, method_name="lora", method_rank=4, training_learning_rate=0.2),
        point([], 0, method_name="full"),
        point([0.1], 10, method_siloing="none"),
        point([0.1], 1000, method_num_free_parameters=1000),
    )
    one, lora, full, plain, number = made.points
    assert (one.series, one.budget, one.label) == ("random", "ε = 1e-4", "random, ε = 1e-4")
    assert one.quality == Spread(pytest.approx(0.6), pytest.approx(0.02**0.5), 2)
    assert one.validation == pytest.approx(0.59)
    assert (one.trials, one.chosen) == ({0.1: 0.5, 0.2: None}, 0.1)
    assert (one.speed, one.switching, one.between_seeds) == (10.0, 0.25, 0.4)
    assert (lora.series, lora.budget, lora.rate) == ("lora", "", 0.2)
    assert (full.quality, full.seeds) == (None, [])
    assert (plain.method, plain.series) == ("dynamic", "dynamic, siloing=none")
    assert number.budget == "1,000 free"
    options = {"method_siloing": "module", "method_churn_interval": 10, "model_name": "x"}
    assert section(point([0.1], 10, **options)).points[0].series == "dynamic, module, churn_interval=10, x"
    assert made.done == [one, lora, plain, number]
    assert made.measured == "test accuracy"
    # Without a title the folder is one.
    assert data.section(summary([], name=""), "here: ", "folder").title == "folder"


def broken(change):
    made = summary([point([0.5], 10, method_name="dynamic", entries={"a": {"0": 1}}, churn=[[1.0, 0.5], [0.5, 1.0]])])
    made["overlap"] = [{"titles": ["dynamic"], "shared": [[1.0]]}]
    made = copy.deepcopy(made)
    change(made)
    return made


def delete(*path):
    def change(made):
        for key in path[:-1]:
            made = made[key]
        del made[path[-1]]

    return change


def put(value, *path):
    def change(made):
        for key in path[:-1]:
            made = made[key]
        made[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (delete("points"), r"summary.json lacks 'points'"),
        (delete("recipe", "model"), r"summary.json: recipe lacks 'model'"),
        (delete("points", 0, "free_parameters"), r"summary.json: points\[0\] lacks 'free_parameters'"),
        (put("7", "points", 0, "steps"), r"summary.json: points\[0\].steps must be an integer, not \"7\""),
        (put(True, "points", 0, "seconds", "all"), r"points\[0\].seconds.all must be a number, not true"),
        (put([0], "points", 0, "metrics"), r"points\[0\].metrics must be a mapping, not \[0\]"),
        (put({}, "points", 0, "metrics", "test"), r"points\[0\].metrics lacks 'accuracy' on the split 'test'"),
        (put([[1]], "points", 0, "trials"), r"points\[0\].trials\[0\] must be a value and a score"),
        (put([["a", 1]], "points", 0, "trials"), r"points\[0\].trials\[0\]\[0\] must be a number"),
        (put([[1.0]], "points", 0, "subset", "snapshots", "shared"), r"snapshots.shared must have 2 rows of 2 numbers"),
        (put([[1.0, 2.0]], "overlap", 0, "shared"), r"overlap\[0\].shared must have 1 rows of 1 numbers"),
        (put(["other"], "overlap", 0, "titles"), r"overlap\[0\] names 'other', which is none of the points"),
        (put({"titles": []}, "overlap"), r"summary.json: overlap must be a list"),
        (put({"a": 1}, "failures"), r"summary.json: failures.a must be text"),
    ],
)
def test_what_is_wrong_in_a_summary_is_said(tmp_path, change, message):
    file = write(tmp_path / "summary.json", broken(change))
    with pytest.raises(ValueError, match=message):
        report([file], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_what_may_lack_may_lack(tmp_path):
    """All that the form of a summary lets be null may also be left out."""
    made = broken(lambda made: None)
    for name in ("against", "overlap"):
        del made[name]
    for entry in made["points"]:
        for name in ("p", "chosen", "search"):
            entry.pop(name, None)
        for figures in entry["metrics"].values():
            for spread in figures.values():
                del spread["deviation"]
    assert report([write(tmp_path / "summary.json", made)], tmp_path / "out")[0].is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put([{"loss": "a"}], "history"), r"history\[0\]\.loss must be a number"),
        (put({"entries": 3}, "subset"), r"subset\.entries must be a mapping"),
        (put({}, "metrics", "test"), r"metrics\.test holds no figures"),
        (put(2.0, "recipe", "method", "epsilon"), r"method\.epsilon must be a fraction"),
        (delete("recipe", "task", "name"), r"the recipe: task\.name must be given"),
    ],
)
def test_what_is_wrong_in_a_run_is_said_with_its_file(tmp_path, change, message):
    run(tmp_path / "good")
    file = run(tmp_path / "bad", seed=1) / "results.json"
    record = json.loads(file.read_text())
    change(record)
    write(file, record)
    with pytest.raises(ValueError, match=rf"bad/results\.json: {message}"):
        data.load([tmp_path / "good", tmp_path / "bad"])


def test_what_is_no_result_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds neither summary.json \(of peft-dst sweep\) nor results.json"):
        data.load([tmp_path / "empty"])
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(ValueError, match=r"text.json is no JSON file"):
        data.load([tmp_path / "text.json"])
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match=r"list.json must be a mapping, not \[\]"):
        data.load([tmp_path / "list.json"])
    for name in ("a", "b"):
        write(tmp_path / "sweep" / "runs" / name / "results.json", {})
    with pytest.raises(ValueError, match=r"sweep is a sweep that has not come to its end, with 2 finished runs: go on"):
        data.load([tmp_path / "sweep"])
    write(tmp_path / "out" / "other", {})
    with pytest.raises(ValueError, match="out exists already"):
        report([write(tmp_path / "summary.json", summary([]))], tmp_path / "out")


def run(folder, task="trec", **options):
    """A finished run that nobody ran."""
    given = {"model": {"name": "a-model"}, "task": {"name": "classification", "data": task}}
    given["training"] = {"learning_rate": 0.01}
    recipe = make_recipe(given, [f"{name.replace('_', '.', 1)}={value}" for name, value in options.items()])
    record = {
        "recipe": to_dict(recipe),
        "metrics": {"validation": {"accuracy": 0.5 + recipe.seed / 10}, "test": {"accuracy": 0.6 + recipe.seed / 10}},
        "free_parameters": 100, "body_parameters": BODY, "head_parameters": 10, "file_sizes": {"adapter.safetensors": 800},
        "steps": 20, "seconds": {"training": 5.0, "all": 6.0}, "peak_memory": {"bytes": None}, "history": [],
        "commit": None, "versions": {"torch": "2"}, "machine": {"system": "Linux"},
    }  # fmt: skip
    write(folder / "results.json", record)
    return folder


def test_single_runs_are_points_of_their_task(tmp_path):
    runs = [run(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    runs.append(run(tmp_path / "far", training_learning_rate=0.5, training_logging_steps=50))
    runs.append(run(tmp_path / "random", method_name="random") / "results.json")
    other = run(tmp_path / "other", task="sst2")
    one, two = data.load([runs[0], other, *runs[1:]])
    assert [(p.label, list(p.seeds)) for p in one.points] == [
        ("dynamic, learning rate 0.01", [0, 1]),
        ("dynamic, learning rate 0.5", [0]),
        ("random, learning rate 0.01", [0]),
    ]
    assert one.points[0].quality == Spread(pytest.approx(0.65), pytest.approx(0.005**0.5), 2)
    assert [(p.title, p.method) for p in two.points] == [("dynamic", "dynamic")]
    assert (one.title, two.title) == ("Runs of classification on trec", "Runs of classification on sst2")
    shutil.copytree(runs[0], tmp_path / "copy")
    with pytest.raises(ValueError, match=r"copy and .*0 hold the same run"):
        data.load([runs[0], tmp_path / "copy"])
    record = json.loads((runs[0] / "results.json").read_text())
    del record["metrics"]["validation"], record["metrics"]["test"]["accuracy"]
    record["metrics"]["test"]["f1"] = 0.5
    write(runs[0] / "results.json", record)
    with pytest.raises(ValueError, match=r"the runs in .* were not measured alike"):
        data.load(runs[:2])
    del record["steps"]
    write(runs[0] / "results.json", record)
    with pytest.raises(ValueError, match=r"results.json lacks 'steps'"):
        data.load(runs[:1])
    record["steps"], record["recipe"]["method"]["name"] = 1, "none"
    write(runs[0] / "results.json", record)
    with pytest.raises(ValueError, match=r"method.name"):
        data.load(runs[:1])


def test_a_real_sweep_can_be_read(tmp_path):
    """What is written is what is read: a sweep of this package, through its files."""
    options = toys.classification(tmp_path)
    options["training"] |= {"max_steps": 2, "snapshots": 2}
    options["sweep"] = [{"method.name": ["dynamic"], "seed": [0, 1]}, {"method.name": ["random"]}]
    found = sweep(make_recipe(options), tmp_path / "sweep", workers=0)
    assert found["failures"] == {}
    from_sweep, from_runs = data.load([tmp_path / "sweep", *(tmp_path / "sweep" / "runs").iterdir()])
    for made in (from_sweep, from_runs):
        dynamic, random = sorted(made.done, key=lambda p: p.method)
        assert dynamic.quality.mean == found["points"][0]["metrics"]["test"]["accuracy"]["mean"]
        assert (len(dynamic.steps), len(dynamic.churn), dynamic.steps[-1]) == (2, 2, 2)
        assert dynamic.between_seeds == found["points"][0]["seeds_share"]
        assert dynamic.budget == random.budget == "ε = 0.02"
        assert dynamic.free == random.free == sum(sum(layers.values()) for layers in dynamic.entries.values())
        assert dynamic.speed > 0
        (grid,) = shapes.overlap_grids(made)
        assert sorted(grid.rows) == ["dynamic", "random"]
