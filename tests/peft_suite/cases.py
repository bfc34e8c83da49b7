"""DST's twins of PEFT's test cases: the same model and targets, without what only the other method has."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from _pytest.mark import ParameterSet
from peft.config import PeftConfig

from peft_dst import DSTConfig


# The options that every method understands. A twin keeps them.
SHARED = (
    "target_modules",
    "exclude_modules",
    "target_parameters",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "task_type",
    "inference_mode",
    "base_model_name_or_path",
    "revision",
)
# A case with one of these is about something that DST does not have.
FOREIGN = ("trainable_token_indices",)
# Half of the components: fewer would not tell two adapters of a tiny model apart within PEFT's tolerances.
VARIANTS: dict[str, dict[str, Any]] = {
    "DST": {"epsilon": 0.5},
    "DST-random": {"epsilon": 0.5, "selection": "random"},
}
# Fixed subsets, which have a path of their own, on a few of the models: MLP is what tests of several adapters use.
RANDOM_ON = ("MLP", "EmbConv1D", "Conv2d")


@dataclass
class TinyDSTConfig(DSTConfig):
    """For tests that are given a class only: the default budget of models of a hundred parameters would be zero."""

    epsilon: float | None = 0.5


def options(given: dict[str, Any], variant: str = "DST") -> dict[str, Any]:
    """DSTConfig's keyword arguments for those of another method's config."""
    kept = {name: value for name, value in given.items() if name in SHARED}
    if any(name.startswith("init_") and value is False for name, value in given.items()):
        kept["init_weights"] = False
    return {**VARIANTS[variant], **kept}


def stand_in(**given: Any) -> DSTConfig:
    """What is called in the place of `LoraConfig` by a test that is written with LoRA and about any method."""
    return DSTConfig(**options(given))


def is_dst(value: object) -> bool:
    """Whether a test's parameter is DST's config or its class."""
    return isinstance(value, DSTConfig) or (_is_method(value) and issubclass(value, DSTConfig))  # type: ignore[arg-type]


def twins(names: Sequence[str], rows: Iterable[Any]) -> list[Any]:
    """The rows that DST gets of a parametrisation over methods; none if it is over something else.

    Args:
        names: the argument names.
        rows: what PEFT's module gives for them.
    """
    found: dict[str, Any] = {}
    for row in rows:
        values = list(row.values) if isinstance(row, ParameterSet) else list(row) if len(names) > 1 else [row]
        if not any(_is_method(value) or isinstance(value, PeftConfig) for value in values):
            return []
        given = [v if isinstance(v, dict) else vars(v) for v in values if isinstance(v, dict | PeftConfig)]
        if any(options.get(name) for options in given for name in FOREIGN):
            continue
        for variant in VARIANTS if any(value in RANDOM_ON for value in values) or len(given) > 1 else ["DST"]:
            twin = [
                _twin(name, value, variant, with_options=bool(given)) for name, value in zip(names, values, strict=True)
            ]
            told = [
                _told(value)
                for name, value in zip(names, twin, strict=True)
                if name not in ("test_name", "tuner_method")
            ]
            label = "-".join([variant, *filter(None, told)])
            named = {"test_name": label, "tuner_method": "dst"}
            twin = [named.get(name, value) for name, value in zip(names, twin, strict=True)]
            found.setdefault(label, pytest.param(*twin, id=label))
    return list(found.values())


def _is_method(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, PeftConfig)


def _twin(name: str, value: Any, variant: str, with_options: bool) -> Any:
    if _is_method(value):
        return DSTConfig if with_options else TinyDSTConfig
    if isinstance(value, PeftConfig):
        return DSTConfig(**options({n: v for n, v in vars(value).items() if v is not None}, variant))
    if name == "mandatory_kwargs":
        # What a config of the other method cannot do without.
        return dict(VARIANTS[variant])
    return options(value, variant) if isinstance(value, dict) else value


def _told(value: Any) -> str:
    """What a test's name says of a parameter."""
    if _is_method(value):
        return ""
    if isinstance(value, DSTConfig):
        value = {name: given for name, given in vars(value).items() if given}
    if not isinstance(value, dict):
        return str(value)
    told = {n: sorted(v) if isinstance(v, set) else v for n, v in value.items() if n in SHARED}
    return ",".join(f"{name}={json.dumps(value, default=str)}" for name, value in told.items())
