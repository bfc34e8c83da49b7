"""Accelerate with FSDP2 in the processes of `together`, on a CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType


def admit_cpus() -> None:
    """Accelerate asks for a GPU before it divides anything; nothing that it then does needs one."""
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU


@contextmanager
def environment(rank: int, world: int) -> Iterator[None]:
    """What a launcher sets for one of several processes; afterwards nothing of Accelerate's is left."""
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    variables = {name: str(value) for name, value in found.items()} if world > 1 else {}
    with mock.patch.dict(os.environ, variables | {"ACCELERATE_USE_CPU": "true"}):
        try:
            yield
        finally:
            AcceleratorState._reset_state(True)
            GradientState._reset_state()


@contextmanager
def accelerator(rank: int, world: int, mixed_precision: str = "no", **options: Any) -> Iterator[Accelerator]:
    """An Accelerator that divides BERT's layers over the processes, or of one process.

    Args:
        rank: of this process.
        world: number of processes.
        mixed_precision: as Accelerator takes it.
        **options: of the plugin.
    """
    with environment(rank, world):
        if world == 1:
            yield Accelerator(cpu=True)
            return
        admit_cpus()
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["BertLayer"],
            **options,
        )
        yield Accelerator(fsdp_plugin=plugin, mixed_precision=mixed_precision)
