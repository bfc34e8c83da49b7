"""What goes together in one batch: of several deltas, by what took less time so far, and of several lengths."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ...serving import DeltaPool, Planner
from .companies import Companies
from .requests import R, Request, by_delta, grouped


# Tokens of several texts that are read in one batch at most, with their padding: one long text makes short ones as long.
TOKENS = 8192


class Plans:
    """Batches that are planned, and what became of them: for reading prompts ("read"), for continuing them ("step") and
    for classifying ("classify"), each by itself.

    Args:
        pool: of the deltas.
        companies: which of them may go together.

    Attributes:
        computed: tokens, batches and their rows, and how many batches were of several deltas.
    """

    def __init__(self, pool: DeltaPool, companies: Companies) -> None:
        self._pool, self._companies = pool, companies
        self._planners = {"read": Planner(), "step": Planner(), "classify": Planner()}
        self.computed = {"tokens": 0, "batches": 0, "rows": 0, "mixed_batches": 0}

    def plan(
        self, kind: str, requests: Sequence[R], size: Callable[[R], int] = lambda request: request.size
    ) -> list[list[R]]:
        """What goes together: of a company as much as the pool has room for, or those of one delta."""
        found: list[list[R]] = []
        for company in grouped(requests, self._companies.of):
            parts = by_delta(company)
            if self._planners[kind].mixes([sum(map(size, part)) for part in parts]):
                fitting, parts = self._fitting(parts)
                found += [[request for part in fitting for request in part]] if fitting else []
            found += parts
        return found

    def _fitting(self, parts: Sequence[list[R]]) -> tuple[list[list[R]], list[list[R]]]:
        """Those of which the pool holds all deltas at once, and others, which would be arranged anew for each token."""
        fitting: list[list[R]] = []
        others: list[list[R]] = []
        room = self._pool.budget
        for part in parts:
            size = self._pool.mixed_nbytes(part[0].delta)
            if size > room:
                others.append(part)
            else:
                room -= size
                fitting.append(part)
        return fitting, others

    @contextmanager
    def measured(self, kind: str, requests: Sequence[Request], sizes: Sequence[int]) -> Iterator[None]:
        """Count a batch and remember what it took, if it comes to its end."""
        begin = time.perf_counter()
        yield
        taken = time.perf_counter() - begin
        tokens: Counter[str | None] = Counter()
        for request, size in zip(requests, sizes, strict=True):
            tokens[request.delta] += size
        self._planners[kind].note(list(tokens.values()), taken)
        self.computed["batches"] += 1
        self.computed["mixed_batches"] += len(tokens) > 1
        self.computed["rows"] += len(requests)
        self.computed["tokens"] += 0 if kind == "classify" else len(requests)


def of_like_sizes(requests: Sequence[R]) -> list[list[R]]:
    """Those of like sizes together, no more than `TOKENS` with their padding, or a single one."""
    found: list[list[R]] = []
    for request in sorted(requests, key=lambda request: request.size):
        if found and (len(found[-1]) + 1) * request.size <= TOKENS:
            found[-1].append(request)
        else:
            found.append([request])
    return found
