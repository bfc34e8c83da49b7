"""Adapters at a part of their strength, for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from .layer import markers


@contextlib.contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """While it lasts, the active adapters show as seed + multiplier · (value − seed); afterwards bit for bit as before.

    What `peft.helpers.rescale_adapter_scale` is for LoRA, and what that does for a model with DST adapters once `peft_dst`
    is imported. With a multiplier between 0 and 1 it is WiSE-FT (Wortsman et al., 2022). Uses within one another multiply.
    Dense copies (modules_to_save) stay as they are.

    Args:
        model: a model with DST adapters.
        multiplier: the factor.

    Raises:
        TypeError: if the multiplier is no number.
        ValueError: if the model has no DST adapter, or one is merged.
    """
    if not isinstance(multiplier, float | int):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    found = [marker for _, marker in markers(model)]
    if not found:
        raise ValueError("the model has no DST adapter whose scale could be changed.")
    if any(marker.merged for marker in found):
        raise ValueError("an adapter is merged, and belongs to the base weights. Call unmerge_adapter() first.")
    with contextlib.ExitStack() as stack:
        for marker in found:
            stack.callback(setattr, marker, "scale", marker.scale)
            marker.scale = marker.scale * multiplier
        yield
