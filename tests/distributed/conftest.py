"""Functions that run in several processes at once, on gloo."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest


# Far longer than anything here takes. One that waits for another that has failed is not waited for: it is killed.
TIMEOUT_S = 120


class Processes:
    """A number of processes, of one process group, that wait for what they are to do; they are started when they are
    needed, and anew after one of them has failed: the others may be waiting for it.
    """

    def __init__(self, world: int):
        self.world = world
        self._context = multiprocessing.get_context("forkserver")
        self._running: list[tuple[Any, Connection]] = []

    def __call__(self, function: Callable[..., Any], *arguments: object, patient: bool = False) -> list[Any]:
        """Call f(rank, world, *arguments) in all of them; their results, by rank, or what the first to fail raised.

        Args:
            function: a function of a module.
            *arguments: for it.
            patient: whether the others' answers are waited for when one has failed.
        """
        if not self._running:
            self._start()
        for _, pipe in self._running:
            pipe.send((function, arguments))
        results: dict[int, Any] = {}
        failed = None
        while len(results) < self.world:
            missing = {pipe: rank for rank, (_, pipe) in enumerate(self._running) if rank not in results}
            ready = wait(missing, TIMEOUT_S)
            if not ready:
                self.stop()
                raise TimeoutError(f"of {self.world} processes {sorted(missing.values())} did not answer")
            for pipe in ready:
                try:
                    results[missing[pipe]], error = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    error = RuntimeError("it died"), "without a word"
                if error is None:
                    continue
                results[missing[pipe]] = None
                failed = failed or (error[0], RuntimeError(f"in process {missing[pipe]}:\n{error[1]}"))
                if not patient:
                    break
            if failed is not None and (not patient or len(results) == self.world):
                self.stop()
                raise failed[0] from failed[1]
        return [results[rank] for rank in range(self.world)]

    def _start(self) -> None:
        folder = tempfile.mkdtemp()
        for rank in range(self.world):
            own, other = self._context.Pipe()
            process = self._context.Process(
                target=_serve, args=(rank, self.world, f"{folder}/store", other), daemon=True
            )
            process.start()
            other.close()
            self._running.append((process, own))

    def stop(self) -> None:
        for process, pipe in self._running:
            process.kill()
            process.join()
            pipe.close()
        self._running.clear()


def _serve(rank: int, world: int, store: str, pipe: Connection) -> None:
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT_S)
    )
    with contextlib.suppress(EOFError):
        while True:
            function, arguments = pipe.recv()
            torch.manual_seed(0)
            try:
                answer = function(rank, world, *arguments), None
            except BaseException as error:
                answer = None, (error, traceback.format_exc())
            try:
                pipe.send_bytes(pickle.dumps(answer))
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                pipe.send_bytes(pickle.dumps((None, (RuntimeError(f"{answer}: {error}"), traceback.format_exc()))))


@pytest.fixture(scope="package")
def _groups(forkserver: None) -> Iterator[dict[int, Processes]]:
    groups = {world: Processes(world) for world in (1, 2, 4)}
    yield groups
    for group in groups.values():
        group.stop()


@pytest.fixture
def together(_groups: dict[int, Processes]) -> Callable[..., list[Any]]:
    """Call a function of a module in 1, 2 or 4 processes, as f(rank, world, *arguments); their results, by rank."""

    def call(world: int, function: Callable[..., Any], *arguments: object) -> list[Any]:
        return _groups[world](function, *arguments)

    return call


@pytest.fixture
def afresh(_groups: dict[int, Processes]) -> Callable[..., list[Any]]:
    """The same in processes that are started for it."""

    def call(world: int, function: Callable[..., Any], *arguments: object) -> list[Any]:
        _groups[world].stop()
        return _groups[world](function, *arguments)

    return call
