"""Norms that a library writes out in Python (LlamaRMSNorm, T5LayerNorm, …), for all samples at once.

They multiply by their weight, and so do the same with a weight for each sample. Whether one does is not read off its code:
its first mixed batch is computed both ways, and only where both are the same, bit for bit, it is done so from then on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .batch import Batch, Host
from .layouts import tensors_in
from .running import by_sample


def is_norm(host: Host) -> bool:
    """Whether a module is a norm of whose own vectors entries are all that subsets change."""
    if "Norm" not in type(host.module).__name__ or any(change.wholes for change in host.changes.values()):
        return False
    patches = [patch for change in host.changes.values() for patch in change.patches]
    return bool(patches) and all(patch.module is host.module and patch.entries.data.dim() == 1 for patch in patches)


def normalise(host: Host, batch: Batch, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a norm once for all samples where that can be done, else once a subset."""
    one_by_one = functools.partial(by_sample, host, batch, forward, *args, **kwargs)
    tensors = tensors_in((args, kwargs))
    known = batch.at_once.get(host.reader.name)
    if batch.trial is not None or batch.alone or known is False or len(tensors) != 1 or tensors[0].dim() < 2:
        return one_by_one()
    (input,) = tensors
    names = batch.names_for(host, input, batch.layout(host, [input])[0])
    if len(names) != len(input):
        return one_by_one()
    at_once = functools.partial(_with_vectors, host, batch, names, input.dim(), forward, *args, **kwargs)
    if known:
        return at_once()
    output = one_by_one()
    if len(host.changes.keys() & set(names)) > 1:
        batch.at_once[host.reader.name] = _same(output, at_once)
    return output


def _same(output: Any, at_once: Callable[[], Any]) -> bool:
    try:
        other = at_once()
    except RuntimeError:
        # Kernels of torch take one weight for all samples.
        return False
    return isinstance(output, Tensor) and isinstance(other, Tensor) and torch.equal(output, other)


def _with_vectors(
    host: Host, batch: Batch, names: Sequence[str], dims: int, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Call a norm with the vectors of each sample's subset in the place of its own."""
    parameters: dict[str, nn.Parameter] = {
        patch.attribute: getattr(host.module, patch.attribute)
        for change in host.changes.values()
        for patch in change.patches
    }
    seeds = {attribute: parameter.data for attribute, parameter in parameters.items()}
    try:
        for attribute, parameter in parameters.items():
            make = functools.partial(_vectors, host, attribute, parameter.data, names)
            vectors = batch.kept((host, attribute, *names), make)
            parameter.data = vectors.view(len(names), *[1] * (dims - 2), -1)
        return forward(*args, **kwargs)
    finally:
        for attribute, parameter in parameters.items():
            parameter.data = seeds[attribute]


def _vectors(host: Host, attribute: str, seed: Tensor, names: Sequence[str]) -> Tensor:
    """A parameter's values for each sample, (samples, size)."""
    vectors = seed.repeat(len(names), 1)
    for row, name in enumerate(names):
        if (change := host.changes.get(name)) is not None:
            for patch in change.patches:
                if patch.attribute == attribute:
                    vectors[row, patch.entries.indices] = patch.entries.values
    return vectors
