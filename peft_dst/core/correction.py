"""What a few changed entries of a weight change in a layer's output, for outputs that the seed has already produced.

A matrix multiplication with the tuned weight is that with the seed plus one with a very sparse difference; a look-up in a
tuned embedding is one in the seed with a few entries replaced. So one dense pass with the seed serves a whole batch, and
each adapter's share of it is corrected afterwards.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .distances import wide_dtype


# Rows of an input that are corrected together on the CPU. A column of that many then stays in the first-level cache while
# every output that needs it adds it up. Three to ten times faster than all rows at once (MiniLM's and BERT's matrices).
ROWS = 128


class LinearDifference(NamedTuple):
    """How a linear layer's weight differs from the seed, by outputs.

    Attributes:
        outputs: the outputs that have an entry, int64 (m,), ascending.
        starts: where the entries of each of them begin, int64 (m,).
        columns: the inputs that an entry multiplies, int64 (c,), ascending.
        inputs: which of these each entry does, int64 (k,), in the order of their outputs.
        differences: value − seed of each, (k,) in float32, or float64 for a float64 weight.
        places: its output and its input, int64 (2, k).
    """

    outputs: Tensor
    starts: Tensor
    columns: Tensor
    inputs: Tensor
    differences: Tensor
    places: Tensor


def linear_difference(
    indices: Tensor, values: Tensor, seeds: Tensor, shape: tuple[int, int], inputs_first: bool = False
) -> LinearDifference:
    """Arrange a record for `correct_linear`; done once for as many calls as one likes.

    Args:
        indices: sorted flat positions in the weight, int64 or int32 (k,).
        values: the new values there, floating (k,).
        seeds: the seed's values there, floating (k,).
        shape: the weight's; (outputs, inputs) as in nn.Linear,
        inputs_first: or (inputs, outputs), as in transformers' Conv1D.
    """
    wide = wide_dtype(values)
    differences = values.to(wide) - seeds.to(wide)
    first, second = indices.long() // shape[1], indices.long() % shape[1]
    if inputs_first:
        order = second.argsort(stable=True)
        first, second, differences = second[order], first[order], differences[order]
    outputs, counts = first.unique_consecutive(return_counts=True)
    columns, inputs = second.unique(return_inverse=True)
    places = torch.stack([first, second])
    return LinearDifference(outputs, counts.cumsum(0) - counts, columns, inputs, differences, places)


def correct_linear(output: Tensor, input: Tensor, difference: LinearDifference) -> None:
    """Make the output of a linear layer with the seed's weight that with the tuned weight, in place.

    Within rounding of the layer's own result: the sums are the same, in another order, and the difference is added up in
    float32 whatever the output's dtype. Autograd follows it back to the input.

    Args:
        output: floating (..., outputs), a view if it is part of a larger one; changed where there is an entry.
        input: floating (..., inputs), what the layer was given.
        difference: of its weight.
    """
    if not difference.differences.numel() or not output.numel():
        return
    rows = max(1, input.numel() // input.shape[-1])
    step = ROWS if input.is_cpu else rows
    inputs, flat = input.reshape(rows, -1), output.view(rows, -1)
    for start in range(0, rows, step):
        columns = inputs[start : start + step].t().index_select(0, difference.columns)
        # A bag is an output, which adds up the columns of its entries.
        sums = functional.embedding_bag(
            difference.inputs,
            columns.to(difference.differences.dtype),
            difference.starts,
            mode="sum",
            per_sample_weights=difference.differences,
        )
        flat[start : start + step].index_add_(1, difference.outputs, sums.t().to(output.dtype))


class EmbeddingEntries(NamedTuple):
    """The new values in an embedding, by rows.

    Attributes:
        rows: the rows (tokens) that have an entry, int64 (m,), ascending.
        starts: where the entries of each of them begin, int64 (m,).
        counts: how many each has, int64 (m,).
        columns: the column of each entry, int64 (k,).
        values: the new value of each, (k,).
    """

    rows: Tensor
    starts: Tensor
    counts: Tensor
    columns: Tensor
    values: Tensor


def embedding_entries(indices: Tensor, values: Tensor, shape: tuple[int, int]) -> EmbeddingEntries:
    """Arrange a record for `correct_embedding`.

    Args:
        indices: sorted flat positions in the weight, int64 or int32 (k,).
        values: the new values there, floating (k,).
        shape: the weight's, (rows, columns).
    """
    rows, counts = (indices.long() // shape[1]).unique_consecutive(return_counts=True)
    return EmbeddingEntries(rows, counts.cumsum(0) - counts, counts, indices.long() % shape[1], values)


def correct_embedding(output: Tensor, tokens: Tensor, entries: EmbeddingEntries) -> None:
    """Make what was looked up in the seed what stands in the tuned weight, in place. Exact.

    Args:
        output: floating (..., columns), a view if it is part of a larger one.
        tokens: the rows that were looked up, integers (...).
        entries: of the tuned weight.
    """
    if not entries.values.numel() or not tokens.numel():
        return
    tokens = tokens.reshape(-1)
    slots = torch.searchsorted(entries.rows, tokens).clamp_max_(entries.rows.numel() - 1)
    found = (entries.rows[slots] == tokens).nonzero().flatten()
    slots = slots[found]
    counts = entries.counts[slots]
    # Every token found takes all entries of its row: number them through, from where the row begins.
    ends = counts.cumsum(0)
    total = int(counts.sum())
    number = torch.arange(total, device=tokens.device) + (entries.starts[slots] - (ends - counts)).repeat_interleave(
        counts, output_size=total
    )
    places = found.repeat_interleave(counts, output_size=total), entries.columns[number]
    output.view(-1, output.shape[-1])[places] = entries.values[number].to(output.dtype)
