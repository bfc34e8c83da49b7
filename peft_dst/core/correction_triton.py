"""Device code of `correct_stacked`, in Triton. Nothing imports it before there is something to correct on a GPU."""

# Type annotations other than tl.constexpr would be taken by Triton for the types of a kernel's arguments.
# mypy: disable-error-code="no-untyped-def, type-arg"

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor


if TYPE_CHECKING:
    from .stacking import Bags

# Rows that a program corrects.
LANES = 64


# What is another number in each batch would have it compiled anew.
@triton.jit(do_not_specialize=["sums", "columns", "entries", "rows"])
def _correct(
    output, input, groups_outputs, starts, groups_columns, inputs, differences,
    sums, columns, entries, rows, width_out, width_in,
    LANES: tl.constexpr,
):  # fmt: skip
    """One sum (program 0) for LANES rows (program 1): its entries one after the other, so no two programs share a place."""
    bag = tl.program_id(0)
    row = tl.program_id(1) * LANES + tl.arange(0, LANES)
    within = row < rows
    group = tl.load(groups_outputs + bag)
    start = tl.load(starts + bag)
    end = tl.load(starts + bag + 1, mask=bag + 1 < sums, other=entries)
    total = tl.zeros([LANES], dtype=differences.dtype.element_ty)
    base = input + (group * rows + row) * width_in
    for entry in range(start, end):
        column = tl.load(groups_columns + columns + tl.load(inputs + entry))
        total += tl.load(base + column, mask=within, other=0).to(total.dtype) * tl.load(differences + entry)
    place = output + (group * rows + row) * width_out + tl.load(groups_outputs + sums + bag)
    # As the plain twin: the sum is rounded to the output's dtype before it is added. (The interpreter cannot add bfloat16.)
    before = tl.load(place, mask=within, other=0)
    after = before.to(total.dtype) + total.to(before.dtype).to(total.dtype)
    tl.store(place, after.to(before.dtype), mask=within)


def correct(outputs: Tensor, inputs: Tensor, bags: Bags) -> None:
    """Correct outputs (groups, rows, outputs), contiguous, given inputs (groups, rows, inputs), in place."""
    _, rows, width = inputs.shape
    sums = bags.starts.numel()
    with torch.cuda.device(outputs.device) if outputs.is_cuda else contextlib.nullcontext():
        _correct[(sums, triton.cdiv(rows, LANES))](
            outputs, inputs.contiguous(), bags.outputs, bags.starts, bags.columns, bags.inputs,
            bags.differences, sums, bags.columns.shape[1], bags.inputs.numel(), rows, outputs.shape[-1], width,
            LANES=LANES,
        )  # fmt: skip
