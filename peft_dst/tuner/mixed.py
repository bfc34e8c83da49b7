"""Several adapters in one batch: `model(**inputs, adapter_names=["a", "__base__", "b", …])`, a name for each sample.

How, and what is refused, says `mixing`; here is what a model of PEFT has for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ..mixing import BASE, Changes, Entries, Host, Reader, Readers, Subsets, changes_of, mixed
from . import settling
from .constraints import constraints
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
    readers = Readers(model)
    markers = [module for module in readers.modules.values() if isinstance(module, SparseLayer)]
    if any(marker.disable_adapters for marker in markers):
        # The seed shows, whatever is active, as with PEFT's LoRA.
        yield
        return
    adapters = set(names) - {BASE}
    _check(model, markers, adapters)
    # One adapter for all samples needs no corrections: it may as well stand in the weights.
    alone = len(set(names)) == 1
    with contextlib.ExitStack() as stack, torch.no_grad():
        for marker in markers:
            stack.callback(marker.show, None)
            marker.show(tuple(adapters) if alone else ())
        changes = {} if alone else _changes(readers, markers, adapters)
        copied = [
            _copied(name, module)
            for name, module in readers.modules.items()
            if isinstance(module, ModulesToSaveWrapper)
        ]
        with mixed(model, Subsets(readers.modules, changes, copied), names, copies):
            yield


def copies_of(kwargs: dict[str, Any]) -> int:
    """How many times `generate` repeats each sample: for beams, or for samples drawn from it."""
    asked = (kwargs, getattr(kwargs.get("generation_config"), "__dict__", {}))
    return max([1, *(a.get(n) or 1 for a in asked for n in ("num_beams", "num_return_sequences"))])


def _changes(readers: Readers, markers: Sequence[SparseLayer], adapters: set[str]) -> dict[str, dict[Reader, Changes]]:
    """What each adapter changes. The live weights are the seed now."""
    entries: dict[str, list[Entries]] = {adapter: [] for adapter in adapters}
    for marker in markers:
        marker.refresh()
        # A quantised layer can only be corrected, also for an adapter that changes nothing but its bias.
        overlays = [weight for weight in marker.weights.values() if isinstance(weight, OverlayWeight)]
        inputs_first = overlays[0].inputs_first if overlays else None
        for adapter in adapters & marker.tuned.keys():
            for parameter, record in marker.scaled_records(adapter).items():
                if not record.indices.numel():
                    continue
                weight = marker.weights[parameter]
                indices = record.indices.to(weight.data.device, torch.int64)
                values, seeds = record.values.to(weight.data), weight.seeds_at(indices)
                entries[adapter].append(Entries(weight.parameter, weight.data, indices, values, seeds, inputs_first))
    return {adapter: changes_of(readers, of_one) for adapter, of_one in entries.items()}


def _copied(name: str, module: ModulesToSaveWrapper) -> Host:
    """A module of which adapters have dense copies: each sample goes through its adapter's own, if there is one."""

    def run(adapter: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        own = adapter in module.modules_to_save
        return (module.modules_to_save[adapter] if own else module.original_module)(*args, **kwargs)

    return Host(Reader(name, module), run=run)


def _check(model: nn.Module, markers: Sequence[SparseLayer], adapters: set[str]) -> None:
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode. Call model.eval() first.")
    existing = constraints(model).keys()
    if unknown := sorted(adapters - existing):
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. There are {', '.join(existing)}."
        )
    if any(marker.merged for marker in markers):
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    if any(marker.awaited for marker in markers):
        settling.check_loaded(model, adapters)
