"""Programs run as `python FILE ARGUMENTS` would run them, in a process that need not import everything again."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import sys
from pathlib import Path
from unittest import mock


def run(file: Path, *arguments: object, folder: Path | None = None) -> str:
    """What a program prints. To be called in a process of its own, with `apart`.

    Args:
        file: the program.
        *arguments: its arguments.
        folder: where it runs, if not here.
    """
    os.chdir(folder or ".")
    # Examples would read those data, and not their own.
    os.environ.pop("PEFT_DST_DATA", None)
    output = io.StringIO()
    with (
        mock.patch("sys.argv", [str(file), *map(str, arguments)]),
        mock.patch("sys.path", [str(file.parent), *sys.path]),
        contextlib.redirect_stdout(output),
    ):
        runpy.run_path(str(file), run_name="__main__")
    return output.getvalue()
