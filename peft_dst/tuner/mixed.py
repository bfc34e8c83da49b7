"""Several adapters in one batch: `model(**inputs, adapter_names=["a", "__base__", "b", …])`, a name for each sample.

How, and what is refused, says `mixing`; here is what PEFT's model has for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ..mixing import BASE, Changes, Entries, Host, Reader, Readers, Subsets, changes_of, serve
from . import exchange
from .layer import SparseLayer
from .overlay import OverlayWeight


@contextlib.contextmanager
def mixed_batch(model: nn.Module, names: Sequence[str], copies: int = 1) -> Iterator[None]:
    """While it lasts, each sample of a batch goes through the model with an adapter of its own.

    Args:
        model: a model with DST adapters, in evaluation mode.
        names: for each sample the name of an adapter, or "__base__".
        copies: how many times `generate` repeats each sample (beams).

    Raises:
        ValueError: if the model is in training mode, an adapter does not exist or is merged.
        RuntimeError: if an adapter's tensors were not loaded.
    """
    wanted = dict.fromkeys(names)
    readers = Readers(model)
    found = [module for module in readers.modules.values() if isinstance(module, SparseLayer)]
    if any(marker.disable_adapters for marker in found):
        # The seed shows, whatever is active, as with PEFT's LoRA.
        yield
        return
    _check(model, found, wanted.keys() - {BASE})
    # One adapter for all samples needs no corrections: it may as well stand in the weights.
    alone = tuple(wanted.keys() - {BASE}) if len(wanted) == 1 else ()
    with contextlib.ExitStack() as stack, torch.no_grad():
        for marker in found:
            stack.callback(marker.show, None)
            marker.show(alone)
        changed = {} if len(wanted) == 1 else _changes(readers, found, wanted.keys() - {BASE})
        copied = [_copied(name, module) for name, module in readers.modules.items() if _has_copies(module)]
        with serve(model, Subsets(readers.modules, changed, copied), names, copies):
            yield


def _changes(readers: Readers, found: Sequence[SparseLayer], adapters: set[str]) -> dict[str, dict[Reader, Changes]]:
    """What each adapter changes. The live weights are the seed now."""
    entries: dict[str, list[Entries]] = {adapter: [] for adapter in adapters}
    for marker in found:
        marker.refresh()
        for adapter in adapters & marker.tuned.keys():
            for parameter, record in marker.scaled_records(adapter).items():
                if not record.indices.numel():
                    continue
                weight = marker.weights[parameter]
                indices = record.indices.to(weight.data.device, torch.int64)
                values, seeds = record.values.to(weight.data), weight.seeds_at(indices)
                first = weight.inputs_first if isinstance(weight, OverlayWeight) else None
                entries[adapter].append(Entries(weight.parameter, weight.data, indices, values, seeds, first))
    return {adapter: changes_of(readers, of_one) for adapter, of_one in entries.items()}


def _has_copies(module: nn.Module) -> bool:
    return isinstance(module, ModulesToSaveWrapper)


def _copied(name: str, module: nn.Module) -> Host:
    """A module of which adapters have dense copies: each sample goes through its adapter's own, if there is one."""

    def run(adapter: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        wrapper = cast(ModulesToSaveWrapper, module)
        own = adapter in wrapper.modules_to_save
        return (wrapper.modules_to_save[adapter] if own else wrapper.original_module)(*args, **kwargs)

    return Host(Reader(name, module), run=run)


def _check(model: nn.Module, found: Sequence[SparseLayer], wanted: set[str]) -> None:
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode. Call model.eval() first.")
    existing = exchange.constraints(model).keys()
    if unknown := sorted(wanted - existing):
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. There are {', '.join(existing)}."
        )
    if any(marker.merged for marker in found):
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    if any(marker.awaited for marker in found):
        exchange.check_loaded(model, wanted)
