"""What is received: no more than a request may have, and no later; uploads."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from fastapi import Request

from ..delta import CONFIG_NAME, WEIGHTS_NAME
from .folder import CONFIG_BYTES
from .limits import Limits, Refused


FILES = (CONFIG_NAME, WEIGHTS_NAME)
UPLOADS = "/v1/deltas/"


class Bounded:
    """Has an application receive no more than its limits of size and time allow; what is more raises `Refused` in it."""

    def __init__(self, app: Any, limits: Limits) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            receive = _Receiver(scope, receive, self.limits)
        await self.app(scope, receive, send)


class _Receiver:
    """What an application calls for the next part of a request."""

    def __init__(self, scope: Any, receive: Any, limits: Limits) -> None:
        self.receive, self.limits = receive, limits
        self.upload = scope["method"] == "PUT" and scope["path"].startswith(UPLOADS)
        self.allowed = limits.upload + CONFIG_BYTES if self.upload else limits.body
        self.announced = int(dict(scope["headers"]).get(b"content-length", 0))
        self.end = asyncio.get_running_loop().time() + limits.seconds
        self.received, self.whole = 0, False

    async def __call__(self) -> Any:
        if self.whole:
            # What comes now is that the client goes away.
            return await self.receive()
        self._check(self.announced)
        try:
            message = await asyncio.wait_for(self.receive(), self.end - asyncio.get_running_loop().time())
        except asyncio.TimeoutError:  # Python 3.10 has two of them
            raise Refused(f"the request has not come within {self.limits.seconds:g} seconds.", 408, "timeout") from None
        self.received += len(message.get("body", b""))
        self._check(self.received)
        self.whole = not message.get("more_body", False)
        return message

    def _check(self, size: int) -> None:
        if size > self.allowed:
            what, limit = ("an upload", self.limits.upload) if self.upload else ("a request", self.limits.body)
            raise Refused(f"{what} may have {limit:,} bytes.", 413)


async def receive(request: Request, folder: Path) -> None:
    """Both files of an adapter, as a multipart form, into a folder.

    Raises:
        Refused: if it is no such form.
    """
    async with request.form(max_files=2, max_fields=0) as form:
        for name in FILES:
            part = form.get(name)
            if part is None or isinstance(part, str):
                raise Refused(
                    f"an upload is a multipart form with two files, {' and '.join(FILES)}; {name} is missing."
                )
            with (folder / name).open("wb") as file:
                while chunk := await part.read(2**20):
                    file.write(chunk)
