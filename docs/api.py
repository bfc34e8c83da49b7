"""Writes docs/api.md: what there is to call, from the code.

python docs/api.py
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import peft_dst
from peft_dst import analysis, baselines, conversion, delta, serving, subsets, training


TARGET = Path(__file__).with_suffix(".md")
SECTIONS: dict[str, tuple[Any, list[str], str]] = {
    "peft_dst": (peft_dst, peft_dst.__all__, "Importing it registers the method with PEFT."),
    "peft_dst.training": (
        training,
        ["subset_metrics", "training_advice"],
        "What `DSTCallback` reports, for loops without it.",
    ),
    "peft_dst.subsets": (
        subsets,
        ["choose", "magnitude_scores", "random_scores"],
        "Scores and the choice on plain tensors.",
    ),
    "peft_dst.delta": (
        delta,
        ["SparseDelta", "SparseTensor", "DeltaError", "merge", "export_patches"],
        "Adapters as values, without PEFT ([the files](format.md)).",
    ),
    "peft_dst.serving": (serving, serving.__all__, "Many deltas on one base ([serving](serving.md))."),
    "peft_dst.analysis": (analysis, analysis.__all__, "What adapters look like."),
    "peft_dst.baselines": (
        baselines,
        ["lora_config_for_budget", "prompt_tuning_config_for_budget", "Match", "SeedPenalty"],
        "What subsets are compared with.",
    ),
    "peft_dst.conversion": (
        conversion,
        ["convert_adapter", "convert_checkpoint"],
        "Other methods' adapters made into deltas ([the command](cli.md#convert)).",
    ),
}
# Whose methods are listed, too: all, or those that PEFT does not call by itself.
WITH_METHODS: dict[str, tuple[str, ...] | None] = {
    "DSTModel": ("constraint", "silos", "print_silos", "get_nb_trainable_parameters", "add_weighted_adapter"),
    "SparseDelta": None,
    "DeltaPool": None,
    "Planner": None,
}


def call(name: str, of: Any) -> str:
    """A name as it is called: parameters, and those defaults that fit."""
    if not callable(of) or (isinstance(of, type) and issubclass(of, BaseException)):
        return name
    shown, keyword_only = [], False
    try:
        parameters = inspect.signature(of).parameters.values()
    except ValueError:
        return f"{name}(…)"
    for one in parameters:
        if one.name == "self" or one.name.startswith("_"):
            continue
        if one.kind is one.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            shown.append("*")
        if one.kind is one.VAR_POSITIONAL:
            keyword_only = True
        star = {one.VAR_POSITIONAL: "*", one.VAR_KEYWORD: "**"}.get(one.kind, "")
        simple = one.default is None or isinstance(one.default, bool | int | float | str)
        shown.append(star + one.name + ("" if one.default is one.empty else f"={one.default!r}" if simple else "=…"))
    # Options of a dataclass have pages of their own.
    return f"{name}({', '.join(shown)})" if len(shown) <= 12 else f"{name}(…)"


def said(of: Any) -> str:
    """The first paragraph of its docstring."""
    return " ".join((inspect.getdoc(of) or "").split("\n\n")[0].split()).replace("|", "\\|")


def row(name: str, of: Any) -> str:
    return f"| `{call(name, of)}` | {said(of)} |"


def methods(of: type, names: tuple[str, ...] | None) -> list[str]:
    lines = []
    for name, member in vars(of).items():
        if name.startswith("_") if names is None else name not in names:
            continue
        if isinstance(member, property):
            lines.append(f"| &emsp;`.{name}` | {said(member)} |")
        else:
            # Bound, if it is the class's.
            lines.append(f"| &emsp;`.{call(name, getattr(of, name))}` | {said(member)} |")
    return lines


def render() -> str:
    lines = [
        "# What there is to call",
        "",
        "Written by `python docs/api.py` from the code. `help(…)` of each has the arguments, shapes, dtypes and errors;",
        "the options of `DSTConfig` are on [a page of their own](options.md).",
    ]
    for title, (module, names, about) in SECTIONS.items():
        lines += ["", f"## {title}", "", about, "", "| | |", "|---|---|"]
        for name in sorted(names, key=str.lower):
            of = getattr(module, name)
            lines.append(row(name, of))
            if name in WITH_METHODS:
                lines += methods(of, WITH_METHODS[name])
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TARGET.write_text(render())
