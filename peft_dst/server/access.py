"""Who may upload and remove deltas: those with the token."""

from __future__ import annotations

import hmac

from fastapi import Request

from .limits import Refused


def check_token(token: str | None) -> None:
    """Check that clients can send a token in a header.

    Raises:
        ValueError: if it is empty, or has a character that is not printable ASCII, or a space.
    """
    if token is not None and not (token and all("!" <= character <= "~" for character in token)):
        raise ValueError(
            "the token must be printable ASCII without spaces, one character at least, so that clients can send it. To "
            "take no deltas at all, give none."
        )


def authorise(request: Request, token: str | None) -> None:
    """Check that a request has the token.

    Raises:
        Refused: if it has another one or none, or there is no token, so that nobody may.
    """
    if token is None:
        raise Refused("this server takes no deltas: it was started without a token.", 403)
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    # Whatever is given takes the same time to compare.
    if kind.lower() != "bearer" or not hmac.compare_digest(given.encode(), token.encode()):
        raise Refused("a valid token is needed: Authorization: Bearer …", 401, "invalid_api_key")
