"""Device code of the fused step, in Triton; `kernels` calls it, and holds the same formulas in plain torch.

A batch of tensors is described by a table, so that one launch serves them all. `table` is int64 of shape (T, 8), with
the columns below, and `scalars` float32 of shape (T, 7), the fields of `adamw.AdamWScalars` in their order. Every
offset into a tensor is computed in int64.

Weights and gradients are read as bit patterns and widened here: a marked weight is known by its bits, and the
interpreter's own widening of bfloat16 is wrong for subnormal numbers.
"""

# Type annotations other than tl.constexpr would be taken by Triton for the types of a kernel's arguments.
# mypy: disable-error-code="no-untyped-def, type-arg"

from __future__ import annotations

import triton
import triton.language as tl
from torch.torch_version import TorchVersion


# Columns of the table: four addresses, the number of components, the first slot among the block maxima, and the first
# program of the launch that updates the tensor. (The eighth, the first component within the batch, is the host's.)
GRAD, EXP_AVG, EXP_AVG_SQ, WEIGHT, NUMEL, FIRST_SLOT, FIRST_TILE = (tl.constexpr(i) for i in range(7))
COLUMNS = tl.constexpr(8)
SCALARS = tl.constexpr(7)
# Lanes of a program of the kernels that work on single entries.
LANES = tl.constexpr(256)
# 2^-100, as `distances.RELATIVE_FLOOR`; written out, for kernels may read no global that is not a constexpr.
FLOOR = tl.constexpr(2.0**-100)


def rounds_as_torch() -> bool:
    """Whether this Triton does. Up to 3.5, torch 2.9's, division and square root flush the subnormal (`div.rn.ftz`)."""
    return TorchVersion(triton.__version__) >= "3.6"


@triton.jit
def _address(table, tensor, column, start, unit: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to the component `start` (int64) of a tensor, from the table."""
    pointer = tl.load(table + tensor * COLUMNS + column).to(tl.pointer_type(unit))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start


@triton.jit
def _remaining(table, tensor, start, LIMIT: tl.constexpr, ALIGNED: tl.constexpr):
    """Components of a tensor from `start` (int64) on, at most LIMIT, int32."""
    left = tl.minimum(tl.load(table + tensor * COLUMNS + NUMEL) - start, LIMIT).to(tl.int32)
    if ALIGNED:
        # Blocks may be shorter than 16.
        left = tl.multiple_of(left, min(16, LIMIT))
    return left


@triton.jit
def _load_bits(table, tensor, column, start, offsets, mask, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Bit patterns of a float32, bfloat16 or float16 tensor, int32 or int16."""
    if DTYPE == "float32":
        pointer = _address(table, tensor, column, start, tl.int32, ALIGNED)
    else:
        pointer = _address(table, tensor, column, start, tl.int16, ALIGNED)
    return tl.load(pointer + offsets, mask=mask, other=0)


@triton.jit
def _widen(bits, DTYPE: tl.constexpr):
    """Values, float32, of bit patterns; exact."""
    if DTYPE == "float32":
        values = bits.to(tl.float32, bitcast=True)
    elif DTYPE == "bfloat16":
        values = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        values = bits.to(tl.float16, bitcast=True).to(tl.float32)
    return values


@triton.jit
def _moments(scalars, g, m, v):
    """Updated first and second moment."""
    lerp, beta2, weight2 = tl.load(scalars + 1), tl.load(scalars + 2), tl.load(scalars + 3)
    base = tl.where(lerp > 0, m, g)
    return base + lerp * (g - m), v * beta2 + weight2 * (g * g)


@triton.jit
def _updated(scalars, p, m, v):
    """θ̂ from θt and the updated moments; scalars may be one pointer, or one for each component."""
    decay, correction, eps, step = tl.load(scalars), tl.load(scalars + 4), tl.load(scalars + 5), tl.load(scalars + 6)
    denominator = tl.div_rn(tl.sqrt_rn(v), correction + tl.zeros_like(v)) + eps
    return p * decay + step * tl.div_rn(m, denominator)


@triton.jit
def _distance_bits(seed, updated, KIND: tl.constexpr):
    """Bit patterns, int32, of Δ: as Δ >= 0 they are ordered as Δ is, and NaN above infinity above all else."""
    delta = updated - seed
    if KIND == "inverse_relative":
        delta = delta * seed
    elif KIND == "relative":
        delta = tl.div_rn(delta, tl.maximum(tl.abs(seed), FLOOR))
    return delta.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def adamw_maxima(
    tile_tensor,
    table,
    scalars,
    maxima,
    KIND: tl.constexpr,
    GRADS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Update the moments of one tile, ROWS blocks of BLOCK components, and store the largest Δ of each block.

    * tile_tensor: tensor that each program works on, int32 (programs,)
    * maxima: bits of the maxima of all tensors, int32; each tensor's begin at its first slot
    """
    tensor = tl.load(tile_tensor + tl.program_id(0)).to(tl.int64)
    tile = tl.program_id(0) - tl.load(table + tensor * COLUMNS + FIRST_TILE)
    start = tile * (ROWS * BLOCK)
    left = _remaining(table, tensor, start, ROWS * BLOCK, ALIGNED)
    rows = tl.arange(0, ROWS)
    at = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = at < left
    g = _widen(_load_bits(table, tensor, GRAD, start, at, inside, GRADS, ALIGNED), GRADS)
    first = _address(table, tensor, EXP_AVG, start, tl.float32, ALIGNED) + at
    second = _address(table, tensor, EXP_AVG_SQ, start, tl.float32, ALIGNED) + at
    own = scalars + tensor * SCALARS
    m, v = _moments(own, g, tl.load(first, mask=inside, other=0.0), tl.load(second, mask=inside, other=0.0))
    tl.store(first, m, mask=inside)
    tl.store(second, v, mask=inside)
    bits = _load_bits(table, tensor, WEIGHT, start, at, inside, WEIGHTS, ALIGNED)
    p = _widen(bits, WEIGHTS)
    delta = _distance_bits(p, _updated(own, p, m, v), KIND)
    delta = tl.where(inside & (bits != -1), delta, 0)
    slot = maxima + (tl.load(table + tensor * COLUMNS + FIRST_SLOT) + tile * ROWS) + rows
    tl.store(slot, tl.max(delta, axis=1), mask=rows * BLOCK < left)


@triton.jit
def candidates(
    marked_tensor,
    marked_block,
    marked_bound,
    tensor_group,
    table,
    scalars,
    distances,
    values,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Recompute one marked block of a tensor of this group, from its updated moments.

    * marked_tensor, marked_block, marked_bound: tensor (int64), block within it (int64) and bits of the bound (int32)
      of each marked block, each (programs,)
    * tensor_group: group of each tensor, int32 (T,)
    * distances: where the bits of Δ go, int32 (programs, BLOCK); 0 for what does not reach the bound
    * values: where θ̂ goes, float32 (programs, BLOCK); only written where the bound is reached
    """
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(marked_tensor + program)
    if tl.load(tensor_group + tensor) != GROUP:
        return
    start = tl.load(marked_block + program) * BLOCK
    at = tl.arange(0, BLOCK)
    inside = at < _remaining(table, tensor, start, BLOCK, ALIGNED)
    m = tl.load(_address(table, tensor, EXP_AVG, start, tl.float32, ALIGNED) + at, mask=inside, other=0.0)
    v = tl.load(_address(table, tensor, EXP_AVG_SQ, start, tl.float32, ALIGNED) + at, mask=inside, other=0.0)
    bits = _load_bits(table, tensor, WEIGHT, start, at, inside, WEIGHTS, ALIGNED)
    p = _widen(bits, WEIGHTS)
    updated = _updated(scalars + tensor * SCALARS, p, m, v)
    delta = _distance_bits(p, updated, KIND)
    hit = inside & (bits != -1) & (delta >= tl.load(marked_bound + program))
    out = program * BLOCK + at
    tl.store(distances + out, tl.where(hit, delta, 0))
    tl.store(values + out, updated, mask=hit)


@triton.jit
def incumbents(tensors, indices, seeds, masters, table, scalars, slots, maxima, values, count, KIND: tl.constexpr):
    """θ̂ and Δ of the current subset, from seeds, float32 values and the updated moments.

    * tensors, indices: tensor and flat position of each entry, int64 (count,)
    * seeds, masters: seed and value, float32 (count,)
    * slots: where in `maxima` the bits of Δ go, int64 (count,)
    * values: where θ̂ goes, float32 (count,)
    """
    entry = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = entry < count
    tensor = tl.load(tensors + entry, mask=inside, other=0)
    index = tl.load(indices + entry, mask=inside, other=0)
    first = tl.load(table + tensor * COLUMNS + EXP_AVG).to(tl.pointer_type(tl.float32)) + index
    second = tl.load(table + tensor * COLUMNS + EXP_AVG_SQ).to(tl.pointer_type(tl.float32)) + index
    seed = tl.load(seeds + entry, mask=inside, other=0.0)
    theta = tl.load(masters + entry, mask=inside, other=0.0)
    m, v = tl.load(first, mask=inside, other=0.0), tl.load(second, mask=inside, other=0.0)
    updated = _updated(scalars + tensor * SCALARS, theta, m, v)
    slot = tl.load(slots + entry, mask=inside, other=0)
    tl.store(maxima + slot, _distance_bits(seed, updated, KIND), mask=inside)
    tl.store(values + entry, updated, mask=inside)


@triton.jit
def _single_weights(tensors, indices, tensor_wide, table, inside):
    """Where single weights stand, as 4 bytes and as 2, and which of the two they are (LANES,)."""
    tensor = tl.load(tensors, mask=inside, other=0)
    index = tl.load(indices, mask=inside, other=0)
    address = tl.load(table + tensor * COLUMNS + WEIGHT)
    is_wide = tl.load(tensor_wide + tensor) != 0
    return address.to(tl.pointer_type(tl.int32)) + index, address.to(tl.pointer_type(tl.int16)) + index, is_wide


@triton.jit
def read_weights(tensors, indices, tensor_wide, table, found, count):
    """Tell the bit patterns of single weights.

    * tensors, indices: tensor and flat position of each entry, int64 (count,)
    * tensor_wide: 1 for each tensor of 4 bytes a component, 0 for one of 2, int32 (T,)
    * found: where the bits go, int32 (count,); of a narrow weight in the lower half
    """
    entry = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = entry < count
    wide_at, narrow_at, is_wide = _single_weights(tensors + entry, indices + entry, tensor_wide, table, inside)
    narrow = tl.load(narrow_at, mask=inside & (is_wide == 0), other=0).to(tl.int32)
    tl.store(found + entry, tl.where(is_wide, tl.load(wide_at, mask=inside & is_wide, other=0), narrow), mask=inside)


@triton.jit
def write_weights(tensors, indices, tensor_wide, table, new, count):
    """Write bit patterns over single weights: `new`, as `read_weights` tells them."""
    entry = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = entry < count
    wide_at, narrow_at, is_wide = _single_weights(tensors + entry, indices + entry, tensor_wide, table, inside)
    written = tl.load(new + entry, mask=inside, other=0)
    tl.store(wide_at, written, mask=inside & is_wide)
    tl.store(narrow_at, written.to(tl.int16), mask=inside & (is_wide == 0))
