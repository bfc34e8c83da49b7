"""The page: one HTML file with all pictures in it, and the same pictures as PNG files beside it."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from ..summary import rows_of
from . import plots
from .data import Section
from .pictures import Picture, comparison, pictures
from .shapes import OWN, Table, budget_table, metric_table, seeds_text


PAGE = "index.html"
TEMPLATE = "page.html"


def write(sections: Sequence[Section], folder: Path) -> list[Path]:
    """Write the page, and each picture as a PNG file.

    Args:
        sections: what is reported, in this order.
        folder: exists, and is empty.

    Returns:
        The pictures' files.
    """
    written: list[Path] = []

    def drawn(picture: Picture, name: str) -> dict[str, Any]:
        with plots.style():
            figure = picture.draw()
            # Laid out once, not for each format.
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
            file = folder / f"{name}-{picture.name}.png"
            file.write_bytes(plots.png(figure))
            image = base64.b64encode(plots.svg(figure)).decode()
        written.append(file)
        return {
            "id": file.stem,
            "title": picture.title,
            "caption": picture.caption,
            "file": file.name,
            "source": f"data:image/svg+xml;base64,{image}",
            # Pixels of CSS, so that the page does not move while it is opened.
            "size": [round(96 * inches) for inches in figure.get_size_inches()],
        }

    parts = []
    for number, section in enumerate(sections, 1):
        name = f"{number}-{_short(section.title)}"
        grid = budget_table(section.done)
        parts.append(
            {
                "id": name,
                "section": section,
                "seeds": seeds_text(section.points),
                "grid": grid,
                "own": grid is not None and OWN in grid.header,
                "spread": any(point.quality and point.quality.count > 1 for point in section.done),
                "whole": Table(*rows_of(section.summary)) if section.metric else None,
                "metrics": metric_table(section.done) if section.done else None,
                "pictures": [drawn(picture, name) for picture in pictures(section)],
                "failures": section.failures,
                "made": _made(section.summary),
            }
        )
    compared = [
        drawn(picture, f"models-{i + 1}")
        for i, alike in enumerate(_alike(sections))
        if (picture := comparison(alike)) is not None
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(TEMPLATE).render(parts=parts, compared=compared)
    (folder / PAGE).write_text(page, encoding="utf-8")
    return written


def _alike(sections: Sequence[Section]) -> list[list[Section]]:
    """Sections whose figures can stand in one picture: of one task, measured alike."""
    found: dict[tuple[str | None, ...], list[Section]] = {}
    for section in sections:
        if section.done:
            found.setdefault((section.task, section.metric, section.split), []).append(section)
    return [alike for alike in found.values() if len(alike) > 1]


def _short(title: str) -> str:
    """A title for addresses in the page and for files."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:40].strip("-") or "results"


def _made(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """With what the runs were made, each as a line of text."""
    found = []
    for name in ("commit", "versions", "machine"):
        value = summary.get(name)
        several = value if isinstance(value, list) else [value]
        for one in several:
            if isinstance(one, Mapping):
                text = ", ".join(f"{key} {inner}" for key, inner in one.items() if inner is not None)
            else:
                text = one if isinstance(one, str) else "unknown" if one is None else json.dumps(one)
            found.append((name, text))
    return found
