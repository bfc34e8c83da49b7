"""Batches that fail, computed in halves: so that errors are told to whom they concern, and to nobody else.

What goes wrong with one sequence alone, as in sampling, ends that one. After an error of a batch of several deltas each
half of them is computed by itself, and so on, down to single deltas, and of those down to single requests, as memory may be
enough for fewer. A request that fails alone ends with its error, and its delta is computed alone for a while; if it is the
delta that cannot be used, all that want it end. So are two deltas that fail together and not alone, as at least one of them
changes what cannot be mixed; but if their outputs have different shapes (heads of different sizes), each goes on with those
of its own shape. Others are mixed as before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...delta import DeltaError
from ...serving import UnknownDelta
from .companies import Companies
from .desk import Desk
from .plans import of_like_sizes
from .requests import R, by_delta


class Halving:
    """Has requests computed, whoever of them fails.

    Args:
        desk: tells them their ends.
        companies: learn whom to compute alone.
    """

    def __init__(self, desk: Desk, companies: Companies) -> None:
        self._desk, self._companies = desk, companies

    def compute(self, batch: Callable[[list[R]], None], requests: Sequence[R]) -> bool:
        """Have requests computed, in one batch if that is possible; those that went away are not.

        Args:
            batch: computes some of them.
            requests: all.

        Returns:
            Whether none ended with an error.
        """
        fine = True
        for some in of_like_sizes(self._desk.present(requests)):
            try:
                batch(some)
            except Exception as error:
                fine = self.after(error, batch, some) and fine
        return fine

    def after(self, error: Exception, batch: Callable[[list[R]], None], requests: Sequence[R]) -> bool:
        """After an error of a batch: compute it in two, so that it is known whose it was; as `compute`."""
        # Those that ended in the very step have their answers.
        self._desk.tell(requests)
        requests = [request for request in requests if self._desk.is_open(request)]
        about_a_delta = isinstance(error, UnknownDelta | DeltaError)
        parts = by_delta(requests)
        if len(parts) < 2 and not about_a_delta:
            # They may have been too many, or it is one request's fault.
            parts = [[request] for request in requests]
        if len(parts) < 2:
            for request in requests:
                if not isinstance(error, UnknownDelta):
                    self._companies.keep_apart(request, error)
                self._desk.drop(request, error)
            return False
        half = len(parts) // 2
        fine = [self.compute(batch, [r for part in some for r in part]) for some in (parts[:half], parts[half:])]
        one, other = parts[0][0], parts[-1][0]
        # What is about a delta is so when it is alone; and memory may be enough for either of one delta's requests.
        together = len(parts) == 2 and all(fine) and not about_a_delta and one.key != other.key
        if together and self._companies.of(one) == self._companies.of(other):
            self._companies.keep_apart(one, error)
            self._companies.keep_apart(other, error)
        return all(fine)
