"""Pictures of what shapes.py found.

A method has one colour in all of them, unless a sweep compares variants of a method, which then have each their own. The
colours are from schemes for the colour-blind, and markers differ as well.
"""

from __future__ import annotations

import io
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator

from .shapes import Grid, Level, Line, Shares


# Of Okabe and Ito, and of Paul Tol's muted scheme. Those that are related share a colour or a marker's form.
STYLES = {
    "dynamic": ("#D55E00", "o"),
    "first_step": ("#E69F00", "s"),
    "random": ("#888888", "X"),
    "bitfit": ("#44AA99", "*"),
    "magnitude": ("#CC79A7", "P"),
    "fisher": ("#0072B2", "^"),
    "fisher_pretraining": ("#56B4E9", "v"),
    "combined": ("#009E73", "D"),
    "diff_pruning": ("#882255", "<"),
    "pruning": ("#AA4466", ">"),
    "transfer": ("#661100", "d"),
    "lora": ("#332288", "p"),
    "prompt_tuning": ("#999933", "h"),
    "head_only": ("#777777", "_"),
    "full": ("#000000", "_"),
    "l1": ("#117733", "1"),
    "l2": ("#88CCEE", "2"),
}
SCALE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999933", "#332288", "#888888", "#882255")
DASHES = ("-", "--", ":", "-.")
MARKERS = "os^vDPXp*h"
HEAT = "viridis"
# Width and height of a cell of a heat map, inches.
CELL = (0.36, 0.27)
OPTIONS = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "svg.hashsalt": "peft-dst",
    "savefig.dpi": 200,
}
# Of maps with more columns the numbers are not written.
FITTING = 20
# So many variants of a method share its colour.
VARIANTS = 2
# Longer names are cut.
LONGEST = 48


@contextmanager
def style() -> Iterator[None]:
    """Inside it plots look alike, and do not complain of letters that the font lacks."""
    with mpl.rc_context(OPTIONS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def svg(figure: Figure) -> bytes:
    """The same bytes for the same results."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def lines(
    series: Sequence[Line],
    levels: Sequence[Level],
    ylabel: str,
    *,
    xlabel: str = "free parameters",
    body: int | None = None,
    log: bool = False,
) -> Figure:
    """Lines over a logarithmic axis with error bars of one standard deviation, and levels across it.

    Args:
        series: the lines.
        levels: what is drawn across, with a band of one standard deviation.
        ylabel: what the figures are.
        xlabel: what x is.
        body: what all free parameters would be, for a second axis in fractions of it.
        log: the figures' axis is logarithmic, too.
    """
    labels = [line.label for line in series] + [level.label for level in levels]
    longest = max(len(_plain(label)) for label in labels)
    figure = Figure(figsize=(5.8 + 0.075 * longest, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log")
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            set_formatter(lambda y, _: f"{y:g}")
    keys = []
    for line, look in zip(series, _looks(series), strict=True):
        means = [y.mean for y in line.y]
        zorder = 4 if line.method == "dynamic" else 3
        axes.plot(line.x, means, zorder=zorder, **look)
        deviations = [y.deviation or math.nan for y in line.y]
        if not all(math.isnan(deviation) for deviation in deviations):
            axes.errorbar(
                line.x, means, deviations, fmt="none", ecolor=look["color"], elinewidth=0.8, capsize=1.8, zorder=2
            )
        keys.append((means[-1], Line2D([], [], **look), line.label))
    for i, level in enumerate(levels):
        colour, _ = _style(level.method)
        look = {"color": colour, "linestyle": "-" if level.method == "full" else DASHES[1 + i % 3], "linewidth": 1.0}
        axes.axhline(level.y.mean, zorder=1, **look)
        if level.y.deviation:
            low, high = level.y.mean - level.y.deviation, level.y.mean + level.y.deviation
            axes.axhspan(low, high, color=colour, alpha=0.1, linewidth=0, zorder=0)
        keys.append((level.y.mean, Line2D([], [], **look), level.label))
    # In the order of the lines' right ends, which is how the eye looks for them.
    keys.sort(key=lambda key: -key[0])
    figure.legend([key for _, key, _ in keys], [_plain(label) for *_, label in keys], loc="outside right upper")
    axes.set_xlabel(_plain(xlabel))
    axes.set_ylabel(_plain(ylabel))
    axes.grid(axis="y", which="both", linewidth=0.4, alpha=0.5)
    if body:
        size: Any = float(body)
        top: Any = axes.secondary_xaxis("top", functions=(lambda x: x / size, lambda x: x * size))
        top.set_xlabel("fraction of the model")
        top.spines["top"].set_visible(True)
    return figure


def dots(found: Sequence[Level], xlabel: str) -> Figure:
    """A figure for each of several things, the best on top, with bars of one standard deviation."""
    found = sorted(found, key=lambda level: level.y.mean)
    longest = max(len(_plain(level.label)) for level in found)
    figure = Figure(figsize=(4.6 + 0.075 * longest, 0.8 + 0.22 * len(found)), layout="constrained")
    axes = figure.add_subplot()
    for place, level in enumerate(found):
        colour, marker = _style(level.method)
        look: dict[str, Any] = {"color": colour, "marker": "|" if marker == "_" else marker, "elinewidth": 1.0}
        axes.errorbar(level.y.mean, place, xerr=level.y.deviation, capsize=2, markersize=6, linestyle="none", **look)
    axes.set_yticks(range(len(found)), [_plain(level.label) for level in found])
    axes.set_ylim(-0.6, len(found) - 0.4)
    axes.set_xlabel(_plain(xlabel))
    axes.grid(axis="x", linewidth=0.4, alpha=0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return figure


def grids(
    found: Sequence[Grid],
    xlabel: str,
    ylabel: str,
    unit: str,
    *,
    percent: bool = False,
    low: float | None = None,
    high: float | None = None,
) -> Figure:
    """Heat maps side by side, with one scale of colours.

    Args:
        found: what is drawn.
        xlabel: what columns are.
        ylabel: what rows are.
        unit: what the numbers are.
        percent: they are fractions, which are written as percentages.
        low: where the scale of colours begins; the smallest number if not given.
        high: where it ends; the largest number if not given.
    """
    every = [
        value for grid in found for row in grid.values for value in row if value is not None and math.isfinite(value)
    ]
    low = min(every, default=0.0) if low is None else low
    high = max(max(every, default=1.0) if high is None else high, low + 1e-9)
    rows, columns = max(len(grid.rows) for grid in found), max(len(grid.columns) for grid in found)
    longest = max(len(_plain(name)) for grid in found for name in grid.rows)
    highest = max(len(_plain(name)) for grid in found for name in grid.columns)
    slanted = highest > 4
    wide = CELL[0] * columns + 0.065 * longest + 0.4
    tall = CELL[1] * rows + 0.5 + (0.045 * highest if slanted else 0.1)
    across = min(len(found), max(1, int(10 / wide)))
    down = math.ceil(len(found) / across)
    figure = Figure(figsize=(max(3.6, across * wide + 1.0), down * tall + 0.4), layout="constrained")
    image = None
    for i, grid in enumerate(found):
        axes = figure.add_subplot(down, across, i + 1)
        numbers = np.array([[math.nan if value is None else value for value in row] for row in grid.values])
        places = np.arange(len(grid.columns) + 1) - 0.5, np.arange(len(grid.rows) + 1) - 0.5
        image = axes.pcolormesh(
            *places, np.ma.masked_invalid(numbers), cmap=HEAT, vmin=low, vmax=high, edgecolors="white", linewidth=0.5
        )
        axes.set_aspect(CELL[1] / CELL[0], anchor="NW")
        # Cells of all maps are of one size.
        axes.set_xlim(-0.5, columns - 0.5)
        axes.set_ylim(len(grid.rows) - 0.5, -0.5)
        axes.set_xticks(range(len(grid.columns)), [_plain(name) for name in grid.columns])
        if slanted:
            axes.tick_params(axis="x", rotation=40)
            for label in axes.get_xticklabels():
                label.set_horizontalalignment("right")
                label.set_rotation_mode("anchor")
        axes.set_yticks(range(len(grid.rows)), [_plain(name) for name in grid.rows])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(_plain(grid.title), loc="left")
        _write_numbers(axes, grid, low, high, percent)
    figure.supxlabel(_plain(xlabel), fontsize=8)
    figure.supylabel(_plain(ylabel), fontsize=8)
    assert image is not None
    bar: Any = figure.colorbar(image, ax=figure.axes, shrink=0.8, aspect=25, pad=0.02, panchor=False)
    bar.outline.set_visible(False)
    if percent:
        bar.ax.yaxis.set_major_formatter(lambda x, _: f"{100 * x:.0f} %")
    bar.set_label(_plain(unit))
    return figure


def _write_numbers(axes: Axes, grid: Grid, low: float, high: float, percent: bool) -> None:
    # Numbers lie within their cells, which the layout need not find out.
    look: dict[str, Any] = {"ha": "center", "va": "center", "in_layout": False}
    for i, row in enumerate(grid.values):
        for j, value in enumerate(row):
            if (i, j) in grid.crossed:
                axes.text(j, i, "×", color="#AA0000", fontsize=9, **look)
            if value is None or not math.isfinite(value):
                continue
            if len(grid.columns) <= FITTING:
                plain = f"{value:.3f}".removeprefix("0") if abs(value) < 10 else f"{value:.1f}"
                colour = "black" if (value - low) / (high - low) > 0.6 else "white"
                axes.text(j, i, f"{100 * value:.0f}" if percent else plain, color=colour, fontsize=6, **look)
            if (i, j) in grid.framed:
                axes.add_patch(Rectangle((j - 0.46, i - 0.46), 0.92, 0.92, fill=False, color="#D55E00", linewidth=1.6))


def bars(found: Sequence[Shares]) -> Figure:
    """For each subset a bar, made of the fractions of it in each part."""
    parts = found[0].parts
    rows = sum(len(shares.rows) for shares in found)
    figure = Figure(figsize=(7.2, 0.19 * rows + 0.32 * len(found) + 0.9), layout="constrained")
    heights = [len(shares.rows) + 0.6 for shares in found]
    every: Any = figure.subplots(len(found), 1, sharex=True, squeeze=False, height_ratios=heights)
    for axes, shares in zip(every[:, 0], found, strict=True):
        left = [0.0] * len(shares.rows)
        places = range(len(shares.rows))
        for k in range(len(parts)):
            widths = [values[k] for values in shares.values]
            colour, hatch = SCALE[k % len(SCALE)], ("", "///", "...")[k // len(SCALE) % 3]
            axes.barh(
                places, widths, left=left, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5, height=0.8
            )
            for place, start, width in zip(places, left, widths, strict=True):
                if width >= 0.05:
                    dark = k % len(SCALE) in (0, 7, 9)
                    axes.text(
                        start + width / 2, place, f"{100 * width:.0f}", ha="center", va="center", fontsize=6,
                        color="white" if dark else "black",
                    )  # fmt: skip
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.set_yticks(places, [_plain(name) for name in shares.rows])
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.tick_params(length=0)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.set_title(_plain(shares.title), loc="left")
    every[-1, 0].xaxis.set_major_formatter(lambda x, _: f"{100 * x:.0f} %")
    every[-1, 0].set_xlabel("share of the subset")
    keys = [
        Patch(facecolor=SCALE[k % len(SCALE)], hatch=("", "///", "...")[k // len(SCALE) % 3], edgecolor="white")
        for k in range(len(parts))
    ]
    figure.legend(keys, [_plain(part) for part in parts], loc="outside right upper")
    return figure


def _looks(series: Sequence[Line]) -> list[dict[str, Any]]:
    """How each line is drawn."""
    most = max(Counter(line.method for line in series).values(), default=0)
    compared = most > VARIANTS or 1 < most == len(series)
    variants: Counter[str] = Counter()
    looks = []
    for i, line in enumerate(series):
        variant = variants[line.method]
        variants[line.method] += 1
        colour, marker = _style(line.method)
        if compared:
            colour, marker, variant = SCALE[i % len(SCALE)], MARKERS[i % len(MARKERS)], i // len(SCALE)
        elif variant:
            marker = MARKERS[variant % len(MARKERS)]
        looks.append(
            {
                "color": colour,
                "marker": marker,
                "linestyle": DASHES[variant % len(DASHES)],
                "markersize": 7 if marker == "*" else 4.5,
                "markeredgecolor": "white",
                "markeredgewidth": 0.0 if marker in "*XP" else 0.4,
            }
        )
    return looks


def _style(method: str) -> tuple[str, str]:
    return STYLES.get(method, ("#444444", "o"))


def _plain(text: str) -> str:
    """Text that Matplotlib shows as it stands: no mathematics, and no underscore that would hide it from a legend."""
    text = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
