"""Two processes on gloo: every rank keeps the same subset, also when one of them saves in the middle."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import PeftModel, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from peft_dst import DSTConfig
from tests.models import assert_same, batch, bert, logits, weights


def run(rank: int, world: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        torch.manual_seed(0)
        base = bert()
        model = get_peft_model(base, DSTConfig(epsilon=0.02, modules_to_save=["classifier"]))
        wrapped = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(4):
            rows = {k: v[rank::world] for k, v in batch("bert", step).items()}
            wrapped(**rows).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if rank == 0 and step == 1:
                model.save_pretrained(folder)
        torch.save((weights(base), [w.indices for w in model.constraint().weights]), Path(folder) / f"rank{rank}.pt")
        if rank == 0:
            model.save_pretrained(folder)
            torch.save(logits(base, "bert"), Path(folder) / "logits.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_agree(tmp_path):
    mp.start_processes(run, (2, str(tmp_path)), nprocs=2, start_method="forkserver")
    one, other = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert_same(one[0], other[0])
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(bert(), tmp_path)
    assert torch.equal(logits(loaded, "bert"), torch.load(tmp_path / "logits.pt"))


def shard(folder: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
    try:
        base = bert()
        model = get_peft_model(base, DSTConfig(epsilon=0.02))
        weight = base.bert.pooler.dense.weight
        sharded = torch.nn.Parameter(distribute_tensor(weight.detach(), init_device_mesh("cpu", (1,)), [Shard(0)]))
        base.bert.pooler.dense.weight = sharded
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        with pytest.raises(
            NotImplementedError, match=r"'bert.pooler.dense.weight' is sharded.*Train with data parallelism"
        ):
            optimizer.step()
    finally:
        dist.destroy_process_group()


def test_sharded_weights_are_refused(tmp_path, apart):
    # In a process of its own: the process group must not leak into other tests.
    apart(shard, str(tmp_path))
