"""Boxes: what a process holds of a tensor that several hold together, whichever way it is divided."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from peft_dst.core.shards import box_of, local, together
from peft_dst.core.weights import SparseWeight


DIVISIONS = [
    ((4,), (7, 5), [Shard(0)]),
    ((4,), (2, 3), [Shard(0)]),
    ((4,), (6, 9, 2), [Shard(1)]),
    ((4,), (5,), [Shard(0)]),
    ((4,), (3, 4), [Replicate()]),
    ((2, 2), (7, 6), [Shard(0), Shard(1)]),
    ((2, 2), (7, 6), [Replicate(), Shard(1)]),
    ((2, 2), (9, 2), [Shard(0), Replicate()]),
    ((2, 2), (13, 3), [Shard(0), Shard(0)]),
    # Matrices that were joined, each divided by itself.
    ((4,), (16, 3), [_StridedShard(0, split_factor=2)]),
    ((4,), (2, 24, 3), [_StridedShard(1, split_factor=3)]),
    ((2, 2), (5, 8), [Shard(0), _StridedShard(1, split_factor=2)]),
]


def look_at_boxes(rank, world, sizes, shape, placements):
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    mesh = init_device_mesh("cpu", sizes)
    parameter = distribute_tensor(tensor, mesh, placements)
    check_box(parameter)


def refuse_stripes(rank, world):
    mesh = init_device_mesh("cpu", (2, 2))
    for shape, placements in (
        ((14, 3), [Replicate(), _StridedShard(0, split_factor=4)]),
        ((16, 3), [Shard(0), _StridedShard(0, split_factor=4)]),
    ):
        parameter = DTensor.from_local(torch.zeros(4, 3), mesh, placements, run_check=False, shape=shape, stride=(3, 1))
        with pytest.raises(NotImplementedError, match="only shards and replicas are supported"):
            box_of(parameter)


def test_stripes_that_are_not_known_are_refused(together):
    together(4, refuse_stripes)


def check_box(parameter):
    """A tensor that counts its own flat positions tells them."""
    box, own = box_of(parameter), local(parameter)
    assert box.shape == own.shape
    held = own.reshape(-1)
    assert torch.equal(box.outwards(torch.arange(held.numel())), held)
    everywhere = torch.arange(parameter.numel())
    inside, at = box.inwards(everywhere)
    assert torch.equal(everywhere[inside], held.sort().values)
    assert torch.equal(held[at], everywhere[inside])


@pytest.mark.parametrize(("sizes", "shape", "placements"), DIVISIONS)
def test_positions_lead_out_of_a_box_and_into_it(together, sizes, shape, placements):
    together(4, look_at_boxes, sizes, shape, placements)


def look_at_both(rank, world):
    """FSDP2 divides again what tensor parallelism has divided."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for placement in (Shard(0), Shard(1)):
        model = nn.Linear(6, 12, bias=False)
        numbers = torch.arange(72.0).view(12, 6)
        model.weight = nn.Parameter(distribute_tensor(numbers, mesh["tensor"], [placement]))
        fully_shard(model, mesh=mesh["data"])
        weight = model.weight
        assert len(weight.placements) == 2
        box, held = box_of(weight), local(weight).detach().reshape(-1).long()
        assert box.shape == local(weight).shape
        assert torch.equal(box.outwards(torch.arange(held.numel())), held)
        assert torch.equal(weight.full_tensor().detach(), numbers)


def test_fsdp_over_tensor_parallelism(together):
    together(4, look_at_both)


def refuse_sums(rank, world):
    mesh = init_device_mesh("cpu", (2,))
    with pytest.raises(NotImplementedError, match=r"placed as P.*fully_shard"):
        box_of(DTensor.from_local(torch.ones(4), mesh, [Partial()]))


def test_sums_are_refused(together):
    together(2, refuse_sums)


def join(rank, world):
    """Of each process's entries all of the tensor's are made, in order and with the signs of zeros."""
    torch.manual_seed(0)
    results = []
    for placement, dtype in ((Shard(0), torch.float32), (Shard(1), torch.bfloat16), (Shard(0), torch.float64)):
        whole = torch.randn(6, 10).to(dtype)
        whole[2, 3], whole[5, 9] = -0.0, 0.0
        module = nn.Module()
        module.weight = nn.Parameter(distribute_tensor(whole, init_device_mesh("cpu", (world,)), [placement]))
        weight = SparseWeight(module, "weight", "weight")
        at = torch.tensor([0, 3, 17, 23, 24, 40, 59])
        assert torch.equal(weight.whole_seeds_at(at).view(torch.uint8), whole.view(-1)[at].view(torch.uint8))
        inside, own = weight.box.inwards(at)
        positions, values = weight.joined(own, weight.data.reshape(-1)[own])
        assert torch.equal(positions, at)
        assert torch.equal(values.view(torch.uint8), whole.view(-1)[at].view(torch.uint8))
        results.append(int(inside.sum()))
    return results


def test_entries_are_joined_bit_for_bit(together):
    for counts in zip(*together(2, join), strict=True):
        assert sum(counts) == 7


def fail(rank, world):
    mesh = init_device_mesh("cpu", (world,))
    processes = together([box_of(distribute_tensor(torch.ones(world), mesh, [Shard(0)]))])
    expected = (
        pytest.raises(OSError, match="disk") if rank == 1 else pytest.raises(RuntimeError, match="saving failed in")
    )
    with expected, processes.all_or_none("saving"):
        if rank == 1:
            raise OSError("disk full")
    with processes.all_or_none("saving"):
        pass


def test_what_fails_in_one_process_fails_in_all(together):
    together(2, fail)
