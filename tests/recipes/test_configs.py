"""The files of configs/: they resolve, they hold nothing that is so already, and the page lists them all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from peft_dst.recipes import at, load_recipe, points
from peft_dst.recipes.config import _flat, _read, make_recipe, option_names, to_dict


ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
# Parts of files, which are no experiments by themselves.
EXPERIMENTS = [path for path in FILES if not path.name.startswith("_")]
DEFAULTS = _flat(to_dict(make_recipe({"model": {"name": "?"}, "task": {"name": "maths", "data": "?"}})))


def label(path):
    return path.relative_to(ROOT / "configs").as_posix()


def own(path):
    """What a file says itself; and what holds without it."""
    values = yaml.safe_load(path.read_text())
    below: dict = {}
    for name in values.pop("defaults", []):
        below |= _flat(_read(path.parent / name, ()))
    return _flat(values), below


@pytest.mark.parametrize("path", EXPERIMENTS, ids=label)
def test_every_experiment_resolves(path):
    recipe = load_recipe(path)
    assert recipe.title
    runs = [at(recipe, point) for point in points(recipe)]
    assert runs
    assert all(runs.count(run) == 1 for run in runs), "two runs of the sweep are the same"


@pytest.mark.parametrize("path", FILES, ids=label)
def test_a_file_holds_differences_only(path):
    values, below = own(path)
    for name, value in values.items():
        if name == "sweep" or name.startswith("sweep."):
            continue
        assert any(name == known or name.startswith(f"{known}.") for known in option_names()), name
        number = float(value) if isinstance(value, str) and re.fullmatch(r"[\d.]+e-?\d+", value) else value
        assert number != below.get(name, DEFAULTS.get(name, "no default")), f"{name} is {value!r} without this file"


def test_every_part_is_used():
    used = {name for path in EXPERIMENTS for name in yaml.safe_load(path.read_text()).get("defaults", [])}
    assert used == {path.name for path in FILES} - {path.name for path in EXPERIMENTS}
