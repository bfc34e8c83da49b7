"""The command line: what is typed, what is printed, and the exit code. The work is done by the modules that it calls.

Exit codes: 0 all is well; 1 refused, or not as it should be; 2 wrong usage.

* `program`     its name, its help, and what the commands have in common
* `deltas`      inspect, diff, merge, overlap, pack, unpack, verify, convert, export
* `experiments` train, evaluate, sweep, report
* `serve`       deltas over HTTP
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..tables import printable

# The help lists commands in the order of these imports.
from . import deltas, experiments, serve  # noqa: F401
from .program import app


__all__ = ["app", "main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, and exit.

    Args:
        arguments: what is typed after the program's name; that of this process if not given.
    """
    try:
        app(None if arguments is None else list(arguments))
    except (ValueError, OSError, FloatingPointError, NotImplementedError) as error:
        # What is refused, or diverged, is said in one sentence; anything else is a defect, and shows where.
        print(f"error: {printable(error)}", file=sys.stderr)
        sys.exit(1)
