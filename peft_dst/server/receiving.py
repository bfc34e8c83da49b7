"""What is received: uploads within their limits."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import Request

from ..delta import CONFIG_NAME, WEIGHTS_NAME
from .limits import Refused


FILES = (CONFIG_NAME, WEIGHTS_NAME)
# Of an uploaded adapter_config.json.
CONFIG_BYTES = 2**20


async def receive(request: Request, folder: Path, limit: int) -> None:
    """Both files of an adapter, as a multipart form, into a folder; no more than so many bytes."""
    if int(request.headers.get("content-length") or 0) > limit + CONFIG_BYTES:
        raise Refused(f"an upload may have {limit:,} bytes.", 413)
    received = 0

    async def counted() -> AsyncIterator[bytes]:
        nonlocal received
        async for chunk in stream():
            received += len(chunk)
            if received > limit + CONFIG_BYTES:
                raise Refused(f"an upload may have {limit:,} bytes.", 413)
            yield chunk

    stream = request.stream
    request.stream = counted
    async with request.form(max_files=2, max_fields=0) as form:
        for name in FILES:
            part = form.get(name)
            if part is None or isinstance(part, str):
                raise Refused(
                    f"an upload is a multipart form with two files, {' and '.join(FILES)}; {name} is missing."
                )
            if name == CONFIG_NAME and (part.size or 0) > CONFIG_BYTES:
                raise Refused(f"{CONFIG_NAME} may have {CONFIG_BYTES:,} bytes.", 413)
            with (folder / name).open("wb") as file:
                while chunk := await part.read(2**20):
                    file.write(chunk)
