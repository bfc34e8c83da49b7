"""Who may upload and remove deltas: those with the token."""

from __future__ import annotations

import hmac

from fastapi import Request

from .limits import Refused


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
