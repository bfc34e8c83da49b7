"""Answers in OpenAI's form: whole, or as a stream of events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request

from .errors import told
from .limits import Refused
from .service import Piece


T = TypeVar("T")


class Answer:
    """The JSON of an answer.

    Args:
        chat: whether it is a message, or a text.
        model: who answers.
        prompt: how many tokens were read.
        usage: whether a stream ends with what was used.
    """

    def __init__(self, chat: bool, model: str, prompt: int, usage: bool) -> None:
        self.chat, self.model, self.prompt, self.with_usage = chat, model, prompt, usage
        self.id, self.created = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", int(time.time())

    def _body(self, choices: list[dict[str, Any]], piece: bool) -> dict[str, Any]:
        kind = f"chat.completion{'.chunk' if piece else ''}" if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def whole(self, text: str, last: Piece) -> dict[str, Any]:
        """All of it at once."""
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **content, "finish_reason": last.finished, "logprobs": None}
        return self._body([choice], False) | {"usage": self.usage(last)}

    def piece(self, piece: Piece, first: bool) -> dict[str, Any]:
        """An event of a stream."""
        role = {"role": "assistant"} if first else {}
        content = {"delta": {**role, "content": piece.text}} if self.chat else {"text": piece.text}
        return self._body([{"index": 0, **content, "finish_reason": piece.finished, "logprobs": None}], True)

    def last(self, last: Piece) -> dict[str, Any]:
        """The event after them, with what was used."""
        return self._body([], True) | {"usage": self.usage(last)}

    def usage(self, last: Piece) -> dict[str, int]:
        """The tokens read and made."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": last.tokens,
            "total_tokens": self.prompt + last.tokens,
        }


async def whole(request: Request, pieces: AsyncGenerator[Piece, None]) -> tuple[str, Piece]:
    """All the text, and the last piece.

    Raises:
        Refused: if the client goes away before; nothing more is computed then.
    """
    async with contextlib.aclosing(pieces):
        return await unless_gone(request, _gather(pieces))


async def unless_gone(request: Request, wanted: Awaitable[T]) -> T:
    """Wait for something for as long as the client does.

    Raises:
        Refused: if it goes away before.
    """
    answering = asyncio.ensure_future(wanted)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise Refused("the client went away.", 499)
        return answering.result()
    finally:
        for task in (answering, leaving):
            task.cancel()
        await asyncio.gather(answering, leaving, return_exceptions=True)


async def _gather(pieces: AsyncIterator[Piece]) -> tuple[str, Piece]:
    found = [piece async for piece in pieces]
    return "".join(piece.text for piece in found), found[-1]


async def _disconnected(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.2)


async def events(
    first: Piece,
    rest: AsyncGenerator[Piece, None],
    answer: Answer,
    note: Callable[[Piece], None],
    failed: Callable[[int], None],
) -> AsyncIterator[str]:
    """A stream's events; at its end `note` is called with the last piece, or `failed` with an error's status."""

    def event(value: dict[str, Any]) -> str:
        return f"data: {json.dumps(value)}\n\n"

    last = first
    yield event(answer.piece(first, True))
    async with contextlib.aclosing(rest):
        try:
            async for last in rest:
                yield event(answer.piece(last, False))
        except Exception as error:
            # The status is long gone.
            status, body = told(error)
            failed(status)
            yield event(body)
            return
    note(last)
    if answer.with_usage:
        yield event(answer.last(last))
    yield "data: [DONE]\n\n"
