"""Whether a model's inputs are as many as there are names, and one for each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .layouts import tensors_in


# The placeholders that multimodal models have in their input_ids, as their configs call them.
_PLACEHOLDER = re.compile(r"(image|video|audio|speech|vision)_token_(id|index)")
# Inputs that have a row for each sample in these models.
_NO_IMAGES = re.compile("embeds|mask|labels|ids|position")


def check_length(names: Sequence[str], inputs: Any) -> None:
    """Check that there is a name for each sample, as far as a model's inputs tell how many those are.

    Raises:
        ValueError: if no input has as many rows.
    """
    sizes = [tensor.shape[0] for tensor in tensors_in(inputs) if tensor.dim()]
    if sizes and len(names) not in sizes:
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} names for inputs of {', '.join(map(str, dict.fromkeys(sizes)))} rows."
        )


def check_placeholders(model: nn.Module, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Check that images (videos, sounds) that are as many as the samples are one for each, by their placeholders.

    There is one for each if every sample has a placeholder. Models that know none have no say in it: there the rows of
    every input are samples, as with CLIP.

    Args:
        model: the base model, whose config names the placeholders.
        names: for each sample the name of an adapter.
        args: what the model is given: its input_ids, int64 (batch, length), come first,
        kwargs: or by name, and floating tensors of two dimensions or more.

    Raises:
        ValueError: if a sample has none of what another one has, or there are no input_ids to tell.
    """
    config = getattr(model, "config", None)
    found = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
    tokens = {value for key, value in found.items() if _PLACEHOLDER.fullmatch(key) and isinstance(value, int)}
    given = {key: value for key, value in kwargs.items() if isinstance(value, Tensor) and not _NO_IMAGES.search(key)}
    others = [t for t in given.values() if t.dim() > 1 and t.is_floating_point() and len(t) == len(names)]
    if not (tokens and others) or len(set(names)) == 1:
        return
    ids = kwargs.get("input_ids", args[0] if args else None)
    have = [(ids == token).any(1).tolist() for token in tokens] if isinstance(ids, Tensor) and ids.dim() == 2 else []
    if any(any(of_one) and not all(of_one) for of_one in have) or not any(map(any, have)):
        raise ValueError(
            f"{len(others[0])} images (or the like, {tuple(others[0].shape)}) were given for as many samples, but not one "
            "for each, as far as the placeholders in input_ids tell. Whose adapter each of them is for is not known: give "
            "each sample one, or call the model with one adapter at a time."
        )
