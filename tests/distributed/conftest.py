"""Functions that run in several processes at once, on gloo."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest


# Longer than any of them computes; a process that waits for one that has failed is not waited for.
TIMEOUT_S = 60


def _run(function: Callable[..., Any], rank: int, world: int, store: str, arguments: tuple[object, ...]) -> Any:
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT_S)
    )
    try:
        return function(rank, world, *arguments)
    finally:
        dist.destroy_process_group()


@pytest.fixture
def together(tmp_path) -> Callable[..., list[Any]]:
    """Call a function of a module in a number of processes, as f(rank, world, *arguments); their results, by rank."""

    def call(world: int, function: Callable[..., Any], *arguments: object) -> list[Any]:
        store = tmp_path / f"store{len(list(tmp_path.glob('store*')))}"
        with ProcessPoolExecutor(world, multiprocessing.get_context("forkserver")) as pool:
            calls = [pool.submit(_run, function, rank, world, str(store), arguments) for rank in range(world)]
            return [one.result() for one in calls]

    return call
