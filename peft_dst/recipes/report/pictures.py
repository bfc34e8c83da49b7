"""Which pictures the results of a sweep allow, each with what it shows and from which figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from . import plots, shapes
from .data import Point, Section, Spread


@dataclass(frozen=True)
class Picture:
    """One picture.

    Attributes:
        name: for its file, unique in its section.
        title: what it shows, in a few words.
        caption: what is drawn, from which figures, of how many seeds.
        draw: makes it, within `plots.style`.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[], Figure]


def pictures(section: Section) -> Iterator[Picture]:
    """The pictures of one section, those it has figures for."""
    if not section.done:
        return
    for picture in (_quality, _rates, _churn, _overlap, _kinds, _layers, _switching, _speed):
        if (found := picture(section)) is not None:
            yield found


def comparison(sections: Sequence[Section]) -> Picture | None:
    """Dynamic subsets of several sections, whose figures are the same, beside one another (first paper, Figure 2)."""
    found = shapes.relative_quality(sections)
    if not found:
        return None
    points = [point for section in sections for point in section.done]
    return Picture(
        "relative",
        "Quality of several models relative to full fine-tuning",
        f"Mean {sections[0].measured} of dynamic subsets divided by that of full fine-tuning of the same sweep (of several "
        f"the best on validation data), by the fraction of the model that is free. {_seeds(points)} As Figure 2 of the "
        "first paper.",
        lambda: plots.lines(
            found,
            [shapes.Level("full fine-tuning", "full", Spread(1.0))],
            f"{sections[0].measured}, relative to full",
            xlabel="ε, fraction of the model",
        ),
    )


def _quality(section: Section) -> Picture | None:
    lines, levels = shapes.curves(section.done, lambda point: point.quality)
    notes = f"{_seeds(section.done)}{_rates_note(section)}"
    if (found := shapes.one_size(lines, levels)) is not None:
        if len(found) < 2:
            return None
        return Picture(
            "quality",
            "Quality of each method",
            f"Mean {section.measured}. {notes} As Table 1 of the second paper.",
            lambda: plots.dots(found, section.measured),
        )
    bodies = {point.body for point in section.done}
    return Picture(
        "quality",
        "Quality by the number of free parameters",
        f"Mean {section.measured} by the number of free parameters, the head aside.{_across(levels)} {notes} As Figures 1 "
        "and 6 of the first paper.",
        lambda: plots.lines(lines, levels, section.measured, body=bodies.pop() if len(bodies) == 1 else None),
    )


def _rates(section: Section) -> Picture | None:
    grids = shapes.rate_grids(section.points)
    if not grids:
        return None
    failed = " × failed." if any(grid.crossed for grid in grids) else ""
    return Picture(
        "learning-rate",
        "Learning rate and size of the subset",
        f"Validation {section.metric} by learning rate (columns) and budget or method (rows); searches run with "
        f"one seed. Framed: the value that was chosen, or is best.{failed} As Figure 9 of the first paper.",
        lambda: plots.grids(grids, "learning rate", "", f"validation {section.metric}"),
    )


def _churn(section: Section) -> Picture | None:
    grids, still = shapes.churn_grids(section.done)
    if not grids:
        return None
    grids, more = grids[:12], len(grids) - 12
    notes = f" Not shown: {more} more points." if more > 0 else ""
    if still:
        notes += f" Without any change: {'; '.join(still[:8])}{', …' if len(still) > 8 else ''}."
    return Picture(
        "churn",
        "Churn: how the subset moves while it is trained",
        "Percentage of the subset after one step (row) that was also in the subset after another (column), of the first "
        f"seed of each point.{notes} As Figure 7 of the first paper.",
        lambda: plots.grids(grids, "step", "step", "shared", percent=True, low=0, high=1),
    )


def _overlap(section: Section) -> Picture | None:
    grids = shapes.overlap_grids(section)
    if not grids:
        return None
    return Picture(
        "overlap",
        "What subsets have in common",
        f"Percentage of the finished subset of one point (row) that is also in another's (column), {_whose(section)}; on "
        "the diagonal between seeds of one point, in the mean over their pairs (blank for one seed). Two subsets chosen "
        "at random would share about the fraction ε. As Figure 8 of the first paper.",
        lambda: plots.grids(grids, "", "", "shared", percent=True, low=0),
    )


def _whose(section: Section) -> str:
    return "of the first seed" if section.one_seed else "in the mean over seeds"


def _kinds(section: Section) -> Picture | None:
    found = shapes.kind_shares(section.done)
    if not found or len(found[0].parts) < 2:
        return None
    return Picture(
        "modules",
        "Where the free parameters are, by kind of module",
        f"Percentage of each finished subset that lies in each kind of module, {_whose(section)}. Where each module and "
        "layer is a silo, the share is that of its size. As Figure 4 of the first paper.",
        lambda: plots.bars(found),
    )


def _layers(section: Section) -> Picture | None:
    found = shapes.layer_shares(section.done)
    if not found or len(found[0].parts) < 3:
        return None
    grids = [shapes.Grid(shares.title, shares.rows, shares.parts, shares.values) for shares in found]
    return Picture(
        "layers",
        "Where the free parameters are, by layer",
        f"Percentage of each finished subset that lies in each kind of module of each layer, {_whose(section)}.",
        lambda: plots.grids(grids, "", "", "share of the subset", percent=True, low=0),
    )


def _switching(section: Section) -> Picture | None:
    lines, _ = shapes.curves(section.done, lambda p: Spread(1000 * p.switching) if p.switching else None)
    if not any(len(line.x) > 1 for line in lines):
        return None
    return Picture(
        "switching",
        "Time to swap a subset",
        "Milliseconds to put a subset's values into the weights of the model in memory, the median of repeated "
        "measurements, in the mean over seeds, by its size. Runs that shared the machine disturb one another. Beside "
        "Figure 3 of the first paper, which shows the same relative to decoding.",
        lambda: plots.lines(lines, [], "milliseconds", log=True),
    )


def _speed(section: Section) -> Picture | None:
    lines, levels, relative = shapes.speed(section)
    found = shapes.one_size(lines, levels)
    if found is not None and len(found) < 2:
        return None
    relatively = ", relative to full fine-tuning of the same sweep" if relative else ""
    label = "steps per second" + (", full = 1" if relative else "")
    return Picture(
        "speed",
        "Training steps per second",
        f"Steps of training per second{relatively}: steps divided by the mean time of the runs, without preparation and "
        "evaluation. Runs that shared the machine disturb one another. As Figure 5 of the first paper.",
        lambda: plots.dots(found, label) if found is not None else plots.lines(lines, levels, label),
    )


def _across(levels: Sequence[shapes.Level]) -> str:
    names = ", ".join(level.label for level in levels)
    return f" Lines across: {names}, with no or all parameters free." if levels else ""


def _seeds(points: Sequence[Point]) -> str:
    seeds = shapes.seeds_text(points)
    many = any(point.quality and point.quality.deviation is not None for point in points)
    return f"{seeds} each; bars and bands are one standard deviation." if many else f"{seeds} each."


def _rates_note(section: Section) -> str:
    if any(point.rate is not None and point.validation is not None for point in section.done):
        return " Of several learning rates the one that is best on validation data."
    if any(point.trials for point in section.points):
        return " Learning rates were chosen on validation data."
    return ""
