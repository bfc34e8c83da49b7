"""Which deltas may be in one batch: those whose outputs have the same shape, but for those that failed of late."""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Sequence

from ...serving import DeltaPool
from .requests import Key, Request, version_of


LOG = logging.getLogger(__name__)
# Seconds that a delta is computed alone after an error; twice as long after each further one.
APART = 60.0


class Companies:
    """What is known of deltas that were computed.

    Args:
        pool: theirs.
    """

    def __init__(self, pool: DeltaPool) -> None:
        self._pool = pool
        # Of a delta's outputs.
        self._shapes: dict[Key, Hashable] = {}
        # Until when a delta is computed alone, and how long it was to be.
        self._apart: dict[Key, tuple[float, float]] = {}

    def of(self, request: Request) -> Hashable:
        """With whom it may be in a batch: with those of the same value. What was never computed is taken to go with the
        base.
        """
        if self._is_apart(request.key):
            return request.key
        return self._shapes.get(request.key, self._shapes.get((None, None)))

    def learn(self, requests: Sequence[Request], shape: Hashable) -> None:
        """These had outputs of this shape."""
        for request in requests:
            self._shapes.setdefault(request.key, shape)
        if len(self._shapes) + len(self._apart) > 2 * len(self._pool) + 2:
            # Most are of deltas that are gone.
            gone = {key for key in (*self._shapes, *self._apart) if version_of(self._pool, key[0]) != key[1]}
            self._shapes = {key: of_one for key, of_one in self._shapes.items() if key not in gone}
            self._apart = {key: of_one for key, of_one in self._apart.items() if key not in gone}

    def keep_apart(self, request: Request, error: Exception) -> None:
        """Compute its delta alone for a while, after an error, which may have been another's or pass."""
        if request.delta is None or self._is_apart(request.key):
            return
        _, before = self._apart.get(request.key, (0.0, APART / 2))
        self._apart[request.key] = time.monotonic() + 2 * before, 2 * before
        LOG.warning(
            "%r is computed alone for %g seconds, after %s: %s", request.delta, 2 * before, type(error).__name__, error
        )

    def _is_apart(self, key: Key) -> bool:
        return time.monotonic() < self._apart.get(key, (0.0, 0.0))[0]
