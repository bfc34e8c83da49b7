"""How a module runs for several subsets: once for all samples with its output corrected, or once a subset, on its samples
alone and with its values written in.

Each function here takes the place of a method of a host, and is given that method.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..core import scatter
from .batch import Batch, Host
from .changes import BASE
from .layouts import Layout, tensors_in


Rows = slice | Tensor
# Besides tensors, what a module may be given that runs once a subset: it does not change from one run to the next.
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)


def corrected(host: Host, batch: Batch, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a module once for all samples, and correct what it returns."""
    if batch.alone and not batch.written.isdisjoint(host.parameters):
        # Tied to what a module around it has: the values are written in already, and a correction would add them again.
        return _run_tuned(host, batch, forward, batch.alone, args, kwargs)
    output, *more = host.kind.call(forward, *args, **kwargs)
    input = args[0] if args and isinstance(args[0], Tensor) else tensors_in((args, kwargs))[0]
    if batch.trial is not None:
        batch.note(host, [input], output)
        return output
    rows, stacked = batch.correction(host, input)
    if not rows:
        return output
    # What is done here is none of the guard's business.
    with torch._C.DisableTorchFunction():
        if input.shape[0] < rows:
            # One row for all samples, as positions often are: from here on each has its own.
            input = input.expand(rows, *input.shape[1:])
            output = output.expand(rows, *output.shape[1:])
        output = output.contiguous()
        if stacked is not None:
            stacked.correct(output, input, *more)
    return output


def by_sample(host: Host, batch: Batch, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a module once a subset on its samples, and put the outputs together."""
    run = host.run or functools.partial(_run_tuned, host, batch, forward)
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if batch.trial is not None:
        output = run(BASE, args, kwargs)
        batch.note(host, tensors, output)
        return output
    if batch.alone:
        return run(batch.alone, args, kwargs)
    layout = batch.layout(host, tensors)
    # What all samples have in common is no obstacle beside something that has their rows.
    telling = next((i for i, at in enumerate(layout[: len(tensors)]) if at is not False), 0)
    bad = next((i for i, at in enumerate(layout[: len(tensors)]) if at is None), telling)
    names = batch.names_for(host, tensors[bad] if tensors else None, layout[bad] if tensors else None)
    first = tensors[0]
    # Attention and recurrent layers of torch: what is first need not be the sample, and theirs mix what is not.
    if not getattr(host.module, "batch_first", True) or (hasattr(host.module, "batch_first") and first.dim() < 3):
        raise NotImplementedError(
            f"{host} was given an input of shape {tuple(first.shape)} whose first dimension is not the sample. Make it "
            "with batch_first=True and call it with batches, call the model with one adapter at a time, or tune the "
            "adapters with this module in exclude_modules."
        )
    _check_plain(host, leaves)
    parts = _rows_of(names)
    outputs = []
    for adapter, rows in parts.items():
        # What is done here is none of the guard's business.
        with torch._C.DisableTorchFunction():
            divided = iter([tensor[rows] if at else tensor for tensor, at in zip(tensors, layout, strict=False)])
        given = tree_unflatten([next(divided) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
        with batch.only(adapter):
            outputs.append(run(adapter, *given))
    return _join(host, outputs, list(parts.values()), layout[len(tensors) :])


def _rows_of(names: Sequence[str]) -> dict[str, Rows]:
    """The rows of each adapter: a slice if they are consecutive, else int64 (r,)."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    return {
        name: slice(at[0], at[-1] + 1) if at[-1] - at[0] == len(at) - 1 else torch.tensor(at)
        for name, at in rows.items()
    }


def _check_plain(host: Host, arguments: Any) -> None:
    for leaf in tree_leaves(arguments):
        if not isinstance(leaf, (Tensor, *_PLAIN)):
            raise NotImplementedError(
                f"{host} has parameters that differ between adapters, and so runs once a subset; but it was given a "
                f"{type(leaf).__name__}, which cannot be divided by sample. Call the model with one adapter at a time, or "
                "(for a cache) with use_cache=False, or tune the adapters with this module in exclude_modules."
            )


def _run_tuned(
    host: Host, batch: Batch, forward: Callable[..., Any], adapter: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call a host with a subset's values written in."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(batch.writing)
        for patch in (patch for change in host.changes.values() for patch in change.patches):
            if getattr(patch.module, "max_norm", None) is not None:
                # Such an embedding shortens whole rows when it is called, with whatever values, beyond the entries.
                stack.callback(patch.entries.data.copy_, patch.entries.data.clone())
        if (own := host.changes.get(adapter)) is not None:
            for _, _, entries in own.patches:
                if (key := id(entries.parameter)) not in batch.written:
                    batch.written.add(key)
                    stack.callback(batch.written.remove, key)
                    stack.callback(scatter, entries.data, entries.indices, entries.seeds)
                    scatter(entries.data, entries.indices, entries.values)
            for whole in own.wholes:
                stack.callback(setattr, whole.module, whole.attribute, whole.parameter)
                setattr(whole.module, whole.attribute, whole.tensor)
        return forward(*args, **kwargs)


def _join(host: Host, outputs: list[Any], rows: list[Rows], layout: Layout) -> Any:
    """Put the samples of all adapters back in their order, in whatever structure they came."""
    layouts = iter(layout)
    counts = [at.stop - at.start if isinstance(at, slice) else at.numel() for at in rows]
    places = torch.cat([torch.arange(at.start, at.stop) if isinstance(at, slice) else at for at in rows])
    order = None if bool((places.diff() > 0).all()) else places.argsort()
    flat = [tree_flatten(output) for output in outputs]

    def join(leaves: Sequence[Any]) -> Any:
        if not isinstance(leaves[0], Tensor):
            if any(isinstance(leaf, Tensor) or leaf != leaves[0] for leaf in leaves):
                raise NotImplementedError(f"{host} returns values that cannot be put together for several adapters.")
            return leaves[0]
        common = all(leaf.dim() and leaf.shape[0] == 1 for leaf in leaves)
        # Rows that all samples have in common may happen to be as many as an adapter's samples.
        fits = next(layouts, None) or common
        if common:
            # One row for all samples of an adapter, as positions often are.
            leaves = [leaf.expand(n, *leaf.shape[1:]) for leaf, n in zip(leaves, counts, strict=True)]
        fits = fits and all(leaf.dim() and leaf.shape[0] == n for leaf, n in zip(leaves, counts, strict=True))
        if not fits or any(leaf.shape[1:] != leaves[0].shape[1:] for leaf in leaves):
            shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves)
            raise ValueError(
                f"{host} returns tensors of shapes {shapes} for {', '.join(map(str, counts))} samples of the adapters in "
                "this batch, which cannot be put together. Heads of modules_to_save must have the same width; otherwise "
                "call the model with one adapter at a time."
            )
        with torch._C.DisableTorchFunction():
            joined = torch.cat(list(leaves))
            return joined if order is None else joined[order]

    if any(spec != flat[0][1] for _, spec in flat):
        raise NotImplementedError(f"{host} returns different structures for the adapters in this batch.")
    return tree_unflatten([join(leaves) for leaves in zip(*(leaves for leaves, _ in flat), strict=True)], flat[0][1])


def bias_by_sample(host: Host, batch: Batch, method: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """A bias of relative positions (1 or batch, heads, queries, keys), which each adapter makes from its own table."""
    given = [] if batch.given is None else [batch.given]
    if batch.trial is not None:
        batch.note(host, given)
        return method(*args, **kwargs)
    if batch.alone:
        return _run_tuned(host, batch, method, batch.alone, args, kwargs)
    names = batch.names_for(host, batch.given, batch.layout(host, given)[0] if given else None)
    made = {}
    for adapter in dict.fromkeys(names):
        with batch.only(adapter):
            made[adapter] = _run_tuned(host, batch, method, adapter, args, kwargs)
        if made[adapter].dim() != 4 or made[adapter].shape[0] not in (1, len(names)):
            raise NotImplementedError(
                f"{host} computes a bias of shape {tuple(made[adapter].shape)}, where one of (batch, heads, queries, keys) "
                "could be divided by sample. Call the model with one adapter at a time."
            )
    return torch.stack([made[name][min(row, made[name].shape[0] - 1)] for row, name in enumerate(names)])
