"""The files of configs/: they resolve, they hold nothing that is so already, and the page lists them all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from peft_dst.recipes import at, load_recipe, points
from peft_dst.recipes.config import _flat, _listed, make_recipe, option_names, to_dict


ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
# Parts of files, which are no experiments by themselves.
EXPERIMENTS = [path for path in FILES if not path.name.startswith("_")]
DEFAULTS = _flat(to_dict(make_recipe({"model": {"name": "?"}, "task": {"name": "maths", "data": "?"}})))
# Sweeps that were tried, with the method that they vary: most are shared by several files.
SWEEPS: set[str] = set()
# These have no default.
for name in ("model.name", "task.name", "task.data"):
    del DEFAULTS[name]


def label(path):
    return path.relative_to(ROOT / "configs").as_posix()


@pytest.mark.parametrize("path", EXPERIMENTS, ids=label)
def test_every_experiment_resolves(path):
    recipe = load_recipe(path)
    assert recipe.title
    runs = points(recipe)
    assert all(runs.count(run) == 1 for run in runs), "two runs of the sweep are the same"
    # Every value of every option that is varied, in one run.
    if repr((recipe.sweep, recipe.method)) in SWEEPS:
        return
    SWEEPS.add(repr((recipe.sweep, recipe.method)))
    one_each = {repr(item): point for point in runs for item in point.items()}.values()
    for point in {repr(point): point for point in one_each}.values():
        at(recipe, point)


def chain(path):
    """The files that make an experiment, each with what it says itself, in the order in which they are merged."""
    path = path.resolve()
    values = yaml.safe_load(path.read_text())
    parts = [found for name in _listed(values.pop("defaults", [])) for found in chain(path.parent / name)]
    return [*parts, (path, {n: v for n, v in _flat(values).items() if not n.startswith("sweep")})]


def test_files_hold_differences_only():
    """An option is in a file because it differs from what holds without: of a part in one experiment at least."""
    said, needed = set(), set()
    for experiment in EXPERIMENTS:
        values = dict(DEFAULTS)
        for path, own in chain(experiment):
            for name, value in own.items():
                assert any(name == known or name.startswith(f"{known}.") for known in option_names()), (path, name)
                # YAML's own reader takes 1e-3 for a word.
                number = float(value) if isinstance(value, str) and re.fullmatch(r"[\d.]+e-?\d+", value) else value
                said.add((label(path), name))
                if name not in values or number != values[name]:
                    needed.add((label(path), name))
            values |= own
    assert said == needed, said - needed


def test_every_part_is_used():
    used = {found for path in EXPERIMENTS for found, _ in chain(path)[:-1]}
    assert used == set(FILES) - set(EXPERIMENTS)


def test_the_page_names_every_experiment():
    page = (ROOT / "docs" / "experiments.md").read_text().partition("## Which file is which table")[2]
    # Files of several sizes or tasks are one line, with braces.
    names = [name for line in page.splitlines() if line.startswith("| `") for name in expand(line.split("`")[1])]
    assert sorted(name for name in names if name.endswith(".yaml")) == sorted(map(label, EXPERIMENTS))


def expand(name):
    """a_{b,c}.yaml as a shell has it."""
    match = re.search(r"\{([^}]*)\}", name)
    if not match:
        return [name]
    return [found for part in match[1].split(",") for found in expand(name.replace(match[0], part, 1))]


def test_the_page_of_options_is_current(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import recipe_options

    page = (ROOT / "docs" / "experiments.md").read_text()
    assert recipe_options.render() in page, "run python docs/recipe_options.py"
