"""Plain-text tables for what people print: silos, overlaps, extractions."""

from __future__ import annotations

from collections.abc import Sequence


# Columns of longer names are numbered.
LONGEST = 24


def printable(text: object) -> str:
    """Text from a file, without what would command a terminal: control characters are written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in str(text))


def square_labels(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names for the rows and the columns of a square table: columns of long names are numbers, which rows begin with."""
    if max(map(len, names), default=0) <= LONGEST:
        return [*names], [*names]
    columns = [f"({i})" for i in range(1, len(names) + 1)]
    return [f"{column} {name}" for column, name in zip(columns, names, strict=True)], columns


def text_table(header: Sequence[str], *groups: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right, a rule before each group of rows."""
    groups = tuple([[printable(cell) for cell in row] for row in group] for group in groups)
    rows = [header, *(row for group in groups for row in group)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, strict=True)
        return "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(cells))

    rule = "  ".join("-" * width for width in widths)
    lines = [line(header)]
    for group in groups:
        lines += [rule, *(line(row) for row in group)]
    return lines
