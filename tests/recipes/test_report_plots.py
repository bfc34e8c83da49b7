"""Reports: the pictures."""

from __future__ import annotations

from peft_dst.recipes.report import plots, shapes
from peft_dst.recipes.report.data import Spread


def test_a_method_keeps_its_colour():
    def line(label, method):
        return shapes.Line(label, method, [1, 10], [Spread(0.5), Spread(0.6)])

    def colours(*lines):
        return [look["color"] for look in plots._looks(lines)]

    dynamic, random = line("dynamic", "dynamic"), line("random", "random")
    assert (
        colours(dynamic, random)
        == colours(random, dynamic)[::-1]
        == [plots.STYLES[m][0] for m in ("dynamic", "random")]
    )
    assert len(set(plots.STYLES.values())) == len(plots.STYLES)
    # Many variants of one method are told apart by colours instead.
    variants = [line(f"dynamic, siloing={i}", "dynamic") for i in range(3)]
    assert len(set(colours(*variants, random))) == 4
    assert len(set(colours(*variants[:2], random))) == 2


def test_names_are_drawn_as_they_are():
    """Neither mathematics, nor hidden from the legend, nor complained of."""
    names = [r"$\frac{$", "a$b", "_hidden", "名", "x" * 100]
    with plots.style():
        series = [shapes.Line(name, name, [1, 10], [Spread(0.5), Spread(0.6, 0.1, 2)]) for name in names]
        figure = plots.lines(series, [shapes.Level(names[0], "full", Spread(0.4, 0.1, 3))], names[0], body=100)
        plots.svg(figure)
        grid = shapes.Grid(
            names[0], names[:2], names[2:4], [[0.1, None], [float("nan"), 0.2]], crossed=frozenset({(0, 1)})
        )
        plots.svg(plots.grids([grid], names[0], names[1], names[2]))
    (legend,) = figure.legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert r"\$\frac{\$" in shown
    assert " _hidden" in shown
    assert len(shown) == len(names) + 1
    assert max(map(len, shown)) == plots.LONGEST
