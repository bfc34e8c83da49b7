"""What a request may ask for, and how it is refused."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        tokens: prompt and answer together.
        seconds: until an answer is whole.
        upload: bytes of an uploaded delta.
    """

    tokens: int = 2048
    seconds: float = 120.0
    upload: int = 64 * 2**20


class Refused(Exception):
    """A request that cannot be served; `status` is HTTP's."""

    def __init__(self, message: str, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code
