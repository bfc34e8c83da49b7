"""Turns of threads at something that can be in one state at a time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Turn:
    """Those who want the same go in at once, others one after the other as they came.

    Locks: one guards the queue and who is in. It is held while `enter` runs, so that nobody comes in meanwhile, and not
    while somebody has their turn.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._waiting: deque[object] = deque()
        self._now: Any = None
        self._users = 0

    @property
    def waiting(self) -> int:
        """Threads that wait for their turn."""
        return len(self._waiting)

    def take(self, wanted: Any, enter: Callable[..., None] | None = None, *given: Any) -> None:
        """Wait for one's turn, and have it until `leave`.

        Args:
            wanted: what one wants to find; compared by identity.
            enter: called when nobody else is there, to make it so.
            given: what `enter` is called with.
        """
        taken = False
        try:
            with self._lock:
                if self._waiting or (self._users and self._now is not wanted):
                    self._wait(wanted)
                if enter is not None and not self._users:
                    enter(*given)
                self._now = wanted
                self._users += 1
                taken = True
        except BaseException:
            # Ctrl-C may come when the lock has been left.
            if taken:
                self.leave()
            raise

    def again(self) -> None:
        """Have it once more, by who has it already: without waiting, as others may wait for that one."""
        with self._lock:
            self._users += 1

    def leave(self) -> None:
        """End what `take` or `again` began."""
        with self._lock:
            self._users -= 1
            if self._waiting:
                self._changed.notify_all()

    @contextmanager
    def of(self, wanted: Any, enter: Callable[..., None] | None = None, *given: Any) -> Iterator[None]:
        """Have a turn while a block runs, with what `take` is given."""
        self.take(wanted, enter, *given)
        try:
            yield
        finally:
            self.leave()

    def _wait(self, wanted: Any) -> None:
        ticket = object()
        self._waiting.append(ticket)
        try:
            self._changed.wait_for(lambda: self._waiting[0] is ticket and (not self._users or self._now is wanted))
        finally:
            self._waiting.remove(ticket)
            # Who is next may want the same.
            self._changed.notify_all()
