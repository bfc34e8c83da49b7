"""What was loaded is checked, and comes into the weights.

PEFT's loader has an adapter's tensors checked before it loads them. transformers' own assigns tensors one by one and calls
nobody back: what it has left is checked when the model is first used.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import nn

from ..core import SparseWeight
from ..delta import DeltaError, Record, Summary, check_entries, check_record, check_seed, parse_summaries
from .layer import SparseLayer, Whole, markers
from .overlay import OverlayWeight


_HANDLES = "dst_settle_handles"
# The adapters that were active when it was last looked whether they are awaited.
_LOOKED = "dst_settled_for"


def settle(model: nn.Module) -> bool:
    """Check and write the records that have been loaded since; return whether none is still awaited.

    Raises:
        DeltaError: if a record is malformed or the base is another one; no weight has been changed by then.
    """
    if not any(marker.awaited for _, marker in markers(model)):
        forget_to_settle(model)
        return True
    awaited = [(marker, adapter) for _, marker in markers(model) for adapter in tuple(marker.awaited)]
    missing = {adapter for marker, adapter in awaited if not marker.has_arrived(adapter)}
    arrived = [(marker, adapter) for marker, adapter in awaited if adapter not in missing]
    configs: Any = model.peft_config
    summaries = {adapter: parse_summaries(configs[adapter].records) for _, adapter in arrived}
    for marker, adapter in arrived:
        for parameter, record in marker.records(adapter).items():
            weight = marker.weights[parameter]
            check_loaded_record(weight, record, summaries[adapter].get(weight.name))
    for marker, adapter in arrived:
        remember_seeds(marker, adapter, summaries[adapter])
        marker.accept(adapter)
        configs[adapter].records = None
    if not missing:
        forget_to_settle(model)
    return not missing


def settle_before_forward(model: nn.Module) -> None:
    """Settle when any part of the model is first called: transformers' own loader calls nobody back.

    Any part, since `generate` calls the encoder before the model, and a module may share another's weight.
    """
    model.__dict__.pop(_LOOKED, None)
    look = functools.partial(_look, Whole(model))
    handles = [module.register_forward_pre_hook(look) for module in model.modules()]
    model.__dict__.setdefault(_HANDLES, []).extend(handles)


def forget_to_settle(model: nn.Module) -> None:
    """Take away what `settle_before_forward` registered: nothing is awaited any more."""
    for handle in model.__dict__.pop(_HANDLES, []):
        handle.remove()
    model.__dict__.pop(_LOOKED, None)


@torch.compiler.disable  # looks at values, and changes weights
def _look(whole: Whole, *unused: Any) -> None:
    model = whole.model
    # The first marker tells for all of them, without a walk through the model at every call of a module.
    active = next((tuple(marker.active_adapters) for _, marker in markers(model)), ())
    if model.__dict__.get(_LOOKED) != active:
        check_loaded(model, set(active))
        if _HANDLES in model.__dict__:
            # Adapters that are not active may still be awaited.
            model.__dict__[_LOOKED] = active


def check_loaded(model: nn.Module, adapters: Set[str]) -> None:
    """Settle, and check that none of these adapters is still awaited.

    Raises:
        RuntimeError: if one is.
    """
    settle(model)
    for _, marker in markers(model):
        if missing := sorted(adapters & marker.awaited):
            raise not_loaded(model, missing[0])


def not_loaded(model: nn.Module, adapter: str) -> RuntimeError:
    """What to say of an adapter that is still awaited."""
    for _, marker in markers(model):
        for weight in marker.weights.values() if adapter in marker.awaited else ():
            weight.check_memory()
    return RuntimeError(
        f"adapter {adapter!r} was added from a saved config, but its tensors were not loaded. Load them with load_adapter; "
        "or, to start a new adapter from that config, set its `records` to None first; or delete_adapter. A packed file is "
        "opened by peft's PeftModel.from_pretrained and load_adapter, not by transformers' own."
    )


def check_loaded_record(weight: SparseWeight, record: Record, summary: Summary | None) -> None:
    """Check a record against the weight that it is for, and against what a config says of it, if it says anything.

    Raises:
        DeltaError: if it is malformed, or does not belong to them.
    """
    check_record(weight.name, weight.shape.numel(), weight.data.dtype, record)
    if summary is None or (weight.data.is_meta and not isinstance(weight, OverlayWeight)):
        return
    check_entries(weight.name, summary, record)
    if isinstance(weight, OverlayWeight):
        # The seed is there only as far as its quantisation has kept it.
        return
    seeds = weight.whole_seeds_at(record.indices.to(weight.data.device, torch.int64))
    try:
        check_seed(weight.name, summary.seed, seeds)
    except DeltaError as error:
        if torch.equal(seeds, record.values.to(seeds)):
            raise DeltaError(
                f"{weight.name!r} has the adapter's values already. The adapter was merged into this base, or "
                "transformers' own loader has just put an embedding there that PEFT saved whole beside the records (as "
                "it does after resize_token_embeddings). Load the base again, and the adapter with "
                "PeftModel.from_pretrained."
            ) from error
        raise


def remember_seeds(marker: SparseLayer, adapter: str, summaries: Mapping[str, Summary]) -> None:
    """Have quantised weights know what a config says of the seed below an adapter's entries, all of which were checked."""
    for parameter in marker.tuned.get(adapter, ()):
        weight = marker.weights[parameter]
        if isinstance(weight, OverlayWeight) and weight.name in summaries:
            weight.summaries[adapter] = summaries[weight.name]
