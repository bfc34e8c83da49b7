"""What clients are told of errors: HTTP's status, and a body in OpenAI's form."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ..delta import DeltaError
from .engine import Unavailable
from .limits import Refused
from .observing import LOGGER


HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 408: {"Connection": "close"}, 503: {"Retry-After": "1"}}


def told(error: Exception) -> tuple[int, dict[str, Any]]:
    """What a client is told of an error: the status, and the body."""
    code = None
    if isinstance(error, HTTPException) and isinstance(error.__cause__, Refused | ClientDisconnect):
        # FastAPI's, of whatever goes wrong where it reads a body.
        error = error.__cause__
    if isinstance(error, Refused):
        status, message, code = error.status, str(error), error.code
    elif isinstance(error, Unavailable):
        status, message, code = 503, str(error), "overloaded"
    elif isinstance(error, DeltaError):
        # Of an upload: what is wrong with a delta that is there already is not its clients' fault.
        status, message, code = 422, str(error), "bad_delta"
    elif isinstance(error, HTTPException):
        status, message = error.status_code, str(error.detail)
    elif isinstance(error, RequestValidationError):
        found = error.errors()[0]
        where = [str(part) for part in found["loc"][1:] if isinstance(part, int) or part.isidentifier()]
        status, message = 400, ": ".join(filter(None, [".".join(where), found["msg"]]))
    elif isinstance(error, ClientDisconnect):
        status, message = 499, "the client went away."
    else:
        LOGGER.error("unexpected error", exc_info=error)
        status, message = 500, "an unexpected error; the server's log has it."
    return status, _body(message, "invalid_request_error" if status < 500 else "server_error", code)


def _body(message: str, kind: str, code: str | None) -> dict[str, Any]:
    # What clients send may be repeated in it, also what is no text.
    message = message.encode(errors="replace").decode()
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def handle_errors(app: FastAPI) -> None:
    """Have every error of an application answered in that form."""

    async def respond(request: Request, error: Exception) -> Response:
        return _response(error)

    for kind in (Refused, Unavailable, DeltaError, HTTPException, RequestValidationError, ClientDisconnect):
        app.add_exception_handler(kind, respond)
    app.add_middleware(_Unexpected)


def _response(error: Exception) -> Response:
    status, body = told(error)
    return JSONResponse(body, status, {**(getattr(error, "headers", None) or {}), **HEADERS.get(status, {})})


class _Unexpected:
    """Answers errors that nothing else does.

    A handler for `Exception` would not do: Starlette raises the error again behind it, and the connection is cut.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        begun = False

        async def noting(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, noting)
        except Exception as error:
            if begun or scope["type"] != "http":
                raise
            await _response(error)(scope, receive, send)
