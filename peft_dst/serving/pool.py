"""Deltas by name on one base, one of them in its weights at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from os import PathLike
from types import TracebackType
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..delta import SparseDelta
from ..mixing import BASE, Readers, Subsets, mixed
from .heads import heads_of
from .placed import UNCHANGED, Mixable, Placed, mixable, place, seeds_below, write
from .shelf import Shelf, UnknownDelta
from .storage import FlatStorage
from .turns import Turn


class _Mixed(NamedTuple):
    """What the last mixed batch was made of."""

    deltas: dict[str, Mixable]
    subsets: Subsets


# What a thread has in use that computes a mixed batch.
_MIXED = object()


class _Held:
    """What a thread has in use, and how many times."""

    __slots__ = ("has", "times")

    def __init__(self) -> None:
        self.has: object = None
        self.times = 0

    def __str__(self) -> str:
        return "computes a mixed batch" if self.has is _MIXED else f"uses {self.has!r}"


class _Mine(threading.local):
    """What this thread has."""

    def __init__(self) -> None:
        self.held = _Held()


class _Use:
    """A delta in the weights while a block runs. A generator would take longer than the rest of a small switch."""

    __slots__ = ("_held", "_name", "_pool")

    def __init__(self, pool: DeltaPool, name: str | None) -> None:
        self._pool, self._name = pool, name

    def __enter__(self) -> nn.Module:
        pool, name = self._pool, self._name
        held = pool._mine.held
        if held.times:
            if held.has != name:
                raise RuntimeError(f"this thread {held}, and would wait for itself to have {name!r}; leave that first.")
            # Tasks of one thread need not leave in the order in which they came.
            pool._turn.again()
        else:
            placed = UNCHANGED if name is None else pool._shelf.ready(name, pool._shown)
            # Those who come to others find the delta in place: only the first one may write while nobody reads.
            pool._turn.take(placed, pool._show, placed)
        held.has = name
        held.times += 1
        # It may be left in another thread, as what web frameworks set up for a request is.
        self._held = held
        return pool.model

    def __exit__(self, *error: object) -> None:
        self._held.times -= 1
        self._pool._turn.leave()


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
    another; who came first goes first. Tasks of one thread (asyncio) are one to it: while one of them has a delta, another
    cannot wait for a different one, and gets a RuntimeError. Have worker threads call `use`, from beginning to end.

    Locks: whose `Turn` it is may use the model; a switch is made at its beginning, when nobody else may come. `_weights`
    guards the values in the weights: it is held while they are written (in a mixed batch, while a module runs with a
    delta's), and while the base's are read from them to make a delta ready, which takes no turn. Names and memory have the
    lock of the `Shelf`, under which no other one is taken.

    Errors: what goes wrong in the middle of a switch leaves the base's weights, bit for bit.

    Args:
        model: the base, on its device and in its dtype. It must not be moved, cast, trained or shared with other processes
            (`share_memory`) while it has a pool. A model of PEFT's is none: give its base.
        budget: bytes of deltas held ready, on the model's device. Each takes 8 + 2 × (bytes of a value) for an entry,
            and its whole tensors. The one in use is held in any case. Those of mixed batches are also held arranged for
            that, within as much again: 45 to 95 bytes an entry (ε from 1e-2 to 1e-4; most where embeddings are tied), with
            those just named. What the last mixed batch took is held besides.
        host_budget: bytes of deltas that are kept as they were read, in the host's memory, so that one that was let go for
            others need not be read and parsed again.
        check: whether each delta is compared with the base when it is made ready (its checksums of the base's values).
        workers: threads that prefetch.

    Raises:
        ValueError: for a model that has adapters of PEFT's in it, no floating parameters, or two that share memory without
            being one.
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
        self._readers, self._heads = Readers(model), heads_of(model)
        self._shelf = Shelf(
            self._place,
            lambda placed: mixable(placed, self.storage, self._readers),
            lambda: self.shown,
            budget=budget,
            host_budget=host_budget,
            workers=workers,
        )
        self._turn = Turn()
        self._mine = _Mine()
        # A module that runs with a delta's values may call another one that does.
        self._weights = threading.RLock()
        #: What is in the weights.
        self._shown = UNCHANGED
        # Names of the base's parameters that a delta's whole tensors may stand in for.
        self._replaced: set[str] = set()
        self._switches = 0
        self._mixed: _Mixed | None = None

    # Names

    def add(self, name: str, source: str | PathLike[str] | SparseDelta) -> None:
        """Make a delta known. Nothing is read yet.

        Args:
            name: what it is used by.
            source: folder or file of an adapter, or what was read of one.

        Raises:
            ValueError: if the name is taken, or there is no such folder.
        """
        self._shelf.add(name, source)

    def add_folder(self, folder: str | PathLike[str]) -> list[str]:
        """Make every adapter in a folder of folders known, each by its folder's name.

        Returns:
            The names, sorted.

        Raises:
            ValueError: if a name is taken; then none is added.
        """
        return self._shelf.add_folder(folder)

    def remove(self, name: str) -> None:
        """Forget a delta. If it is in use, this waits for that to end; the base's weights are put back if it is in them.

        Raises:
            UnknownDelta: if there is none of that name.
            RuntimeError: if the pool is closed, or this thread uses it.
        """
        with self._alone():
            self._shelf.remove(name)
            if self._mixed is not None and name in self._mixed.deltas:
                self._mixed = None
            if self.shown == name:
                self._switch(UNCHANGED)

    def names(self) -> list[str]:
        """The deltas' names, in the order in which they were added."""
        return self._shelf.names()

    def version(self, name: str) -> int:
        """A number that tells a delta from others that have had its name: those who compute in several turns can see
        whether it is still the same.

        Raises:
            UnknownDelta: if there is none of that name.
            RuntimeError: if the pool is closed.
        """
        return self._shelf.version(name)

    def __contains__(self, name: object) -> bool:
        return name in self._shelf

    def __len__(self) -> int:
        return len(self._shelf)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._shelf.closed

    @property
    def shown(self) -> str | None:
        """The delta in the weights now; None for the base."""
        return self._shown.name

    @property
    def statistics(self) -> PoolStatistics:
        """What happened so far."""
        return PoolStatistics(**self._shelf.figures(), switches=self._switches)

    # Use

    def use(self, name: str | None) -> AbstractContextManager[nn.Module]:
        """Have a delta in the weights for a while: `with pool.use("support") as model`.

        Args:
            name: its name; None for the base itself.

        Returns:
            What gives the model when it is entered.

        Raises:
            UnknownDelta: on entering, if there is none of that name.
            DeltaError: if it cannot be read, or is another base's. The weights are as they were.
            RuntimeError: if the model's parameters were moved since the pool was made, or the pool is closed.
        """
        return _Use(self, name)

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
            UnknownDelta, DeltaError, RuntimeError: as `use`.
        """
        if self.model.training:
            raise ValueError("a mixed batch is for evaluation; call model.eval() first.")
        wanted = dict.fromkeys(names)
        if len(wanted) == 1:
            with self.use(next(iter(wanted))) as model:
                yield model
            return
        last = self._mixed
        before = last.deltas if last is not None else {}
        found = {name: self._shelf.mixable(name, before.get(name)) for name in wanted if name is not None}

        with self._alone(self._show_base, list(found.values())), self._noted_as_mixed():
            # A generation asks for the same deltas again and again.
            if self._mixed is None or self._mixed.deltas != found:
                changes = {name: one.changes for name, one in found.items()}
                self._mixed = _Mixed(found, Subsets(self._readers.modules, changes, writing=self._weights))
            given = [BASE if name is None else name for name in names]
            with mixed(self.model, self._mixed.subsets, given, copies):
                yield self.model

    @contextmanager
    def _noted_as_mixed(self) -> Iterator[None]:
        held = self._mine.held
        held.has = _MIXED
        held.times += 1
        try:
            yield
        finally:
            held.times -= 1

    def _alone(self, enter: Callable[..., None] | None = None, *given: Any) -> AbstractContextManager[None]:
        """Wait for everybody else to leave the weights.

        Args:
            enter: called then, before anybody else may come.
            given: what it is called with.

        Raises:
            RuntimeError: if this thread itself uses them.
        """
        held = self._mine.held
        if held.times:
            raise RuntimeError(f"this thread {held}; leave that first.")
        return self._turn.of(object(), enter, *given)

    def prefetch(self, *names: str) -> None:
        """Have deltas read and made ready in the background.

        An error in that comes up when the delta is used.

        Raises:
            UnknownDelta: if there is none of that name.
        """
        for name in names:
            self._shelf.prefetch(name)

    def ready(self, name: str) -> Placed:
        """A delta as it is written: positions in the storage's buffers, values, seeds; read now if it is not held.

        Raises:
            UnknownDelta, DeltaError: as `use`.
        """
        return self._shelf.ready(name)

    def is_ready(self, name: str) -> bool:
        """Whether a delta is held within the budget, so that nothing is read to use it; of none that is unknown."""
        return self._shelf.is_ready(name)

    def mixed_nbytes(self, name: str | None) -> int:
        """Bytes that a delta is held in for mixed batches; 0 if it was in none so far, and of the base."""
        return self._shelf.mixed_nbytes(name)

    def verify(self, delta: SparseDelta) -> None:
        """Check that a delta could be used here, without adding it.

        Raises:
            DeltaError: if it is another base's, or changes what this model does not have.
        """
        self._place(delta)

    def close(self) -> None:
        """Put the base's weights back, and let everything go. Waits for what is in use."""
        with self._alone():
            if not self._shelf.closed:
                self._switch(UNCHANGED)
            self._shelf.close()
            self._mixed = None

    def __enter__(self) -> DeltaPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Weights

    def _place(self, delta: SparseDelta) -> Placed:
        return place(delta, self.storage, self._heads, self._seeds_at, self.check)

    def _seeds_at(self, buffer: int, positions: Tensor) -> Tensor:
        with self._weights:
            return seeds_below(self._shown, self.storage, buffer, positions)

    def _show(self, wanted: Placed) -> None:
        """At the beginning of a turn: have a delta in the weights, if its name still stands for it."""
        self._check(wanted)
        if self._shown is not wanted:
            self._switch(wanted)

    def _show_base(self, deltas: Iterable[Mixable]) -> None:
        """At the beginning of a mixed batch's turn."""
        for one in deltas:
            self._check(one.placed)
        self._show(UNCHANGED)

    def _check(self, placed: Placed) -> None:
        if placed.name is not None and not self._shelf.is_version(placed.name, placed.version):
            raise UnknownDelta(f"the delta {placed.name!r} was removed.")

    def _switch(self, wanted: Placed) -> None:
        """Take out the delta that is in the weights, and put in another; nobody uses the model meanwhile."""
        before = self._shown
        self.storage.check(self._replaced)
        with self._weights:
            try:
                write(self.storage, before, seeds=True)
                if self._replaced or wanted.dense:
                    self._put_back()
                    # Noted before any is there, so that an interrupt in between is no harm.
                    self._replaced.update(wanted.dense)
                    for key, parameter in wanted.dense.items():
                        self.storage.replace(key, parameter)
                write(self.storage, wanted)
            except BaseException:
                # Whatever was written of either, the base is below both.
                write(self.storage, before, seeds=True)
                write(self.storage, wanted, seeds=True)
                self._put_back()
                self._shown = UNCHANGED
                raise
            self._shown = wanted
        self._switches += 1

    def _put_back(self) -> None:
        """The base's own parameters where a delta's whole tensors are."""
        for key in self._replaced:
            self.storage.replace(key, self.storage.parameters[key])
        self._replaced.clear()
