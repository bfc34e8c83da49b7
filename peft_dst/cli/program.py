"""The program: its name, its help, and what its commands have in common."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


app = typer.Typer(
    name="peft-dst",
    help="Work with deltas: the adapters of peft-dst, which hold new values for a small part of a model's own weights.\n\n"
    "BASE and TUNED are folders of checkpoints in safetensors, as save_pretrained writes them; DELTA is the folder of an "
    "adapter, or its adapter_model.safetensors.\n\n"
    "Exit codes: 0 all is well, 1 refused or not as it should be, 2 wrong usage.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Output = Annotated[Path, typer.Option("--output", "-o", help="What to write; must not be there yet.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, and nothing but errors.")]


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        print(installed("peft-dst"))
        raise typer.Exit


def shows(quiet: bool) -> bool:
    """Whether there are bars: on a terminal, unless they are unwanted."""
    return not quiet and sys.stderr.isatty()
