"""A page and pictures of what sweeps and runs found.

* `forms`    what files must hold
* `data`     summaries and runs, read and checked
* `shapes`   lines, grids, shares and tables as plain numbers
* `plots`    how they are drawn
* `pictures` which of them the results allow, with their captions
* `page`     the page
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ...delta import check_free, new_folder
from .data import load


__all__ = ["report"]


def report(paths: Iterable[str | Path], output: str | Path) -> list[Path]:
    """Write a page of results, `index.html`, which needs nothing else, and its pictures as PNG files beside it.

    Args:
        paths: folders of sweeps (or their summary.json), and of single runs (or their results.json).
        output: folder to make; must not be there yet.

    Returns:
        The files, the page first.

    Raises:
        ValueError: for a path that is neither, a file that is not as it should be (with what is wrong in it), an output
            that exists, or if matplotlib is not installed.
    """
    output = Path(output)
    check_free(output)
    sections = load(Path(path) for path in paths)
    try:
        from .page import PAGE, write
    except ModuleNotFoundError as error:
        name = str(error.name).partition(".")[0]
        raise ValueError(f"a report needs {name}, which is not installed: pip install 'peft-dst[plots]'.") from None
    with new_folder(output) as folder:
        pictures = write(sections, folder)
    return [output / PAGE, *(output / picture.name for picture in pictures)]
