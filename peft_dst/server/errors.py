"""What clients are told of errors: HTTP's status, and a body in OpenAI's form."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ..delta import DeltaError
from .engine import Full
from .limits import Refused
from .observing import LOGGER


def told(error: Exception) -> tuple[int, dict[str, Any]]:
    """What a client is told of an error: the status, and the body."""
    code = None
    if isinstance(error, Refused):
        status, message, code = error.status, str(error), error.code
    elif isinstance(error, Full):
        status, message, code = 503, str(error), "overloaded"
    elif isinstance(error, DeltaError):
        status, message, code = 422, str(error), "bad_delta"
    elif isinstance(error, KeyError):
        status, message, code = 404, str(error.args[0]), "model_not_found"
    elif isinstance(error, HTTPException):
        status, message = error.status_code, str(error.detail)
    elif isinstance(error, RequestValidationError):
        found = error.errors()[0]
        status, message = 400, f"{'.'.join(str(part) for part in found['loc'][1:])}: {found['msg']}"
    elif isinstance(error, ClientDisconnect):
        status, message = 499, "the client went away."
    else:
        LOGGER.error("unexpected error", exc_info=error)
        status, message = 500, "an unexpected error; the server's log has it."
    return status, _body(message, "invalid_request_error" if status < 500 else "server_error", code)


def _body(message: str, kind: str, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def handle_errors(app: FastAPI) -> None:
    """Have every error of an application answered in that form."""

    async def respond(request: Request, error: Exception) -> Response:
        status, body = told(error)
        return JSONResponse(body, status, {"Retry-After": "1"} if status == 503 else None)

    ours = (Refused, Full, DeltaError, KeyError)
    for kind in (*ours, HTTPException, RequestValidationError, ClientDisconnect, Exception):
        app.add_exception_handler(kind, respond)
