"""The commands that run experiments from recipes, and show what came of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..tables import printable, text_table
from .program import Output, Quiet, app, shows


Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[OPTION=VALUE]...", help="Options that are otherwise than in the file.")
]


@app.command("train", epilog="Example: peft-dst train experiment.yaml training.learning_rate=2e-2 --output run")
def _train(
    config: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The recipe, a YAML file.")],
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", file_okay=False, help="Folder of the run; runs/NAME if not given.")
    ] = None,
    comparison: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Also write the result to this file as PEFT's comparison of methods has it."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Run an experiment from a recipe.

    The folder then holds the adapter, the whole recipe (config.yaml) and what came of it (results.json). A finished run is
    not run again, an interrupted one goes on from its last checkpoint, and a folder of another recipe is refused.
    """
    recipes = _recipes()
    given = recipes.load_recipe(config, overrides or [])
    folder = output or Path("runs") / config.stem
    there = recipes.results(folder) is not None
    recipe = recipes.settled(given)
    if comparison is not None:
        recipes.check_comparable(recipe)
    if recipe != given and not quiet:
        print(f"learning rate {recipe.training.learning_rate:g} by rule; training.learning_rate=NUMBER gives another.")
    record = recipes.train(recipe, folder, progress=shows(quiet))
    if comparison is not None:
        comparison.write_text(json.dumps(recipes.compared(folder), indent=2) + "\n")
    if not quiet:
        print(f"{folder}: {'finished before' if there else 'finished'}; {record['free_parameters']:,} free parameters.")
        _print_metrics(record["metrics"])


@app.command("evaluate", epilog="Example: peft-dst evaluate run --split test")
def _evaluate(
    run: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder that peft-dst train made.")],
    overrides: Overrides = None,
    splits: Annotated[
        list[str] | None, typer.Option("--split", help="train, validation or test; may be given several times.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Measure what a run saved.

    Its adapter is loaded onto a fresh base; the figures are printed, and written to evaluation.json beside it. Options of
    evaluation may be otherwise than in training, and where the model and data are: evaluation.beams=4, task.data=DIR.
    """
    metrics = _recipes().evaluate(run, splits or ["test"], overrides or [], progress=shows(quiet))
    _print_metrics(metrics)


@app.command("sweep", epilog="Example: peft-dst sweep experiment.yaml --output sweep --workers 2")
def _sweep(
    config: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The recipe, with its sweep.")],
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", file_okay=False, help="Folder of the runs; runs/NAME if not given.")
    ] = None,
    workers: Annotated[
        int, typer.Option("--workers", "-w", min=0, help="Runs side by side; 0: none besides this process.")
    ] = 1,
    against: Annotated[
        str | None,
        typer.Option(
            help="The point that the others are tested against, as --list names it; else the best on validation."
        ),
    ] = None,
    listing: Annotated[bool, typer.Option("--list", help="Print the points, and run nothing.")] = False,
    quiet: Quiet = False,
) -> None:
    """Run a recipe for many values of its options, seeds among them.

    Each point of the sweep is run with each seed, every run in a process and a folder of its own. With search.option, that
    option is first chosen for each point, on validation data alone. Whatever stops a sweep, the same command goes on with
    it. The last word is a table: mean and standard deviation over seeds, and p of a paired t-test against one point.
    """
    recipes = _recipes()
    recipe = recipes.load_recipe(config, overrides or [])
    if listing:
        for group in recipes.groups(recipe):
            seeds = len(group.recipes)
            search = f", {group.option} searched from {group.start:g}" if group.option else ""
            if group.option and group.search.at:
                search += f" at {recipes.title(group.search.at)}"
            if group.rule is not None:
                search += f", learning rate {group.rule:g} by rule"
            print(f"{recipes.title(group.point)}: {seeds} seed{'s' * (seeds != 1)}{search}")
        return
    folder = output or Path("runs") / config.stem
    summary = recipes.sweep(recipe, folder, workers=workers, progress=not quiet, against=against)
    if not quiet:
        header, rows = recipes.rows_of(summary)
        print("\n".join(text_table(header, rows)))
    for name, error in summary["failures"].items():
        print(printable(f"error: {folder / 'runs' / name}: {error}"), file=sys.stderr)
    if summary["failures"]:
        raise typer.Exit(1)


@app.command("report", epilog="Example: peft-dst report sweep --output report")
def _report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...", exists=True, help="Folders of sweeps and runs, or their summary.json and results.json."
        ),
    ],
    output: Output,
    quiet: Quiet = False,
) -> None:
    """Write a page with tables and plots of what sweeps and runs found.

    One HTML file that needs nothing else, and each plot as a PNG file beside it. Single runs of one task stand together, as
    if they were a sweep.
    """
    page, *pictures = _recipes().report(paths, output)
    if not quiet:
        print(f"{page}, and {len(pictures)} pictures beside it.")


def _recipes() -> Any:
    """The package that runs recipes, which is only imported when one is run."""
    try:
        from .. import recipes
    except ModuleNotFoundError as error:
        raise ValueError(
            f"recipes need {error.name}, which is not installed: pip install 'peft-dst[recipes]'."
        ) from None
    recipes.only_own_bars()
    return recipes


def _print_metrics(metrics: dict[str, dict[str, float]]) -> None:
    for split, figures in metrics.items():
        print(f"{split}: " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))
