"""Requests from when they are submitted until they have ended, which each of them is told once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from ...delta import DeltaError
from ...serving import DeltaPool, UnknownDelta
from ..cohorts import Continuation
from .loading import Loading
from .requests import Full, Generate, R, Request, Stopped, removed, version_of


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
        self._waiting: list[Request] = []
        # Those that were submitted and have not ended.
        self._open: set[Request] = set()
        self._running: dict[Continuation, Generate] = {}
        self._changed = threading.Condition()
        self._loading = Loading(pool, self._changed)
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
            self._loading.clear()
            self._changed.notify()
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
        """New requests, as many as there is room and time for; None when this is closed and nothing is left.

        It waits until there is something to compute, or to tell.
        """
        with self._changed:
            while True:
                ending, new = self._ending(), self._beginning()
                if new or ending or self._running:
                    break
                if self._closed and not self._waiting:
                    return None
                self._changed.wait()
        for request, error in ending:
            # The files of a delta that was removed are gone, too.
            self.drop(request, (self.removed(request) or error) if isinstance(error, DeltaError) else error)
        return new

    def _ending(self) -> list[tuple[Request, BaseException | None]]:
        """Those that are not wanted any more, or whose delta cannot be used: they wait no longer. With what went wrong."""
        errors = self._loading.errors()
        ending = [one for one in self._waiting if one.cancelled or one.key in errors]
        self._waiting = [one for one in self._waiting if not one.cancelled and one.key not in errors]
        return [(one, None if one.cancelled else errors[one.key]) for one in ending]

    def _beginning(self) -> list[Request]:
        """Those that wait no longer as they are computed. Others overtake one whose delta is still being read."""
        new: list[Request] = []
        staying: list[Request] = []
        left = READ
        for at, request in enumerate(self._waiting):
            if self.running + len(new) >= self.capacity or (new and request.size > left):
                staying += self._waiting[at:]
                break
            if self._loading.lets(request):
                left -= request.size
                new.append(request)
            else:
                staying.append(request)
        self._waiting = staying
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
        return removed(self.pool, request.key)

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
