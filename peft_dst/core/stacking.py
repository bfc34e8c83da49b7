"""Corrections of several groups of samples in one call, whatever their number."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from . import kernels
from .correction import ROWS, EmbeddingEntries, LinearDifference


class Bags(NamedTuple):
    """Entries by the sums that they are part of.

    Attributes:
        outputs: the group and the output of each sum, int64 (2, m).
        starts: where the entries of each of them begin, int64 (m,).
        columns: the group and the input that an entry multiplies, int64 (2, c).
        inputs: which of these each entry does, int64 (k,).
        differences: value − seed of each, (k,).
    """

    outputs: Tensor
    starts: Tensor
    columns: Tensor
    inputs: Tensor
    differences: Tensor


class Padded(NamedTuple):
    """Entries one by one, padded to as many for each group, int64, int64 and floating (groups, k).

    Attributes:
        outputs: the output that each goes to.
        inputs: the input that it multiplies.
        differences: value − seed; zero where there is none.
    """

    outputs: Tensor
    inputs: Tensor
    differences: Tensor


class StackedDifference:
    """Linear differences of several groups of rows.

    Args:
        differences: for each group that of its weight; None if it has none, but not for all.
        width: number of the layer's outputs.
    """

    def __init__(self, differences: Sequence[LinearDifference | None], width: int) -> None:
        self.groups = len(differences)
        self._found = {number: one for number, one in enumerate(differences) if one is not None}
        sizes = [one.inputs.numel() for one in self._found.values()]
        self._most = max(sizes)
        self.dtype = next(iter(self._found.values())).differences.dtype
        #: Rows are then gone through one by one, each of which stays in the first-level cache. Where many entries share
        #: an output, or groups are of very different sizes, sums over bags of entries are faster (docs/LOG.md).
        self.pads = self._most <= width and self._most * self.groups <= 2 * sum(sizes)

    @cached_property
    def padded(self) -> Padded:
        """What is padded adds zero times the first input to the first output."""
        # The same difference mostly serves several groups.
        distinct = list({id(one): one for one in self._found.values()}.values())
        rows = {id(one): row for row, one in enumerate(distinct)}
        places = torch.zeros(2, len(distinct) + 1, self._most, dtype=torch.int64)
        differences = distinct[0].differences.new_zeros(len(distinct) + 1, self._most)
        for row, one in enumerate(distinct):
            places[:, row, : one.inputs.numel()] = one.places
            differences[row, : one.inputs.numel()] = one.differences
        # The last row is that of groups without any.
        groups = [rows.get(id(self._found.get(group)), len(distinct)) for group in range(self.groups)]
        of_group = torch.tensor(groups)
        return Padded(places[0, of_group], places[1, of_group], differences[of_group])

    @cached_property
    def bags(self) -> Bags:
        """Any entries, on any device."""
        found = list(self._found.values())
        device = found[0].inputs.device
        groups, outputs, columns, entries = (
            torch.tensor(values, device=device)
            for values in (
                list(self._found),
                [one.outputs.numel() for one in found],
                [one.columns.numel() for one in found],
                [one.inputs.numel() for one in found],
            )
        )
        # Where the entries and the columns of each begin, when they follow each other.
        entry, column = entries.cumsum(0) - entries, columns.cumsum(0) - columns
        return Bags(
            torch.stack([groups.repeat_interleave(outputs), torch.cat([one.outputs for one in found])]),
            torch.cat([one.starts for one in found]) + entry.repeat_interleave(outputs),
            torch.stack([groups.repeat_interleave(columns), torch.cat([one.columns for one in found])]),
            torch.cat([one.inputs for one in found]) + column.repeat_interleave(entries),
            torch.cat([one.differences for one in found]),
        )


def stack_differences(differences: Sequence[LinearDifference | None], width: int) -> StackedDifference | None:
    """Put the differences of one layer together for `correct_stacked`; None if there are none.

    Args:
        differences: for each group of rows that of its weight; None if it has none.
        width: number of the layer's outputs.
    """
    if all(one is None or not one.inputs.numel() for one in differences):
        return None
    return StackedDifference(differences, width)


def correct_stacked(output: Tensor, input: Tensor, stacked: StackedDifference) -> None:
    """`correct_linear` for each group of rows with its own difference, in place. No gradients are recorded.

    Args:
        output: floating (rows, ..., outputs), contiguous; the rows of a group follow each other, all groups are as large.
        input: floating (rows, ..., inputs), what the layer was given.
        stacked: of its weight, for as many groups.
    """
    if not output.numel():
        return
    inputs = input.reshape(stacked.groups, -1, input.shape[-1])
    outputs = output.view(stacked.groups, inputs.shape[1], output.shape[-1])
    if output.is_cuda and kernels.available(output):
        # Late: only then Triton is asked for.
        from .correction_triton import correct

        correct(outputs, inputs, stacked.bags)
    elif stacked.pads and output.is_cpu and output.dtype == stacked.dtype:
        _correct_padded(outputs, inputs, stacked.padded)
    else:
        _correct_bags(outputs, inputs, stacked.bags)


def _correct_padded(outputs: Tensor, inputs: Tensor, padded: Padded) -> None:
    """Correct outputs (groups, rows, outputs), given inputs (groups, rows, inputs), in place."""
    shape = (len(inputs), inputs.shape[1], padded.outputs.shape[1])
    products = inputs.gather(2, padded.inputs[:, None].expand(shape)).to(outputs.dtype)
    products *= padded.differences[:, None]
    outputs.scatter_add_(2, padded.outputs[:, None].expand(shape), products)


def _correct_bags(outputs: Tensor, inputs: Tensor, bags: Bags) -> None:
    """As `_correct_padded`; sums are rounded to the outputs' dtype once."""
    step = ROWS if inputs.is_cpu else max(1, inputs.shape[1])
    for start in range(0, inputs.shape[1], step):
        rows = slice(start, start + step)
        columns = inputs[:, rows].transpose(1, 2)[bags.columns[0], bags.columns[1]].to(bags.differences.dtype)
        sums = functional.embedding_bag(
            bags.inputs, columns, bags.starts, mode="sum", per_sample_weights=bags.differences
        )
        # No two of them have the same place.
        places = (bags.outputs[0], bags.outputs[1])
        outputs[:, rows].transpose(1, 2).index_put_(places, sums.to(outputs.dtype), accumulate=True)


def stack_entries(entries: Sequence[EmbeddingEntries | None], rows: int) -> EmbeddingEntries | None:
    """The entries of several groups of an embedding as if each had a table of its own, below that of the one before.

    Args:
        entries: for each group those of its table; None if it has none.
        rows: of the table. A group's tokens then count from its number times this.

    Returns:
        None if no group has any.
    """
    numbers = [number for number, of_group in enumerate(entries) if of_group is not None]
    found = [of_group for of_group in entries if of_group is not None]
    if not found:
        return None
    before = torch.tensor([0, *(of_group.values.numel() for of_group in found)]).cumsum(0).tolist()
    return EmbeddingEntries(
        torch.cat([of_group.rows + number * rows for number, of_group in zip(numbers, found, strict=True)]),
        torch.cat([of_group.starts + start for of_group, start in zip(found, before, strict=False)]),
        *(torch.cat([of_group[field] for of_group in found]) for field in (2, 3, 4)),
    )
