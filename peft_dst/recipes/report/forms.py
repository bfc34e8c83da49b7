"""What a file of results must hold, and what is said where it does not."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...tables import printable


NUMBER = (int, float)
# A key of a mapping: whatever else is in it.
ANY = "*"


@dataclass(frozen=True)
class Maybe:
    """What may be null, or not there."""

    form: Any


_SPREAD = {"values": [NUMBER], "mean": NUMBER, "deviation": Maybe(NUMBER)}
_MATRIX = [[NUMBER]]
# Where entries are, of the first of several seeds or, where their number is told, in the mean.
_SUBSET = Maybe(
    {"entries": {ANY: {ANY: NUMBER}}, "seeds": Maybe(int), "snapshots": Maybe({"steps": [int], "shared": _MATRIX})}
)
POINT = {
    "title": str,
    "options": dict,
    "search": Maybe(str),
    "trials": [list],
    "chosen": Maybe(NUMBER),
    "rule": Maybe(NUMBER),
    "seeds": [int],
}
# Of a point with runs that are finished.
DONE = {
    "metrics": {ANY: {ANY: _SPREAD}},
    "metrics_after_head": Maybe({ANY: {ANY: _SPREAD}}),
    "p": Maybe(NUMBER),
    "free_parameters": int,
    "body_parameters": int,
    "file_bytes": int,
    "steps": int,
    "seconds": {"all": NUMBER, "training": Maybe(NUMBER), "switching": Maybe(NUMBER)},
    "subset": _SUBSET,
    "seeds_share": Maybe(NUMBER),
}
SUMMARY = {
    "recipe": {
        "title": Maybe(str),
        "model": {"name": str},
        "task": {"name": str, "data": str},
        "method": {"name": str},
    },
    "metric": Maybe(str),
    "split": Maybe(str),
    "against": Maybe(str),
    "points": [POINT],
    "overlap": Maybe([{"titles": [str], "shared": _MATRIX, "seeds": Maybe(int)}]),
    "failures": {ANY: str},
}
# What is read of a run's results.json to make a summary.
RECORD = {
    "recipe": dict,
    "metrics": {ANY: {ANY: NUMBER}},
    "free_parameters": int,
    "body_parameters": int,
    "head_parameters": int,
    "file_sizes": {ANY: int},
    "steps": int,
    "seconds": {"all": NUMBER, ANY: NUMBER},
    "peak_memory": {"bytes": Maybe(int)},
    "subset": _SUBSET,
    "history": Maybe([{"loss": Maybe(NUMBER)}]),
    "commit": Maybe(str),
    "versions": dict,
    "machine": dict,
}


def read(path: Path) -> Any:
    """What a JSON file holds, its text without characters that no page may hold.

    Raises:
        ValueError: if it is none.
    """
    try:
        return _clean(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from None


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {printable(key): _clean(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_clean(inner) for inner in value]
    return printable(value) if isinstance(value, str) else value


def check(value: Any, form: Any, where: str) -> None:
    """Check that a value of a JSON file has a form.

    Args:
        value: the value.
        form: a type or several; a list with the form of each element; a mapping with the form of each key, and under `ANY`
            that of the others; or Maybe.
        where: the file with a colon and a space, and where the value is in it.

    Raises:
        ValueError: that says where what is missing, or is something else.
    """
    if isinstance(form, Maybe):
        if value is not None:
            check(value, form.form, where)
    elif isinstance(form, list):
        _check_type(value, list, where)
        for i, element in enumerate(value):
            check(element, form[0], f"{where}[{i}]")
    elif isinstance(form, dict):
        _check_type(value, dict, where)
        for key, inner in form.items():
            if key not in value and key != ANY and not isinstance(inner, Maybe):
                raise ValueError(f"{where.rstrip(': ')} lacks {key!r}; it is no summary or result of this version.")
        for key in value:
            if inner := form.get(key, form.get(ANY)):
                check(value[key], inner, where + key if where.endswith(" ") else f"{where}.{key}")
    else:
        _check_type(value, form, where)


def _check_type(value: Any, kinds: type | tuple[type, ...], where: str) -> None:
    # JSON's true is no number.
    if not isinstance(value, kinds) or isinstance(value, bool):
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        names = {int: "an integer", float: "a number", str: "text", list: "a list", dict: "a mapping"}
        raise ValueError(f"{where.rstrip(': ')} must be {names[kinds[-1]]}, not {json.dumps(value)[:60]}.")
