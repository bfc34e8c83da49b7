"""The one thread that computes: takes in requests for many deltas, and batches those that can go together."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..serving import DeltaPool
from .cohorts import Cohort, Continuation


@dataclass(eq=False)
class Request:
    """Something to compute with a delta.

    Attributes:
        delta: its name; None for the base.
        on_end: called once: with None when it is done, or with what went wrong.
        arrived: when it came, of time.monotonic().
    """

    delta: str | None
    on_end: Callable[[BaseException | None], None]
    arrived: float = field(default_factory=time.monotonic, init=False)


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


class Full(Exception):
    """There are more requests than may wait."""


class Engine:
    """Computes requests, many at a time, in a thread of its own.

    Continuations of one delta make a batch, into which new ones come between two tokens. Deltas take turns token by token:
    a switch costs a small part of a forward pass, and so nobody waits for another's answer to end. Requests that arrive
    together for one delta are read in one forward pass.

    Args:
        pool: of the model that computes.
        padding: token that pads what is classified.
        capacity: sequences in computation at most.
        queue: requests that may wait beside them.
    """

    def __init__(self, pool: DeltaPool, *, padding: int = 0, capacity: int = 32, queue: int = 256) -> None:
        self.pool, self.padding, self.capacity, self.queue = pool, padding, capacity, queue
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._running: dict[str | None, tuple[Cohort, dict[Continuation, Generate]]] = {}
        self.computed = {"tokens": 0, "batches": 0, "rows": 0}
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
        return sum(len(cohort.members) for cohort, _ in list(self._running.values()))

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
        for _, requests in list(self._running.values()):
            for continuation, request in list(requests.items()):
                continuation.cancelled = True
                request.on_end(error)
        return False

    # In the thread

    def _work(self) -> None:
        while (new := self._take()) is not None:
            by_delta: dict[tuple[str | None, type], list[Any]] = {}
            for request in new:
                by_delta.setdefault((request.delta, type(request)), []).append(request)
            for (delta, kind), requests in by_delta.items():
                (self._read if kind is Generate else self._classify)(delta, requests)
            for delta in list(self._running):
                self._step(delta)

    def _take(self) -> list[Request] | None:
        """New requests, as many as there is room for; None when the engine has stopped and nothing is left."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._running or self._stopping)
            if self._stopping and not self._waiting and not self._running:
                return None
            room = max(0, self.capacity - self.running)
            return [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]

    def _read(self, delta: str | None, requests: list[Generate]) -> None:
        """Begin continuations, beside those of the same delta that are under way."""
        owners = {request.continuation: request for request in requests}
        try:
            with self.pool.use(delta) as model:
                cohort = Cohort(model, list(owners))
        except Exception as error:
            self._fail(owners, error)
            return
        self._count(len(owners), len(owners))
        self._tell(owners)
        there, others = self._running.get(delta, (None, {}))
        if there is not None:
            there.join(cohort)
            cohort, owners = there, others | owners
        if cohort.members:
            self._running[delta] = cohort, owners

    def _step(self, delta: str | None) -> None:
        cohort, owners = self._running[delta]
        rows = len(cohort.members)
        try:
            with self.pool.use(delta):
                cohort.step()
        except Exception as error:
            del self._running[delta]
            self._fail(owners, error)
            return
        self._count(rows, rows)
        self._tell(owners)
        if not cohort.members:
            del self._running[delta]

    def _tell(self, owners: dict[Continuation, Generate]) -> None:
        for continuation in [c for c in owners if c.finished is not None]:
            owners.pop(continuation).on_end(None)

    def _fail(self, owners: dict[Continuation, Generate], error: Exception) -> None:
        for request in owners.values():
            request.on_end(error)

    @torch.no_grad()
    def _classify(self, delta: str | None, requests: list[Classify]) -> None:
        requests = [request for request in requests if not request.cancelled]
        if not requests:
            return
        longest = max(len(request.tokens) for request in requests)
        ids = torch.full((len(requests), longest), self.padding)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, : len(request.tokens)] = torch.tensor(request.tokens)
            mask[row, : len(request.tokens)] = 1
        try:
            with self.pool.use(delta) as model:
                device = next(model.parameters()).device
                logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.cpu()
        except Exception as error:
            for request in requests:
                request.on_end(error)
            return
        self._count(len(requests), 0)
        for row, request in enumerate(requests):
            request.logits = logits[row]
            request.on_end(None)

    def _count(self, rows: int, tokens: int) -> None:
        self.computed["batches"] += 1
        self.computed["rows"] += rows
        self.computed["tokens"] += tokens
