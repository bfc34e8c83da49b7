"""What came of a sweep: means over seeds, what was chosen, tests, and how much subsets have in common."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from ..analysis import overlap, overlaps
from ..delta import SparseDelta
from .config import option_names, to_dict
from .options import Recipe, SearchOptions
from .record import ADAPTER, SURROUNDINGS


SUMMARY, TABLE = "summary.json", "summary.md"
RATE = "training.learning_rate"
# Every pair of so many adapters of one budget is compared.
COMPARED = 16
HEADER = ("", "chosen", "free parameters", "file, bytes", "seeds", "mean", "deviation", "p", "seconds")


@dataclass
class Group:
    """The runs of one point, which differ in their seed alone, and what came of them.

    Attributes:
        point: option → value, without the seed and what is searched.
        search: what is chosen before they run.
        start: the searched option's value to begin with.
        rule: the learning rate, where a rule gave it and it is not searched.
        recipes: the runs by their seed, the searched option at its start.
        trials: value of the searched option → figure on the validation split; -inf for what failed.
        chosen: the searched option's value.
        at_the_edge: whether the search ended with the best value at an end of those tried, as its trials were used up.
        records: results by seed.
        folders: folder by seed.
    """

    point: dict[str, Any]
    search: SearchOptions
    start: float
    rule: float | None = None
    recipes: dict[int, Recipe] = field(default_factory=dict)
    trials: dict[float, float] = field(default_factory=dict)
    chosen: float | None = None
    at_the_edge: bool = False
    records: dict[int, dict[str, Any]] = field(default_factory=dict)
    folders: dict[int, Path] = field(default_factory=dict)

    @property
    def option(self) -> str | None:
        return self.search.option


def title(point: Mapping[str, Any]) -> str:
    """A point in words, the method first: `dynamic, epsilon=0.001`."""
    words = [
        str(value) if name == "method.name" else f"{_brief(name)}={_short(value)}"
        for name, value in sorted(point.items(), key=lambda option: option[0] != "method.name")
    ]
    return ", ".join(words) or "the recipe"


def _brief(name: str) -> str:
    """An option's name without what is not needed to tell it from others; the outer one has the shorter name."""
    parts = name.split(".")
    others = [known.split(".") for known in option_names() if known != name and known.count(".") < len(parts)]
    lengths = range(1, len(parts) + 1)
    return next((".".join(parts[-n:]) for n in lengths if all(o[-n:] != parts[-n:] for o in others)), name)


def first_figure(record: Mapping[str, Any], split: str) -> float:
    """The figure to choose by: the task's first."""
    return next(iter(record["metrics"][split].values()))


def summarise(
    recipe: Recipe, groups: Sequence[Group], failures: Mapping[str, str], against: str | None = None
) -> dict[str, Any]:
    """What a sweep found, all that a report needs.

    Args:
        recipe: of the sweep.
        groups: its points, with their runs.
        failures: what went wrong, by run.
        against: title of the point to compare with; the best on validation data if not given.

    Returns:
        `recipe`; `metric`, the name of the figure to choose by; `split`, on which points are compared; `against`, the
        title of the point that the others are compared with; `points`, each with its title, options, trials, chosen
        value, figures of each split (values by seed, mean, standard deviation), test, sizes and times; `overlap`, of the
        subsets of each budget; failures; commit, versions and machine, lists of them where runs differ.
    """
    done = [group for group in groups if group.records]
    splits = [split for split in ("test", "validation", "train") if all(_has(group, split) for group in done)]
    split = splits[0] if done and splits else None
    reference = _reference(done, against)
    return {
        "recipe": to_dict(recipe),
        "metric": next(iter(_any(done)["metrics"][split])) if split else None,
        "split": split,
        "against": title(reference.point) if reference else None,
        "points": [_point(group, reference, split) for group in groups],
        "overlap": _overlap(done),
        "failures": dict(failures),
        **_common(done),
    }


def _has(group: Group, split: str) -> bool:
    return all(split in record["metrics"] for record in group.records.values())


def _any(groups: Sequence[Group]) -> dict[str, Any]:
    return next(iter(groups[0].records.values()))


def _reference(done: Sequence[Group], against: str | None) -> Group | None:
    if against is not None:
        return next((group for group in done if title(group.point) == against), None)
    for split in ("validation", "train", "test"):
        if done and all(_has(group, split) for group in done):
            return max(done, key=lambda group: statistics.fmean(_figures(group, split).values()))
    return None


def _figures(group: Group, split: str) -> dict[int, float]:
    return {seed: first_figure(record, split) for seed, record in sorted(group.records.items())}


def _point(group: Group, reference: Group | None, split: str | None) -> dict[str, Any]:
    records = [record for _, record in sorted(group.records.items())]
    found: dict[str, Any] = {
        "title": title(group.point),
        "options": group.point,
        "search": group.option,
        "trials": [[value, None if score == -math.inf else score] for value, score in sorted(group.trials.items())],
        "chosen": group.chosen,
        "at_the_edge": group.at_the_edge,
        "rule": group.rule,
        "seeds": sorted(group.records),
    }
    if not records:
        return found
    after_head = _spreads([record.get("metrics_after_head", {}) for record in records])
    return found | {
        "metrics": _spreads([record["metrics"] for record in records]),
        **({"metrics_after_head": after_head} if after_head else {}),
        "p": _paired(group, reference, split) if reference is not None and split else None,
        "free_parameters": records[0]["free_parameters"],
        "body_parameters": records[0]["body_parameters"],
        "head_parameters": records[0]["head_parameters"],
        "file_bytes": sum(records[0]["file_sizes"].values()),
        "steps": records[0]["steps"],
        "seconds": {
            name: round(statistics.fmean(record["seconds"][name] for record in records), 6)
            for name in records[0]["seconds"]
        },
        "peak_memory": max((record["peak_memory"]["bytes"] or 0) for record in records),
        **({"subset": _subset(records)} if all("subset" in record for record in records) else {}),
        **({"seeds_share": shared} if (shared := _seeds_share(group)) is not None else {}),
        "history": [
            [entry["step"], round(entry["loss"], 4)]
            for entry in records[0].get("history") or []
            if entry.get("loss") is not None
        ],
    }


def _subset(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Where the entries are, in the mean over seeds; how they moved, of the first."""
    total: dict[str, Counter[str]] = {}
    for record in records:
        for kind, layers in record["subset"]["entries"].items():
            total.setdefault(kind, Counter()).update(layers)
    entries = {
        kind: {layer: round(count / len(records), 3) for layer, count in layers.items()}
        for kind, layers in total.items()
    }
    return {**records[0]["subset"], "entries": entries, "seeds": len(records)}


def _spreads(records: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Spreads of each figure of the splits on which all runs were measured."""
    return {
        split: {key: _spread([record[split][key] for record in records]) for key in figures}
        for split, figures in records[0].items()
        if all(split in record for record in records)
    }


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, and standard deviation of the sample, None of a single one."""
    return {
        "values": list(values),
        "mean": statistics.fmean(values),
        "deviation": statistics.stdev(values) if len(values) > 1 else None,
    }


def _paired(group: Group, reference: Group, split: str) -> float | None:
    """Two-sided p of the paired t-test over the seeds that both have; None where it says nothing."""
    one, other = _figures(group, split), _figures(reference, split)
    seeds = [seed for seed in one if seed in other]
    differences = np.array([one[seed] - other[seed] for seed in seeds])
    if group is reference or len(seeds) < 2:
        return None
    if np.ptp(differences) < 1e-12:
        # The same at every seed: nothing, or something beyond any doubt that this test knows.
        return None if abs(differences[0]) < 1e-12 else 0.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def _seeds_share(group: Group) -> float | None:
    """Mean over pairs of seeds of the fraction of one's subset that the other has."""
    pairs = list(itertools.combinations(_deltas(group.folders.values()), 2))
    return statistics.fmean(overlap(one, other).total.of_a for one, other in pairs) if pairs else None


def _overlap(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """For each base and budget, fractions of each point's subset (a row) that another's (a column) has: means over the
    seeds that all of them have, each seed's adapters compared with one another.
    """
    budgets: dict[tuple[Any, ...], list[Group]] = {}
    for group in groups:
        recipe = next(iter(group.recipes.values()))
        base, method = recipe.model, recipe.method
        if any("subset" in record for record in group.records.values()):
            # Only of one base are subsets comparable.
            key = (base.name, base.revision, base.tuned, method.epsilon, method.num_free_parameters)
            budgets.setdefault(key, []).append(group)
    found = []
    for members in budgets.values():
        titles = [title(group.point) for group in members]
        if not 1 < len(members) <= COMPARED:
            continue
        shared = []
        for seed in sorted(set.intersection(*(set(group.folders) for group in members))):
            # A seed at a time: subsets may be large.
            deltas = _deltas(group.folders[seed] for group in members)
            if len(deltas) == len(members):
                shared.append(overlaps(deltas, titles).shared)
        if shared:
            means = np.mean(shared, axis=0).round(6).tolist()
            found.append({"titles": titles, "shared": means, "seeds": len(shared)})
    return found


def _deltas(folders: Iterable[Path]) -> list[SparseDelta]:
    """Adapters of this package among what runs left."""
    found = []
    for folder in folders:
        try:
            found.append(SparseDelta.load(folder / ADAPTER))
        except (OSError, ValueError):
            continue
    return found


def _common(done: Sequence[Group]) -> dict[str, Any]:
    """With what the runs were made: a list where they differ."""
    found: dict[str, list[Any]] = {key: [] for key in SURROUNDINGS}
    for group in done:
        for record in group.records.values():
            for key in SURROUNDINGS:
                if record[key] not in found[key]:
                    found[key].append(record[key])
    return {key: values[0] if len(values) == 1 else values for key, values in found.items()}


def table(summary: Mapping[str, Any]) -> str:
    """The summary as a table in Markdown."""
    header, rows = rows_of(summary)
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def rows_of(summary: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The summary as header and rows of text."""
    measured = f"{summary['split']} {summary['metric']}" if summary["metric"] else "mean"
    header = tuple(measured if name == "mean" else name for name in HEADER)
    return header, [_row(point, summary) for point in summary["points"]]


def _row(point: Mapping[str, Any], summary: Mapping[str, Any]) -> tuple[str, ...]:
    chosen = "" if point["chosen"] is None else f"{point['chosen']:g}"
    if point.get("at_the_edge"):
        chosen += ", at the edge"
    if point.get("rule") is not None:
        chosen = f"{chosen + ', ' if chosen else ''}rate {point['rule']:g}"
    if not point["seeds"]:
        return (point["title"], chosen, "", "", "0", "failed", "", "", "")
    figures = point["metrics"][summary["split"]][summary["metric"]]
    deviation, p = figures["deviation"], point["p"]
    return (
        point["title"],
        chosen,
        f"{point['free_parameters']:,}",
        f"{point['file_bytes']:,}",
        str(len(point["seeds"])),
        f"{figures['mean']:.4f}",
        "" if deviation is None else f"{deviation:.4f}",
        "–" if point["title"] == summary["against"] else "" if p is None else f"{p:.3f}",
        f"{point['seconds']['all']:.0f}",
    )


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
