"""The command line: what is typed, what is printed, and the exit code. The work is done by the modules that it calls.

Exit codes: 0 all is well; 1 refused, or not as it should be; 2 wrong usage.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from .analysis import inspect, overlap
from .config import DSTConfig
from .conversion import convert_adapter, convert_checkpoint, is_delta
from .core.distances import Distance
from .core.silos import Siloing
from .delta import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    Checkpoint,
    Layout,
    SparseDelta,
    check_free,
    copy_others,
    export_patches,
    merge,
    new_folder,
    place,
)
from .extraction import Extraction, extract, layout_of
from .tables import printable, text_table


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

Folder = Annotated[Path, typer.Argument(exists=True, file_okay=False)]
Delta = Annotated[Path, typer.Argument(exists=True, help="Folder of an adapter, or its safetensors file.")]
Base = Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of the base's checkpoint.")]
BaseOption = Annotated[
    Path, typer.Option("--base", exists=True, file_okay=False, help="Folder of the base's checkpoint.")
]
Output = Annotated[Path, typer.Option("--output", "-o", help="What to write; must not be there yet.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, and nothing but errors.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Epsilon = Annotated[
    float | None, typer.Option("--epsilon", "-e", help="Fraction of the components that may differ, e.g. 0.001.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[OPTION=VALUE]...", help="Options that are otherwise than in the file.")
]
Number = Annotated[int | None, typer.Option("--num-free-parameters", "-n", help="The same as a number of components.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, and exit.

    Args:
        arguments: what is typed after the program's name; that of this process if not given.
    """
    try:
        app(None if arguments is None else list(arguments))
    except (ValueError, OSError) as error:
        # What is refused is said in one sentence; anything else is a defect, and shows where.
        print(f"error: {printable(error)}", file=sys.stderr)
        sys.exit(1)


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        print(installed("peft-dst"))
        raise typer.Exit


@app.command("inspect", epilog="Example: peft-dst inspect my-adapter --plot kinds.png")
def _inspect(
    delta: Delta,
    as_json: AsJson = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the share of each kind of module into this picture.")] = None,
) -> None:
    """Show what a delta holds.

    Entries, values and bytes, by kind of module and by tensor.
    """
    found = inspect(SparseDelta.load(delta))
    if plot is not None:
        found.plot(plot)
    print(_json(found.to_json()) if as_json else found)


@app.command("diff", epilog="Example: peft-dst diff base tuned -o extracted --epsilon 0.01")
def _diff(
    base: Base,
    tuned: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of the fine-tuned checkpoint.")],
    output: Output,
    epsilon: Epsilon = None,
    number: Number = None,
    siloing: Annotated[Siloing, typer.Option(help="Within what the budget is shared.")] = "module_and_layer",
    distance: Annotated[Distance, typer.Option(help="What ranks a component.")] = "inverse_relative",
    target_modules: Annotated[
        list[str] | None, typer.Option("--target-module", help="Only this module; may be given several times.")
    ] = None,
    exclude_modules: Annotated[
        list[str] | None, typer.Option("--exclude-module", help="Not this module; may be given several times.")
    ] = None,
    modules_to_save: Annotated[
        list[str] | None,
        typer.Option("--module-to-save", help="Keep this module whole, as a fresh head; may be given several times."),
    ] = None,
    task_type: Annotated[str | None, typer.Option(help="PEFT's name of the task, e.g. SEQ_CLS or CAUSAL_LM.")] = None,
    quiet: Quiet = False,
) -> None:
    """Make a delta of a fully fine-tuned checkpoint.

    Each silo's largest changes stay, all else goes back to the base.
    """
    check_free(output)
    config = DSTConfig(
        epsilon=epsilon,
        num_free_parameters=number,
        siloing=siloing,
        distance=distance,
        target_modules=target_modules or None,
        exclude_modules=exclude_modules or None,
        modules_to_save=modules_to_save or None,
        task_type=task_type,
    )
    _report(extract(base, tuned, output, config, progress=_shows(quiet)), quiet)


@app.command("merge", epilog="Example: peft-dst merge base my-adapter -o merged")
@app.command("apply", epilog="Example: peft-dst apply base my-adapter -o applied")
def _merge(base: Base, delta: Delta, output: Output, quiet: Quiet = False) -> None:
    """Write the full checkpoint of a base and a delta.

    `merge` and `apply` are the same. It streams from file to file, so a checkpoint of any size takes little memory.
    Everything is checked before anything is written, and the folder appears when it is whole.
    """
    _merge_into(base, SparseDelta.load(delta), output, quiet)


@app.command("overlap", epilog="Example: peft-dst overlap my-adapter another-adapter")
def _overlap(a: Delta, b: Delta) -> None:
    """Compare the subsets of two deltas of one base.

    How much they have in common stands beside what chance would give.
    """
    print(overlap(a, b))


@app.command("pack", epilog="Example: peft-dst pack my-adapter")
def _pack(
    delta: Delta, output: Annotated[Path | None, typer.Argument(help="Where to; in place if not given.")] = None
) -> None:
    """Code a delta's positions in few bytes. PEFT opens such a file; transformers' own loader does not."""
    _rewrite(delta, output, packed=True)


@app.command("unpack", epilog="Example: peft-dst unpack my-adapter plain")
def _unpack(
    delta: Delta, output: Annotated[Path | None, typer.Argument(help="Where to; in place if not given.")] = None
) -> None:
    """Write a packed delta plainly."""
    _rewrite(delta, output, packed=False)


@app.command("verify", epilog="Example: peft-dst verify my-adapter --base base")
def _verify(
    delta: Delta,
    base: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Also check that this is the delta's base.")
    ] = None,
) -> None:
    """Check a delta, alone or against its base.

    Its file is whole and holds what it says; with --base: its base has the values that it was made from.
    """
    found = SparseDelta.load(delta)
    if base is not None:
        unknown = place(found, Checkpoint(base), _layout(base)).not_compared
        if unknown:
            raise ValueError(
                f"whether {base} is the base of {delta} cannot be told: the values of {unknown[0]!r} ({len(unknown)} such "
                "tensors) have checksums in none of the dtypes that those of the base can be rounded to."
            )
    against = "" if base is None else f", and belongs to {base}"
    print(f"{delta} is good: {found.num_entries:,} entries in {len(found)} tensors, {len(found.dense)} dense{against}.")


@app.command("convert", epilog="Example: peft-dst convert my-lora --base base -o from-lora --epsilon 0.1")
def _convert(
    source: Annotated[
        Path,
        typer.Argument(
            exists=True, file_okay=False, help="Adapter of PEFT (LoRA, SHiRA, Super-Tuning, …), checkpoint, or delta."
        ),
    ],
    base: BaseOption,
    output: Output,
    epsilon: Epsilon = None,
    number: Number = None,
    siloing: Annotated[Siloing, typer.Option(help="Within what the budget is shared.")] = "none",
    distance: Annotated[Distance, typer.Option(help="What ranks a component.")] = "absolute",
    quiet: Quiet = False,
) -> None:
    """Turn other adapters and checkpoints into deltas.

    And a delta into a dense checkpoint, as merge does.

    SHiRA and Super-Tuning adapters, and checkpoints, come over exactly. Of a LoRA adapter the nearest delta with the given
    budget is made, and what was cut off is stated as a share of the change (relative Frobenius norm), by module.
    """
    if (source / CONFIG_NAME).is_file():
        if is_delta(source):
            _merge_into(base, SparseDelta.load(source), output, quiet)
            return
        made = convert_adapter(
            source,
            base,
            output,
            epsilon=epsilon,
            num_free_parameters=number,
            siloing=siloing,
            distance=distance,
            progress=_shows(quiet),
        )
        _report(made, quiet)
        if not quiet:
            print("\nrelative error (Frobenius norm of what was cut off, of the change):")
            for figures in [*made.parameters, made.total]:
                print(f"  {figures.name}: {figures.error:.4f}")
    else:
        delta = convert_checkpoint(source, base, output)
        if not quiet:
            print(f"{output}: {delta.num_entries:,} entries in {len(delta)} tensors, the whole difference.")


@app.command("export", epilog="Example: peft-dst export my-adapter --base base --form vllm -o patch.safetensors")
def _export(
    delta: Delta,
    base: BaseOption,
    output: Output,
    form: Annotated[str, typer.Option(help="For which engine; only vllm.")] = "vllm",
) -> None:
    """Write sparse patches for an inference engine.

    They are in the coordinates of the base's checkpoint: vLLM's checkpoint patches (name, shape, dtype, flat int32 indices,
    values) in one safetensors file. Where the engine takes no patches, merge.
    """
    if form != "vllm":
        raise typer.BadParameter(f"{form!r} is not known; only vllm is.", param_hint="--form")
    count = export_patches(base, SparseDelta.load(delta), output, layout=_layout(base))
    print(f"{output}: {count} patches.")


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
    recipe = recipes.load_recipe(config, overrides or [])
    folder = output or Path("runs") / config.stem
    there = recipes.results(folder) is not None
    if recipe.training.learning_rate == recipes.AUTO:
        recipe = recipes.settled(recipe)
        if not quiet:
            print(
                f"learning rate {recipe.training.learning_rate:g} by rule; training.learning_rate=NUMBER gives another."
            )
    record = recipes.train(recipe, folder, progress=_shows(quiet))
    if comparison is not None:
        comparison.write_text(json.dumps(recipes.compared(folder), indent=2) + "\n")
    if not quiet:
        print(f"{folder}: {'finished before' if there else 'finished'}; {record['free_parameters']:,} free parameters.")
        _print_metrics(record["metrics"])


@app.command("evaluate", epilog="Example: peft-dst evaluate run --split test")
def _evaluate(
    run: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder that peft-dst train made.")],
    splits: Annotated[
        list[str] | None, typer.Option("--split", help="train, validation or test; may be given several times.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Measure what a run saved.

    Its adapter is loaded onto a fresh base; the figures are printed, and written to evaluation.json beside it.
    """
    metrics = _recipes().evaluate(run, splits or ["test"], progress=_shows(quiet))
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
            print(f"{recipes.title(group.point)}: {len(group.recipes)} seeds")
        return
    folder = output or Path("runs") / config.stem
    summary = recipes.sweep(recipe, folder, workers=workers, progress=not quiet, against=against)
    if not quiet:
        header, rows = recipes.rows_of(summary)
        print("\n".join(text_table(header, rows)))
    for name, error in summary["failures"].items():
        print(f"error: {folder / 'runs' / name}: {error}", file=sys.stderr)
    if summary["failures"]:
        raise typer.Exit(1)


@app.command("report", epilog="Example: peft-dst report sweep --output report")
def _page(
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


@app.command("serve", epilog="Example: peft-dst serve base --deltas adapters --port 8000")
def _serve(
    base: Annotated[str, typer.Argument(help="Hub id or folder of the base.")],
    deltas: Annotated[
        Path | None, typer.Option("--deltas", "-d", file_okay=False, help="Folder of adapters, a folder each.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What clients call the base; its folder's name if not given.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="completions or classify; read off the base if not given.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights; auto is the checkpoint's.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Where to compute; an accelerator if there is one.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="PEFT_DST_TOKEN", help="What clients must send to upload and remove deltas; none: nobody may."
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt and its answer together.")] = 2048,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for an answer.")] = 120.0,
    max_upload: Annotated[int, typer.Option(min=1, help="MiB of an uploaded delta.")] = 64,
    budget: Annotated[int, typer.Option(min=0, help="MiB of deltas held ready.")] = 1024,
    capacity: Annotated[int, typer.Option(min=1, help="Sequences in computation at most.")] = 32,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait.")] = 256,
) -> None:
    """Serve a base and any number of deltas over HTTP.

    Causal models answer as OpenAI's API does (/v1/completions, /v1/chat/completions, /v1/models), where the model's name is
    the delta's; classifiers at /v1/classify. Also /metrics and /health. Ends with what was begun when it is told to stop.
    """
    try:
        from .server.start import Limits, serve
    except ModuleNotFoundError as error:
        raise ValueError(
            f"serving needs {error.name}, which is not installed: pip install 'peft-dst[serve]'."
        ) from None
    limits = Limits(max_tokens, timeout, max_upload * 2**20)
    serve(
        base,
        deltas,
        name=name,
        task=task,
        dtype=dtype,
        device=device,
        host=host,
        port=port,
        token=token,
        limits=limits,
        budget=budget * 2**20,
        capacity=capacity,
        queue=queue,
    )


def _recipes() -> Any:
    """The package that runs recipes, which is only imported when one is run."""
    try:
        from . import recipes
    except ModuleNotFoundError as error:
        raise ValueError(
            f"recipes need {error.name}, which is not installed: pip install 'peft-dst[recipes]'."
        ) from None
    recipes.only_own_bars()
    return recipes


def _print_metrics(metrics: dict[str, dict[str, float]]) -> None:
    for split, figures in metrics.items():
        print(f"{split}: " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))


def _merge_into(base: Path, delta: SparseDelta, output: Path, quiet: bool) -> None:
    check_free(output)
    layout = _layout(base)
    total = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    with _bar("merge", total, quiet) as advance:
        merged = merge(base, delta, output, layout=layout, on_bytes=advance)
    if not quiet:
        print(f"{output}: {merged.entries:,} values in {len(merged.tensors)} tensors; {merged.size:,} bytes in all.")
        for note, names in (("replaced whole", merged.replaced), ("added", merged.added)):
            if names:
                print(printable(f"{note}: {', '.join(names)}"))
    if new := [*merged.reshaped, *merged.added]:
        print(
            f"note: config.json is the base's, and knows nothing of the shape of {printable(', '.join(new))}. Load the "
            "result with the class and options of the fine-tuned model (num_labels, …).",
            file=sys.stderr,
        )


def _layout(base: Path) -> Layout | None:
    try:
        return layout_of(base)
    except ValueError as error:
        print(
            f"note: tensors are taken by their names in the file, each for itself: {printable(error)}", file=sys.stderr
        )
        return None


def _rewrite(source: Path, output: Path | None, packed: bool) -> None:
    if output is not None:
        check_free(output, beside=source)
    delta = SparseDelta.load(source)
    before = _size(source)
    delta = replace(delta, config={**delta.config, "packed": packed})
    if output is None or output.suffix == ".safetensors":
        output = output or source
        delta.save(output, packed=packed)
    else:
        with new_folder(output) as folder:
            if source.is_dir():
                copy_others(source, folder)
            delta.save(folder, packed=packed)
    print(f"{output}: {before:,} bytes before, {_size(output):,} now.")


def _size(path: Path) -> int:
    return (path / WEIGHTS_NAME if path.is_dir() else path).stat().st_size


def _report(extraction: Extraction, quiet: bool) -> None:
    if not quiet:
        print(extraction)
        print(f"{extraction.output}: {extraction.total.free:,} entries.")


def _shows(quiet: bool) -> bool:
    return not quiet and sys.stderr.isatty()


@contextmanager
def _bar(what: str, total: int, quiet: bool) -> Iterator[Callable[[int], Any]]:
    with tqdm(desc=what, total=total, unit="B", unit_scale=True, disable=not _shows(quiet)) as bar:
        yield bar.update


def _json(value: Any) -> str:
    def plain(found: Any) -> Any:
        if isinstance(found, dict):
            return {str(key): plain(inner) for key, inner in found.items()}
        if isinstance(found, list | tuple):
            return [plain(inner) for inner in found]
        # JSON has no NaN.
        return None if isinstance(found, float) and not math.isfinite(found) else found

    return json.dumps(plain(value), indent=2)
