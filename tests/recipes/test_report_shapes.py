"""Reports: the numbers behind pictures and tables."""

from __future__ import annotations

import pytest

from peft_dst.recipes.report import data, shapes
from peft_dst.recipes.report.data import Spread, number_text
from tests.recipes.summaries import BODY, point, section, spread


def means(lines):
    return [(line.label, list(line.x), [y.mean for y in line.y]) for line in lines]


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
    lines, _ = shapes.curves(made.points, lambda p: p.quality)
    assert means(lines) == [("dynamic", [10, 100], [0.8, 0.1])]
    # Test scores do not choose: without validation data all stay, each rate a series of its own.
    for entry in made.summary["points"]:
        del entry["metrics"]["validation"]
    again = data.section(made.summary, "here: ", "folder")
    assert len(shapes.best_rates(again.points)) == 4
    lines, _ = shapes.curves(again.points, lambda p: p.quality)
    named = {line.label: [y.mean for y in line.y] for line in lines}
    names = [f"dynamic, learning rate {rate}" for rate in (0.1, 0.3, 0.2)]
    assert named == dict(zip(names, ([0.6, 0.1], [0.8], [0.7]), strict=True))


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
    assert grid.rows == ["(1) dynamic, ε = 0.1, learning rate 0.1", "(2) dynamic, ε = 0.1, learning rate 0.2"]
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


def test_of_several_full_ones_the_best_on_validation_data_counts():
    """As with and without dropout."""
    full = [point([quality], BODY, method_name="full", model_dropout=p) for p, quality in ((0.0, 0.5), (0.1, 0.8))]
    # Worse on the test split.
    full[1]["metrics"]["test"]["accuracy"] = spread([0.4])
    dynamic = [point([0.2], 10, method_name="dynamic", seconds=20.0)]
    made = [section(*dynamic, *full, name=name) for name in ("one", "other")]
    assert [line.y[0].mean for line in shapes.relative_quality(made)] == [0.5, 0.5]


def test_what_generalises_is_tabled():
    """The gap between training and test data, seed by seed, and what the head alone had learnt."""
    entry = point([0.8, 0.9], 100)
    entry["metrics"]["train"] = {"accuracy": spread([0.9, 0.94])}
    entry["metrics_after_head"] = {"test": {"accuracy": {"values": [0.5, 0.7], "mean": 0.6}}}
    made = section(entry, point([0.7], 10, method_epsilon=0.1))
    table = shapes.metric_table(made.points)
    assert table.header[-2:] == ["gap, test − train", "head alone, test accuracy"]
    assert [row[-2:] for row in table.rows] == [["-0.070 ± 0.042", "0.600"], ["", ""]]
    assert made.points[1].gap is None


def test_layers_of_strangers_take_no_time():
    """Names as long, and as many, as in no model."""
    names = ["9" * 300_000, "layer." + "1" * 5_000 + "x", *(f"a.{i}" for i in range(20_000))]
    (found,) = shapes.layer_shares(section(point([0.5], 10, entries={"a": dict.fromkeys(names, 1)})).points)
    assert sum(found.values[0]) == pytest.approx(1.0)


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
