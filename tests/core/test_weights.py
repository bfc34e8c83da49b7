import pytest
import torch
from torch import nn

from peft_dst.core import SparseWeight
from peft_dst.core.tiles import bits


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(), (1,), (7,), (5, 6), (3, 4, 5), (0,), (4, 0, 2)]


def host(data: torch.Tensor) -> SparseWeight:
    module = nn.Module()
    module.weight = nn.Parameter(data)
    return SparseWeight(module, "weight", "host.weight")


def same_bits(one, other):
    return torch.equal(bits(one.contiguous().view(-1)), bits(other.contiguous().view(-1)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_apply_then_revert_is_the_identity(shape, dtype):
    weight = host(torch.randn(shape).to(dtype))
    seed = weight.data.clone()
    n = seed.numel()
    for _ in range(3):
        indices = torch.randperm(n)[: (n + 1) // 2].sort().values
        values = torch.randn(len(indices)).to(dtype)
        weight.apply(indices, values)
        assert torch.equal(weight.values(), values)
        assert same_bits(weight.seeds_at(torch.arange(n)), seed)
    weight.revert()
    assert same_bits(weight.data, seed)
    assert weight.indices.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_survive(dtype):
    seed = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-8, -1.0]).to(dtype)
    weight = host(seed.clone())
    weight.apply(torch.arange(6), torch.arange(6).to(dtype))
    weight.revert()
    assert same_bits(weight.data, seed)


def test_layouts_without_a_flat_view():
    for data in (torch.randn(6, 5).t(), torch.randn(6, 5)[:, ::2], torch.randn(4, 3, 2).permute(1, 2, 0)):
        weight = host(data)
        seed = weight.data.clone(memory_format=torch.contiguous_format)
        assert not weight.data.is_contiguous()
        indices = torch.arange(0, seed.numel(), 3)
        weight.apply(indices, torch.ones(len(indices)))
        expected = seed.view(-1).clone()
        expected[indices] = 1
        assert torch.equal(weight.flat(), expected)
        assert torch.equal(weight.seeds_at(torch.arange(seed.numel())), seed.view(-1))
        weight.revert()
        assert torch.equal(weight.data, seed)


def test_edits_do_not_trip_autograd():
    weight = host(torch.randn(4, 4))
    x = torch.randn(2, 4, requires_grad=True)
    out = (x @ weight.parameter).square().sum()
    saved = weight.data.clone()
    weight.apply(torch.tensor([1, 5]), torch.zeros(2))
    weight.revert()
    out.backward()
    assert torch.equal(weight.data, saved)
    assert weight.parameter.grad is not None


def test_a_checksum_notices_any_change_outside_the_subset():
    weight = host(torch.randn(1000))
    assert weight.seed_checksum.is_intact()
    weight.seed_checksum.note()
    weight.apply(torch.tensor([3, 900]), torch.tensor([5.0, 6.0]))
    assert weight.seed_checksum.is_intact()
    weight.data[3] = 7.0
    assert weight.seed_checksum.is_intact()
    kept = weight.data[4].clone()
    weight.data[4] = torch.nextafter(kept, kept + 1)
    assert not weight.seed_checksum.is_intact()
    weight.data[4] = kept
    weight.revert()
    assert weight.seed_checksum.is_intact()
    # A cast that was announced changes what is compared; changes are still noticed.
    weight.apply(torch.tensor([3, 900]), torch.tensor([5.0, 6.0]))
    weight.seed_checksum.note_cast(lambda t: t.to(torch.bfloat16))
    weight.module.to(torch.bfloat16)
    assert weight.seed_checksum.is_intact()
    weight.data[7] += 1
    assert not weight.seed_checksum.is_intact()


def test_a_step_that_raised_is_recovered_from():
    class Step:
        def recover(self):
            weight.data.fill_(1.0)
            weight.under_way = None

    weight, step = host(torch.randn(5)), Step()
    weight.recover()
    weight.under_way = step
    assert weight.under_way is step
    weight.recover()
    assert weight.data.tolist() == [1.0] * 5


def test_lending_a_working_copy():
    weight = host(torch.randn(6, 4).t())
    live, seed = weight.data, weight.data.clone()
    weight.apply(torch.tensor([3]), torch.tensor([9.0]))
    working = weight.lend()
    assert weight.parameter.data is not live
    assert weight.parameter.stride() == working.stride() == live.stride()
    weight.parameter.data.mul_(2.0)
    assert weight.data.data_ptr() == live.data_ptr()
    assert weight.values().tolist() == [9.0]
    weight.take_back()
    assert weight.parameter.data_ptr() == live.data_ptr()
    # Given up: the copy is the live weight, and the tensor from before the seed.
    working = weight.lend()
    given = weight.give_up()
    assert weight.data.data_ptr() == working.data_ptr()
    assert torch.equal(given, seed)
    assert weight.values().tolist() == [9.0]
    weight.revert()
    assert torch.equal(weight.data, seed)


def test_replacing_and_casting_the_parameter():
    weight = host(torch.randn(50))
    reference = weight.data.clone().to(torch.bfloat16)
    weight.apply(torch.tensor([2, 30]), torch.tensor([1.5, 2.5]))
    weight.module.weight = nn.Parameter(weight.data.clone().to(torch.bfloat16))
    weight.revert()
    assert torch.equal(weight.data, reference)
    weight.forget()
    assert torch.equal(weight.seeds_at(torch.arange(50)), reference)
