"""Runs side by side, each in a process of its own: one that fails, or is killed, takes no other with it."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from .config import make_recipe, to_dict
from .options import Recipe
from .record import ERROR, LOG
from .runner import only_own_bars, train


DEVICES = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, eq=False)
class Run:
    """One run to do: a recipe, its folder, and what it is called."""

    recipe: Recipe
    folder: Path
    title: str = ""


class Pool:
    """A number of places in which runs take place.

    Args:
        workers: how many; they share the cores, unless OMP_NUM_THREADS says how many each has, and take the accelerators
            in turn. 0: in this process, one after the other.
        cache: folder that the runs share.
    """

    def __init__(self, workers: int, cache: Path) -> None:
        self.workers, self.cache = workers, cache
        devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        self._devices = (os.environ.get(DEVICES) or ",".join(map(str, range(devices)))).split(",") if devices else []
        # A forked process has what its server imported; but no accelerator survives a fork.
        forks = "forkserver" in multiprocessing.get_all_start_methods() and not devices
        self._context = multiprocessing.get_context("forkserver" if forks else "spawn")
        if forks:
            self._context.set_forkserver_preload([__name__])
        self._running: dict[int, tuple[BaseProcess, Run]] = {}

    def go(self, take: Callable[[], Run | None]) -> Iterator[tuple[Run, str | None]]:
        """Run what `take` gives for as long as it gives something.

        Args:
            take: called when a place is free; None: nothing at the moment.

        Yields:
            Each run that has ended, with what went wrong, or None.
        """
        try:
            while True:
                if not self.workers:
                    if (run := take()) is None:
                        return
                    yield run, _attempt(run, self.cache)
                    continue
                while len(self._running) < self.workers and (run := take()) is not None:
                    self._start(run)
                if not self._running:
                    return
                wait([process.sentinel for process, _ in self._running.values()])
                for place, (process, run) in list(self._running.items()):
                    if process.exitcode is not None:
                        del self._running[place]
                        yield run, _failure(process, run)
        finally:
            for process, _ in self._running.values():
                process.terminate()
                process.join()

    def _start(self, run: Run) -> None:
        place = next(i for i in range(self.workers) if i not in self._running)
        threads = None if "OMP_NUM_THREADS" in os.environ else max(1, (os.cpu_count() or 1) // self.workers)
        arguments = (to_dict(run.recipe), run.folder, self.cache, threads)
        # mypy: contexts of different kinds have no common type of process.
        process: BaseProcess = self._context.Process(target=_work, args=arguments, daemon=True)  # type: ignore[attr-defined]
        with _device(self._devices[place % len(self._devices)] if self._devices else None):
            process.start()
        self._running[place] = process, run


def _work(values: dict, folder: Path, cache: Path, threads: int | None) -> None:
    """In the process of a run."""
    threading.Thread(target=_follow, daemon=True).start()
    if threads is not None:
        torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG).open("a") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    only_own_bars()
    # The recipe was checked when it was made.
    sys.exit(_attempt(Run(make_recipe(values), folder), cache) is not None)


def _follow() -> None:
    """End with the parent, however that ends: nobody would wait for this process."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _attempt(run: Run, cache: Path) -> str | None:
    (run.folder / ERROR).unlink(missing_ok=True)
    try:
        train(run.recipe, run.folder, cache=cache, wait=True)
    except Exception as error:
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}"
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / ERROR).write_text(text + "\n")
        return text
    return None


def _failure(process: BaseProcess, run: Run) -> str | None:
    if process.exitcode == 0:
        return None
    file = run.folder / ERROR
    if file.is_file():
        return file.read_text().strip()
    return f"its process ended with {process.exitcode}" + (", killed" if (process.exitcode or 0) < 0 else "")


@contextmanager
def _device(name: str | None) -> Iterator[None]:
    """What processes started meanwhile see of the accelerators."""
    before = os.environ.get(DEVICES)
    if name is not None:
        os.environ[DEVICES] = name
    try:
        yield
    finally:
        if name is not None:
            os.environ.pop(DEVICES)
            if before is not None:
                os.environ[DEVICES] = before
