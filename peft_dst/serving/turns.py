"""Turns of threads at something that can be in one state at a time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Turn:
    """Those who want the same go in at once, others one after the other as they came.

    Locks: a condition guards the queue and who is in. It is held while `enter` runs, so that nobody comes in meanwhile, and
    not while somebody has their turn.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self._now: Any = None
        self._users = 0

    @property
    def waiting(self) -> int:
        """Threads that wait for their turn."""
        return len(self._waiting)

    @contextmanager
    def of(self, wanted: Any, enter: Callable[[], None] | None = None) -> Iterator[None]:
        """Wait for one's turn, and have it.

        Args:
            wanted: what one wants to find; compared by identity.
            enter: called when nobody else is there, to make it so.
        """
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                self._changed.wait_for(lambda: self._may_enter(ticket, wanted))
                if enter is not None and not self._users:
                    enter()
                self._now = wanted
                self._users += 1
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
        with self._left():
            yield

    @contextmanager
    def again(self) -> Iterator[None]:
        """Have it once more, by who has it already: without waiting, as others may wait for that one."""
        with self._changed:
            self._users += 1
        with self._left():
            yield

    @contextmanager
    def _left(self) -> Iterator[None]:
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    def _may_enter(self, ticket: object, wanted: Any) -> bool:
        return self._waiting[0] is ticket and (not self._users or self._now is wanted)
