"""What was used last, within a budget of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=Sized)


class Cache(Generic[T]):
    """Least recently used values go first when the budget is exceeded.

    Not safe for threads by itself.

    Args:
        budget: bytes that the values may have together.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.nbytes = 0
        self._values: OrderedDict[str, T] = OrderedDict()

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __len__(self) -> int:
        return len(self._values)

    def get(self, name: str) -> T | None:
        """The value, now the most recently used; None if it is not there."""
        if name not in self._values:
            return None
        self._values.move_to_end(name)
        return self._values[name]

    def put(self, name: str, value: T, keep: Collection[str] = ()) -> list[str]:
        """Take a value in, and let others go.

        Args:
            name: its name; what was there under it goes.
            value: what to keep.
            keep: names that must not go.

        Returns:
            Names of what went; the value's own, if there is no room for it.
        """
        self.drop(name)
        if value.nbytes + sum(self._values[kept].nbytes for kept in set(keep) & self._values.keys()) > self.budget:
            # Nothing goes for what has no room in any case.
            return [name]
        gone = []
        for other in list(self._values):
            if self.nbytes + value.nbytes <= self.budget:
                break
            if other not in keep:
                self.drop(other)
                gone.append(other)
        self._values[name] = value
        self.nbytes += value.nbytes
        return gone

    def drop(self, name: str) -> None:
        """Let a value go, if it is there."""
        if (value := self._values.pop(name, None)) is not None:
            self.nbytes -= value.nbytes
