"""Where tensors have their samples: found out from a call with a sample more, and by following rows that are selected.

Sizes alone do not tell: a batch may have as many samples as its texts have tokens, or an expert tokens. But a dimension
that has a row more when there is a sample more is that of the samples; one that stays as it is is not. What this cannot
tell are rows that are selected by their values, as the tokens of an expert are: their number changes with what is in them,
and may be anything. So tensors that were made by such a selection are followed until they are back in their places.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary


# Of each tensor that a module is given or returns: whether its rows are the samples (True), or all samples have it in
# common (False), or neither (None).
Layout = tuple[bool | None, ...]
# The shapes of what a module is given and returns in one call.
Shapes = list[torch.Size]


def _functions(*names: str) -> set[Any]:
    return {getattr(owner, name) for owner in (torch, Tensor) for name in names if hasattr(owner, name)}


_PLACING = _functions(
    "__setitem__", "index_add", "index_add_", "index_copy", "index_copy_", "index_put", "index_put_", "scatter", "scatter_",
    "scatter_add", "scatter_add_",
)  # fmt: skip
_TAKING = _functions("__getitem__", "index_select", "gather", "take_along_dim", "masked_select")
_INDEXED = _functions("__getitem__", "__setitem__", "index_put", "index_put_")
_DIVIDING = _functions("view", "reshape", "unflatten")


def tensors_in(arguments: Any) -> list[Tensor]:
    """All tensors in whatever structure."""
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]


def with_rows(before: int, rows: int, leaf: Any) -> Any:
    """An argument of a model with another number of samples; a copy, as a model may change what it is given.

    Args:
        before: how many rows it has now, if they are the samples.
        rows: how many it shall have; they are repeated from the first one on.
        leaf: a tensor (before, ...) or of other shapes, which stay; a cache of transformers; or anything else.
    """
    if isinstance(leaf, Tensor):
        if leaf.dim() and leaf.shape[0] == before:
            return leaf[torch.arange(rows, device=leaf.device) % before]
        return leaf.clone()
    leaf = copy.deepcopy(leaf)
    if hasattr(leaf, "batch_select_indices"):
        leaf.batch_select_indices(torch.arange(rows) % before)
    return leaf


def compare(one: list[Shapes], more: list[Shapes], rows: int) -> Layout:
    """What the shapes in all calls of a module, with so many samples and with one more, say of its tensors.

    Calls whose number depends on the samples, or that contradict each other, say nothing of any.
    """
    calls = [(*a, *b) for a, b in zip(one, more, strict=False)]
    if not calls or len(one) != len(more) or len({len(shapes) for shapes in (*one, *more)}) > 1:
        return (None,) * len((one or more)[0])

    def single(a: torch.Size, b: torch.Size) -> bool | None:
        if a == b:
            return False
        return True if a[:1] == (rows,) and b[:1] == (rows + 1,) and a[1:] == b[1:] else None

    width = len(one[0])
    found = [{single(call[i], call[width + i]) for call in calls} for i in range(width)]
    return tuple(of_one.pop() if len(of_one) == 1 else None for of_one in found)


class Selected:
    """The tensors of a forward whose rows were selected, or put somewhere, by their values."""

    def __init__(self) -> None:
        self._tensors = WeakTensorKeyDictionary()

    def __contains__(self, tensor: object) -> bool:
        return len(self._tensors) > 0 and isinstance(tensor, Tensor) and tensor in self._tensors

    def follow(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any, rows: int) -> None:
        """Note what a function of torch has made of selected tensors, or by selecting.

        Args:
            func: the function, as in a TorchFunctionMode.
            args: what it was given,
            kwargs: and by name.
            result: what it returned.
            rows: how many rows the samples have.
        """
        selects = (func in _TAKING or func in _PLACING) and _selects_rows(func, args, kwargs)
        if not selects and not len(self._tensors):
            return
        given = tensors_in((args, kwargs))
        before = [tensor for tensor in given if tensor in self]
        if func in _PLACING:
            # Selected rows go back to where they came from; others are put where they do not belong.
            back = any(tensor.is_floating_point() for tensor in before if tensor is not given[0])
            made = given[0] in self or (selects and not back)
        else:
            made = selects or (bool(before) and not _is_by_sample(func, given, before, result, rows))
        if made:
            for tensor in [given[0]] if result is None else tensors_in(result):
                self._tensors[tensor] = True


def _is_by_sample(func: Any, given: list[Tensor], selected: list[Tensor], result: Any, rows: int) -> bool:
    """Whether the rows of a result are samples, though something went into it whose rows are not."""

    def by_sample(tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.dim() > 2 and tensor.shape[0] == rows

    if not by_sample(result) or any(by_sample(tensor) for tensor in selected):
        return False
    # Divided by sample again, or something that all samples have in common beside something that is theirs.
    others = [tensor for tensor in given if all(tensor is not other for other in selected)]
    return func in _DIVIDING or any(by_sample(tensor) for tensor in others)


def _selects_rows(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the first dimension of a tensor (activations, not a table) is indexed by a tensor."""
    source = args[0] if args else kwargs.get("input")
    if isinstance(source, nn.Parameter) or not isinstance(source, Tensor) or not source.dim():
        return False
    if func not in _INDEXED:
        dim = kwargs.get("dim", next((value for value in args[1:] if type(value) is int), 0))
        return dim in (0, -source.dim())
    value = args[2] if len(args) > 2 else kwargs.get("values")
    if func in _PLACING and not (isinstance(value, Tensor) and value.dim()):
        # One value for all of them moves none.
        return False
    items = args[1] if isinstance(args[1], tuple) else (args[1],)
    first = next((item for item in items if item is not None), None)
    if isinstance(first, list):
        return True
    if not isinstance(first, Tensor) or not first.dim():
        return False
    if first.dtype == torch.bool or len(first) != len(source) or first.numel() != len(source):
        return True
    # Each row its own, as (n, 1, …) where masks are made.
    return not torch.equal(first.flatten(), torch.arange(len(source), device=first.device))
