"""Corrections of many groups in one call against one by one."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from peft_dst.core.correction import ROWS, correct_embedding, correct_linear, embedding_entries, linear_difference
from peft_dst.core.stacking import DifferenceTable, correct_stacked, stack_entries
from tests.core.test_correction import changed, dense_linear


# Entries of each group; None has no difference at all.
UNEVEN = [[40, None, 1, 17 * 23], [None, 5, 0, None]]


def groups_of(seed: Tensor, sizes: list[int | None], inputs_first: bool = False) -> list:
    """For each group a difference with so many entries, or none."""
    found = []
    for k in sizes:
        indices, values, seeds, _ = changed(seed, k or 0)
        shape = tuple(seed.shape)
        found.append(None if k is None else linear_difference(indices, values, seeds, shape, inputs_first))
    return found


def stacked_of(differences: list, width: int):
    table = DifferenceTable({number: one for number, one in enumerate(differences) if one is not None}, width)
    return table.of(range(len(differences)))


def one_by_one(output: Tensor, input: Tensor, differences: list) -> Tensor:
    """The plain twin: each group by itself."""
    corrected = output.clone()
    rows = len(input) // len(differences)
    for number, difference in enumerate(differences):
        if difference is not None:
            part = slice(number * rows, (number + 1) * rows)
            correct_linear(corrected[part], input[part], difference)
    return corrected


@pytest.mark.parametrize("inputs_first", [False, True])
@pytest.mark.parametrize("leading", [(4,), (4, 3), (8,), (12, 2, 3), (4, ROWS + 7), (0, 4)])
@pytest.mark.parametrize("sizes", [*UNEVEN, [3, 3, 3, 3], [40, None, 30, 35]])
def test_groups_are_corrected_together_as_one_by_one(inputs_first, leading, sizes):
    seed = torch.randn((17, 23) if not inputs_first else (23, 17), dtype=torch.float64)
    differences = groups_of(seed, sizes, inputs_first)
    input = torch.randn(*leading, 23, dtype=torch.float64)
    output = dense_linear(input, seed, inputs_first)
    wanted = one_by_one(output, input, differences)
    # As many entries as outputs at most are padded, unless sizes differ much.
    for width in (17 * 23, 0):
        stacked = stacked_of(differences, width)
        assert stacked.pads == (width > 0 and sizes not in UNEVEN)
        corrected = output.clone()
        correct_stacked(corrected, input, stacked)
        assert torch.allclose(corrected, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_groups_in_lower_precision_bit_for_bit(dtype):
    """Sums are made in float32 and rounded once, one by one or together."""
    seed = (torch.randn(48, 64) / 8).to(dtype)
    differences = groups_of(seed, [200, 9, None])
    input = torch.randn(6, 5, 64).to(dtype)
    output = functional.linear(input, seed)
    wanted = one_by_one(output, input, differences)
    correct_stacked(output, input, stacked_of(differences, len(seed)))
    assert torch.equal(output, wanted)


def test_nothing_to_correct():
    seed = torch.randn(5, 4)
    assert stacked_of(groups_of(seed, [None, 0]), 5) is None
    assert stack_entries([None], 5) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("rows", "sizes"), [(1, [30, None, 4]), (5, [7, 7]), (67, [40]), (64, [3, 200])])
def test_the_kernel_equals_its_plain_twin(rows, sizes, dtype, device):
    from peft_dst.core.correction_triton import correct

    seed = (torch.randn(19, 33) / 8).to(device, dtype)
    differences = groups_of(seed, sizes)
    bags = stacked_of(differences, len(seed)).bags
    input = torch.randn(len(sizes), rows, 33).to(device, dtype)
    output = functional.linear(input, seed)
    wanted = one_by_one(output.flatten(0, 1), input.flatten(0, 1), differences).view_as(output)
    untouched = torch.ones_like(output, dtype=torch.bool)
    untouched.transpose(1, 2)[bags.outputs[0], bags.outputs[1]] = False
    before = output.clone()
    # Not contiguous, as a part of something larger is.
    correct(output, torch.cat([input, input], -1)[..., :33], bags)
    # Sums are added up in another order: within rounding of the largest term.
    scale = 1 if dtype in (torch.float32, torch.float64) else torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    tolerance = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps * scale * 64
    assert (output.double() - wanted.double()).abs().max() <= tolerance
    assert not torch.equal(output, before)
    assert torch.equal(output[untouched], before[untouched])


def test_the_kernel_runs_on_the_device_of_its_outputs(monkeypatch):
    """Triton launches on the current one, which need not be that of a layer of a model on several GPUs."""
    pytest.importorskip("triton", minversion="3.6", reason="triton is not installed, or is old")
    from peft_dst.core import correction_triton

    class OnSecond(torch.Tensor):
        is_cuda, device = True, torch.device("cuda", 1)

    current, launched = [], []

    @contextlib.contextmanager
    def device(which):
        current.append(which)
        yield
        current.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: launched.append(list(current))

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(correction_triton, "_correct", Kernel())
    bags = stacked_of(groups_of(torch.randn(5, 4), [3]), 5).bags
    correction_triton.correct(torch.zeros(1, 2, 5).as_subclass(OnSecond), torch.zeros(1, 2, 4), bags)
    correction_triton.correct(torch.zeros(1, 2, 5), torch.zeros(1, 2, 4), bags)
    assert launched == [[torch.device("cuda", 1)], []]


def test_nothing_waits_for_the_device_to_put_differences_together():
    """A tensor without memory cannot be asked how long another one becomes."""
    there = groups_of(torch.randn(17, 23), [40, None, 1])
    elsewhere = [one and type(one)(*(tensor.to("meta") for tensor in one)) for one in there]
    found, want = (stacked_of(differences, 0).bags for differences in (elsewhere, there))
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in want]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [[30, None, 1, 77], [0, 5, 5, 5]])
def test_tables_of_several_groups_bit_for_bit(sizes, dtype):
    seed = torch.randn(11, 7).to(dtype)
    records = [changed(seed, k or 0) for k in sizes]
    entries = [
        None if k is None else embedding_entries(indices, values, (11, 7))
        for k, (indices, values, _, _) in zip(sizes, records, strict=True)
    ]
    tokens = torch.randint(0, 11, (8, 5))
    groups = torch.arange(4).repeat_interleave(2)[:, None]
    output = functional.embedding(tokens, seed)
    correct_embedding(output, tokens + groups * 11, stack_entries(entries, 11))
    wanted = [functional.embedding(row, records[group][3]) for row, group in zip(tokens, groups.flatten(), strict=True)]
    assert torch.equal(output, torch.stack(wanted))
