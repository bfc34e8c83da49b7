"""State dicts of tuned weights without what markers write beside them, which nobody could tell from another base.

Whoever keeps the best of what is trained, by `requires_grad`, has those. Loaded, they would be taken for a new seed, under
the records of another moment. But they differ from the seed in few places, and another base nearly everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..core import SparseWeight, gather
from ..core.tiles import bits
from ..delta import MARKER
from .layer import CONSTRAINTS, markers
from .overlay import OverlayWeight


_HANDLE = "dst_loading_handle"


def watch_loading(model: nn.Module) -> None:
    """Look at each state dict of a base model before it is loaded."""
    if _HANDLE not in model.__dict__:
        model.__dict__[_HANDLE] = model.register_load_state_dict_pre_hook(_before_load)


def forget_loading(model: nn.Module) -> None:
    """Take away what `watch_loading` registered."""
    if _HANDLE in model.__dict__:
        model.__dict__.pop(_HANDLE).remove()


def _before_load(model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *unused: Any) -> None:
    """Refuse what lacks a part of the notes on the seed, and weights that differ from the seed in no more places than
    adapters may change, and in less than half of all.

    Raises:
        ValueError: if these are such; nothing has been changed by then.
    """
    for name, marker in markers(model):
        marker.check_notes(state_dict, f"{prefix}{name}.")
    if any(MARKER in key.split(".") for key in state_dict if key.startswith(prefix)):
        return
    found = model.__dict__.get(CONSTRAINTS, {}).values()
    # A tracked threshold may keep any number.
    limit = sum(math.inf if constraint.tracking else constraint.budget for constraint in found)
    differing = total = 0
    first = None
    for name, marker in markers(model):
        for weight in marker.weights.values():
            tensor = _comparable(weight, state_dict.get(f"{prefix}{name.removesuffix(MARKER)}{weight.attribute}"))
            if tensor is not None:
                apart = _differing(weight, tensor)
                first = first or (weight.name if apart else None)
                differing, total = differing + apart, total + tensor.numel()
        if differing > limit:
            return
    if first is not None and 2 * differing < total:
        raise ValueError(
            f"the state dict has tuned weights and no records: it differs from the seed in {differing:,} of {total:,} "
            f"components (in {first!r}, for one), no more than adapters may change, and these would become the seed. Keep "
            "an adapter by get_peft_model_state_dict(model) and restore it by set_peft_model_state_dict, or keep the whole "
            "model.state_dict(). To load another base that is nearly the same, unload the adapters first, and add them "
            "afterwards."
        )


def _comparable(weight: SparseWeight, tensor: Any) -> Tensor | None:
    """What is to be loaded over a weight, if it can be compared with the seed here."""
    held = isinstance(tensor, Tensor) and not isinstance(tensor, DTensor) and not tensor.is_meta
    if not held or isinstance(weight, OverlayWeight) or weight.is_divided or weight.data.is_meta:
        return None
    return tensor if tensor.shape == weight.shape else None


def _differing(weight: SparseWeight, tensor: Tensor) -> int:
    """In how many places a tensor differs from a weight's seed."""
    tensor = tensor.detach().to(weight.data)
    indices, seeds = weight.noted()
    here = bits(gather(tensor, indices))
    in_subset = int((here != bits(seeds)).sum()) - int((here != bits(weight.values())).sum())
    return int((bits(tensor) != bits(weight.data)).sum()) + in_subset
