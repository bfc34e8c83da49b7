"""Coded indices: the bytes are those of the module's docstring, few, and harmless whatever they hold."""

from __future__ import annotations

import math
import tracemalloc
from functools import partial

import numpy as np
import pytest
import torch

from peft_dst.delta import MAX_COMPONENTS, DeltaError, decode_indices, encode_indices


def varint(number):
    return bytes([number]) if number < 128 else bytes([number % 128 + 128]) + varint(number // 128)


def bit_vector(bits):
    return int("0" + bits[::-1], 2).to_bytes(-(-len(bits) // 8), "little")


def cost(gap, b):
    d = gap.bit_length() - b
    return 2 * b + (2 if d <= 0 else [2, 4, 7, 14, 19][d] if d < 5 else 4 * d + 4)


def reference_encode(positions, widths=None):
    """The plain twin: to these bytes, with the widths given or those that the writer shall choose."""
    gaps = [p - q - 1 for p, q in zip(positions, [-1, *positions], strict=False)]
    out = varint(len(gaps))
    for start in range(0, len(gaps), 16384):
        segment, chosen, unary, remainders = gaps[start : start + 16384], [], "", ""
        for first in range(0, len(segment), 256):
            block = segment[first : first + 256]
            b = min(range(41), key=lambda b, block=block: sum(cost(gap, b) for gap in block))
            b = b if widths is None else widths[(start + first) // 256]
            chosen.append(b)
            for gap in block:
                q = gap >> b
                j = int(math.log2(q - 2)) if q > 3 else 0
                low, c = (q, q) if q < 4 else (2 + 2**j, 3 + j)
                unary += "0" * c + "1"
                remainders += f"{gap - (low << b):0{b + j}b}"[::-1][: b + j]
        part = bit_vector(unary)
        out += varint(len(part)) + bytes(chosen) + part + bit_vector(remainders)
    return out


def reference_decode(data):
    """Positions and widths, of bytes that are taken to be good."""
    data, positions, widths = iter(data), [], []

    def number():
        digit = next(data)
        return digit if digit < 128 else digit - 128 + 128 * number()

    def bits():
        for byte in data:
            yield from f"{byte:08b}"[::-1]

    k = number()
    while len(positions) < k:
        m = min(16384, k - len(positions))
        u = number()
        chosen = [next(data) for _ in range(-(-m // 256))]
        part = "".join(f"{next(data):08b}"[::-1] for _ in range(u))
        classes = [len(zeros) for zeros in part.split("1")[:m]]
        rest = bits()
        for i, c in enumerate(classes):
            b, j = chosen[i // 256], max(0, c - 3)
            remainder = sum(int(next(rest)) << place for place in range(b + j))
            low = c if c < 4 else 2 + 2**j
            positions.append((positions or [-1])[-1] + 1 + (low << b) + remainder)
        widths += chosen
    return positions, widths


def is_good(data, n):
    """Whether bytes are of the format: whether the plain twin, given what it reads in them, would write them."""
    try:
        positions, widths = reference_decode(data)
    except (StopIteration, RuntimeError, IndexError, RecursionError):  # at an end that comes too early
        return False
    if any(b > 40 for b in widths) or (positions and positions[-1] >= n):
        return False
    return reference_encode(positions, widths) == data


def coded(positions, n=MAX_COMPONENTS):
    return bytes(encode_indices(torch.tensor(positions, dtype=torch.int64), n).tolist())


def tensor(data):
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def samples(generator):
    """Ascending positions of many kinds."""
    yield "none", []
    yield "one", [5]
    yield "furthest", [0, MAX_COMPONENTS - 1]
    for epsilon in (1e-8, 1e-4, 1e-2, 0.1, 0.5, 1.0):
        for k in (1, 2, 255, 256, 257, 600):
            yield f"{epsilon:g}, {k}", (np.cumsum(generator.geometric(epsilon, k)) - 1).tolist()
    far = np.cumsum(1 + np.floor(2 ** generator.uniform(-1, 32, 255)).astype(np.int64)) - 1
    yield "all sizes of gaps", far.tolist()
    runs = np.flatnonzero(np.repeat(generator.random(400) < 0.05, 40))
    yield "runs", runs.tolist()


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def test_fast_equals_plain(generator):
    for name, positions in samples(generator):
        data = coded(positions)
        assert data == reference_encode(positions), name
        assert reference_decode(data)[0] == positions, name
        assert decode_indices(tensor(data)).tolist() == positions, name


def test_widths_are_those_that_the_writer_shall_choose(generator):
    """Short blocks of mixed gaps, where two widths often cost nearly the same."""
    for _ in range(500):
        gaps = np.floor(2 ** generator.uniform(-1, generator.uniform(1, 12), generator.integers(2, 12)))
        positions = (np.cumsum(gaps.astype(np.int64) + 1) - 1).tolist()
        assert coded(positions) == reference_encode(positions)


def test_several_segments(generator):
    positions = (np.cumsum(generator.geometric(0.02, 2 * 16384 + 300)) - 1).tolist()
    data = coded(positions)
    assert data == reference_encode(positions)
    assert decode_indices(tensor(data), positions[-1] + 1).tolist() == positions


@pytest.mark.parametrize(
    ("positions", "golden"),
    [
        ([], "00"),
        ([0], "01 01 00 01"),
        (range(10), "0a 02 00 ff03"),
        (range(300), "ac02 26 0000" + 37 * "ff" + "0f"),
        ([MAX_COMPONENTS - 1], "01 01 27 02 ffffffff7f"),
        # Gaps 0, 2, 3, 4, 999, width 2: 999 has quotient 249, class 3 + 7, remainder 999 - (130 << 2) of 9 bits.
        ([0, 3, 7, 12, 1012], "05 02 02 1780 38df01"),
    ],
)
def test_golden_bytes(positions, golden):
    golden = bytes.fromhex(golden)
    assert coded(list(positions)) == golden
    assert reference_encode(list(positions)) == golden
    assert decode_indices(tensor(golden)).tolist() == list(positions)


def entropy(epsilon):
    return (-epsilon * math.log2(epsilon) - (1 - epsilon) * math.log2(1 - epsilon)) / epsilon


@pytest.mark.parametrize("epsilon", [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.03, 0.06, 0.08, 0.1])
@pytest.mark.parametrize("k", [1000, 100_000])
def test_few_bits(generator, epsilon, k):
    """Within 3 % of the entropy; of a thousand within 5, as the header shows. Means over some draws."""
    draws = 300_000 // k
    taken = [len(coded(np.cumsum(generator.geometric(epsilon, k)) - 1)) for _ in range(draws)]
    assert 8 * sum(taken) / draws / k <= (1.03 if k > 1000 else 1.05) * entropy(epsilon)


@pytest.mark.parametrize("share", ["rows", "columns", "both"])
def test_fewer_bits_where_positions_are_clustered(generator, share):
    rows = (generator.random((20_000, 1)) < 0.05) if share == "rows" else np.ones((20_000, 1))
    columns = (np.arange(768) // 64 == 3) if share == "columns" else np.ones(768)
    weights = 0.1 * rows * columns
    if share == "both":
        weights = 0.004 * np.exp(generator.standard_normal((20_000, 1)) + 1.5 * generator.standard_normal((1, 768)))
    positions = np.flatnonzero(generator.random(weights.shape) < weights)
    assert 8 * len(coded(positions)) / len(positions) < entropy(len(positions) / weights.size)


def test_int32_and_int64_give_the_same_bytes():
    positions = torch.arange(0, 3000, 3)
    assert torch.equal(encode_indices(positions, 3000), encode_indices(positions.int(), 3000))
    assert decode_indices(encode_indices(positions.int(), 3000), 3000).dtype == torch.int64


@pytest.mark.parametrize(
    ("positions", "n", "match"),
    [
        (torch.tensor([1, 10]), 10, "entry 1 has position 10, outside a tensor of 10 components"),
        (torch.tensor([-1, 1]), 10, "entry 0 has position -1"),
        (torch.tensor([-(2**63), 2**63 - 1]), 10, "entry 0 has position -9223372036854775808"),
        (torch.tensor([1, 2, 2]), 10, "not strictly ascending at entry 2"),
        (torch.cat([torch.arange(16384), torch.tensor([16383])]), 10**6, "not strictly ascending at entry 16384"),
        (torch.tensor([[1]]), 10, r"torch.int64 of shape \(1, 1\)"),
        (torch.tensor([1.0]), 10, "indices are torch.float32"),
        (torch.tensor([1]), 2**40 + 1, "n is 1099511627777"),
    ],
)
def test_positions_that_cannot_be_coded_are_named(positions, n, match):
    with pytest.raises(ValueError, match=match):
        encode_indices(positions, n)


BAD = [
    ("", 10, "byte 0: the data end within the number"),
    ("80", 10, "byte 0: the data end within the number"),
    ("8000", 10, "byte 0: a number with leading zeros"),
    ("ffffffffffff01", MAX_COMPONENTS, "byte 0: a number of more than 6 bytes"),
    ("0b 02 00 ff07", 10, "byte 0: 11 positions are announced, in a tensor of 10 components"),
    ("ffffffff0f 01", MAX_COMPONENTS, "byte 0: 4,294,967,295 positions are announced, more than the 1 bytes"),
    ("00 00", 10, "byte 1: 1 bytes follow the last position"),
    ("0a 02 00 ff03 00", 10, "byte 5: 1 bytes follow the last position"),
    ("0a 01 00 ff", 10, "byte 1: a unary part of 1 bytes for 10 positions"),
    ("01 07 00 00000000000001", 99, "byte 1: a unary part of 7 bytes for 1 positions"),
    ("07 01", 10, "byte 2: widths of 1 bytes should begin here, but 0 are left"),
    ("0a 02 29 ff03", 10, "byte 2: a width of 41 bits, more than 40"),
    ("0a 02 00 ff", 10, "byte 3: a unary part of 2 bytes should begin here, but 1 are left"),
    ("0a 02 00 ff01", 10, "byte 3: a unary part of 9 positions in 2 bytes, where 10 should"),
    ("0a 02 00 ff07", 10, "byte 3: a unary part of 11 positions in 2 bytes, where 10 should"),
    ("0a 03 00 ff0300", 10, "byte 3: a unary part of 10 positions in 3 bytes, where 10 should just fill it"),
    ("01 06 01 000000000008 0000000000", 99, "byte 8: a gap of more than 40 binary digits"),
    ("01 01 27 02 ffffffff", MAX_COMPONENTS, "byte 4: remainders of 5 bytes should begin here, but 4 are left"),
    ("01 01 27 02 ffffffffff", MAX_COMPONENTS, "byte 8: bits that should be 0"),
    ("01 01 27 02 ffffffff7f", MAX_COMPONENTS - 1, "byte 1: entry 0 has position 1099511627775, outside"),
    ("05 02 02 1780 38df01", 1012, "byte 1: entry 4 has position 1012, outside a tensor of 1,012 components"),
]


@pytest.mark.parametrize(("data", "n", "match"), BAD)
def test_bad_bytes_are_named(data, n, match):
    data = bytes.fromhex(data)
    assert not is_good(data, n)
    with pytest.raises(DeltaError, match=match + ".*download it again"):
        decode_indices(tensor(data), n)


def test_a_tensor_of_another_form_is_refused():
    for data in (torch.zeros(3), torch.zeros(1, 1, dtype=torch.uint8)):
        with pytest.raises(DeltaError, match="expected a vector of uint8"):
            decode_indices(data)


def mutate(generator, data):
    """Bytes that differ from good ones in one of the ways in which files get damaged, or more than one."""
    data = bytearray(data)
    for _ in range(generator.choice([1, 1, 1, 2, 3])):
        # Most fields stand at the beginning.
        at = int(generator.integers(0, 1 + (min(len(data), 6) if generator.random() < 0.5 else len(data))))
        length = int(generator.integers(1, 9))
        strange = bytes(generator.choice([0, 1, 127, 128, 255, int(generator.integers(256))], length).tolist())
        match int(generator.integers(8)):
            case 0 | 1 | 2 if at < len(data):
                data[at] ^= 1 << int(generator.integers(8))
            case 3 if at < len(data):
                data[at] = strange[0]
            case 4:
                del data[at:]
            case 5:
                data[at:at] = strange
            case 6:
                del data[at : at + length]
            case _:
                data += strange[:2]
    return bytes(data)


def fuzz(seed, count):
    """Read damaged bytes: refused exactly if they are not of the format, otherwise read as the plain twin reads them.

    Returns:
        How many were refused, and how many were good for other positions.
    """
    generator = np.random.default_rng(seed)
    good = [coded(positions) for _, positions in samples(generator) if len(positions) < 300]
    refused = read = 0
    for _ in range(count):
        data = mutate(generator, good[int(generator.integers(len(good)))])
        n = int(generator.choice([MAX_COMPONENTS, MAX_COMPONENTS, 10**6, 300]))
        try:
            found = decode_indices(tensor(data), n).tolist()
        except DeltaError:
            refused += 1
            assert not is_good(data, n), (data.hex(), n)
        else:
            read += 1
            assert is_good(data, n), (data.hex(), n)
            assert found == reference_decode(data)[0], (data.hex(), n)
    return refused, read


def test_damaged_bytes_are_refused_or_mean_something():
    refused, read = fuzz(0, 3000)
    assert min(refused, read) > 100


def test_damaged_bytes_of_several_segments(generator):
    """Too long for the plain twin; what is read can be checked by itself."""
    data = coded(np.cumsum(generator.geometric(0.2, 16384 + 400)) - 1)
    read = 0
    for _ in range(200):
        try:
            found = decode_indices(tensor(mutate(generator, data)), 10**6)
        except DeltaError:
            continue
        read += 1
        assert (found.diff() > 0).all()
        assert ((found >= 0) & (found < 10**6)).all()
    assert 20 < read < 200


def peak(function):
    tracemalloc.start()
    try:
        function()
    except DeltaError:
        pass
    finally:
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return most


def test_no_memory_is_taken_for_what_cannot_be_there():
    for data, n, _ in BAD:
        hostile = tensor(bytes.fromhex(data))
        peak(partial(decode_indices, hostile, n))  # what numpy keeps from a first call
        assert peak(partial(decode_indices, hostile, n)) < 50_000
    # A unary part of a megabyte for 3 positions is refused by its size.
    data = varint(3) + varint(1 << 20) + bytes(1 << 20)
    hostile = tensor(data)
    assert peak(partial(decode_indices, hostile)) < 50_000


def test_memory_while_coding(generator):
    positions = torch.from_numpy(np.cumsum(generator.geometric(0.01, 1 << 20)) - 1)
    data = encode_indices(positions, MAX_COMPONENTS)
    constant = 16384 * 8 * 20
    assert peak(lambda: encode_indices(positions, MAX_COMPONENTS)) < 2.2 * len(data) + constant
    assert peak(lambda: decode_indices(data)) < 8 * len(positions) + constant
