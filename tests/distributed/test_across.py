"""The choice across processes is the choice of one: ties, uneven shards, repeated tensors, budgets of every size."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from peft_dst.core import DISTANCES, NonFiniteDistanceError, across, select
from peft_dst.core.across import choose_across, find_candidates
from peft_dst.core.shards import box_of, local, together


# Shapes and placements of two silos' tensors, over a mesh of these sizes. Of what is plain every process has all.
LAYOUTS = {
    "rows": ((4,), [[((7, 5), [Shard(0)]), ((3,), [Shard(0)])], [((40, 30), [Shard(0)])]]),
    "columns": (
        (4,),
        [[((8, 12), [Shard(1)]), ((8, 12), [Shard(0)]), ((5,), None)], [((31,), [Replicate()]), ((6, 8), [Shard(1)])]],
    ),
    "both": (
        (2, 2),
        [[((9, 4), [Shard(0), Shard(1)]), ((6,), [Shard(0), Replicate()])], [((5, 7), [Replicate(), Shard(1)])]],
    ),
}

LAYOUTS["rows_of_two"] = ((2,), LAYOUTS["rows"][1])


def compare(rank, world, layout, kind, dtype, values):
    sizes, silos = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", sizes)
    for seed in range(4):
        torch.manual_seed(seed)
        whole = [[[_numbers(shape, values, dtype) for _ in range(2)] for shape, _ in silo] for silo in silos]
        for share in (0.0, 0.01, 0.1, 0.5, 0.97):
            budgets = [round(share * sum(seed.numel() for seed, _ in silo)) for silo in whole]
            mine, boxes = [], []
            for tensors, silo, budget in zip(whole, silos, budgets, strict=True):
                held = [
                    [distribute_tensor(part, mesh, placements) if placements else part for part in pair]
                    for pair, (_, placements) in zip(tensors, silo, strict=True)
                ]
                boxes.append([box_of(first) for first, _ in held])
                flat = [[local(part).reshape(-1) for part in pair] for pair in held]
                mine.append(find_candidates([first for first, _ in flat], [second for _, second in flat], budget, kind))
            processes = together(box for own in boxes for box in own)
            chosen = choose_across(mine, boxes, budgets, processes)
            for found, own, tensors, budget, (masks, threshold) in zip(
                mine, boxes, whole, budgets, chosen, strict=True
            ):
                flat = [[part.reshape(-1) for part in pair] for pair in tensors]
                wanted = select([a for a, _ in flat], [b for _, b in flat], budget, kind)
                for at, mask, box, expected in zip(found.indices, masks, own, wanted.indices, strict=True):
                    inside, _ = box.inwards(expected)
                    assert torch.equal(box.outwards(at[mask]), expected[inside])
                if budget and sum(i.numel() for i in wanted.indices) == budget:
                    assert threshold == wanted.threshold


def _numbers(shape, values, dtype):
    if values == "ties":
        return torch.randint(-3, 4, shape).to(dtype) / 8
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize("values", ["ties", "any"])
@pytest.mark.parametrize("layout", ["rows", "columns", "both"])
def test_equals_the_choice_of_one_process(together, layout, values):
    together(4, compare, layout, "absolute", torch.float32, values)


def compare_in_pieces(*args):
    with mock.patch.object(across, "_PIECE", 7):
        compare(*args)


@pytest.mark.parametrize("values", ["ties", "any"])
def test_pieces_of_keys_make_no_difference(together, values):
    together(2, compare_in_pieces, "rows_of_two", "absolute", torch.float32, values)


@pytest.mark.parametrize(
    ("kind", "dtype"), [(kind, torch.float32) for kind in DISTANCES] + [("absolute", torch.float64)]
)
def test_every_distance_and_width(together, kind, dtype):
    together(2, compare, "rows_of_two", kind, dtype, "any")


def test_a_candidate_is_at_a_distance():
    # Where all that a process holds may be kept, `select` also names what moved by a distance of zero.
    seeds, updates = [torch.tensor([0.0, 1.0, 2.0])], [torch.tensor([5.0, 1.0, 3.0])]
    found = find_candidates(seeds, updates, 3, "inverse_relative")
    assert found.indices[0].tolist() == [2]
    assert found.values[0].tolist() == [3.0]
    assert found.distances[0].tolist() == [2.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_told_by_position(bad):
    seeds, updates = [torch.ones(5), torch.ones(3)], [torch.ones(5), torch.tensor([1.0, bad, 1.0])]
    assert find_candidates(seeds, updates, 2, "absolute").failed == 1
    with pytest.raises(NonFiniteDistanceError):
        select(seeds, updates, 2, "absolute")
