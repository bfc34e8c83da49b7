"""What a request may ask for, and how it is refused."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        tokens: prompt and answer together.
        seconds: until a request is received, and again until its answer is whole.
        upload: bytes of an uploaded delta.
    """

    tokens: int = 2048
    seconds: float = 120.0
    upload: int = 64 * 2**20

    @property
    def characters(self) -> int:
        """Of a text; one that has more is not read at all. Tokens have four on average, and seldom as many as 32."""
        return 32 * self.tokens

    @property
    def body(self) -> int:
        """Bytes of a request that is no upload: room for five characters a token, also if each takes six."""
        return max(2**20, 32 * self.tokens)


class Refused(Exception):
    """A request that cannot be served; `status` is HTTP's."""

    def __init__(self, message: str, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code
