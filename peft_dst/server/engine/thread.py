"""The one thread that computes: takes in requests for many deltas, round by round."""

from __future__ import annotations

import logging
import threading

from ...serving import DeltaPool
from .desk import Desk
from .requests import Request
from .rounds import Rounds


LOG = logging.getLogger(__name__)


class Engine:
    """Computes requests, many at a time, in a thread of its own.

    Continuations make batches, into which new ones come between two tokens: one batch of all deltas, or a batch for each,
    which then take turns token by token. Whatever took less time so far is done (`Planner`), for reading prompts, for
    continuing them and for classifying, each by itself. What fails is told to whom it concerns (`halving`).

    A request is for the delta that had its name when it was submitted: if that is removed, it ends with an UnknownDelta,
    also when another one has come in its place.

    Args:
        pool: of the model that computes, which is in evaluation mode.
        capacity: sequences in computation at most.
        queue: requests that may wait beside them.
    """

    def __init__(self, pool: DeltaPool, *, capacity: int = 32, queue: int = 256) -> None:
        self.pool = pool
        self._desk = Desk(pool, capacity, queue)
        self._rounds = Rounds(pool, self._desk)
        self._thread = threading.Thread(target=self._work, name="peft-dst-engine", daemon=True)
        self._thread.start()

    def submit(self, *requests: Request) -> None:
        """Have requests computed. Those that are submitted together count as one of those that wait.

        Raises:
            Full: if too many wait.
            Stopped: if the engine does not run any more.
        """
        self._desk.submit(*requests)

    @property
    def waiting(self) -> int:
        """Requests that nothing is computed for yet; without those that went away."""
        return self._desk.waiting

    @property
    def running(self) -> int:
        """Sequences in computation."""
        return self._desk.running

    @property
    def computed(self) -> dict[str, int]:
        """Tokens, batches and their rows, and how many batches were of several deltas (`mixed_batches`)."""
        return self._rounds.plans.computed

    @property
    def alive(self) -> bool:
        """Whether it computes; not when it was stopped, or its thread broke down."""
        return self._thread.is_alive()

    def stop(self, timeout: float | None = None) -> bool:
        """Take no more requests, and wait for those that are there. It may be called several times.

        Args:
            timeout: seconds to wait; then what is left ends with `Stopped`.

        Returns:
            Whether all were computed.
        """
        self._desk.close()
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._desk.give_up("the server was stopped before this was computed.")
        return not self._desk.lost

    def _work(self) -> None:
        try:
            while (new := self._desk.take()) is not None:
                try:
                    self._rounds.compute(new)
                except Exception as error:
                    LOG.exception("a round failed, and with it all that was in computation")
                    self._rounds.clear()
                    self._desk.fail(new, error)
        except BaseException:
            LOG.critical("the engine broke down", exc_info=True)
            self._desk.give_up("the engine broke down; the server's log has more.")
