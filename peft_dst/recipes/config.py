"""What an experiment is: its options, read from YAML files and the command line, and checked before anything is loaded.

A file holds what differs from the files that its key `defaults` names (one, or a list; relative to it; later ones win).
Options on the command line come last: `training.learning_rate=1e-2`. The options themselves are in `options`.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..config import SELECTIONS
from .checks import check_numbers, check_splits
from .options import AUTO, DTYPES, METHODS, OPTIMIZERS, SPLITS, TASKS, Recipe, SearchOptions
from .rates import settled


# What refers to another option, or to the environment, in OmegaConf: somebody else's recipe shall read neither. Such text
# stays as it is; while OmegaConf has it, a character of private use stands in it.
REFERENCE, HARMLESS = "${", "\ue000{"
# Options that are mappings, with what they are without any: a new one takes the old one's place, where OmegaConf would
# merge the two (and could not merge one with a list).
WHOLE: dict[str, Any] = {"sweep": None, "task.columns": {}, "search.at": {}}


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file.
        overrides: `option=value` each, the option's name dotted, the value as in YAML.

    Raises:
        ValueError: for a file that is no such thing, an option that does not exist (with the nearest that does), a value
            of the wrong type or outside its choices, and an option that must be given.
    """
    return make_recipe(_read(Path(path), ()), overrides, str(path))


def make_recipe(values: Mapping[str, Any], overrides: Iterable[str] = (), where: str = "the recipe") -> Recipe:
    """A recipe from nested mappings, as `load_recipe` makes it from files."""
    recipe = _merge(OmegaConf.structured(Recipe), values, where)
    for override in overrides:
        recipe = _merge(recipe, _given(override), "the command line", [override.partition("=")[0]])
    return _finished(recipe, where)


def _given(override: str) -> dict[str, Any]:
    """What `option=value` gives, the value read as YAML; of an option that is text whatever YAML finds more in it."""
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ValueError(f"{override!r} is no override; write option=value, e.g. training.learning_rate=1e-2.")
    entry = option_names().get(name)
    is_text = entry is not None and str(entry.type) in ("str", "str | None")
    try:
        given = OmegaConf.to_container(OmegaConf.from_dotlist([_inert(override)]))
    except Exception as error:  # whatever YAML has to say
        if not is_text:
            raise ValueError(f"{override!r} cannot be read: {error}") from None
        return _nested(name, text)
    assert isinstance(given, dict)
    value: Any = given
    for part in name.split("."):
        value = value[part]
    return _nested(name, text) if is_text and value is not None and not isinstance(value, str) else given


def _inert(value: Any, back: bool = False) -> Any:
    """Text in which OmegaConf sees no reference (`${…}`), anywhere in a value, or such text as it was."""
    if isinstance(value, str):
        return value.replace(HARMLESS, REFERENCE) if back else value.replace(REFERENCE, HARMLESS)
    if isinstance(value, dict):
        return {_inert(key, back): _inert(inner, back) for key, inner in value.items()}
    if isinstance(value, list):
        return [_inert(inner, back) for inner in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [entry.name for entry in dataclasses.fields(value)]
        return replace(value, **{name: _inert(getattr(value, name), back) for name in names})
    return value


def _finished(recipe: DictConfig, where: str) -> Recipe:
    """The recipe, checked."""
    try:
        found = _inert(OmegaConf.to_object(recipe), back=True)
    except OmegaConfBaseException as error:
        name = error.full_key or "an option"
        raise ValueError(f"{where}: {name} must be given; add it to the file, or {name}=VALUE.") from None
    assert isinstance(found, Recipe)
    _check(found)
    return found


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """All options as nested mappings, of which `make_recipe` makes the same recipe."""
    return dataclasses.asdict(recipe)


def to_yaml(recipe: Recipe) -> str:
    """The whole recipe as a YAML file, without defaults to look up."""
    return _inert(OmegaConf.to_yaml(OmegaConf.create(_inert(to_dict(recipe)))), back=True)


def differences(one: Recipe, other: Recipe) -> list[str]:
    """Names of the options in which two recipes differ, those of no effect on a single training aside."""
    a, b = (_flat(to_dict(_trained(recipe))) for recipe in (one, other))
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def digest(recipe: Recipe, options: Iterable[str] | None = None) -> str:
    """Ten characters for what a recipe trains: those of two recipes are equal if `differences` finds none.

    Options at their defaults do not count, so that one which is added here later changes nothing.

    Args:
        recipe: any recipe.
        options: beginnings of the names of the options that count; all, if not given.
    """
    default = _flat(to_dict(Recipe()))
    given = {
        name: value
        for name, value in _flat(to_dict(_trained(recipe))).items()
        if value != default.get(name) and (options is None or name.startswith(tuple(options)))
    }
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:10]


def _trained(recipe: Recipe) -> Recipe:
    """The recipe with everything at its default that has no effect on what is trained."""
    evaluation = replace(recipe.evaluation, splits=[])
    return replace(recipe, title="", sweep=None, search=SearchOptions(), evaluation=evaluation)


def points(recipe: Recipe) -> list[dict[str, Any]]:
    """What a sweep varies: for each of its runs a mapping from options to values; [{}] if it varies nothing."""
    grids = _grids(recipe.sweep)
    product = [
        dict(zip(grid, values, strict=True))
        for grid in grids
        for values in itertools.product(*map(_listed, grid.values()))
    ]
    return product or [{}]


def at(recipe: Recipe, point: Mapping[str, Any]) -> Recipe:
    """The recipe of one run of a sweep, with its learning rate settled.

    Raises:
        ValueError: for an option or value that does not exist, or if there is no rule for a learning rate.
    """
    values: dict[str, Any] = {}
    for name, value in point.items():
        values = _merged(values, _nested(name, value))
    merged = _merge(OmegaConf.structured(_inert(replace(recipe, sweep=None))), values, "the sweep", point)
    return settled(_finished(merged, "the sweep"))


def value_of(recipe: Recipe, name: str) -> Any:
    """An option's value by its dotted name; None if there is no such option."""
    values: Any = to_dict(recipe)
    for part in name.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def is_integer(name: str) -> bool:
    """Whether an option takes integers alone."""
    kind = str(option_names()[name].type)
    return "int" in kind and "float" not in kind


def option_names() -> dict[str, dataclasses.Field[Any]]:
    """Every option by its dotted name, with its field."""
    return _names(Recipe)


def _names(kind: type, prefix: str = "") -> dict[str, dataclasses.Field[Any]]:
    found: dict[str, dataclasses.Field[Any]] = {}
    for entry in dataclasses.fields(kind):
        inner = entry.default_factory
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            found |= _names(inner, f"{prefix}{entry.name}.")
        else:
            found[prefix + entry.name] = entry
    return found


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """A file over its defaults."""
    if path.resolve() in above:
        raise ValueError(f"{path} is among its own defaults.")
    try:
        # OmegaConf reads with YAML's safe loader: no file can make Python objects or run code.
        loaded = OmegaConf.load(StringIO(_inert(path.read_text(encoding="utf-8"))))
        values = OmegaConf.to_container(loaded)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # whatever YAML has to say
        raise ValueError(f"{path} is not a YAML file of options: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a list, not options by name.")
    merged: dict[str, Any] = {}
    for name in _listed(values.pop("defaults", [])):
        if not isinstance(name, str):
            raise ValueError(f"{path}: defaults must be a file or a list of files, got {name!r}.")
        merged = _merged(merged, _read(path.parent / name, (*above, path.resolve())))
    return _merged(merged, {str(key): value for key, value in values.items()})


def _merged(lower: Any, upper: Any) -> Any:
    if not (isinstance(lower, dict) and isinstance(upper, dict)):
        return upper
    return {key: _merged(lower[key], upper[key]) if key in lower and key in upper else upper.get(key, lower.get(key))
            for key in [*lower, *(k for k in upper if k not in lower)]}  # fmt: skip


def _merge(recipe: DictConfig, values: Mapping[str, Any], where: str, given: Iterable[str] = ()) -> DictConfig:
    """A recipe with other values, of which those options that are `given` by their whole names."""
    _check_names(values, Recipe, "", where)
    recipe = copy.deepcopy(recipe)
    for name in WHOLE.keys() & {*values, *given}:
        OmegaConf.update(recipe, name, WHOLE[name], merge=False)
    try:
        merged = OmegaConf.merge(recipe, OmegaConf.create(_inert(dict(values))))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        entry = option_names().get(error.full_key or "")
        kind = f"; it takes {entry.type}" if entry else ""
        raise ValueError(f"{where}: {error.full_key}: {reason}{kind}.") from None
    assert isinstance(merged, DictConfig)
    return merged


def _check_names(values: Mapping[str, Any], kind: type, prefix: str, where: str) -> None:
    known = {entry.name: entry.default_factory for entry in dataclasses.fields(kind)}
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{where} has an option {prefix}{key}, which does not exist{_nearest(prefix + str(key))}.")
        inner = known[key]
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            if not isinstance(value, Mapping):
                raise ValueError(f"{where}: {prefix}{key} holds options, not {value!r}; name one of them.")
            _check_names(value, inner, f"{prefix}{key}.", where)


def _nearest(name: str) -> str:
    names = list(option_names())
    found = difflib.get_close_matches(name, names, 1)
    # The right name in the wrong place.
    found = found or [known for known in names if known.rpartition(".")[2] == name.rpartition(".")[2]][:1]
    return f"; did you mean {found[0]}" if found else "; see docs/experiments.md"


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _nested(name: str, value: Any) -> dict[str, Any]:
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _grids(sweep: Any) -> list[dict[str, Any]]:
    grids = _listed(sweep) if sweep else []
    for grid in grids:
        if not isinstance(grid, dict):
            raise ValueError(f"sweep takes options and their values, got {grid!r}; e.g. sweep: {{seed: [0, 1, 2]}}.")
    return grids


def _check(recipe: Recipe) -> None:
    """Choices and ranges, which types do not say."""
    for name, value, choices in (
        ("model.dtype", recipe.model.dtype, DTYPES),
        ("task.name", recipe.task.name, TASKS),
        ("method.name", recipe.method.name, METHODS),
        ("training.optimizer", recipe.training.optimizer, OPTIMIZERS),
    ):
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}.{hint}")
    if not recipe.evaluation.splits:
        raise ValueError(f"evaluation.splits is empty; name some of {', '.join(SPLITS)}.")
    unknown = [split for split in recipe.evaluation.splits if split not in SPLITS]
    if unknown:
        raise ValueError(f"evaluation.splits are of {', '.join(SPLITS)}; got {unknown[0]!r}.")
    rate = recipe.training.learning_rate
    if rate != AUTO and (isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < math.inf):
        raise ValueError(f"training.learning_rate must be auto, or a number of 0 or more; got {rate!r}.")
    check_numbers(_flat(to_dict(recipe)))
    check_splits(recipe.task)
    method = recipe.method
    if method.epsilon is not None and method.num_free_parameters is not None:
        raise ValueError(
            "method.epsilon and method.num_free_parameters are two ways to set one budget; give one of them."
        )
    if method.epsilon is not None and not 0 < method.epsilon <= 1:
        raise ValueError(f"method.epsilon must be a fraction with 0 < epsilon <= 1, got {method.epsilon}.")
    if method.name == "transfer" and not method.source:
        raise ValueError(
            "method.name=transfer takes over the subset of another adapter; set method.source to its folder."
        )
    if method.name in ("fisher_pretraining", "combined") and not (method.text or method.source):
        raise ValueError(f"method.name={method.name} scores on plain text; set method.text to a hub id or a folder.")
    if recipe.search.option is not None and recipe.search.option not in option_names():
        raise ValueError(
            f"search.option is {recipe.search.option}, which does not exist{_nearest(str(recipe.search.option))}."
        )
    if recipe.search.option is not None and recipe.search.option.startswith(("seed", "search.")):
        raise ValueError(f"search.option={recipe.search.option} is nothing to choose on validation data.")
    for name in recipe.search.at:
        if name not in option_names():
            raise ValueError(f"search.at changes {name}, which does not exist{_nearest(name)}.")
        if name == recipe.search.option or name.startswith(("seed", "search.", "sweep")):
            raise ValueError(
                f"search.at={{{name}: …}} is nothing that trials can have otherwise; take {name} out of it."
            )
    if recipe.training.release_gradients and method.name not in SELECTIONS:
        raise ValueError(
            f"training.release_gradients is DSTOptimizer's, which method.name={method.name} does not step through; set it "
            "to false."
        )
    for grid in _grids(recipe.sweep):
        for name, values in grid.items():
            if name not in option_names():
                raise ValueError(f"sweep varies {name}, which does not exist{_nearest(name)}.")
            if values == []:
                raise ValueError(f"sweep gives {name} no values; leave it out, or give some.")
