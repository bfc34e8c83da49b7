"""Corrections of several groups of samples in one call, whatever their number."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
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


class DifferenceTable:
    """Linear differences of one layer, by whatever tells them apart; made once for any number of batches.

    Args:
        differences: by name; at least one.
        width: number of the layer's outputs.
    """

    def __init__(self, differences: Mapping[Hashable, LinearDifference], width: int) -> None:
        self.differences, self.width = differences, width
        self.dtype = next(iter(differences.values())).differences.dtype
        #: Entries of the largest one.
        self.most = max(one.inputs.numel() for one in differences.values())

    def of(self, names: Sequence[Hashable]) -> StackedDifference | None:
        """For groups of rows, each with the difference of a name, or none; None if there is nothing to correct."""
        found = {group: self.differences[name] for group, name in enumerate(names) if name in self.differences}
        return StackedDifference(self, names, found) if any(one.inputs.numel() for one in found.values()) else None

    @cached_property
    def padded(self) -> Padded:
        """A row for each of them, and last one without any. What is padded adds zero times the first input to the first
        output.
        """
        count = len(self.differences)
        outputs, inputs = (torch.zeros(count + 1, self.most, dtype=torch.int64) for _ in range(2))
        differences = torch.zeros(count + 1, self.most, dtype=self.dtype)
        for row, one in enumerate(self.differences.values()):
            size = one.inputs.numel()
            outputs[row, :size], inputs[row, :size] = one.places
            differences[row, :size] = one.differences
        return Padded(outputs, inputs, differences)

    @cached_property
    def rows(self) -> dict[Hashable, int]:
        """Their rows there."""
        return {name: row for row, name in enumerate(self.differences)}


class StackedDifference:
    """Linear differences of several groups of rows; made by a table.

    Attributes:
        groups: how many there are.
        pads: whether `padded` is to be used on the CPU.
    """

    def __init__(
        self, table: DifferenceTable, names: Sequence[Hashable], found: Mapping[int, LinearDifference]
    ) -> None:
        self._table, self._names, self._found = table, names, found
        self.groups, self.dtype = len(names), table.dtype
        #: Rows are then gone through one by one, each of which stays in the first-level cache. Where many entries share
        #: an output, or groups are of very different sizes, sums over bags of entries are faster (docs/LOG.md).
        total = sum(one.inputs.numel() for one in found.values())
        self.pads = table.most <= table.width and table.most * self.groups <= 2 * total

    @cached_property
    def padded(self) -> Padded:
        """A row for each group."""
        last = len(self._table.rows)
        rows = torch.tensor([self._table.rows.get(name, last) for name in self._names])
        return Padded(*(tensor[rows] for tensor in self._table.padded))

    @cached_property
    def bags(self) -> Bags:
        """Any entries, on any device."""
        found = list(self._found.values())
        device = found[0].inputs.device
        sizes = [(one.outputs.numel(), one.columns.numel(), one.inputs.numel()) for one in found]
        # Their sums are known here, so that nobody waits for the device to find them.
        sums, multiplied, total = map(sum, zip(*sizes, strict=True))
        groups = torch.tensor(list(self._found), device=device)
        outputs, columns, entries = torch.tensor(sizes, device=device).unbind(1)
        # Where the entries and the columns of each begin, when they follow each other.
        entry, column = entries.cumsum(0) - entries, columns.cumsum(0) - columns
        return Bags(
            torch.stack(
                [groups.repeat_interleave(outputs, output_size=sums), torch.cat([one.outputs for one in found])]
            ),
            torch.cat([one.starts for one in found]) + entry.repeat_interleave(outputs, output_size=sums),
            torch.stack(
                [groups.repeat_interleave(columns, output_size=multiplied), torch.cat([one.columns for one in found])]
            ),
            torch.cat([one.inputs for one in found]) + column.repeat_interleave(entries, output_size=total),
            torch.cat([one.differences for one in found]),
        )


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
        torch.cat([of_group.counts for of_group in found]),
        torch.cat([of_group.columns for of_group in found]),
        torch.cat([of_group.values for of_group in found]),
    )
