"""What the engine is asked for, and why it may not compute it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from ...serving import DeltaPool, UnknownDelta
from ..cohorts import Continuation


# A delta's name and version.
Key = tuple[str | None, int | None]


@dataclass(eq=False)
class Request:
    """Something to compute with a delta.

    Attributes:
        delta: its name; None for the base.
        on_end: called once: with None when it is done, or with what went wrong.
        version: of the delta, when it was submitted; None for the base, and if there was none.
        group: what was submitted together has the same.
    """

    delta: str | None
    on_end: Callable[[BaseException | None], None]
    version: int | None = field(default=None, init=False)
    group: object = field(default=None, init=False)

    @property
    def cancelled(self) -> bool:
        """Whether nobody wants it any more."""
        raise NotImplementedError

    @property
    def size(self) -> int:
        """Tokens that are to be read."""
        raise NotImplementedError

    @property
    def key(self) -> Key:
        """What it is computed with."""
        return self.delta, self.version


@dataclass(eq=False)
class Generate(Request):
    """Continue a text; its tokens come to the continuation's own `on_token`."""

    continuation: Continuation

    @property
    def cancelled(self) -> bool:
        return self.continuation.cancelled

    @property
    def size(self) -> int:
        return len(self.continuation.prompt) + len(self.continuation.tokens)


@dataclass(eq=False)
class Classify(Request):
    """Read a text, as tokens; at the end `logits` is there, floating on the CPU, of the model's shape without the batch."""

    tokens: Sequence[int]
    logits: Tensor | None = None
    cancelled: bool = False

    @property
    def size(self) -> int:
        return len(self.tokens)


R = TypeVar("R", bound=Request)


class Unavailable(Exception):
    """A request that is not computed now, through no fault of its own."""


class Full(Unavailable):
    """There are more requests than may wait."""


class Stopped(Unavailable):
    """The engine was stopped, or broke down."""


def version_of(pool: DeltaPool, delta: str | None) -> int | None:
    """Of a delta now; None for the base, and for one that there is not."""
    try:
        return None if delta is None else pool.version(delta)
    except UnknownDelta:
        return None


def removed(pool: DeltaPool, key: Key) -> UnknownDelta | None:
    """What to tell those whose delta has gone, or is another one now."""
    delta, version = key
    if delta is None or (version is not None and version_of(pool, delta) == version):
        return None
    return UnknownDelta(f"the delta {delta!r} was removed.")


def by_delta(requests: Sequence[R]) -> list[list[R]]:
    """Those of each delta together."""
    return grouped(requests, lambda request: request.key)


def grouped(requests: Sequence[R], key: Callable[[R], Hashable]) -> list[list[R]]:
    """Those with the same key together, in the order in which the first of each comes."""
    found: dict[Hashable, list[R]] = {}
    for request in requests:
        found.setdefault(key(request), []).append(request)
    return list(found.values())
