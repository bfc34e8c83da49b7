"""A dataloader's batches in the portions whose gradients are squared: example by example, or batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def portions(
    dataloader: Iterable[Any], *, single: bool, skip: int, limit: int | None, device: torch.device
) -> Iterator[tuple[Any, int]]:
    """Go through a dataloader's examples.

    Args:
        dataloader: batches: a mapping or a tuple of tensors, whose first dimension is the batch's, or one such tensor.
        single: examples by themselves (batches of one), or batches as they come.
        skip: examples to leave out at the beginning.
        limit: stop after this many, those left out counted; it cuts the last batch short.
        device: where the tensors go.

    Yields:
        (portion, its number of examples).

    Raises:
        ValueError: if a batch cannot be split, if `skip` ends inside a batch and they come whole, or if there are fewer
            examples than are to be skipped.
    """
    seen = 0
    for batch in dataloader:
        size = _size(batch)
        first, end = max(skip - seen, 0), size if limit is None else min(size, limit - seen)
        if not single and 0 < first < size:
            raise ValueError(
                f"the cache ends after {skip:,} examples, inside a batch ({seen:,} to {seen + size:,}): it was made with "
                "batches of other sizes. Use those, or another path, or delete it."
            )
        for start in range(first, end, 1 if single else max(size, 1)):
            stop = start + 1 if single else end
            yield _part(batch, start, stop, device), stop - start
        seen += size
        if limit is not None and seen >= limit:
            return
    if seen < skip:
        raise ValueError(
            f"the cache has {skip:,} examples, the dataloader only {seen:,}: it was made with other data. Use those, or "
            "another path, or delete it."
        )


def _size(batch: Any) -> int:
    """Number of examples of a batch."""
    sizes = {key: len(value) for key, value in _items(batch).items() if isinstance(value, Tensor) and value.dim()}
    if not sizes:
        raise ValueError(
            f"a batch of type {type(batch).__name__} has no tensor with a batch dimension. A dataloader must give mappings "
            "or tuples of tensors, or tensors."
        )
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"the tensors of a batch have different first dimensions: {sizes}. Each must be the number of examples, or "
            "the tensor a scalar."
        )
    return next(iter(sizes.values()))


def _items(batch: Any) -> Mapping[Any, Any]:
    if isinstance(batch, Mapping):
        return batch
    return dict(enumerate(batch)) if isinstance(batch, (tuple, list)) else {0: batch}


def _part(batch: Any, start: int, stop: int, device: torch.device) -> Any:
    """Some examples of a batch, as a batch: a dict, a tuple or a tensor. What is not split is passed along."""

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return (value[start:stop] if value.dim() else value).to(device)

    if isinstance(batch, Mapping):
        return {key: cut(value) for key, value in batch.items()}
    return tuple(cut(value) for value in batch) if isinstance(batch, (tuple, list)) else cut(batch)
