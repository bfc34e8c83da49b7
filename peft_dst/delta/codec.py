"""Strictly ascending positions as few bytes: gaps in a Golomb-like code whose parameter follows the data.

What is coded is the gap before each position, the number of components skipped: `g[0] = p[0]` and
`g[i] = p[i] - p[i-1] - 1`. On uniformly random positions, up to a tenth of all, it takes some 3 % more bits at worst than
the entropy: their gaps are geometric, for which Rice's code is good, and for small quotients this is Rice's code. Where
positions crowd into some rows or columns, the parameter, chosen per block of 256, falls; and a jump from one crowd to the
next costs bits in the logarithm of its length, not in the length. `benchmarks/codec.py` measures both.

The bytes, for another implementation, are described in docs/format.md, "The code of positions".
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .records import DeltaError


#: Components that a tensor may have at most.
MAX_COMPONENTS = 2**40
BLOCK = 1 << 8
# Entries that are coded together: their temporaries stay in the cache.
SEGMENT = 1 << 14
MAX_WIDTH = 40
# Quotients up to this one have a class of their own.
LINEAR = 3
_MAX_CLASS = LINEAR + MAX_WIDTH
_VARINT_BYTES = 6

Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]


def _expected_bits() -> NDArray[np.float64]:
    """Half bits that a gap costs, by its number of binary digits (row) and the block's width (column): (41, 41)."""
    d = np.arange(MAX_WIDTH + 1)[:, None] - np.arange(MAX_WIDTH + 1)
    near = np.array([2, 4, 7, 14, 19])
    return np.where(d < len(near), near[np.clip(d, 0, len(near) - 1)], 4 * d + 4) + 2.0 * np.arange(MAX_WIDTH + 1)


_EXPECTED_BITS = _expected_bits()
_BLOCK_OF = np.arange(SEGMENT) // BLOCK


def encode_indices(indices: Tensor, n: int) -> Tensor:
    """Code positions as bytes.

    Args:
        indices: strictly ascending, 0 ≤ position < n; int32 or int64 (k,).
        n: components of the tensor they lie in, at most 2^40. It is not stored, and the bytes do not depend on it.

    Returns:
        uint8 (bytes,), on the CPU.

    Raises:
        ValueError: if the positions are not of this form.
    """
    _check_n(n)
    if indices.dtype not in (torch.int32, torch.int64) or indices.dim() != 1:
        raise ValueError(
            f"indices are {indices.dtype} of shape {tuple(indices.shape)}; expected a vector of int32 or int64."
        )
    positions = indices.detach().cpu().numpy()
    parts = [_varint(len(positions))]
    last = -1
    for start in range(0, len(positions), SEGMENT):
        ahead = positions[start : start + SEGMENT].astype(np.int64)
        wrong = (ahead < 0) | (ahead >= n)
        if wrong.any():
            at = int(wrong.argmax())
            raise ValueError(f"entry {start + at} has position {ahead[at]}, outside a tensor of {n:,} components.")
        gaps = np.diff(ahead, prepend=last) - 1
        if gaps.min() < 0:
            at = start + int((gaps < 0).argmax())
            raise ValueError(f"positions are not strictly ascending at entry {at}. Sort them, and drop repeated ones.")
        parts += _encode_segment(gaps)
        last = int(ahead[-1])
    return torch.from_numpy(np.concatenate(parts))


def decode_indices(data: Tensor, n: int = MAX_COMPONENTS, count: int | None = None) -> Tensor:
    """Read positions back. The bytes may be anything: they are checked, and before memory is taken for what they announce.

    Args:
        data: what `encode_indices` made, uint8 (bytes,).
        n: components of the tensor that the positions must lie in.
        count: how many positions there must be; any number if not given.

    Returns:
        Strictly ascending positions below n, int64 (k,), on the CPU.

    Raises:
        DeltaError: if the bytes are not of this format or hold another number of positions, or one is not below n; names
            the byte.
    """
    _check_n(n)
    if data.dtype != torch.uint8 or data.dim() != 1:
        raise DeltaError(
            f"coded positions are {data.dtype} of shape {tuple(data.shape)}; expected a vector of uint8. The file is "
            "not a DST adapter of this format; save the adapter again."
        )
    reader = _Reader(data.detach().cpu().contiguous().numpy())
    at = reader.at
    k = reader.varint()
    if count is not None and k != count:
        reader.fail(at, f"{k:,} positions are announced, where there should be {count:,}")
    if k > n:
        reader.fail(at, f"{k:,} positions are announced, in a tensor of {n:,} components")
    if k > 8 * reader.left:  # each costs at least one bit
        reader.fail(at, f"{k:,} positions are announced, more than the {reader.left:,} bytes that follow can hold")
    positions = np.empty(k, np.int64)
    last = -1
    for start in range(0, k, SEGMENT):
        at = reader.at
        ahead = positions[start : start + SEGMENT]
        gaps = _decode_segment(reader, len(ahead))
        gaps += 1
        gaps[0] += last
        # Below 2^14 x 2^42: no overflow, and ascending because no gap is negative.
        np.cumsum(gaps, out=ahead)
        last = int(ahead[-1])
        if last >= n:
            entry = int(np.searchsorted(ahead, n))
            reader.fail(at, f"entry {start + entry} has position {ahead[entry]}, outside a tensor of {n:,} components")
    if reader.left:
        reader.fail(reader.at, f"{reader.left:,} bytes follow the last position")
    return torch.from_numpy(positions)


def _check_n(n: int) -> None:
    if not 0 <= n <= MAX_COMPONENTS:
        raise ValueError(f"n is {n}; a tensor has between 0 and 2^40 components.")


def _varint(number: int) -> Bytes:
    digits = []
    while number >= 128:
        digits.append(number % 128 + 128)
        number //= 128
    return np.array([*digits, number], np.uint8)


class _Reader:
    """Bytes, and how far they have been read."""

    def __init__(self, data: Bytes):
        self.data = data
        self.at = 0

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def fail(self, at: int, what: str) -> NoReturn:
        raise DeltaError(f"coded positions, byte {at}: {what}. The file is damaged; save or download it again.")

    def take(self, count: int, what: str) -> Bytes:
        if count > self.left:
            self.fail(self.at, f"{what} of {count:,} bytes should begin here, but {self.left:,} are left")
        self.at += count
        return self.data[self.at - count : self.at]

    def varint(self) -> int:
        start, number, digit = self.at, 0, 128
        while digit >= 128:
            place = self.at - start
            if place == _VARINT_BYTES:
                self.fail(start, f"a number of more than {_VARINT_BYTES} bytes")
            if not self.left:
                self.fail(start, "the data end within the number that should begin here")
            digit = int(self.data[self.at])
            number |= (digit & 127) << 7 * place
            self.at += 1
        if not digit and place:
            self.fail(start, "a number with leading zeros")
        return number


def _floor_log2(numbers: Ints) -> Ints:
    """Of int64 below 2^53 (m,): exact, from the exponent of a float64; something negative for those below 1."""
    return (numbers.astype(np.float64).view(np.int64) >> 52) - 1023


def _choose_widths(gaps: Ints) -> Bytes:
    """The width of each block, uint8 (blocks,), for gaps int64 (m,): see the module's docstring."""
    digits = np.maximum(_floor_log2(gaps), -1) + 1
    blocks = -(-len(gaps) // BLOCK)
    digits += _BLOCK_OF[: len(gaps)] * (MAX_WIDTH + 1)
    histogram = np.bincount(digits, minlength=blocks * (MAX_WIDTH + 1)).reshape(blocks, -1)
    # Small integers: exact in float64.
    return (histogram.astype(np.float64) @ _EXPECTED_BITS).argmin(1).astype(np.uint8)


def _encode_segment(gaps: Ints) -> list[Bytes]:
    widths = _choose_widths(gaps)
    b = np.repeat(widths.astype(np.int64), BLOCK)[: len(gaps)]
    quotients = gaps >> b
    exponents = np.maximum(_floor_log2(quotients - 2), 0)
    np.minimum(quotients, LINEAR, out=quotients)
    lows = quotients + (1 << exponents) - 1
    unary = _mark(np.cumsum(quotients + exponents + 1) - 1)
    return [_varint(len(unary)), widths, unary, _pack(gaps - (lows << b), b + exponents)]


def _decode_segment(reader: _Reader, m: int) -> Ints:
    """The gaps of the segment that begins here, int64 (m,)."""
    at = reader.at
    size = reader.varint()
    if not m <= 8 * size <= (_MAX_CLASS + 1) * m + 7:
        reader.fail(at, f"a unary part of {size:,} bytes for {m:,} positions")
    at = reader.at
    widths = reader.take(-(-m // BLOCK), "widths")
    if widths.max() > MAX_WIDTH:
        at += int((widths > MAX_WIDTH).argmax())
        reader.fail(at, f"a width of {widths.max()} bits, more than {MAX_WIDTH}")
    at = reader.at
    unary = reader.take(size, "a unary part")
    ones = np.flatnonzero(np.unpackbits(unary, bitorder="little").view(np.bool_))
    if len(ones) != m or not unary[-1]:
        reader.fail(at, f"a unary part of {len(ones):,} positions in {size:,} bytes, where {m:,} should just fill it")
    classes = np.diff(ones, prepend=-1) - 1
    exponents = np.maximum(classes - LINEAR, 0)
    b = np.repeat(widths.astype(np.int64), BLOCK)[:m]
    bits = b + exponents
    if bits.max() > MAX_WIDTH:
        entry = int((bits > MAX_WIDTH).argmax())
        reader.fail(at + int(ones[entry]) // 8, f"a gap of more than {MAX_WIDTH} binary digits")
    lows = classes - exponents + (1 << exponents) - 1
    return (lows << b) + _unpack(reader, bits)


def _mark(ones: Ints) -> Bytes:
    """A bit vector, uint8, that has these bits set and ends with the last of them."""
    bits = np.zeros(int(ones[-1]) + 1, np.uint8)
    bits[ones] = 1
    return np.packbits(bits, bitorder="little")


def _pack(values: Ints, bits: Ints) -> Bytes:
    """A bit vector, uint8, of numbers of so many bits each, lowest first; both int64 (m,)."""
    ends = np.cumsum(bits)
    size = int(ends[-1])
    # One word more, where a number of no bits may begin.
    words = np.zeros(size // 64 + 1, np.uint64)
    starts = ends - bits
    word, shift = starts >> 6, (starts & 63).astype(np.uint64)
    numbers = values.view(np.uint64)
    # Their bits do not overlap: a sum is as good as an or, and faster.
    np.add.at(words, word, numbers << shift)
    # What did not fit goes into the next word; at most one number crosses into each.
    over = np.flatnonzero((ends - 1) >> 6 > word)
    words[word[over] + 1] |= numbers[over] >> (np.uint64(64) - shift[over])
    return words.astype("<u8").view(np.uint8)[: -(-size // 8)]


def _unpack(reader: _Reader, bits: Ints) -> Ints:
    """The numbers of so many bits each, int64 (m,), from the bit vector that begins here."""
    at = reader.at
    ends = np.cumsum(bits)
    size = int(ends[-1])
    packed = reader.take(-(-size // 8), "remainders")
    if size % 8 and packed[-1] >> size % 8:
        reader.fail(at + len(packed) - 1, "bits that should be 0 behind the remainders")
    padded = np.zeros(len(packed) + 8, np.uint8)
    padded[: len(packed)] = packed
    # The 64 bits from each byte on: a number of 40 bits lies within those from the byte where it begins.
    windows: NDArray[Any] = np.ndarray(len(packed) + 1, "<u8", padded, strides=(1,))
    starts = ends - bits
    numbers = windows[starts >> 3].astype(np.uint64) >> (starts & 7).astype(np.uint64)
    return numbers.view(np.int64) & ((1 << bits) - 1)
