"""From points to what is drawn and tabled: lines, grids and shares, as plain numbers."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...tables import square_labels
from .data import Point, Section, Spread, number_text


# The column of a table for what no budget sizes.
OWN = "size of its own"


@dataclass(frozen=True)
class Line:
    """A series by its number of free parameters.

    Attributes:
        label: what it is.
        method: which method; decides the colour.
        x: free parameters, ascending.
        y: figures.
    """

    label: str
    method: str
    x: Sequence[float]
    y: Sequence[Spread]


@dataclass(frozen=True)
class Level:
    """A point without a place on the axis of free parameters: it has none, or all."""

    label: str
    method: str
    y: Spread


@dataclass(frozen=True)
class Grid:
    """Numbers by rows and columns.

    Attributes:
        title: what it is.
        rows: their names.
        columns: their names.
        values: a list a row; None where there is nothing.
        framed: (row, column) of what is to stand out.
        crossed: (row, column) of what failed.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    framed: frozenset[tuple[int, int]] = frozenset()
    crossed: frozenset[tuple[int, int]] = frozenset()


@dataclass(frozen=True)
class Shares:
    """How subsets are spread over parts of the model.

    Attributes:
        title: what the subsets have in common, their budget.
        rows: a name for each subset.
        parts: names.
        values: for each subset the fraction of it in each part.
    """

    title: str
    rows: Sequence[str]
    parts: Sequence[str]
    values: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Table:
    """Text in rows; `strong` are (row, column) of the best."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: frozenset[tuple[int, int]] = field(default_factory=frozenset)


def best_rates(points: Iterable[Point]) -> list[Point]:
    """Of points that differ in their learning rate alone, the one that is best on validation data.

    Points that were not measured there all stay, as series of their own.
    """
    found: dict[tuple[Any, ...], Point] = {}
    for point in points:
        compared = point.rate is not None and point.validation is not None
        key = (point.series, point.budget, point.free, None if compared else point.title)
        other = found.setdefault(key, point)
        if other is not point and (point.validation or 0) > (other.validation or 0):
            found[key] = point
    counts = Counter((point.series, point.budget, point.free) for point in found.values())
    several = {series for (series, _, _), count in counts.items() if count > 1}
    return [
        replace(p, series=f"{p.series}, learning rate {number_text(p.rate)}")
        if p.series in several and p.rate is not None
        else p
        for p in found.values()
    ]


def curves(points: Iterable[Point], value: Callable[[Point], Spread | None]) -> tuple[list[Line], list[Level]]:
    """Figures by the number of free parameters.

    Args:
        points: of one sweep; those without the figure are left out.
        value: the figure.

    Returns:
        A line for each series, and a level for each point that has no free parameters, or nothing but them.
    """
    series: dict[str, list[tuple[Point, Spread]]] = {}
    levels = []
    for point in best_rates(points):
        if (figure := value(point)) is None:
            continue
        if 0 < point.free < point.body:
            series.setdefault(point.series, []).append((point, figure))
        else:
            levels.append(Level(point.series, point.method, figure))
    lines = []
    for label, members in series.items():
        members.sort(key=lambda pair: pair[0].free)
        x, y = [point.free for point, _ in members], [figure for _, figure in members]
        lines.append(Line(label, members[0][0].method, x, y))
    return lines, levels


def one_size(lines: Sequence[Line], levels: Sequence[Level]) -> list[Level] | None:
    """All figures, where they are of one number of free parameters; None where there is an axis of sizes to draw."""
    if len({x for line in lines for x in line.x}) > 1:
        return None
    return [Level(line.label, line.method, y) for line in lines for y in line.y] + [*levels]


def speed(section: Section) -> tuple[list[Line], list[Level], bool]:
    """Steps per second by the number of free parameters; whether they are relative to full fine-tuning's."""
    full = section.reference("full")
    unit = full.speed if full else None
    lines, levels = curves(section.done, lambda point: Spread(point.speed / (unit or 1.0)) if point.speed else None)
    return lines, levels, unit is not None


def relative_quality(sections: Iterable[Section]) -> list[Line]:
    """For each section with full fine-tuning and a dynamic subset: its quality relative to full, by epsilon."""
    found = []
    for section in sections:
        full = section.reference("full")
        if full is None or full.quality is None or not full.quality.mean:
            continue
        unit = full.quality.mean
        dynamic = [point for point in section.done if point.method == "dynamic"]
        for line in curves(dynamic, lambda point: point.quality)[0]:
            y = [
                Spread(y.mean / unit, None if y.deviation is None else y.deviation / abs(unit), y.count) for y in line.y
            ]
            label = section.title if line.label == "dynamic" else f"{section.title}: {line.label}"
            body = next(point.body for point in best_rates(dynamic) if point.series == line.label)
            found.append(Line(label, line.method, [x / body for x in line.x], y))
    return found if len({line.label for line in found}) > 1 else []


@dataclass
class _Tried:
    """Learning rates of one series at one budget."""

    series: str
    budget: str
    size: int = 0
    scores: dict[float, float | None] = field(default_factory=dict)
    chosen: float | None = None

    @property
    def best(self) -> float | None:
        """What the sweep chose; where it compared learning rates as points, the best."""
        scores = {rate: score for rate, score in self.scores.items() if score is not None}
        return max(scores, key=lambda rate: scores[rate]) if scores and self.chosen is None else self.chosen


def rate_grids(points: Sequence[Point]) -> list[Grid]:
    """Scores on validation data by budget (rows) and learning rate (columns), a grid for each series.

    Series with one budget share a grid, whose rows they are. What was chosen is framed, what failed is crossed.
    """
    found: dict[tuple[str, str], _Tried] = {}
    for point in points:
        scores = dict(point.trials)
        if not scores and point.rate is not None and (point.validation is not None or not point.seeds):
            scores = {point.rate: point.validation}
        if scores:
            row = found.setdefault((point.series, point.budget), _Tried(point.series, point.budget))
            row.scores |= scores
            row.size = max(row.size, point.free)
            row.chosen = point.chosen if point.trials else None
    if all(len(row.scores) < 2 for row in found.values()):
        return []
    series: dict[str, list[_Tried]] = {}
    for row in found.values():
        series.setdefault(row.series, []).append(row)
    grids = [
        _rate_grid(name, rows, [row.budget for row in rows])
        for name, members in series.items()
        if len(rows := sorted(members, key=lambda row: row.size)) > 1
    ]
    single = [rows[0] for rows in series.values() if len(rows) == 1]
    if single:
        names = [", ".join(filter(None, (row.series, row.budget))) for row in single]
        grids.append(_rate_grid("one size" if grids else "", single, names))
    return grids


def _rate_grid(title: str, rows: Sequence[_Tried], names: Sequence[str]) -> Grid:
    rates = sorted({rate for row in rows for rate in row.scores})
    places = [(i, j) for i in range(len(rows)) for j in range(len(rates))]
    return Grid(
        title,
        names,
        [number_text(rate) for rate in rates],
        [[row.scores.get(rate) for rate in rates] for row in rows],
        framed=frozenset((i, j) for i, j in places if rows[i].best == rates[j]),
        crossed=frozenset((i, j) for i, j in places if rows[i].scores.get(rates[j], 0.0) is None),
    )


def churn_grids(points: Iterable[Point]) -> tuple[list[Grid], list[str]]:
    """What checkpoints of one training have in common, a grid for each point; and points that never changed.

    Where all checkpoints have one size a grid is symmetric, and its upper half is left out.
    """
    grids, still = [], []
    for point in points:
        if len(point.steps) < 2:
            continue
        if all(share == 1 for row in point.churn for share in row):
            still.append(point.label)
            continue
        pairs = itertools.combinations(range(len(point.steps)), 2)
        symmetric = all(abs(point.churn[i][j] - point.churn[j][i]) < 1e-6 for i, j in pairs)
        names = [str(step) for step in point.steps]
        values = [
            [share if j <= i or not symmetric else None for j, share in enumerate(row)]
            for i, row in enumerate(point.churn)
        ]
        grids.append(Grid(point.label, names, names, values))
    return grids, still


def overlap_grids(section: Section) -> list[Grid]:
    """What the subsets of points of one budget have in common; on the diagonal what seeds have in common."""
    by_title = {point.title: point for point in section.points}
    grids = []
    for titles, shared in section.overlaps:
        points = [by_title[name] for name in titles]
        names = _short_names(points)
        values: list[list[float | None]] = [[*row] for row in shared]
        for i, point in enumerate(points):
            values[i][i] = point.between_seeds
        budgets = {point.budget for point in points}
        grids.append(Grid(budgets.pop() if len(budgets) == 1 else "", *square_labels(names), values))
    return grids


def kind_shares(points: Iterable[Point]) -> list[Shares]:
    """The fraction of each subset in each kind of module, for each budget."""
    return _shares(points, lambda entries: {kind: sum(layers.values()) for kind, layers in entries.items()})


def layer_shares(points: Iterable[Point]) -> list[Shares]:
    """The fraction of each subset in each kind of module of each layer, for each budget.

    Parts are named `attention 3`, or `decoder attention 3` where there are several stacks of layers.
    """
    points = [point for point in points if point.entries]
    layers = [layer for point in points for found in (point.entries or {}).values() for layer in found if layer]
    stacks = list(dict.fromkeys(_layer(layer)[0] for layer in layers))
    names = {"": ""} | dict(zip(stacks, _where_they_differ(stacks), strict=True))
    order = {stack: place for place, stack in enumerate(names)}

    def named(entries: dict[str, dict[str, float]]) -> dict[str, float]:
        found: dict[str, float] = {}
        for kind, counts in entries.items():
            by_layer: dict[tuple[str, int], float] = {}
            for name, count in counts.items():
                by_layer[_layer(name)] = by_layer.get(_layer(name), 0) + count
            for stack, number in sorted(by_layer, key=lambda layer: (order[layer[0]], layer[1])):
                words = [names[stack], kind, str(number) if number >= 0 else ""]
                found[" ".join(filter(None, words))] = by_layer[stack, number]
        return found

    return _shares(points, named)


def _layer(name: str) -> tuple[str, int]:
    """The stack that a layer is in, and its number; -1 without one."""
    # Of a long row of digits, as nobody has layers, not all are tried as the beginning of a number.
    found = re.search(r"\.?(\d{1,6})\Z", name)
    return (name[: found.start()], int(found[1])) if found else (name, -1)


def _where_they_differ(names: Sequence[str]) -> list[str]:
    """Of dotted names the first part that tells them all apart, else all of them; nothing of a single one."""
    if len(names) < 2:
        return [""] * len(names)
    columns = itertools.zip_longest(*(name.split(".") for name in names), fillvalue="")
    return list(next((column for column in columns if len(set(column)) == len(names)), names))


def _shares(points: Iterable[Point], parts_of: Callable[..., dict[str, float]]) -> list[Shares]:
    budgets: dict[str, list[tuple[Point, dict[str, float]]]] = {}
    for point in points:
        counts = parts_of(point.entries) if point.entries else {}
        if sum(counts.values()):
            budgets.setdefault(point.budget, []).append((point, counts))
    parts = list(dict.fromkeys(part for members in budgets.values() for _, counts in members for part in counts))
    return [
        Shares(
            budget,
            _short_names([point for point, _ in members]),
            parts,
            [[counts.get(part, 0) / sum(counts.values()) for part in parts] for _, counts in members],
        )
        for budget, members in budgets.items()
    ]


def _short_names(points: Sequence[Point]) -> list[str]:
    """Names of points of one budget: their series, if that tells them apart."""
    names = [point.series for point in points]
    return names if len(set(names)) == len(names) else [point.label for point in points]


def budget_table(points: Iterable[Point]) -> Table | None:
    """Series by budget: `.943 ± .005`, the best of each column strong. None without two budgets and two series."""
    points = best_rates(points)
    sized = [point for point in points if point.budget and 0 < point.free < point.body]
    sizes: dict[str, int] = {}
    for point in sized:
        sizes[point.budget] = min(sizes.get(point.budget, point.free), point.free)
    budgets = sorted(sizes, key=lambda budget: sizes[budget])
    if len(budgets) < 2 or len({point.series for point in sized}) < 2:
        return None
    rows: dict[str, dict[str, Spread]] = {}
    for point in points:
        if point.quality is not None:
            own = point not in sized
            row = f"{point.title} ({point.free:,})" if own else point.series
            rows.setdefault(row, {})["" if own else point.budget] = point.quality
    columns = [*budgets, *([""] if any("" in figures for figures in rows.values()) else [])]
    names = list(rows)
    best = {
        (max((name for name in names if column in rows[name]), key=lambda name: rows[name][column].mean), column)
        for column in budgets
    }
    return Table(
        ["method", *(column or OWN for column in columns)],
        [[name, *(figure_text(rows[name].get(column)) for column in columns)] for name in names],
        frozenset((names.index(name), columns.index(column) + 1) for name, column in best),
    )


def metric_table(points: Sequence[Point]) -> Table:
    """Every figure on every split, and what generalises: the gap, and what the head alone had learnt."""
    found: list[dict[str, Spread]] = []
    for point in points:
        own = {
            f"{split} {key}": figure
            for split, figures in (point.metrics or {}).items()
            for key, figure in figures.items()
        }
        if point.gap is not None:
            own["gap, test − train"] = point.gap
        for split, figures in (point.after_head or {}).items():
            own |= {f"head alone, {split} {key}": figure for key, figure in figures.items()}
        found.append(own)
    names = list(dict.fromkeys(name for own in found for name in own))
    rows = [
        [point.title, *(figure_text(own.get(name)) for name in names)] for point, own in zip(points, found, strict=True)
    ]
    return Table(["", *names], rows)


def figure_text(figure: Spread | None) -> str:
    """A mean and its deviation: `0.943 ± 0.005`, `27.31`."""
    if figure is None:
        return ""
    digits = 3 if abs(figure.mean) <= 1.5 else 2
    deviation = "" if figure.deviation is None else f" ± {figure.deviation:.{digits}f}"
    return f"{figure.mean:.{digits}f}{deviation}"


def seeds_text(points: Iterable[Point]) -> str:
    """How many seeds there were: `3 seeds`, `1 to 3 seeds`."""
    counts = {len(point.seeds) for point in points} - {0}
    if not counts:
        return "no seed"
    if counts == {1}:
        return "1 seed"
    return f"{max(counts)} seeds" if len(counts) == 1 else f"{min(counts)} to {max(counts)} seeds"
