"""The commands on deltas and checkpoints: look, compare, make, write."""

from __future__ import annotations

import itertools
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

from ..analysis import Overlaps, inspect, overlap, overlaps
from ..config import DSTConfig
from ..conversion import convert_adapter, convert_checkpoint, is_delta
from ..core.distances import Distance
from ..core.silos import Siloing
from ..delta import (
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
from ..extraction import Extraction, extract, layout_of
from ..tables import printable, square_labels
from .program import Output, Quiet, app, shows


Delta = Annotated[Path, typer.Argument(exists=True, help="Folder of an adapter, or its safetensors file.")]
Base = Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of the base's checkpoint.")]
BaseOption = Annotated[
    Path, typer.Option("--base", exists=True, file_okay=False, help="Folder of the base's checkpoint.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Epsilon = Annotated[
    float | None, typer.Option("--epsilon", "-e", help="Fraction of the components that may differ, e.g. 0.001.")
]
Number = Annotated[int | None, typer.Option("--num-free-parameters", "-n", help="The same as a number of components.")]


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
    _report(extract(base, tuned, output, config, progress=shows(quiet)), quiet)


@app.command("merge", epilog="Example: peft-dst merge base my-adapter -o merged")
@app.command("apply", epilog="Example: peft-dst apply base my-adapter -o applied")
def _merge(base: Base, delta: Delta, output: Output, quiet: Quiet = False) -> None:
    """Write the full checkpoint of a base and a delta.

    `merge` and `apply` are the same. It streams from file to file, so a checkpoint of any size takes little memory.
    Everything is checked before anything is written, and the folder appears when it is whole.
    """
    _merge_into(base, SparseDelta.load(delta), output, quiet)


@app.command("overlap", epilog="Example: peft-dst overlap my-adapter another-adapter")
def _overlap(
    deltas: Annotated[
        list[Path],
        typer.Argument(metavar="DELTA DELTA...", exists=True, help="Folders of adapters, or their safetensors files."),
    ],
    as_json: AsJson = False,
    plot: Annotated[Path | None, typer.Option(help="Draw how much each has of each other into this picture.")] = None,
) -> None:
    """Compare the subsets of deltas of one base.

    Of two: how much they have in common, by kind of module and layer, beside what chance would give. Of more: a square
    table of the percentage of each one's subset (row) that is also in each other's (column).
    """
    if len(deltas) < 2:
        raise typer.BadParameter("a subset is compared with others; give two deltas or more.", param_hint="DELTA")
    found = [SparseDelta.load(path) for path in deltas]
    each = overlaps(found, _short_names(deltas)) if plot is not None or len(found) > 2 else None
    if each is not None and plot is not None:
        _draw(each, plot)
    shown = overlap(*found) if len(found) == 2 else each
    assert shown is not None
    print(_json(shown.to_json()) if as_json else shown)


def _short_names(paths: Sequence[Path]) -> list[str]:
    """What tells paths apart: each without the parts that all begin with, and those that they end with."""

    def shared(parts: Sequence[Sequence[str]]) -> int:
        columns = zip(*parts, strict=False)
        return len([*itertools.takewhile(lambda column: len(set(column)) == 1, columns)])

    parts = [path.parts for path in paths]
    head = shared(parts)
    tail = shared([own[head:][::-1] for own in parts])
    names = ["/".join(own[head : len(own) - tail]) for own in parts]
    return [name or str(path) for name, path in zip(names, paths, strict=True)]


def _draw(found: Overlaps, path: Path) -> None:
    """A heat map, as reports have them."""
    try:
        from ..recipes.report import plots, shapes
    except ModuleNotFoundError as error:
        raise ValueError(
            f"this plot needs {error.name}, which is not installed: pip install 'peft-dst[recipes,plots]'."
        ) from None
    places = range(len(found.names))
    # That each has all of itself would take up the scale of colours.
    values = [[None if i == j else found.shared[i][j] for j in places] for i in places]
    with plots.style():
        grid = shapes.Grid("", *square_labels(found.names), values)
        plots.grids([grid], "that are also in", "components of", "shared", percent=True, low=0).savefig(path)


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
    kind = "a checkpoint"
    if (source / CONFIG_NAME).is_file():
        kind = "a delta" if is_delta(source) else "an adapter"
    if kind != "an adapter":
        given = {"--epsilon": epsilon is not None, "-n": number is not None}
        given |= {"--siloing": siloing != "none", "--distance": distance != "absolute"}
        if wrong := [option for option, is_given in given.items() if is_given]:
            raise typer.BadParameter(
                f"{source} is {kind}, and comes over exactly; only other adapters can be cut to a budget. "
                "For a delta of one from a checkpoint take peft-dst diff.",
                param_hint=wrong[0],
            )
    if kind == "a delta":
        _merge_into(base, SparseDelta.load(source), output, quiet)
    elif kind == "an adapter":
        made = convert_adapter(
            source,
            base,
            output,
            epsilon=epsilon,
            num_free_parameters=number,
            siloing=siloing,
            distance=distance,
            progress=shows(quiet),
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


@contextmanager
def _bar(what: str, total: int, quiet: bool) -> Iterator[Callable[[int], Any]]:
    with tqdm(desc=what, total=total, unit="B", unit_scale=True, disable=not shows(quiet)) as bar:
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
