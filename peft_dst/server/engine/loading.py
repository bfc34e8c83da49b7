"""Deltas that are read beside the engine's thread, which computes with others meanwhile."""

from __future__ import annotations

import threading

from ...serving import DeltaPool
from .requests import Key, Request, removed


class Loading:
    """Has deltas made ready for requests that wait, one after the other, in a thread that is there while any is wanted.

    One that there is no room for even then, or that others have pushed out before its request could begin, is left to the
    engine's thread: for no request is a delta read again and again.

    Locks: all but the reading is done with the desk's held. Its condition is notified when a delta has been read.

    Args:
        pool: of the deltas.
        changed: the desk's condition.
    """

    def __init__(self, pool: DeltaPool, changed: threading.Condition) -> None:
        self._pool, self._changed = pool, changed
        # Each with the last request that was seen to want it; the first one is being read.
        self._wanted: dict[Key, Request] = {}
        self._errors: dict[Key, BaseException] = {}
        # Of those that were read and have not been found ready since: whether there was room for them.
        self._read: dict[Key, bool] = {}

    def lets(self, request: Request) -> bool:
        """Whether a request may begin. If not, its delta is being read, and it is asked again after that."""
        key = request.key
        if request.delta is None or self._pool.is_ready(request.delta):
            self._read.pop(key, None)
            return True
        if (fitted := self._read.get(key)) is not None:
            if fitted:
                del self._read[key]
            return True
        if not self._wanted:
            try:
                threading.Thread(target=self._work, name="peft-dst-loading", daemon=True).start()
            except RuntimeError:
                # The system gives no more threads: it is read in place.
                return True
        self._wanted[key] = request
        return False

    def errors(self) -> dict[Key, BaseException]:
        """What went wrong since this was asked last."""
        found, self._errors = self._errors, {}
        return found

    def clear(self) -> None:
        """Read nothing more."""
        self._wanted.clear()

    # In the thread

    def _work(self) -> None:
        key, error = None, None
        while True:
            with self._changed:
                if key is not None:
                    self._note(key, error)
                key = self._next()
            if key is None:
                return
            error = self._load(key)

    def _next(self) -> Key | None:
        for key, request in list(self._wanted.items()):
            if not request.cancelled:
                return key
            # Whoever else wants it is seen again.
            del self._wanted[key]
            self._changed.notify()
        return None

    def _load(self, key: Key) -> BaseException | None:
        """Make a delta ready, and say what went wrong."""
        try:
            if (error := removed(self._pool, key)) is not None:
                return error
            assert key[0] is not None
            self._pool.ready(key[0])
        except BaseException as error:
            return error
        return None

    def _note(self, key: Key, error: BaseException | None) -> None:
        self._wanted.pop(key, None)
        self._changed.notify()
        if error is not None:
            self._errors[key] = error
            return
        if len(self._read) > 2 * len(self._pool) + 2:
            # Most are of deltas that are gone; of others it is found out again.
            self._read.clear()
        self._read[key] = key[0] is not None and self._pool.is_ready(key[0])
