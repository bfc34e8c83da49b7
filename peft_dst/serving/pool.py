"""Deltas by name on one base, one of them in its weights at a time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from ..delta import CONFIG_NAME, SparseDelta
from ..mixing import BASE as SEED
from ..mixing import Readers, Subsets, serve
from .cache import Cache
from .placed import BASE, Mixable, Placed, ReadDelta, mixable, place, write
from .storage import FlatStorage


@dataclass(frozen=True)
class PoolStatistics:
    """What a pool has done so far, and holds now.

    Attributes:
        deltas: known by name.
        ready: of them held in memory.
        nbytes: bytes of those, and of what is arranged for mixed batches.
        host_nbytes: bytes of those that are kept as they were read.
        hits: uses of a delta that was ready.
        loads: deltas read and made ready.
        evictions: deltas let go for others.
        switches: changes of the delta in the weights.
    """

    deltas: int
    ready: int
    nbytes: int
    host_nbytes: int
    hits: int
    loads: int
    evictions: int
    switches: int


class DeltaPool:
    """Any number of deltas on one base model.

        pool = DeltaPool(model)
        pool.add("support", "adapters/support")
        with pool.use("support"):
            model(**batch)

    Deltas stay on disk until they are used, or prefetched; what was used last is held in memory, ready to be written,
    within a budget. A switch writes the base's values at the entries of the delta that leaves, and the values of the one
    that comes: two calls, whatever the number of tensors. The last one stays in the weights until another is used.

    Threads: any number may call any method. While one is in `use`, others may use the same delta beside it, and wait for
    another; who came first goes first.

    Errors: what goes wrong in the middle of a switch leaves the base's weights, bit for bit.

    Args:
        model: the base, on its device and in its dtype. It must not be moved, cast or trained while it has a pool. A
            model of PEFT's is none: give its base.
        budget: bytes of deltas held ready, on the model's device. Each takes 8 + 2 × (bytes of a value) for an entry,
            and its whole tensors. The one in use is held in any case. Those of mixed batches are held once more, arranged
            for that (some 30 bytes an entry besides), within the same budget again.
        host_budget: bytes of deltas that are kept as they were read, in the host's memory, so that one that was let go for
            others need not be read and parsed again. For a model on CUDA they are pinned there.
        check: whether each delta is compared with the base when it is made ready (its checksums of the base's values).
        workers: threads that prefetch.

    Raises:
        ValueError: for a model that has adapters of PEFT's in it, or no floating parameters.
    """

    def __init__(
        self, model: nn.Module, *, budget: int = 2**30, host_budget: int = 0, check: bool = True, workers: int = 1
    ) -> None:
        if hasattr(model, "peft_config"):
            raise ValueError(
                "the model has PEFT adapters in it, which write into the same weights. Give the pool the base "
                "(model.unload()), and add the adapters' folders to it."
            )
        self.storage = FlatStorage(model)
        if not self.storage.buffers:
            raise ValueError("the model has no floating parameters in memory that deltas could change.")
        self.model, self.check, self.budget = model, check, budget
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._sources: dict[str, Path | SparseDelta] = {}
        self._ready: Cache[Placed] = Cache(budget)
        self._mixables: Cache[Mixable] = Cache(budget)
        self._read: Cache[ReadDelta] = Cache(host_budget)
        self._readers = Readers(model)
        # The deltas of the last mixed batch, and what was arranged for them.
        self._mixed: tuple[dict[str, Mixable], Subsets] = ({}, Subsets({}, {}))
        self._loading: dict[str, Future[Placed]] = {}
        self._prefetcher = ThreadPoolExecutor(workers, thread_name_prefix="delta-pool")
        # Of names, caches and counts. Never held while something is read or written.
        self._lock = threading.Lock()
        # Of the weights: held while they are written, or the base's values read from them.
        self._weights = threading.Lock()
        self._turn = _Turn()
        self._mine = threading.local()
        self._shown: tuple[str | None, Placed] = (None, BASE)
        # The base's own data of parameters that a delta's whole tensors stand in for.
        self._replaced: dict[str, Tensor] = {}
        self._counts = dict.fromkeys(("hits", "loads", "evictions", "switches"), 0)
        self._closed = False

    # Names

    def add(self, name: str, source: str | PathLike[str] | SparseDelta) -> None:
        """Make a delta known. Nothing is read yet.

        Args:
            name: what it is used by.
            source: folder or file of an adapter, or what was read of one.

        Raises:
            ValueError: if the name is taken, or there is no such folder.
        """
        if not isinstance(source, SparseDelta):
            source = Path(source)
            if not source.exists():
                raise ValueError(f"there is no {source}.")
        with self._lock:
            self._check_open()
            if name in self._sources:
                raise ValueError(f"there is a delta {name!r} already; remove it first.")
            self._sources[name] = source

    def add_folder(self, folder: str | PathLike[str]) -> list[str]:
        """Make every adapter in a folder of folders known, each by its folder's name.

        Returns:
            The names, sorted.

        Raises:
            ValueError: if a name is taken; then none is added.
        """
        found = {path.parent.name: path.parent for path in sorted(Path(folder).glob(f"*/{CONFIG_NAME}"))}
        with self._lock:
            self._check_open()
            if taken := sorted(found.keys() & self._sources.keys()):
                raise ValueError(f"there is a delta {taken[0]!r} already; remove it first.")
            self._sources |= found
        return sorted(found)

    def remove(self, name: str) -> None:
        """Forget a delta. If it is in use, this waits for that to end; the base's weights are put back if it is in them.

        Raises:
            KeyError: if there is none of that name.
        """
        with self._alone():
            with self._lock:
                self._source(name)
                del self._sources[name]
                self._ready.drop(name)
                self._mixables.drop(name)
                self._read.drop(name)
                self._loading.pop(name, None)
            if self._shown[0] == name:
                self._switch(None, BASE)

    def names(self) -> list[str]:
        """The deltas' names, in the order in which they were added."""
        with self._lock:
            return list(self._sources)

    def __contains__(self, name: object) -> bool:
        return name in self._sources

    def __len__(self) -> int:
        return len(self._sources)

    @property
    def shown(self) -> str | None:
        """The delta in the weights now; None for the base."""
        return self._shown[0]

    @property
    def statistics(self) -> PoolStatistics:
        """What happened so far."""
        with self._lock:
            return PoolStatistics(
                len(self._sources),
                len(self._ready),
                self._ready.nbytes + self._mixables.nbytes,
                self._read.nbytes,
                **self._counts,
            )

    # Use

    @contextmanager
    def use(self, name: str | None) -> Iterator[nn.Module]:
        """Have a delta in the weights for a while.

        Args:
            name: its name; None for the base itself.

        Yields:
            The model.

        Raises:
            KeyError: if there is none of that name.
            DeltaError: if it cannot be read, or is another base's. The weights are as they were.
            RuntimeError: if the model's parameters were moved since the pool was made, or the pool is closed.
        """
        if hasattr(self._mine, "name"):
            if self._mine.name != name:
                raise RuntimeError(
                    f"this thread uses {self._mine.name!r}, and would wait for itself to have {name!r}; leave that first."
                )
            yield self.model
            return
        source = None if name is None else self._known(name)
        placed = BASE if name is None else self._obtain(name)

        def show() -> None:
            if name is not None and self._sources.get(name) is not source:
                raise KeyError(f"the delta {name!r} was removed.")
            if self._shown[1] is not placed:
                self._switch(name, placed)

        # Those who come to others find the delta in place: only the first one may write while nobody reads.
        with self._turn.of(placed, show), self._noted(name):
            yield self.model

    @contextmanager
    def mix(self, names: Sequence[str | None], copies: int = 1) -> Iterator[nn.Module]:
        """Have the model compute each sample of a batch with a delta of its own, for a while.

        The base is in the weights; what a delta changes is corrected in the outputs of its samples, module by module.
        What cannot be divided by sample is refused, by name (`peft_dst.mixing`). Others wait meanwhile.

        Args:
            names: for each sample the name of a delta, or None for the base.
            copies: how many times `generate` repeats each sample (beams).

        Yields:
            The model, whose calls take as many samples as there are names, and record no gradients.

        Raises:
            ValueError: if the model is in training mode.
            KeyError, DeltaError, RuntimeError: as `use`.
        """
        if self.model.training:
            raise ValueError("a mixed batch is for evaluation; call model.eval() first.")
        wanted = dict.fromkeys(names)
        if len(wanted) == 1:
            with self.use(next(iter(wanted))) as model:
                yield model
            return
        sources = {name: self._known(name) for name in wanted if name is not None}
        found = {name: self._mixable(name) for name in sources}

        def show() -> None:
            if gone := [name for name, source in sources.items() if self._sources.get(name) is not source]:
                raise KeyError(f"the delta {gone[0]!r} was removed.")
            if self._shown[1] is not BASE:
                self._switch(None, BASE)

        with self._alone(show), self._noted(None):
            given = [SEED if name is None else name for name in names]
            # A generation asks for the same deltas again and again.
            if self._mixed[0] != found:
                changes = {name: one.changes for name, one in found.items()}
                self._mixed = found, Subsets(self._readers.modules, changes)
            with serve(self.model, self._mixed[1], given, copies):
                yield self.model

    @contextmanager
    def _noted(self, name: str | None) -> Iterator[None]:
        self._mine.name = name
        try:
            yield
        finally:
            del self._mine.name

    @contextmanager
    def _alone(self, enter: Callable[[], None] | None = None) -> Iterator[None]:
        """Wait for everybody else to leave the weights.

        Args:
            enter: called then, before anybody else may come.

        Raises:
            RuntimeError: if this thread itself uses them.
        """
        if hasattr(self._mine, "name"):
            raise RuntimeError(f"this thread uses {self._mine.name!r}; leave that first.")
        with self._turn.of(object(), enter):
            yield

    def prefetch(self, *names: str) -> None:
        """Have deltas read and made ready in the background.

        An error in that comes up when the delta is used.

        Raises:
            KeyError: if there is none of that name.
        """
        for name in names:
            with self._lock:
                self._check_open()
                self._source(name)
                if name not in self._ready:
                    self._start_loading(name)

    def ready(self, name: str) -> Placed:
        """A delta as it is written: positions in the storage's buffers, values, seeds; read now if it is not held.

        Raises:
            KeyError, DeltaError: as `use`.
        """
        return self._obtain(name)

    def verify(self, delta: SparseDelta) -> None:
        """Check that a delta could be used here, without adding it.

        Raises:
            DeltaError: if it is another base's, or changes what this model does not have.
        """
        with self._weights:
            place(delta, self.storage, self._shown[1], self.check)

    def close(self) -> None:
        """Put the base's weights back, and let everything go. Waits for what is in use."""
        with self._alone():
            if not self._closed:
                self._switch(None, BASE)
            with self._lock:
                self._closed = True
                self._sources.clear()
                self._ready, self._mixables, self._read = Cache(0), Cache(0), Cache(0)
        self._prefetcher.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> DeltaPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Making ready

    def _obtain(self, name: str) -> Placed:
        """The delta, ready: from memory, from a loading that is under way, or from its source."""
        with self._lock:
            self._check_open()
            self._source(name)
            if (placed := self._ready.get(name)) is not None:
                self._counts["hits"] += 1
                return placed
            future, mine = self._loading.get(name), False
            if future is None or future.cancelled():
                future, mine = Future(), True
                self._loading[name] = future
        if mine:
            self._load(name, future)
        return future.result()

    def _mixable(self, name: str) -> Mixable:
        """The delta for mixed batches: from memory, or made of what is written."""
        placed = self._obtain(name)
        with self._lock:
            if (found := self._mixables.get(name)) is not None and found.placed is placed:
                return found
        found = mixable(placed, self.storage, self._readers)
        with self._lock:
            if name in self._sources and not self._closed:
                self._mixables.put(name, found)
        return found

    def _start_loading(self, name: str) -> None:
        if name not in self._loading:
            future: Future[Placed] = Future()
            self._loading[name] = future
            self._prefetcher.submit(self._load, name, future)

    def _load(self, name: str, future: Future[Placed]) -> None:
        """Make a delta ready; whoever waits for the future gets it, or the error.

        It may be removed meanwhile, and another one of its name be added, whose loading is none of ours.
        """
        try:
            with self._lock:
                source = self._source(name)
            delta = source if isinstance(source, SparseDelta) else self._from_disk(name, source)
            with self._weights:
                placed = place(delta, self.storage, self._shown[1], self.check)
        except BaseException as error:
            with self._lock:
                if self._loading.get(name) is future:
                    del self._loading[name]
            future.set_exception(error)
            return
        with self._lock:
            if self._loading.get(name) is future:
                del self._loading[name]
            self._counts["loads"] += 1
            if self._sources.get(name) is source and not self._closed:
                self._counts["evictions"] += len(self._ready.put(name, placed, keep={self._shown[0] or ""}))
        future.set_result(placed)

    def _from_disk(self, name: str, source: Path) -> SparseDelta:
        with self._lock:
            kept = self._read.get(name)
        if kept is not None:
            return kept.delta
        delta = SparseDelta.load(source)
        if self._read.budget:
            kept = ReadDelta(delta, pinned=any(buffer.is_cuda for buffer in self.storage.buffers))
            delta = kept.delta
            with self._lock:
                if self._sources.get(name) is source:
                    self._read.put(name, kept)
        return delta

    def _known(self, name: str) -> Path | SparseDelta:
        with self._lock:
            self._check_open()
            return self._source(name)

    def _source(self, name: str) -> Path | SparseDelta:
        if name not in self._sources:
            raise KeyError(f"there is no delta {name!r}; add it first.")
        return self._sources[name]

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the pool is closed.")

    # Weights

    def _switch(self, name: str | None, placed: Placed) -> None:
        """Take out the delta that is in the weights, and put in another; nobody uses the model meanwhile."""
        before = self._shown[1]
        self.storage.check(self._replaced.keys())
        with self._weights:
            try:
                write(self.storage, before, seeds=True)
                self._put_back()
                self._replaced = {key: self._parameters[key].data for key in placed.dense}
                for key, tensor in placed.dense.items():
                    self._parameters[key].data = tensor
                write(self.storage, placed)
            except BaseException:
                # Whatever was written of either, the base is below both.
                write(self.storage, before, seeds=True)
                write(self.storage, placed, seeds=True)
                self._put_back()
                self._shown = (None, BASE)
                raise
            self._shown = (name, placed)
        self._counts["switches"] += 1

    def _put_back(self) -> None:
        """The base's own tensors where a delta's whole ones are."""
        for key, tensor in self._replaced.items():
            self._parameters[key].data = tensor
        self._replaced = {}


class _Turn:
    """Who may use the weights: those who want the same at once, others one after the other as they came."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[tuple[object, Any]] = deque()
        self._now: Any = None
        self._users = 0

    @contextmanager
    def of(self, wanted: Any, enter: Callable[[], None] | None = None) -> Iterator[None]:
        """Wait for one's turn, and have it.

        Args:
            wanted: what one wants to find; compared by identity.
            enter: called when nobody else is there, to make it so.
        """
        ticket = object()
        with self._changed:
            self._waiting.append((ticket, wanted))
            try:
                self._changed.wait_for(lambda: self._may_enter(ticket, wanted))
                if enter is not None and not self._users:
                    enter()
                self._now = wanted
                self._users += 1
            finally:
                self._waiting.remove((ticket, wanted))
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    def _may_enter(self, ticket: object, wanted: Any) -> bool:
        first = self._waiting[0][0] is ticket
        return first and (not self._users or self._now is wanted)
