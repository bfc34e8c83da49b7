"""Tensor parallelism, FSDP2 over it, and FSDP2 with replicas (HSDP) end up as one process does."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from peft_dst import DSTConfig
from peft_dst.core.shards import box_of
from peft_dst.core.shards import together as those_of
from tests.distributed.sharded import STEPS, assert_agree, divide, optimizer_of, subsets
from tests.models import BUILDERS, batch


# Norms, embeddings and the head are left whole, and compete with what is divided.
PLAN = {
    **dict.fromkeys(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"), "column"
    ),
    **dict.fromkeys(("self_attn.o_proj", "mlp.down_proj"), "row"),
}


def train(rank, world, names, sizes, kind, siloing):
    torch.manual_seed(0)
    base = BUILDERS["llama"]()
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    if "tensor" in names:
        for layer in base.model.layers:
            styles = {name: ColwiseParallel() if how == "column" else RowwiseParallel() for name, how in PLAN.items()}
            parallelize_module(layer, mesh["tensor"], styles)
    model = get_peft_model(base, DSTConfig(epsilon=0.02, siloing=siloing))
    data = tuple(name for name in names if name != "tensor")
    if data and world > 1:
        divide(model, mesh=mesh[data])
    # torch's own: what is divided and what is whole cannot be stepped by one loop over all tensors.
    optimizer = optimizer_of(model, kind)
    for group in optimizer.param_groups:
        group["foreach"] = False
    shares = mesh[data].size() if data else 1
    # Processes that differ along "tensor" only see the same rows.
    share = rank // (world // shares)
    for number in range(STEPS):
        rows = {name: tensor[share::shares].contiguous() for name, tensor in batch("llama", number).items()}
        model(**rows).loss.backward()
        with torch.no_grad():
            # After which FSDP leaves weights gathered.
            model(**rows)
        optimizer.step()
        optimizer.zero_grad()
    placed = [w.parameter.placements for w in model.constraint().weights if isinstance(w.parameter, DTensor)]
    return subsets(model), len({len(one) for one in placed})


@pytest.mark.parametrize(
    ("names", "sizes", "kind", "siloing", "kinds"),
    [
        (("tensor",), (2,), "hook", "module_and_layer", 1),
        (("data", "tensor"), (2, 2), "hook", "module_and_layer", 2),
        (("data", "tensor"), (2, 2), "AdamW", "none", 2),
        # What FSDP gathers is then no larger than what it divides.
        (("data", "tensor"), (1, 2), "hook", "module_and_layer", 2),
        (("replicas", "data"), (2, 2), "hook", "module_and_layer", 1),
    ],
)
def test_every_division_agrees_with_one_process(together, names, sizes, kind, siloing, kinds):
    ((alone, _),) = together(1, train, ("data",), (1,), kind, siloing)
    for found, lengths in together(torch.Size(sizes).numel(), train, names, sizes, kind, siloing):
        assert lengths == kinds
        assert_agree(alone, found)


def disagree(rank, world):
    """Replicas of which one has another base, divided before the adapter is added: no process knows a whole weight."""
    torch.manual_seed(rank // 2)
    base = BUILDERS["bert"]()
    fully_shard(base, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "data")))
    model = get_peft_model(base, DSTConfig(epsilon=0.02))
    with pytest.raises(ValueError, match="process 2 does not train what process 0 does: the checksum of the base's"):
        model(**batch("bert"))


def test_replicas_that_disagree_are_told_so(together):
    together(4, disagree)


def refuse(rank, world):
    """Meshes that are no parts of one."""
    whole, other = (init_device_mesh("cpu", (2, 2), mesh_dim_names=names) for names in (("a", "b"), ("c", "d")))
    boxes = [
        box_of(distribute_tensor(torch.ones(8), mesh, [Shard(0)])) for mesh in (whole["a"], whole["b"], other["c"])
    ]
    with pytest.raises(NotImplementedError, match=r"different meshes.*exclude_modules"):
        those_of(boxes)
    assert those_of(boxes[:2]).dimensions == (0, 1)
    both = box_of(distribute_tensor(torch.ones(8), whole, [Replicate(), Shard(0)]))
    found = those_of([boxes[0], both])
    assert found.mesh == whole
    assert found.dimensions == (0, 1)
    # What is divided along "a" alone is repeated along "b", and so counted where that begins.
    assert found.counts(boxes[0]) == (rank % 2 == 0)
    assert found.counts(both) == (rank < 2)


def test_meshes_beside_one_another_are_refused(together):
    together(4, refuse)
