"""Deltas by name: where each comes from, and those that are held in memory, made ready."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..delta import CONFIG_NAME, DeltaError, SparseDelta
from ..mixing import BASE
from .cache import Cache
from .placed import Mixable, Placed, ReadDelta


#: Where a delta comes from: a folder or file, or what was read of one.
Source = Path | SparseDelta


class UnknownDelta(KeyError):
    """There is no delta of that name, or no longer the one that had it."""


class Known(NamedTuple):
    """What a name stands for: where the delta comes from, and a number that no other one has had in this shelf."""

    source: Source
    version: int


class Shelf:
    """Names, and what is held of them within budgets.

    A delta is read and made ready once, however many threads ask for it: the first one loads, others wait for the future.
    Names may go, and come again with another source, while that is under way. What was read is then still given to
    those who wait for it, and not kept; whoever uses it compares the `version` of before (`is_version`). A version is one
    delta's for good: files that are read again must have what they had.

    Locks: one guards names, caches, loadings, counts and whether this is closed. It is never held while something is read,
    placed, arranged or waited for.

    Args:
        place: makes a delta ready; called by any thread.
        arrange: makes a ready one into what mixed batches take, likewise.
        in_use: the name that must not be let go for others; None if there is none. Called with the lock held.
        budget: bytes of what is ready, and again of what is arranged.
        host_budget: bytes of what is kept as it was read.
        workers: threads that prefetch.
    """

    def __init__(
        self,
        place: Callable[[SparseDelta], Placed],
        arrange: Callable[[Placed], Mixable],
        in_use: Callable[[], str | None],
        *,
        budget: int,
        host_budget: int,
        workers: int,
    ) -> None:
        self._place, self._arrange, self._in_use = place, arrange, in_use
        self._known: dict[str, Known] = {}
        self._versions = itertools.count(1)
        self._ready: Cache[Placed] = Cache(budget)
        self._mixables: Cache[Mixable] = Cache(budget)
        self._read: Cache[ReadDelta] = Cache(host_budget)
        # Of what was read from files, and bytes of what was arranged, by name.
        self._digests: dict[str, bytes] = {}
        self._sizes: dict[str, int] = {}
        # What comes of it is None where the thread that loads was interrupted.
        self._loading: dict[str, Future[Placed | None]] = {}
        self._prefetcher = ThreadPoolExecutor(workers, thread_name_prefix="delta-pool")
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(("hits", "loads", "evictions"), 0)
        self._closed = False

    # Names

    def add(self, name: str, source: str | PathLike[str] | SparseDelta) -> None:
        """As `DeltaPool.add`."""
        if not isinstance(source, SparseDelta):
            source = Path(source)
            if not source.exists():
                raise ValueError(f"there is no {source}.")
        self._add({name: source})

    def add_folder(self, folder: str | PathLike[str]) -> list[str]:
        """As `DeltaPool.add_folder`."""
        found = {path.parent.name: path.parent for path in sorted(Path(folder).glob(f"*/{CONFIG_NAME}"))}
        self._add(found)
        return sorted(found)

    def _add(self, sources: Mapping[str, Source]) -> None:
        with self._lock:
            self._check_open()
            if taken := sorted(sources.keys() & self._known.keys()):
                raise ValueError(f"there is a delta {taken[0]!r} already; remove it first.")
            if BASE in sources:
                raise ValueError(f"{BASE!r} is what mixed batches call the base; give the delta another name.")
            self._known |= {name: Known(source, next(self._versions)) for name, source in sources.items()}

    def remove(self, name: str) -> None:
        """Forget a delta.

        Raises:
            UnknownDelta: if there is none of that name.
            RuntimeError: if this is closed.
        """
        with self._lock:
            self._of(name)
            del self._known[name]
            self._ready.drop(name)
            self._mixables.drop(name)
            self._read.drop(name)
            self._digests.pop(name, None)
            self._sizes.pop(name, None)
            self._loading.pop(name, None)

    def names(self) -> list[str]:
        """In the order in which they were added."""
        with self._lock:
            return list(self._known)

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __len__(self) -> int:
        return len(self._known)

    def version(self, name: str) -> int:
        """As `DeltaPool.version`."""
        return self._look_up(name).version

    def is_version(self, name: str, version: int | None) -> bool:
        """Whether a name still stands for what it did."""
        known = self._known.get(name)
        return known is not None and known.version == version

    def figures(self) -> dict[str, int]:
        """What `PoolStatistics` says of names and memory."""
        with self._lock:
            return {
                "deltas": len(self._known),
                "ready": len(self._ready),
                "nbytes": self._ready.nbytes + self._mixables.nbytes,
                "host_nbytes": self._read.nbytes,
                **self._counts,
            }

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Let everything go. Who waits for what a thread will prefetch is told that this is closed."""
        with self._lock:
            self._closed = True
            self._known.clear()
            self._digests.clear()
            self._sizes.clear()
            self._ready, self._mixables, self._read = Cache(0), Cache(0), Cache(0)
        # What is queued is not cancelled but refused, as its futures may be waited for.
        self._prefetcher.shutdown(wait=False)

    # What is held

    def ready(self, name: str, held: Placed | None = None) -> Placed:
        """The delta, ready: from memory, from a loading that is under way, or from its source.

        Args:
            name: its name.
            held: what the caller still has from before, be it this one or not.

        Raises:
            UnknownDelta: if there is none of that name.
            DeltaError: if it cannot be read or placed.
            RuntimeError: if this is closed.
        """
        while True:
            with self._lock:
                version = self._of(name).version
                placed = self._ready.get(name)
                if placed is None and held is not None and held.version == version:
                    placed = held
                if placed is not None:
                    self._counts["hits"] += 1
                    return placed
                if (future := self._loading.get(name)) is None:
                    future = self._loading[name] = Future()
                # One that waits for a thread to prefetch it is begun here.
                mine = _begin(future)
            if mine:
                self._load(name, future)
            if (placed := future.result()) is not None:
                return placed

    def mixable(self, name: str, held: Mixable | None = None) -> Mixable:
        """The delta for mixed batches: from memory, or made of what is ready.

        Args:
            name: its name.
            held: what the caller still has of that name from before.

        Raises:
            UnknownDelta, DeltaError, RuntimeError: as `ready`.
        """
        placed = self.ready(name, None if held is None else held.placed)
        with self._lock:
            if (found := self._mixables.get(name) or held) is not None and found.placed is placed:
                return found
        found = self._arrange(placed)
        with self._lock:
            if self.is_version(name, placed.version):
                self._mixables.put(name, found)
                self._sizes[name] = found.nbytes
        return found

    def mixed_nbytes(self, name: str | None) -> int:
        """As `DeltaPool.mixed_nbytes`."""
        return self._sizes.get(name, 0) if name is not None else 0

    def is_ready(self, name: str) -> bool:
        """As `DeltaPool.is_ready`."""
        with self._lock:
            return name in self._ready

    def prefetch(self, name: str) -> None:
        """Have a delta made ready in the background.

        Raises:
            UnknownDelta, RuntimeError: as `ready`.
        """
        with self._lock:
            self._of(name)
            if name not in self._ready and name not in self._loading:
                future = self._loading[name] = Future()
                self._prefetcher.submit(self._prefetch, name, future)

    def _prefetch(self, name: str, future: Future[Placed | None]) -> None:
        with self._lock:
            mine = _begin(future)
        if mine:
            self._load(name, future)

    def _load(self, name: str, future: Future[Placed | None]) -> None:
        """Make a delta ready; whoever waits for the future gets it, or the error.

        It may be removed meanwhile, and another one of its name be added, whose loading is none of ours.
        """
        try:
            source, version = self._look_up(name)
            delta = source if isinstance(source, SparseDelta) else self._from_disk(name, source, version)
            placed = replace(self._place(delta), name=name, version=version)
        except BaseException as error:
            with self._lock:
                if self._loading.get(name) is future:
                    del self._loading[name]
            if not isinstance(error, Exception):
                # Ctrl-C is this thread's; whoever waits for it loads in its place.
                future.set_result(None)
                raise
            future.set_exception(error)
            return
        with self._lock:
            if self._loading.get(name) is future:
                del self._loading[name]
            self._counts["loads"] += 1
            if self.is_version(name, version):
                self._counts["evictions"] += len(self._ready.put(name, placed, keep={self._in_use() or ""}))
        future.set_result(placed)

    def _from_disk(self, name: str, path: Path, version: int) -> SparseDelta:
        with self._lock:
            kept = self._read.get(name)
        if kept is not None:
            return kept.delta
        delta = SparseDelta.load(path)
        digest = _digest(delta)
        with self._lock:
            if self.is_version(name, version) and self._digests.setdefault(name, digest) != digest:
                raise DeltaError(
                    f"the delta {name!r} has other files than those that were read first ({path}). Remove it from the pool "
                    "and add it again to have the new ones used."
                )
        if self._read.budget:
            kept = ReadDelta(delta)
            delta = kept.delta
            with self._lock:
                if self.is_version(name, version):
                    self._read.put(name, kept)
        return delta

    def _look_up(self, name: str) -> Known:
        with self._lock:
            return self._of(name)

    # With the lock held

    def _of(self, name: str) -> Known:
        if (known := self._known.get(name)) is None:
            # Closed, there is none at all.
            self._check_open()
            raise UnknownDelta(f"there is no delta {name!r}; add it first.")
        return known

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the pool is closed.")


def _digest(delta: SparseDelta) -> bytes:
    """By which a delta is known again."""
    found = hashlib.blake2b(digest_size=16)

    def add(name: str, *tensors: Tensor) -> None:
        found.update(repr((name, [(tensor.dtype, tensor.shape) for tensor in tensors])).encode())
        for tensor in tensors:
            found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

    for name, one in sorted(delta.items()):
        add(name, one.indices, one.values)
    for name, tensor in sorted(delta.dense.items()):
        add(name, tensor)
    return found.digest()


def _begin(future: Future[Placed | None]) -> bool:
    """Take a loading on oneself, if nobody has; with the lock held."""
    return not future.running() and not future.done() and future.set_running_or_notify_cancel()
