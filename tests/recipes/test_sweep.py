"""Sweeps: what runs, what is chosen and by what, what a restart does, failures, and the summary."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scipy import stats
from transformers import AutoTokenizer, BertConfig, BertModel

from peft_dst import overlap
from peft_dst.recipes import groups, make_recipe, processes, sweep, title
from peft_dst.recipes.record import results
from peft_dst.recipes.search import best_place, in_series, next_places
from tests import toys

from .scripted import scripted


@pytest.fixture
def options(tmp_path):
    made = toys.classification(tmp_path)
    made["training"] |= {"max_steps": 2}
    return made


# Searching


def test_the_series():
    assert [in_series(0.02, place) for place in range(-4, 4)] == [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2]
    assert [in_series(1e-3, place) for place in (-1, 1)] == [5e-4, 2e-3]
    assert [in_series(0.3, place) for place in (-1, 0, 1)] == [0.1, 0.3, 0.5]
    assert in_series(1e-3, 1) == in_series(1e-2, -2) == 0.002


@pytest.mark.parametrize("peak", [-5, -1, 0, 1, 4])
@pytest.mark.parametrize("most", [1, 2, 3, 20])
def test_a_search_climbs(peak, most):
    """To the top of a hill, with both its neighbours seen, if there are trials enough."""
    scores: dict[int, float] = {}
    while places := next_places(scores, most):
        assert not scores.keys() & set(places)
        scores |= {place: -abs(place - peak) for place in places}
    assert len(scores) <= most
    best = best_place(scores)
    assert scores[best] == max(scores.values())
    if most == 20:
        assert best == peak
        assert {best - 1, best + 1} <= scores.keys()
        assert len(scores) == abs(peak) + 3


def test_a_plateau_ends_a_search_where_it_began():
    assert next_places({0: 0.5, -1: 0.5, 1: 0.5}, 20) == []
    assert best_place({-1: 0.5, 0: 0.5, 1: 0.5}) == 0
    assert best_place({-2: 0.9, 2: 0.9, 0: 0.1}) == -2
    # What failed is worse than anything.
    assert next_places({0: -math.inf, -1: 0.1, 1: -math.inf}, 20) == [-2]


# Points and names


def test_groups_are_points_without_their_seeds(options):
    options["search"] = {"option": "training.learning_rate"}
    options["sweep"] = [
        {"method.name": ["dynamic", "random"], "method.epsilon": [0.1, 0.02], "seed": [0, 1, 2]},
        {"method.name": ["full"], "training.learning_rate": [1e-4], "seed": [4]},
        {"method.name": ["pruning"], "search.option": [None]},
    ]
    found = groups(make_recipe(options))
    assert [(group.point, sorted(group.recipes)) for group in found] == [
        ({"method.name": "dynamic", "method.epsilon": 0.1}, [0, 1, 2]),
        ({"method.name": "dynamic", "method.epsilon": 0.02}, [0, 1, 2]),
        ({"method.name": "random", "method.epsilon": 0.1}, [0, 1, 2]),
        ({"method.name": "random", "method.epsilon": 0.02}, [0, 1, 2]),
        ({"method.name": "full"}, [4]),
        ({"method.name": "pruning"}, [0]),
    ]
    assert [group.option for group in found] == ["training.learning_rate"] * 5 + [None]
    assert [group.start for group in found[:5]] == [0.01] * 4 + [1e-4]
    with pytest.raises(ValueError, match=r"search of training\.learning_rate must start at a number above 0, not at 0"):
        groups(make_recipe(options, ["sweep={training.learning_rate: [0]}"]))
    with pytest.raises(
        ValueError,
        match=r"has the recipe twice, with training\.learning_rate=0\.1, search\.trials=7 and with training\.learning_rate"
        r"=0\.2, .*: .*Give one value to start from, or set search\.option=null",
    ):
        groups(make_recipe(options, ["sweep={training.learning_rate: [0.1, 0.2]}"]))
    with pytest.raises(ValueError, match=r"has full twice, with training\.learning_rate=0\.01, .* and with no search"):
        groups(make_recipe(options, ["sweep=[{method.name: [full]}, {method.name: [full], search.option: [null]}]"]))
    with pytest.raises(ValueError, match=r"search\.option is training\.lr, which does not exist; did you mean"):
        make_recipe(options, ["search.option=training.lr"])


# Sweeps in this process


def test_the_choice_is_made_on_validation_data_with_one_seed(options, tmp_path, monkeypatch):
    def figure(recipe):
        return 0.5 - abs(math.log10(recipe.training.learning_rate / 0.05)) / 10 + recipe.seed / 1000

    seen = scripted(monkeypatch, figure)
    options["search"] = {"option": "training.learning_rate", "seed": 5}
    options["sweep"] = {"method.name": ["dynamic"], "seed": [1, 2, 3]}
    summary = sweep(make_recipe(options), tmp_path / "sweep", workers=0)
    runs = [(recipe.training.learning_rate, recipe.seed, recipe.evaluation.splits) for recipe in seen]
    both = ["validation", "test"]
    assert runs == [
        *((rate, 5, ["validation"]) for rate in (0.01, 0.005, 0.02, 0.05, 0.1)),
        *((0.05, seed, both) for seed in (1, 2, 3)),
    ]
    (point,) = summary["points"]
    assert point["chosen"] == 0.05
    assert [rate for rate, _ in point["trials"]] == [0.005, 0.01, 0.02, 0.05, 0.1]
    assert max(point["trials"], key=lambda pair: pair[1])[0] == 0.05
    figures = point["metrics"]["test"]["accuracy"]
    assert figures["values"] == pytest.approx([0.601, 0.602, 0.603])
    assert figures["mean"] == pytest.approx(0.602)
    assert figures["deviation"] == pytest.approx(0.001)
    # Of what was tried there are the figures alone.
    kept = [folder for folder in (tmp_path / "sweep" / "runs").iterdir() if (folder / "adapter").is_dir()]
    assert len(kept) == 3


def test_trials_may_have_other_options_than_the_runs(options, tmp_path, monkeypatch):
    """The second paper's secondary tasks: one rate, chosen on the pretrained model, for every tuned body."""

    def figure(recipe):
        best = 0.02 if recipe.model.tuned is None else 0.1
        return 0.5 - abs(math.log10(recipe.training.learning_rate / best)) / 10

    seen = scripted(monkeypatch, figure)
    options["search"] = {"option": "training.learning_rate", "at": {"model.tuned": None}}
    options["sweep"] = {"model.tuned": ["one", "other", None], "seed": [0, 1]}
    summary = sweep(make_recipe(options), tmp_path / "sweep", workers=0)
    runs = [
        (recipe.model.tuned, recipe.training.learning_rate, recipe.seed, "test" in recipe.evaluation.splits)
        for recipe in seen
    ]
    trials = [(None, rate, 0, False) for rate in (0.01, 0.005, 0.02, 0.05)]
    assert sorted(runs, key=str) == sorted(
        [*trials, *((tuned, 0.02, seed, True) for tuned in ("one", "other", None) for seed in (0, 1))], key=str
    )
    assert [(point["title"], point["chosen"]) for point in summary["points"]] == [
        ("tuned=one", 0.02), ("tuned=other", 0.02), ("tuned=None", 0.02)
    ]  # fmt: skip
    assert len({str(point["trials"]) for point in summary["points"]}) == 1
    # Without other options every body has a rate of its own.
    options["search"].pop("at")
    summary = sweep(make_recipe(options), tmp_path / "sweep", workers=0)
    assert [point["chosen"] for point in summary["points"]] == [0.1, 0.1, 0.02]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model.tunes": None}, r"search\.at changes model\.tunes, which does not exist; did you mean model\.tuned\."),
        ({"training.learning_rate": 0.1}, r"search\.at=\{training\.learning_rate: …\} is nothing"),
        ({"seed": 3}, r"search\.at=\{seed: …\} is nothing"),
        ({"search.trials": 3}, r"search\.at=\{search\.trials: …\} is nothing"),
        ({"method.epsilon": 3.0}, r"method\.epsilon must be a fraction"),
    ],
)
def test_options_of_trials_are_checked(options, values, message):
    options["search"] = {"option": "training.learning_rate", "at": values}
    with pytest.raises(ValueError, match=message):
        groups(make_recipe(options))


def test_what_is_finished_is_not_run_again(options, tmp_path, monkeypatch):
    """Not even if the sweep has grown, or is written in other words."""
    seen = scripted(monkeypatch, lambda recipe: 0.5)
    options["search"] = {"option": "training.learning_rate", "trials": 3}
    options["sweep"] = {"method.epsilon": [0.1, 0.02], "seed": [0, 1]}
    first = sweep(make_recipe(options), tmp_path / "sweep", workers=0)
    # Three trials, the best of which is one of the two runs, measured on the test split too.
    assert len(seen) == 2 * (3 + 2)
    seen.clear()
    assert sweep(make_recipe(options), tmp_path / "sweep", workers=0) == first
    assert not seen
    options["sweep"] = [{"seed": [0, 1, 2], "method.epsilon": [0.02, 0.1], "method.name": ["dynamic"]}]
    again = sweep(make_recipe(options), tmp_path / "sweep", workers=0)
    assert [(recipe.seed, recipe.method.epsilon) for recipe in seen] == [(2, 0.02), (2, 0.1)]
    assert [point["seeds"] for point in again["points"]] == [[0, 1, 2]] * 2


def test_predictions_that_were_removed_are_made_again(options, tmp_path):
    recipe = make_recipe(options, ["evaluation.predictions=true"])
    first = sweep(recipe, tmp_path / "sweep", workers=0)
    (file,) = (tmp_path / "sweep").rglob("predictions_test.jsonl")
    before = file.read_text()
    file.unlink()
    assert sweep(recipe, tmp_path / "sweep", workers=0) == first
    assert file.read_text() == before


def test_failures_are_told_and_tried_again(options, tmp_path, monkeypatch):
    seen = scripted(monkeypatch, lambda recipe: FloatingPointError("inf!") if recipe.method.epsilon == 0.1 else 0.5)
    options["sweep"] = {"method.epsilon": [0.1, 0.02], "seed": [0, 1]}
    summary = sweep(make_recipe(options), tmp_path / "sweep", workers=0)
    assert sorted(summary["failures"].values()) == ["FloatingPointError: inf!"] * 2
    assert [point["seeds"] for point in summary["points"]] == [[], [0, 1]]
    assert "| epsilon=0.1 |  |  |  | 0 | failed |" in (tmp_path / "sweep" / "summary.md").read_text()
    folder = tmp_path / "sweep" / "runs" / next(name for name in summary["failures"])
    assert (folder / "error.txt").read_text() == "FloatingPointError: inf!\n"
    seen.clear()
    summary = sweep(make_recipe(options), tmp_path / "sweep", workers=0)
    assert len(seen) == 2
    seen = scripted(monkeypatch, lambda recipe: 0.5)
    summary = sweep(make_recipe(options), tmp_path / "sweep", workers=0)
    assert summary["failures"] == {}
    assert not (folder / "error.txt").exists()


def test_a_sweep_over_models(tmp_path):
    """Subsets of different bases have nothing in common, be they as large; each base's are compared."""
    options = toys.classification(tmp_path)
    options["training"]["max_steps"] = 1
    config = BertConfig.from_pretrained(tmp_path / "bert", intermediate_size=24)
    BertModel(config).save_pretrained(tmp_path / "smaller")
    AutoTokenizer.from_pretrained(tmp_path / "bert").save_pretrained(tmp_path / "smaller")
    names = [str(tmp_path / name) for name in ("bert", "smaller")]
    options["sweep"] = {"model.name": names, "method.name": ["dynamic", "random"]}
    summary = sweep(make_recipe(options), tmp_path / "sweep", workers=0)
    assert summary["failures"] == {}
    assert [
        [name in title for title in found["titles"]] for name, found in zip(names, summary["overlap"], strict=True)
    ] == [
        [True, True],
        [True, True],
    ]


def test_each_run_is_told_in_a_line(options, tmp_path, monkeypatch, capsys):
    """By its whole point; its folder's name is cut."""
    scripted(monkeypatch, lambda recipe: ValueError("!") if recipe.seed else 0.5)
    options["sweep"] = {
        "method.siloing": ["module_and_layer"], "method.distance": ["inverse_relative"], "method.epsilon": [1e-2],
        "training.learning_rate": [2e-2], "seed": [0, 1],
    }  # fmt: skip
    summary = sweep(make_recipe(options), tmp_path / "sweep", workers=0, progress=True)
    (failed,) = summary["failures"]
    told = capsys.readouterr().err
    point = "siloing=module_and_layer, distance=inverse_relative, epsilon=0.01, learning_rate=0.02, seed"
    assert f"{point}=0: validation 0.5000 in 1 s\n" in told
    assert f"{point}=1: failed: ValueError: !\n" in told
    assert "seed" not in failed
    # A run in a process of its own has a log.
    (tmp_path / "sweep" / "runs" / failed / "log.txt").touch()
    sweep(make_recipe(options), tmp_path / "sweep", workers=0, progress=True)
    assert f"failed, see {tmp_path / 'sweep' / 'runs' / failed / 'log.txt'}: " in capsys.readouterr().err


def test_a_trial_that_fails_is_not_chosen(options, tmp_path, monkeypatch):
    error = FloatingPointError("!")
    scripted(monkeypatch, lambda recipe: error if recipe.training.learning_rate > 0.01 else 0.5)
    options["search"] = {"option": "training.learning_rate"}
    options["sweep"] = {"seed": [0, 1]}
    (point,) = sweep(make_recipe(options), tmp_path / "sweep", workers=0)["points"]
    assert (point["chosen"], point["trials"]) == (0.01, [[0.005, 0.5], [0.01, 0.5], [0.02, None]])
    # Nor is one without a figure.
    scripted(monkeypatch, lambda recipe: math.nan if recipe.training.learning_rate < 0.01 else 0.5)
    (point,) = sweep(make_recipe(options), tmp_path / "none", workers=0)["points"]
    assert (point["chosen"], point["trials"]) == (0.01, [[0.005, None], [0.01, 0.5], [0.02, 0.5]])
    scripted(monkeypatch, lambda recipe: error)
    (point,) = sweep(make_recipe(options), tmp_path / "other", workers=0)["points"]
    assert (point["chosen"], point["seeds"], len(point["trials"])) == (None, [], 3)


def test_a_trial_that_diverged_is_done(options, tmp_path, monkeypatch):
    """That is its result: no failure of the sweep, and nothing to try again."""
    error = FloatingPointError("!")
    seen = scripted(monkeypatch, lambda recipe: error if recipe.training.learning_rate > 0.01 else 0.5)
    options["search"] = {"option": "training.learning_rate"}
    first = sweep(make_recipe(options), tmp_path / "sweep", workers=0)
    assert first["failures"] == {}
    assert not (tmp_path / "sweep" / "cache").exists()
    seen.clear()
    assert sweep(make_recipe(options), tmp_path / "sweep", workers=0) == first
    assert not seen
    # Where nothing came of any, that is told; and the run that diverges at its end is tried again.
    scripted(monkeypatch, lambda recipe: error)
    assert set(sweep(make_recipe(options), tmp_path / "all", workers=0)["failures"].values()) == {
        "FloatingPointError: !"
    }
    seen = scripted(monkeypatch, lambda recipe: error if "test" in recipe.evaluation.splits else 0.5)
    for _ in range(2):
        assert len(sweep(make_recipe(options), tmp_path / "last", workers=0)["failures"]) == 1
    assert sum("test" in recipe.evaluation.splits for recipe in seen) == 2


def test_without_one_of_the_trials_nothing_is_chosen(options, tmp_path, monkeypatch):
    """An error that says nothing about the value, such as a full disk: that trial may be the best. Nothing is tested."""

    def figure(recipe):
        if recipe.training.learning_rate == 0.02 and not mended:
            return OSError("no space left on device")
        return 1 - recipe.training.learning_rate if recipe.training.learning_rate != 0.02 else 2.0

    mended: list[bool] = []
    seen = scripted(monkeypatch, figure)
    options["search"] = {"option": "training.learning_rate"}
    options["sweep"] = {"seed": [0, 1]}
    summary = sweep(make_recipe(options), tmp_path / "sweep", workers=0)
    assert (summary["points"][0]["chosen"], summary["points"][0]["seeds"]) == (None, [])
    assert list(summary["failures"].values()) == ["OSError: no space left on device"]
    assert all(recipe.evaluation.splits == ["validation"] for recipe in seen)
    mended.append(True)
    summary = sweep(make_recipe(options), tmp_path / "sweep", workers=0)
    assert (summary["points"][0]["chosen"], summary["points"][0]["seeds"]) == (0.02, [0, 1])
    assert not summary["failures"]


@pytest.mark.parametrize(("trials", "edge"), [(3, True), (4, True), (5, False), (7, False)])
def test_a_best_value_at_the_end_of_those_tried_is_marked(options, tmp_path, monkeypatch, trials, edge):
    scripted(monkeypatch, lambda recipe: 1 - abs(recipe.training.learning_rate - 0.05))
    options["search"] = {"option": "training.learning_rate", "trials": trials}
    summary = sweep(make_recipe(options), tmp_path / "sweep", workers=0)
    assert summary["points"][0]["at_the_edge"] is edge
    chosen = "0.02" if trials == 3 else "0.05"
    assert (
        f"| the recipe | {chosen}{', at the edge' if edge else ''} |" in (tmp_path / "sweep" / "summary.md").read_text()
    )


def test_a_rate_by_rule_is_told(options, tmp_path, monkeypatch):
    scripted(monkeypatch, lambda recipe: recipe.training.learning_rate)
    options["training"]["learning_rate"] = "auto"
    options["sweep"] = [
        {"method.epsilon": [1e-3, 1e-4]}, {"method.name": ["full"], "training.learning_rate": [0.1]},
        {"method.name": ["random"], "method.epsilon": [1e-3], "search.option": ["training.learning_rate"]},
    ]  # fmt: skip
    assert [group.rule for group in groups(make_recipe(options))] == [0.01, 0.02, None, None]
    points = sweep(make_recipe(options), tmp_path / "sweep", workers=0)["points"]
    assert [point["rule"] for point in points] == [0.01, 0.02, None, None]
    table = (tmp_path / "sweep" / "summary.md").read_text()
    assert "| epsilon=0.001 | rate 0.01 |" in table
    assert "| full, learning_rate=0.1 |  |" in table


def test_kinds_of_tasks_are_not_mixed(options):
    options["sweep"] = [{"task.name": ["classification"]}, {"task.name": ["tagging"]}]
    with pytest.raises(
        ValueError, match=r"figures of different kinds: classification, tagging\. Make a recipe for each"
    ):
        groups(make_recipe(options))


def test_a_search_stays_among_the_values_that_an_option_can_have(options, tmp_path, monkeypatch):
    """Beyond them the series ends; an integer stays one."""
    scripted(monkeypatch, lambda recipe: recipe.method.epsilon / 2)
    options["search"] = {"option": "method.epsilon"}
    (point,) = sweep(make_recipe(options, ["method.epsilon=1.0"]), tmp_path / "sweep", workers=0)["points"]
    assert (point["chosen"], point["trials"]) == (1.0, [[0.5, 0.25], [1.0, 0.5]])
    (point,) = sweep(make_recipe(options, ["method.epsilon=0.5"]), tmp_path / "sweep", workers=0)["points"]
    assert (point["chosen"], point["trials"]) == (1.0, [[0.2, 0.1], [0.5, 0.25], [1.0, 0.5]])
    seen = scripted(monkeypatch, lambda recipe: 1 / recipe.training.batch_size)
    options["search"] = {"option": "training.batch_size"}
    (point,) = sweep(make_recipe(options, ["training.batch_size=1"]), tmp_path / "other", workers=0)["points"]
    assert (point["chosen"], point["trials"]) == (1, [[1, 1.0], [2, 0.5]])
    assert all(isinstance(recipe.training.batch_size, int) for recipe in seen)


def test_titles_tell_points_apart(options):
    options["sweep"] = [{"training.learning_rate": [1e-3]}, {"training.head_first.learning_rate": [1e-3]},
                        {"model.name": ["m"], "method.name": ["full"], "seed": [0]}]  # fmt: skip
    titles = [title(group.point) for group in groups(make_recipe(options))]
    assert titles == ["learning_rate=0.001", "head_first.learning_rate=0.001", "full, model.name=m"]


def test_a_sweep_without_a_finished_run_has_a_table(options, tmp_path, monkeypatch):
    scripted(monkeypatch, lambda recipe: ValueError("!"))
    sweep(make_recipe(options), tmp_path / "sweep", workers=0)
    header = (tmp_path / "sweep" / "summary.md").read_text().splitlines()[0]
    assert header == "|  | chosen | free parameters | file, bytes | seeds | mean | deviation | p | seconds |"


def test_points_are_tested_against_one_of_them(options, tmp_path, monkeypatch):
    values = {"dynamic": [0.5, 0.52, 0.55], "random": [0.4, 0.45, 0.43], "magnitude": [0.4, 0.42, 0.45]}
    scripted(monkeypatch, lambda recipe: values[recipe.method.name][recipe.seed])
    options["sweep"] = {"method.name": list(values), "seed": [0, 1, 2]}
    summary = sweep(make_recipe(options), tmp_path / "sweep", workers=0)
    assert summary["against"] == "dynamic"
    expected = stats.ttest_rel([0.6, 0.62, 0.65], [0.5, 0.55, 0.53]).pvalue
    # A difference that is the same for all seeds is as sure as this test can be.
    assert [point["p"] for point in summary["points"]] == [None, pytest.approx(expected), 0.0]
    summary = sweep(make_recipe(options), tmp_path / "sweep", workers=0, against="random")
    assert [point["p"] is None for point in summary["points"]] == [False, True, False]
    scripted(monkeypatch, lambda recipe: [0.5, 0.52, 0.55][recipe.seed])
    summary = sweep(make_recipe(options), tmp_path / "equal", workers=0)
    assert [point["p"] for point in summary["points"]] == [None, None, None]
    with pytest.raises(ValueError, match="no point 'full' to compare with; there are: dynamic; random; magnitude"):
        sweep(make_recipe(options), tmp_path / "sweep", workers=0, against="full")


# Real runs, in processes


def test_runs_side_by_side(options, forkserver, tmp_path):
    """The same figures as one by one, scores made once for all; subsets compared; files that can be read again."""
    options["method"] |= {"score_examples": 6, "siloing": "none"}
    options["sweep"] = {"method.name": ["dynamic", "fisher"], "seed": [0, 1]}
    recipe = make_recipe(options)
    summary = sweep(recipe, tmp_path / "two", workers=2)
    alone = sweep(recipe, tmp_path / "one", workers=0)
    assert summary["failures"] == {}
    for point, other in zip(summary["points"], alone["points"], strict=True):
        assert point["metrics"] == other["metrics"]
        assert point["subset"] == other["subset"]
    folders = sorted((tmp_path / "two" / "runs").iterdir())
    assert len(folders) == 4
    assert [folder.name for folder in folders] == [
        folder.name for folder in sorted((tmp_path / "one" / "runs").iterdir())
    ]
    by_name = {name: [f for f in folders if f.name.startswith(name)] for name in ("dynamic", "fisher")}
    pairs = [*zip(by_name["dynamic"], by_name["fisher"], strict=True)]
    assert [[results(folder)["recipe"]["seed"] for folder in pair] for pair in pairs] == [[0, 0], [1, 1]]
    shares = [overlap(*(folder / "adapter" for folder in pair)).total.of_a for pair in pairs]
    assert shares[0] != shares[1]
    (found,) = summary["overlap"]
    assert (found["titles"], found["seeds"]) == (["dynamic", "fisher"], 2)
    assert found["shared"][0] == pytest.approx([1, sum(shares) / 2], abs=1e-6)
    one, other = (results(folder)["subset"]["entries"]["attention"] for folder in by_name["dynamic"])
    assert one != other
    means = {layer: (one.get(layer, 0) + other.get(layer, 0)) / 2 for layer in one.keys() | other.keys()}
    assert summary["points"][0]["subset"]["entries"]["attention"] == means
    assert summary["points"][0]["subset"]["seeds"] == 2
    seeds = overlap(*(folder / "adapter" for folder in by_name["dynamic"])).total.of_a
    assert summary["points"][0]["seeds_share"] == seeds
    assert not (tmp_path / "two" / "cache").exists()
    assert json.loads((tmp_path / "two" / "summary.json").read_text()) == summary
    figures = [results(folder)["metrics"]["test"]["accuracy"] for folder in by_name["dynamic"]]
    assert summary["points"][0]["metrics"]["test"]["accuracy"]["mean"] == statistics.fmean(figures)


def test_a_killed_sweep_goes_on(options, tmp_path):
    """Killed without warning, its runs end with it; started again, it runs what is not finished, and nothing else."""
    options["training"] |= {"max_steps": 3}
    options["sweep"] = {"seed": [0, 1, 2]}
    (tmp_path / "sweep.yaml").write_text(json.dumps(options))
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "peft_dst", "sweep", "sweep.yaml", "-o", "sweep", "--workers", "1"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *filter(None, sys.path)])}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True)
    runs = tmp_path / "sweep" / "runs"
    finished = {}
    try:
        deadline = time.monotonic() + 120
        while not finished and time.monotonic() < deadline:
            time.sleep(0.05)
            finished = {path: path.stat().st_mtime_ns for path in runs.glob("*/results.json")}
    finally:
        process.kill()
        process.wait()
    assert 0 < len(finished) < 3
    summary = sweep(make_recipe(options), runs.parent, workers=0)
    assert summary["points"][0]["seeds"] == [0, 1, 2]
    now = {path: path.stat().st_mtime_ns for path in runs.glob("*/results.json")}
    assert len(now) == 3
    assert finished.items() <= now.items()


def test_a_killed_run_is_a_failure(options, tmp_path, monkeypatch):
    """The others are not touched by it."""
    options["sweep"] = {"seed": [0, 1]}
    pool = processes.Pool(1, tmp_path / "cache")
    runs = [processes.Run(group_recipe, tmp_path / str(seed)) for seed, group_recipe in
            groups(make_recipe(options))[0].recipes.items()]  # fmt: skip
    waiting = list(runs)
    start = pool._start

    def start_and_kill(run):
        start(run)
        if run is runs[0]:
            os.kill(pool._running[0][0].pid, signal.SIGKILL)

    monkeypatch.setattr(pool, "_start", start_and_kill)
    ended = dict(pool.go(lambda: waiting.pop(0) if waiting else None))
    assert ended == {runs[0]: "its process ended with -9, killed", runs[1]: None}
    assert results(runs[0].folder) is None
    assert results(runs[1].folder) is not None
