"""Reports: what is read and refused, the numbers behind pictures and tables, the page, and how a browser shows it."""

from __future__ import annotations

import base64
import copy
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from peft_dst.recipes import make_recipe, report, sweep, to_dict
from peft_dst.recipes.report import data, plots, shapes
from peft_dst.recipes.report.data import Spread, number_text
from tests import toys
from tests.recipes import summaries
from tests.recipes.summaries import BODY, point, summary


def section(*points, **others):
    return data.section(summary(list(points), **others), "here: ", "folder")


def means(lines):
    return [(line.label, list(line.x), [y.mean for y in line.y]) for line in lines]


# What is read


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


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


# The numbers behind pictures and tables


def test_curves_and_levels():
    made = section(
        point([0.8, 0.9], 1000, method_name="dynamic", method_epsilon=1e-3),
        point([0.7], 10, method_name="dynamic", method_epsilon=1e-5),
        point([], 0, method_name="dynamic", method_epsilon=1e-4),
        point([0.6], 500, method_name="lora", method_rank=1),
        point([0.4], 0, method_name="head_only"),
        point([0.95], BODY, method_name="full"),
    )
    lines, levels = shapes.curves(made.points, lambda p: p.quality)
    assert means(lines) == [("dynamic", [10, 1000], [0.7, pytest.approx(0.85)]), ("lora", [500], [0.6])]
    assert [y.deviation for y in lines[0].y] == [None, pytest.approx(0.005**0.5)]
    assert [(level.label, level.y.mean) for level in levels] == [("head_only", 0.4), ("full", 0.95)]
    assert shapes.one_size(lines, levels) is None
    assert [level.label for level in shapes.one_size(lines[1:], levels)] == ["lora", "head_only", "full"]


def test_the_best_learning_rate_is_that_of_validation_data():
    made = section(
        *(point([0.5 + rate], 10, method_epsilon=1e-5, training_learning_rate=rate) for rate in (0.1, 0.3, 0.2)),
        point([0.1], 100, method_epsilon=1e-4, training_learning_rate=0.1),
    )
    assert [p.rate for p in shapes.best_rates(made.points)] == [0.3, 0.1]
    # Test scores do not choose: without validation data all stay.
    for entry in made.summary["points"]:
        del entry["metrics"]["validation"]
    again = data.section(made.summary, "here: ", "folder")
    assert len(shapes.best_rates(again.points)) == 4


def test_learning_rates_by_budget():
    made = section(
        point([0.9], 1000, trials=[[0.01, 0.8], [0.1, 0.8]], chosen=0.1, method_epsilon=1e-3),
        point([0.9], 10, trials=[[0.1, 0.5], [0.2, 0.6], [0.5, None]], chosen=0.2, method_epsilon=1e-5),
        point([0.9], BODY, trials=[[1e-4, 0.9]], chosen=1e-4, method_name="full"),
    )
    dynamic, single = shapes.rate_grids(made.points)
    assert (dynamic.title, dynamic.rows, dynamic.columns) == (
        "dynamic", ["ε = 1e-5", "ε = 0.001"], ["0.01", "0.1", "0.2", "0.5"]
    )  # fmt: skip
    assert dynamic.values == [[None, 0.5, 0.6, None], [0.8, 0.8, None, None]]
    assert dynamic.framed == {(0, 2), (1, 1)}
    assert dynamic.crossed == {(0, 3)}
    assert (single.title, single.rows, single.columns, single.framed) == ("one size", ["full"], ["1e-4"], {(0, 0)})
    # Where learning rates are points themselves, the best one stands out.
    made = section(
        point([0.6], 10, method_epsilon=1e-5, training_learning_rate=0.1),
        point([0.7], 10, method_epsilon=1e-5, training_learning_rate=0.2),
        point([], 0, method_epsilon=1e-5, training_learning_rate=0.5),
    )
    (grid,) = shapes.rate_grids(made.points)
    assert (grid.title, grid.rows, grid.framed, grid.crossed) == ("", ["dynamic, ε = 1e-5"], {(0, 1)}, {(0, 2)})
    assert grid.values == [[pytest.approx(0.59), pytest.approx(0.69), None]]
    assert shapes.rate_grids(section(point([0.6], 10, training_learning_rate=0.1)).points) == []


def test_churn():
    entries = {"attention": {"": 1}}
    made = section(
        point([0.5], 10, entries=entries, churn=[[1.0, 0.6], [0.6, 1.0]], method_epsilon=1e-5),
        point([0.5], 10, entries=entries, churn=[[1.0, 0.6], [0.3, 1.0]], method_epsilon=1e-4),
        point([0.5], 10, entries=entries, churn=[[1.0, 1.0], [1.0, 1.0]], method_name="first_step"),
        point([0.5], 10, entries=entries, churn=[[1.0]], method_name="other"),
        point([0.5], 10),
    )
    (even, uneven), still = shapes.churn_grids(made.points)
    assert even.values == [[1.0, None], [0.6, 1.0]]
    assert uneven.values == [[1.0, 0.6], [0.3, 1.0]]
    assert (even.title, even.rows, even.columns) == ("dynamic, ε = 1e-5", ["10", "20"], ["10", "20"])
    assert still == ["first_step"]


def test_overlaps_have_seeds_on_their_diagonal():
    points = [point([0.5, 0.6], 10, entries={"a": {"": 1}}, method_name=name, method_epsilon=0.1) for name in "ab"]
    points[1]["seeds_share"] = None
    titles = [p["title"] for p in points]
    made = section(*points, overlap=[{"titles": titles[::-1], "shared": [[1.0, 0.2], [0.3, 1.0]]}])
    (grid,) = shapes.overlap_grids(made)
    assert (grid.title, grid.rows, grid.columns) == ("ε = 0.1", ["b", "a"], ["b", "a"])
    assert grid.values == [[None, 0.2], [0.3, 0.4]]
    # Points that differ in their learning rate alone are told apart by it.
    points = [point([0.5], 10, method_epsilon=0.1, training_learning_rate=rate) for rate in (0.1, 0.2)]
    made = section(*points, overlap=[{"titles": [p["title"] for p in points], "shared": [[1.0, 0.5], [0.5, 1.0]]}])
    (grid,) = shapes.overlap_grids(made)
    assert grid.rows == ["dynamic, ε = 0.1, learning rate 0.1 (1)", "dynamic, ε = 0.1, learning rate 0.2 (2)"]
    assert grid.columns == ["(1)", "(2)"]


def test_shares_of_modules_and_layers():
    bert = {"embeddings": {"": 1}, "attention": {"bert.layer.10": 2, "bert.layer.9": 1}}
    made = section(
        point([0.5], 10, entries=bert, method_name="dynamic", method_epsilon=0.1),
        point([0.5], 10, entries={"attention": {"bert.layer.9": 5}}, method_name="random", method_epsilon=0.1),
        point([0.5], 10, entries=bert, method_name="dynamic", method_epsilon=0.2),
        point([0.5], 10, entries={"attention": {"": 0}}, method_name="empty", method_epsilon=0.2),
    )
    one, two = shapes.kind_shares(made.points)
    assert (one.title, one.rows, one.parts) == ("ε = 0.1", ["dynamic", "random"], ["embeddings", "attention"])
    assert one.values == [[0.25, 0.75], [0.0, 1.0]]
    assert (two.title, two.rows) == ("ε = 0.2", ["dynamic"])
    layers = shapes.layer_shares(made.points)[0]
    assert layers.parts == ["embeddings", "attention 9", "attention 10"]
    assert layers.values == [[0.25, 0.25, 0.5], [0.0, 1.0, 0.0]]
    three = {"a": {"text.layer.0": 1, "text.block.0": 2, "image.layer.0": 1}}
    (layers,) = shapes.layer_shares(section(point([0.5], 10, entries=three)).points)
    assert layers.parts == ["text.layer a 0", "text.block a 0", "image.layer a 0"]
    assert layers.values == [[0.25, 0.5, 0.25]]
    t5 = {"attention": {"encoder.block.0": 1, "decoder.block.0": 2}, "embeddings": {"": 1}}
    (layers,) = shapes.layer_shares(section(point([0.5], 10, entries=t5)).points)
    assert layers.parts == ["encoder attention 0", "decoder attention 0", "embeddings"]
    assert layers.values == [[0.25, 0.5, 0.25]]


def test_speed_is_relative_to_full():
    dynamic = point([0.5], 10, seconds=20.0, method_name="dynamic")
    lines, _, relative = shapes.speed(section(dynamic, point([0.5], BODY, seconds=10.0, method_name="full")))
    assert (means(lines), relative) == ([("dynamic", [10], [0.5])], True)
    lines, _, relative = shapes.speed(section(dynamic))
    assert (means(lines), relative) == ([("dynamic", [10], [5.0])], False)
    # What is not trained has no speed.
    assert shapes.speed(section(point([0.5], 10, method_name="pruning") | {"steps": 0}))[0] == []


def test_models_beside_one_another():
    def model(title, *qualities):
        points = [
            point([quality], 10 ** (i + 1), method_name="dynamic", method_epsilon=i)
            for i, quality in enumerate(qualities)
        ]
        return section(*points, point([0.8], BODY, method_name="full"), name=title)

    small, large = model("small", 0.4, 0.6), model("large", 0.8)
    without = section(point([0.5], 10), name="without")
    found = shapes.relative_quality([small, without, large])
    assert means(found) == [("small", [1e-5, 1e-4], [0.5, pytest.approx(0.75)]), ("large", [1e-5], [1.0])]
    assert shapes.relative_quality([small, without]) == []


def test_tables():
    made = section(
        point([0.8, 0.9], 100, method_name="dynamic", method_epsilon=1e-2),
        point([0.6], 10, method_name="dynamic", method_epsilon=1e-3),
        point([0.7], 10, method_name="random", method_epsilon=1e-3),
        point([0.5], 50, method_name="lora", method_rank=1),
        point([0.95], BODY, method_name="full"),
        point([], 0, method_name="random", method_epsilon=1e-2),
    )
    table = shapes.budget_table(made.done)
    assert table.header == ["method", "ε = 0.001", "ε = 0.01", "size of its own"]
    assert table.rows == [
        ["dynamic", "0.600", "0.850 ± 0.071", ""],
        ["random", "0.700", "", ""],
        ["lora, rank=1 (50)", "", "", "0.500"],
        ["full (1,000,000)", "", "", "0.950"],
    ]
    assert table.strong == {(1, 1), (0, 2)}
    assert shapes.budget_table(made.done[:3]).header == ["method", "ε = 0.001", "ε = 0.01"]
    assert shapes.budget_table(made.done[1:]) is None
    whole = shapes.metric_table(made.done[:1])
    assert whole.header == ["", "validation accuracy", "test accuracy", "test macro_f1"]
    assert whole.rows == [["dynamic, epsilon=0.01", "0.840 ± 0.071", "0.850 ± 0.071", "0.830 ± 0.071"]]
    assert shapes.figure_text(Spread(27.314, 0.5)) == "27.31 ± 0.50"
    assert [shapes.seeds_text(made.points[i:j]) for i, j in ((0, 6), (0, 1), (1, 3), (5, 6))] == [
        "1 to 2 seeds", "2 seeds", "1 seed", "no seed"
    ]  # fmt: skip
    assert [number_text(number) for number in (1e-5, 2.5e-4, 0.001, 0.02, 0, 3)] == [
        "1e-5", "2.5e-4", "0.001", "0.02", "0", "3"
    ]  # fmt: skip


# Pictures


def test_a_method_keeps_its_colour():
    def line(label, method):
        return shapes.Line(label, method, [1, 10], [Spread(0.5), Spread(0.6)])

    def colours(*lines):
        return [look["color"] for look in plots._looks(lines)]

    dynamic, random = line("dynamic", "dynamic"), line("random", "random")
    assert (
        colours(dynamic, random)
        == colours(random, dynamic)[::-1]
        == [plots.STYLES[m][0] for m in ("dynamic", "random")]
    )
    assert len(set(plots.STYLES.values())) == len(plots.STYLES)
    # Many variants of one method are told apart by colours instead.
    variants = [line(f"dynamic, siloing={i}", "dynamic") for i in range(3)]
    assert len(set(colours(*variants, random))) == 4
    assert len(set(colours(*variants[:2], random))) == 2


def test_names_are_drawn_as_they_are():
    """Neither mathematics, nor hidden from the legend, nor complained of."""
    names = [r"$\frac{$", "a$b", "_hidden", "名", "x" * 100]
    with plots.style():
        series = [shapes.Line(name, name, [1, 10], [Spread(0.5), Spread(0.6, 0.1, 2)]) for name in names]
        figure = plots.lines(series, [shapes.Level(names[0], "full", Spread(0.4, 0.1, 3))], names[0], body=100)
        plots.svg(figure)
        grid = shapes.Grid(
            names[0], names[:2], names[2:4], [[0.1, None], [float("nan"), 0.2]], crossed=frozenset({(0, 1)})
        )
        plots.svg(plots.grids([grid], names[0], names[1], names[2]))
    (legend,) = figure.legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert r"\$\frac{\$" in shown
    assert " _hidden" in shown
    assert len(shown) == len(names) + 1
    assert max(map(len, shown)) == plots.LONGEST


# The page


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Of two models, with every kind of picture, and names that are up to no good."""
    folder = tmp_path_factory.mktemp("report")
    hostile = "<script>document.title = 'no'</script>"
    one, two = summaries.everything(hostile, few=True), summaries.everything("Methods", seed=1, few=True)
    one["recipe"]["model"]["name"] = '"><img src=http://example.com/a.png>'
    one["points"][0]["title"] = one["overlap"][0]["titles"][0] = "\x1b[31m \ud800"
    one["versions"] = [{"torch": hostile}, {"torch": "2.13.0"}]
    one["failures"] = {hostile: "\x1b[31m" + hostile}
    two["overlap"] = []
    (folder / "one").mkdir()
    (folder / "one" / "summary.json").write_text(json.dumps(one))
    (folder / "two.json").write_text(json.dumps(two))
    files = report([folder / "one", folder / "two.json"], folder / "out")
    assert sorted(files) == sorted((folder / "out").iterdir())
    return files[0]


class Parsed(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.elements, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, text):
        self.text.append(text)

    def all(self, name):
        return [attributes[name] for _, attributes in self.elements if name in attributes]


def test_the_page_needs_nothing_else(page):
    parsed = Parsed(page.read_text())
    tags = {tag for tag, _ in parsed.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    sources = parsed.all("src")
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    pictures = [base64.b64decode(source.partition(",")[2]) for source in sources]
    assert all(b"<svg" in picture and b"</svg>" in picture for picture in pictures)
    # No address but those that name kinds of XML.
    addresses = [address for picture in pictures for address in re.findall(rb'(?:href|src)="([^"]*)"', picture)]
    assert all(address.startswith((b"#", b"data:image/png;base64,")) for address in addresses)
    assert not re.search(r"url\(|@import", page.read_text())
    ids, targets = parsed.all("id"), parsed.all("href")
    assert len(set(ids)) == len(ids)
    assert targets
    assert all(target[0] == "#" and target[1:] in ids for target in targets)
    assert all(len(alt) > 20 for alt in parsed.all("alt"))
    # Each picture is there twice, and nothing else is.
    files = {file.name for file in page.parent.iterdir()} - {page.name}
    assert len(files) == len(sources)
    assert files == {f"{name}.png" for name in ids if f"{name}.png" in files}
    assert all((page.parent / name).read_bytes().startswith(b"\x89PNG") for name in files)
    assert all(name in "".join(parsed.text) for name in files)


def test_names_stay_text(page):
    parsed = Parsed(page.read_text())
    text = "".join(parsed.text)
    # Title, navigation, failure, its message, versions; and the alternative texts of pictures hold no more.
    assert text.count("<script>document.title = 'no'</script>") == 5
    assert '"><img src=http://example.com/a.png>' in text
    assert r"\x1b[31m \ud800" in text


def test_every_picture_is_there(page):
    ids = Parsed(page.read_text()).all("id")
    kinds = {"quality", "learning-rate", "churn", "overlap", "modules", "layers", "switching", "speed"}
    name = "1-script-document-title-no-script"
    assert {i.removeprefix(f"{name}-") for i in ids if i.startswith(f"{name}-")} == kinds
    assert {i.removeprefix("2-methods-") for i in ids if i.startswith("2-methods-")} == kinds - {"overlap"}
    assert "models-1-relative" in ids


def test_the_same_results_make_the_same_pictures(tmp_path):
    made = summary([point([0.5, 0.6], 10 * i, method_epsilon=i / 100) for i in (1, 2)])
    file = write(tmp_path / "summary.json", made)
    page, *pictures = report([file, file], tmp_path / "out")
    sources = Parsed(page.read_text()).all("src")
    assert len(sources) == 4
    assert sources[:2] == sources[2:]
    # Sections of one name have pictures of their own.
    assert {picture.name for picture in pictures} == {
        f"{number}-a-sweep-{kind}.png" for number in (1, 2) for kind in ("quality", "speed")
    }


def test_a_sweep_that_failed_altogether(tmp_path):
    made = summary([point([], 0, method_name="full")], metric=None, split=None, failures={"run": "ValueError: why"})
    files = report([write(tmp_path / "summary.json", made)], tmp_path / "out")
    text = "".join(Parsed(files[0].read_text()).text)
    assert len(files) == 1
    assert "No run is finished." in text
    assert "run: ValueError: why" in text


def test_a_report_needs_matplotlib(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("matplotlib", "peft_dst.recipes.report.p"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    file = write(tmp_path / "summary.json", summary([]))
    with pytest.raises(ValueError, match=r"a report needs matplotlib, .* pip install 'peft-dst\[plots\]'"):
        report([file], tmp_path / "out")
    assert not (tmp_path / "out").exists()


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# Looks at the page from outside, in which nothing may run.
OUTSIDE = """<!DOCTYPE html><title>no</title><iframe src="report.html" width="WIDTH" height="900"></iframe><script>
onload = async () => {
  const page = frames[0].document
  await Promise.all([...page.images].map(image => image.decode()))
  document.title = JSON.stringify({
    title: page.title,
    images: [...page.images].map(image => [image.naturalWidth, image.getBoundingClientRect().width]),
    requests: frames[0].performance.getEntriesByType("resource").map(entry => entry.name),
    width: page.documentElement.scrollWidth,
    sections: [...page.querySelectorAll("section")].map(section => section.getBoundingClientRect().height),
  })
}
</script>"""


@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_shows_the_page(page, tmp_path, width):
    """All pictures, nothing beyond the screen's edges; nothing asked of the network, nothing run, nothing complained of."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    shutil.copy(page, tmp_path / "report.html")
    (tmp_path / "outside.html").write_text(OUTSIDE.replace("WIDTH", str(width)))
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage",
        "--allow-file-access-from-files", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--v=0",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,1000", "--virtual-time-budget=20000",
        f"--screenshot={tmp_path / 'shot.png'}", "--dump-dom", (tmp_path / "outside.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    parsed = Parsed(done.stdout)
    seen = json.loads(next(text for text in parsed.text if text.startswith("{")))
    assert seen["title"] == "peft-dst report"
    assert len(seen["images"]) == len(list(page.parent.glob("*.png")))
    assert all(natural > 0 and 0 < shown <= width for natural, shown in seen["images"])
    assert seen["requests"] == []
    assert seen["width"] <= width
    assert all(height > 200 for height in seen["sections"])
