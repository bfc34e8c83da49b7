"""Requests from when they are submitted until they have ended, which each of them is told once."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence

from ...serving import DeltaPool, UnknownDelta
from ..cohorts import Continuation
from .requests import Full, Generate, R, Request, Stopped, version_of


LOG = logging.getLogger(__name__)
# Tokens of new texts that are read before everybody gets another token, or a single text.
READ = 8192


class Desk:
    """Who waits, who is in computation, and who has not ended.

    Locks: a condition guards who waits, who has not ended and whether more are taken in. It is not held while anything is
    computed or told. Who is in computation is changed by the engine's thread alone.

    Args:
        pool: of the deltas.
        capacity: sequences in computation at most.
        queue: requests that may wait beside them.

    Attributes:
        lost: whether any ended uncomputed, as this was given up.
    """

    def __init__(self, pool: DeltaPool, capacity: int, queue: int) -> None:
        self.pool, self.capacity, self.queue = pool, capacity, queue
        self.lost = False
        self._waiting: deque[Request] = deque()
        # Those that were submitted and have not ended.
        self._open: set[Request] = set()
        self._running: dict[Continuation, Generate] = {}
        self._changed = threading.Condition()
        self._closed = False

    # Of any thread

    def submit(self, *requests: Request) -> None:
        """As `Engine.submit`."""
        group = object()
        with self._changed:
            if self._closed:
                raise Stopped("the engine was stopped.")
            if (waiting := self.waiting) >= self.queue:
                raise Full(f"{waiting} requests are waiting already; try again later.")
            for request in requests:
                request.version, request.group = version_of(self.pool, request.delta), group
            self._waiting.extend(requests)
            self._open.update(requests)
            self._changed.notify()

    @property
    def waiting(self) -> int:
        """Requests that nothing is computed for yet; without those that went away."""
        with self._changed:
            return len({request.group for request in self._waiting if not request.cancelled})

    @property
    def running(self) -> int:
        """Sequences in computation."""
        return len(self._running)

    def close(self) -> None:
        """Take nothing more in."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def give_up(self, why: str) -> None:
        """Take nothing more in, and end all that is there."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            left = list(self._open)
            self.lost = self.lost or bool(left)
        for request in left:
            self.end(request, Stopped(why))

    def end(self, request: Request, error: BaseException | None) -> None:
        """Tell a request's end, once."""
        with self._changed:
            if request not in self._open:
                return
            self._open.remove(request)
        try:
            request.on_end(error)
        except Exception:
            # Whoever asked is gone, which is nobody else's concern.
            LOG.warning("the end of a request could not be told", exc_info=True)

    # Of the engine's

    def take(self) -> list[Request] | None:
        """New requests, as many as there is room and time for; None when this is closed and nothing is left."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._running or self._closed)
            if self._closed and not self._waiting and not self._running:
                return None
            gone = [request for request in self._waiting if request.cancelled]
            self._waiting = deque(request for request in self._waiting if not request.cancelled)
            new: list[Request] = []
            left = READ
            while self._waiting and self.running + len(new) < self.capacity:
                left -= self._waiting[0].size
                if new and left < 0:
                    break
                new.append(self._waiting.popleft())
        self.present(gone)
        return new

    def begin(self, requests: Sequence[Generate]) -> None:
        """These are in computation from now on."""
        self._running |= {request.continuation: request for request in requests}

    def of(self, members: Sequence[Continuation]) -> list[Generate]:
        """The requests of continuations that are in computation."""
        return [self._running[member] for member in members]

    def present(self, requests: Sequence[R]) -> list[R]:
        """Those that are still wanted, and whose delta is still there; for others it is the end."""
        staying = []
        for request in requests:
            if request.cancelled or not self.is_open(request):
                self.drop(request, None)
            elif error := self.removed(request):
                self.drop(request, error)
            else:
                staying.append(request)
        return staying

    def is_open(self, request: Request) -> bool:
        """Whether it has not ended."""
        return request in self._open

    def removed(self, request: Request) -> UnknownDelta | None:
        """What to tell it if its delta has gone, or is another one now."""
        if request.delta is None:
            return None
        if request.version is not None and version_of(self.pool, request.delta) == request.version:
            return None
        return UnknownDelta(f"the delta {request.delta!r} was removed.")

    def drop(self, request: Request, error: BaseException | None) -> None:
        """The end of a request that is not done."""
        if isinstance(request, Generate):
            request.continuation.finished = "cancelled" if error is None else "error"
            self._running.pop(request.continuation, None)
        self.end(request, error)

    def tell(self, requests: Sequence[Request]) -> None:
        """Let those know whose texts are finished."""
        for request in requests:
            if isinstance(request, Generate) and request.continuation.finished is not None:
                self._running.pop(request.continuation, None)
                self.end(request, request.continuation.error)

    def fail(self, new: Sequence[Request], error: Exception) -> None:
        """The end of all that is in computation, and of what was to be."""
        for request in (*new, *self._running.values()):
            self.end(request, error)
        self._running.clear()
