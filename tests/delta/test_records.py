import pytest
import torch

from peft_dst.delta import (
    DeltaError,
    Record,
    Summary,
    check_entries,
    check_record,
    check_seed,
    check_shape,
    index_dtype,
    seed_checksums,
    summarize,
)


def record(indices, values, dtype=torch.float32):
    return Record(torch.tensor(indices, dtype=torch.int32), torch.tensor(values, dtype=dtype))


def test_a_good_record_passes():
    check_record("w", 10, torch.float32, record([0, 4, 9], [1.0, 2.0, 3.0]))
    check_record("w", 10, torch.float32, record([], []))
    check_record("w", 1, torch.float32, Record(torch.tensor([0]), torch.tensor([1.0], dtype=torch.bfloat16)))


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (record([0, 10], [1.0, 2.0]), r"'w': entry 1 has position 10, outside a tensor of 10 components"),
        (record([-1], [1.0]), "entry 0 has position -1"),
        (record([1, 1], [1.0, 2.0]), r"not strictly ascending at entry 1 \(1 after 1\)"),
        (record([3, 2], [1.0, 2.0]), r"not strictly ascending at entry 1 \(2 after 3\)"),
        (record([1, 2], [1.0]), "two vectors of one length"),
        (record([[1]], [[1.0]]), "two vectors of one length"),
        (record([1], [float("nan")]), "entry 0 has the value nan"),
        (Record(torch.tensor([1.0]), torch.tensor([1.0])), "indices are torch.float32"),
        (Record(torch.tensor([1], dtype=torch.int16), torch.tensor([1.0])), "indices are torch.int16"),
        (Record(torch.tensor([1]), torch.tensor([1])), "values torch.int64"),
    ],
)
def test_bad_records_are_named(bad, match):
    with pytest.raises(DeltaError, match=match):
        check_record("w", 10, torch.float32, bad)


def test_values_must_be_finite_in_the_weight_s_dtype():
    wide = record([1], [1e300], torch.float64)
    check_record("w", 10, torch.float64, wide)
    with pytest.raises(DeltaError, match=r"value 1e\+300, which is not finite in torch.float32"):
        check_record("w", 10, torch.float32, wide)
    with pytest.raises(DeltaError, match=r"not finite in torch.float16"):
        check_record("w", 10, torch.float16, record([1], [1e5]))


def test_index_dtype():
    assert index_dtype(2**31 - 1) == torch.int32
    assert index_dtype(2**31) == torch.int64


def test_summaries_recognise_their_base_in_any_coarser_dtype():
    seeds = torch.randn(20)
    entries = record(list(range(20)), [0.0] * 20)
    summary = Summary.parse("w", list(summarize(entries, seed_checksums(seeds), (20,))))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_seed("w", summary.seed, seeds.to(dtype))
        with pytest.raises(DeltaError, match="'w': the base model's values differ"):
            check_seed("w", summary.seed, seeds.to(dtype).roll(1))
    # A bfloat16 base is recognised after it was loaded in float32, and cannot be compared in float16.
    half = Summary.parse("w", list(summarize(entries, seed_checksums(seeds.bfloat16()), (20,))))
    check_seed("w", half.seed, seeds.bfloat16().float())
    check_seed("w", half.seed, seeds.half())
    with pytest.raises(DeltaError, match="differ"):
        check_seed("w", half.seed, -seeds.bfloat16().float())


def test_summaries_recognise_their_entries():
    seeds = torch.randn(2)
    summary = summarize(record([1, 5], [0.0, 0.0]), seed_checksums(seeds), (6,))
    for other in (record([1, 6], [0.0, 0.0]), record([1], [0.0]), record([1, 5], [0.0, 0.0], torch.float64)):
        with pytest.raises(DeltaError, match=r"not those that adapter_config\.json describes"):
            check_entries("w", summary, other)
    # Positions are the same in 32 and in 64 bits.
    check_entries("w", summary, Record(torch.tensor([1, 5]), torch.zeros(2)))


@pytest.mark.parametrize(
    "raw",
    [
        None,
        [],
        3,
        "abc",
        [1, "0", {"float32": "00000000"}, [2], "float32"],
        [1, "0000000A", {"float32": "00000000"}, [2], "float32"],
        [1, "00000000", {"float32": None}, [2], "float32"],
        [1, "00000000", {"int8": "00000000"}, [2], "float32"],
        [1, "00000000", {"float32": "00000000"}, [10**4000] * 1600, "float32"],
        [1, "00000000", {"float32": "00000000"}, [1] * 65, "float32"],
        [1, "00000000", {"float32": "00000000"}],
        ["1", "00000000", {"float32": "00000000"}, [2], "float32"],
        [0, "00000000", {"float32": "00000000"}, [2], "float32"],
        [True, "00000000", {"float32": "00000000"}, [2], "float32"],
        [1, "00000000", [], [2], "float32"],
        [1, "00000000", {}, [2], "float32"],
        [1, "00000000", {"float32": "00000000"}, 2, "float32"],
        [1, "00000000", {"float32": "00000000"}, [2, 0], "float32"],
        [1, "00000000", {"float32": "00000000"}, [-2, -2], "float32"],
        [1, "00000000", {"float32": "00000000"}, [2.0], "float32"],
        [3, "00000000", {"float32": "00000000"}, [2], "float32"],
        [3, "00000000", {"float32": "00000000"}, [2**40, 2**40], "float32"],
        [1, "00000000", {"float32": "00000000"}, [2], "int8"],
        [1, "00000000", {"float32": "00000000"}, [2], 4],
        [1, "00000000", {"float32": "00000000"}, [2], []],
    ],
)
def test_malformed_summaries_are_named(raw):
    with pytest.raises(DeltaError, match="malformed entry for 'w'"):
        Summary.parse("w", raw)


def test_shapes_give_positions_their_meaning():
    summary = summarize(record([1, 5], [0.0, 0.0]), seed_checksums(torch.zeros(2)), (2, 3))
    for shape in [(2, 3), (7, 3), (1, 3)]:
        check_shape("w", shape, summary.shape, summary.entries)
    for shape in [(3, 2), (6,), (2, 3, 1), ()]:
        with pytest.raises(DeltaError, match=r"'w' is of shape .*2 entries for a tensor of shape \(2, 3\)"):
            check_shape("w", shape, summary.shape, summary.entries)
    check_shape("w", (), (), 1)
    with pytest.raises(DeltaError, match="another base"):
        check_shape("w", (1,), (), 1)
