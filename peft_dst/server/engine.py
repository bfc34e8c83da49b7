"""The one thread that computes: takes in requests for many deltas, and batches those that can go together."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ..delta import DeltaError
from ..serving import DeltaPool, Planner
from .cohorts import Cohort, Continuation


LOG = logging.getLogger(__name__)
# Steps after which it is decided anew whether deltas go together; when requests come, it is decided at once.
STEPS = 16


@dataclass(eq=False)
class Request:
    """Something to compute with a delta.

    Attributes:
        delta: its name; None for the base.
        on_end: called once: with None when it is done, or with what went wrong.
    """

    delta: str | None
    on_end: Callable[[BaseException | None], None]


@dataclass(eq=False)
class Generate(Request):
    """Continue a text; its tokens come to the continuation's own `on_token`."""

    continuation: Continuation


@dataclass(eq=False)
class Classify(Request):
    """Read a text, as tokens; at the end `logits` is there, floating on the CPU, of the model's shape without the batch."""

    tokens: Sequence[int]
    logits: Tensor | None = None
    cancelled: bool = False


R = TypeVar("R", bound=Request)


class Full(Exception):
    """There are more requests than may wait."""


class Engine:
    """Computes requests, many at a time, in a thread of its own.

    Continuations make batches, into which new ones come between two tokens: one batch of all deltas, or a batch for each,
    which then take turns token by token. Whatever took less time so far is done (`Planner`), for reading prompts, for
    continuing them and for classifying, each by itself. A model that cannot mix deltas gets a batch for each.

    Args:
        pool: of the model that computes, which is in evaluation mode.
        padding: token that pads what is classified.
        capacity: sequences in computation at most.
        queue: requests that may wait beside them.
    """

    def __init__(self, pool: DeltaPool, *, padding: int = 0, capacity: int = 32, queue: int = 256) -> None:
        self.pool, self.padding, self.capacity, self.queue = pool, padding, capacity, queue
        # Until the model turns out to be one that cannot mix deltas.
        self.mixes = True
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._cohorts: list[Cohort] = []
        self._owners: dict[Continuation, Generate] = {}
        # Steps until it is asked again whether deltas go together.
        self._settled = 0
        self.planners = {"read": Planner(), "step": Planner(), "classify": Planner()}
        self.computed = {"tokens": 0, "batches": 0, "rows": 0, "mixed_batches": 0}
        self._thread = threading.Thread(target=self._work, name="peft-dst-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Have a request computed.

        Raises:
            Full: if too many wait.
            RuntimeError: if the engine was stopped.
        """
        with self._changed:
            if self._stopping:
                raise RuntimeError("the engine was stopped.")
            if len(self._waiting) >= self.queue:
                raise Full(f"{len(self._waiting)} requests are waiting already; try again later.")
            self._waiting.append(request)
            self._changed.notify()

    @property
    def waiting(self) -> int:
        """Requests that nothing is computed for yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Sequences in computation."""
        return len(self._owners)

    def stop(self, timeout: float | None = None) -> bool:
        """Take no more requests, and wait for those that are there.

        Args:
            timeout: seconds to wait; then what is left is given up.

        Returns:
            Whether all were computed.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout)
        if not self._thread.is_alive():
            return True
        error = RuntimeError("the engine was stopped before this was computed.")
        with self._changed:
            left = [*self._waiting]
            self._waiting.clear()
        for request in left:
            request.on_end(error)
        for continuation, request in list(self._owners.items()):
            continuation.cancelled = True
            request.on_end(error)
        return False

    # In the thread

    def _work(self) -> None:
        while (new := self._take()) is not None:
            self._read([request for request in new if isinstance(request, Generate)])
            self._classify([request for request in new if isinstance(request, Classify) and not request.cancelled])
            self._arrange(bool(new))
            for cohort in list(self._cohorts):
                self._step(cohort)

    def _take(self) -> list[Request] | None:
        """New requests, as many as there is room for; None when the engine has stopped and nothing is left."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._owners or self._stopping)
            if self._stopping and not self._waiting and not self._owners:
                return None
            room = max(0, self.capacity - self.running)
            return [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]

    def _read(self, requests: list[Generate]) -> None:
        """Begin continuations; not of those that went away while they waited."""
        for request in requests:
            if request.continuation.cancelled:
                request.continuation.finished = "cancelled"
                request.on_end(None)
        requests = [request for request in requests if not request.continuation.finished]
        self._owners |= {request.continuation: request for request in requests}
        for part in self._plan("read", requests, lambda request: len(request.continuation.prompt)):
            self._begin([request.continuation for request in part])

    def _begin(self, members: list[Continuation]) -> None:
        """Read what these have so far, and have them continued; of several deltas one by one, if they cannot be mixed."""
        deltas = [self._owners[member].delta for member in members]
        lengths = [len(member.prompt) + len(member.tokens) for member in members]
        try:
            with self._measured("read", deltas, lengths), self.pool.mix(deltas) as model:
                self._cohorts.append(Cohort(model, members))
        except Exception as error:
            self._failed(members, error)
            return
        self._tell(members)

    def _arrange(self, new: bool) -> None:
        """Put batches together, or part them, as it is best now."""
        self._settled -= 1
        if not self._cohorts or (self._settled > 0 and not new):
            return
        self._settled = STEPS
        rows = Counter(self._owners[member].delta for cohort in self._cohorts for member in cohort.members)
        mix = self.mixes and self.planners["step"].mixes(list(rows.values()))
        if not mix:
            self._cohorts = [part for cohort in self._cohorts for part in cohort.divide(self._deltas(cohort))]
        found: dict[str | None, Cohort] = {}
        for cohort in self._cohorts:
            key = None if mix else self._deltas(cohort)[0]
            if key in found:
                found[key].join(cohort)
            else:
                found[key] = cohort
        self._cohorts = list(found.values())

    def _step(self, cohort: Cohort) -> None:
        members, deltas = list(cohort.members), self._deltas(cohort)
        try:
            with self._measured("step", deltas, [1] * len(members)), self.pool.mix(deltas):
                cohort.step()
        except Exception as error:
            self._cohorts.remove(cohort)
            self._failed(members, error)
            return
        self._tell(members)

    def _failed(self, members: list[Continuation], error: Exception) -> None:
        """After an error: read those of each delta by themselves, so that it is known whose it was."""
        # Those that ended in the very step have their answers.
        self._tell(members)
        requests = [self._owners[member] for member in members if member.finished is None]
        parts = _by_delta(requests)
        if len(parts) > 1:
            self._doubt(error)
            for part in parts:
                self._begin([request.continuation for request in part])
            return
        for request in requests:
            del self._owners[request.continuation]
            request.on_end(error)

    def _doubt(self, error: Exception) -> None:
        """After an error of a mixed batch: if it is not about a delta, the model may be one that cannot be mixed."""
        if not isinstance(error, KeyError | DeltaError):
            self.mixes = False
            LOG.warning("deltas are not mixed any more, because of %s: %s", type(error).__name__, error)

    def _deltas(self, cohort: Cohort) -> list[str | None]:
        return [self._owners[member].delta for member in cohort.members]

    def _tell(self, members: list[Continuation]) -> None:
        """Let those know that are finished; batches without members go."""
        self._cohorts = [cohort for cohort in self._cohorts if cohort.members]
        for member in members:
            if member.finished is not None:
                self._owners.pop(member).on_end(None)

    def _classify(self, requests: list[Classify]) -> None:
        for part in self._plan("classify", requests, lambda request: len(request.tokens)):
            self._classify_together(part)

    @torch.no_grad()
    def _classify_together(self, requests: list[Classify]) -> None:
        longest = max(len(request.tokens) for request in requests)
        ids = torch.full((len(requests), longest), self.padding)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, : len(request.tokens)] = torch.tensor(request.tokens)
            mask[row, : len(request.tokens)] = 1
        deltas = [request.delta for request in requests]
        try:
            with self._measured("classify", deltas, [longest] * len(requests)), self.pool.mix(deltas) as model:
                device = next(model.parameters()).device
                logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.cpu()
        except Exception as error:
            parts = _by_delta(requests)
            if len(parts) > 1:
                self._doubt(error)
                for part in parts:
                    self._classify_together(part)
                return
            for request in requests:
                request.on_end(error)
            return
        for row, request in enumerate(requests):
            request.logits = logits[row]
            request.on_end(None)

    def _plan(self, kind: str, requests: list[R], size: Callable[[R], int]) -> list[list[R]]:
        """What goes together: everything, or those of one delta."""
        parts = _by_delta(requests)
        if self.mixes and self.planners[kind].mixes([sum(map(size, part)) for part in parts]):
            return [requests]
        return parts

    @contextmanager
    def _measured(self, kind: str, deltas: Sequence[str | None], sizes: Sequence[int]) -> Iterator[None]:
        """Count a batch and remember what it took, if it comes to its end."""
        begin = time.perf_counter()
        yield
        taken = time.perf_counter() - begin
        by_delta: Counter[str | None] = Counter()
        for delta, size in zip(deltas, sizes, strict=True):
            by_delta[delta] += size
        self.planners[kind].note(list(by_delta.values()), taken)
        self.computed["batches"] += 1
        self.computed["mixed_batches"] += len(by_delta) > 1
        self.computed["rows"] += len(deltas)
        self.computed["tokens"] += 0 if kind == "classify" else len(deltas)


def _by_delta(requests: Sequence[R]) -> list[list[R]]:
    found: dict[str | None, list[R]] = {}
    for request in requests:
        found.setdefault(request.delta, []).append(request)
    return list(found.values())
