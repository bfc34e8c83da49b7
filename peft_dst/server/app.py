"""The HTTP server: OpenAI's API over a service, uploads of deltas, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import shutil
import time
import uuid
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ..delta import CONFIG_NAME, WEIGHTS_NAME, DeltaError
from .engine import Unavailable
from .protocol import ChatRequest, ClassifyRequest, CompletionRequest, error_body
from .sampling import Sampling
from .service import Piece, Refused, Service


T = TypeVar("T")

LOGGER = logging.getLogger("peft_dst.server")
FILES = (CONFIG_NAME, WEIGHTS_NAME)
# Of an uploaded adapter_config.json.
CONFIG_BYTES = 2**20


class Metrics:
    """What Prometheus asks for."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        options: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("peft_dst_requests", "Requests answered.", ["path", "status"], **options)
        self.seconds = Histogram("peft_dst_request_seconds", "Time to the end of an answer.", ["path"], **options)
        self.tokens = Counter("peft_dst_tokens", "Tokens read and made.", ["kind"], **options)
        for name, text, value in (
            ("waiting", "Requests that wait.", lambda: service.engine.waiting),
            ("running", "Sequences in computation.", lambda: service.engine.running),
            ("batches", "Batches computed.", lambda: service.engine.computed["batches"]),
            ("mixed_batches", "Of them those of several deltas.", lambda: service.engine.computed["mixed_batches"]),
            ("deltas", "Deltas known.", lambda: len(service.pool)),
            ("deltas_ready", "Deltas held in memory.", lambda: service.pool.statistics.ready),
            ("deltas_bytes", "Bytes of those.", lambda: service.pool.statistics.nbytes),
            ("delta_switches", "Switches of the delta in the weights.", lambda: service.pool.statistics.switches),
        ):
            Gauge(f"peft_dst_{name}", text, **options).set_function(value)


def create_app(service: Service, *, token: str | None = None, grace: float = 30.0) -> FastAPI:
    """The application.

    Args:
        service: what it serves; closed when the application ends.
        token: what clients must send (Authorization: Bearer …) to upload and remove deltas. None: nobody may.
        grace: seconds that requests have left when the application ends.
    """
    metrics = Metrics(service)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        done = await asyncio.to_thread(service.close, grace)
        LOGGER.info("stopped", extra={"fields": {"all_answered": done}})

    app = FastAPI(title="peft-dst", lifespan=lifespan)
    _errors(app)

    app.add_middleware(_Observed, metrics=metrics)

    @app.get("/health")
    async def health() -> dict[str, str]:
        if not service.engine.alive:
            raise Refused("nothing is computed any more.", 503)
        return {"status": "ok"}

    @app.get("/metrics")
    async def prometheus() -> Response:
        return PlainTextResponse(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "peft-dst"} for name in service.names()]
        return {"object": "list", "data": data}

    @app.get("/v1/models/{name}")
    async def one_model(name: str) -> dict[str, Any]:
        service.delta(name)
        return {"id": name, "object": "model", "created": 0, "owned_by": "peft-dst"}

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Any:
        prompt = service.read(body.prompt, body.max_tokens)
        answer = _Answer("text_completion", "cmpl", body.model, len(prompt), body.with_usage)
        return await _complete(request, service, metrics, body, prompt, body.max_tokens, answer)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Any:
        if not getattr(service.tokenizer, "chat_template", None):
            raise Refused("this model has no chat template; use /v1/completions.")
        messages = [message.model_dump(exclude_none=True) for message in body.messages]
        try:
            text = service.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # whatever a template has to say
            raise Refused(f"the chat template does not take these messages: {error}") from None
        # The template writes the special tokens itself.
        tokens = service.tokenizer(text, add_special_tokens=False)["input_ids"]
        limit = body.max_completion_tokens or body.max_tokens or max(1, service.longest - len(tokens))
        prompt = service.read(list(tokens), limit)
        answer = _Answer(
            "chat.completion",
            "chatcmpl",
            body.model,
            len(prompt),
            body.with_usage,
        )
        return await _complete(request, service, metrics, body, prompt, limit, answer)

    @app.post("/v1/classify")
    async def classify(body: ClassifyRequest, request: Request) -> dict[str, Any]:
        if service.generates:
            raise Refused("this model continues texts; use /v1/completions.")
        texts = [body.input] if isinstance(body.input, str) else body.input
        scores = await _unless_gone(request, service.classify(service.delta(body.model), texts))
        request.state.noted = {"model": body.model, "texts": len(texts)}
        data = [
            {"index": i, "label": max(found, key=lambda label: found[label]), "scores": found}
            for i, found in enumerate(scores)
        ]
        return {"object": "list", "model": body.model, "data": data}

    @app.put("/v1/deltas/{name}")
    async def upload(name: str, request: Request) -> dict[str, Any]:
        _authorise(request, token)
        service.check_name(name)
        folder = service.incoming()
        try:
            await _receive(request, folder, service.limits.upload)
            delta = await asyncio.to_thread(service.take, name, folder)
        finally:
            # Of an upload that was taken there is nothing left here.
            await asyncio.to_thread(shutil.rmtree, folder, True)
        request.state.noted = {"model": name, "entries": delta.num_entries}
        return {"id": name, "object": "model", "entries": delta.num_entries}

    @app.delete("/v1/deltas/{name}")
    async def remove(name: str, request: Request) -> dict[str, Any]:
        _authorise(request, token)
        await asyncio.to_thread(service.remove, name)
        return {"id": name, "object": "model", "deleted": True}

    return app


class _Observed:
    """Counts and logs each request when its answer has ended, also of a stream."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status = time.perf_counter(), 500

        async def noting(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            seconds = time.perf_counter() - begin
            path = scope["route"].path if scope.get("route") is not None else "unknown"
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(seconds)
            line = {"method": scope["method"], "path": path, "status": status, "seconds": round(seconds, 4)}
            LOGGER.info("answered", extra={"fields": line | scope.get("state", {}).get("noted", {})})


def _told(error: Exception) -> tuple[int, dict[str, Any]]:
    """What a client is told of an error: HTTP's status, and a body in OpenAI's form."""
    code = None
    if isinstance(error, Refused):
        status, message, code = error.status, str(error), error.code
    elif isinstance(error, Unavailable):
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
    return status, error_body(message, "invalid_request_error" if status < 500 else "server_error", code)


def _errors(app: FastAPI) -> None:
    """Every error in OpenAI's form."""

    async def respond(request: Request, error: Exception) -> Response:
        status, body = _told(error)
        return JSONResponse(body, status, {"Retry-After": "1"} if status == 503 else None)

    ours = (Refused, Unavailable, DeltaError, KeyError)
    for kind in (*ours, HTTPException, RequestValidationError, ClientDisconnect, Exception):
        app.add_exception_handler(kind, respond)


class _Answer:
    """The JSON of an answer, whole or in pieces."""

    def __init__(self, kind: str, prefix: str, model: str, prompt: int, usage: bool) -> None:
        self.kind, self.model, self.prompt, self.with_usage = kind, model, prompt, usage
        self.id, self.created = f"{prefix}-{uuid.uuid4().hex}", int(time.time())
        self.chat = kind == "chat.completion"

    def _body(self, choices: list[dict[str, Any]], piece: bool) -> dict[str, Any]:
        kind = f"{self.kind}.chunk" if self.chat and piece else self.kind
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def whole(self, text: str, last: Piece) -> dict[str, Any]:
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **content, "finish_reason": last.finished, "logprobs": None}
        return self._body([choice], False) | {"usage": self.usage(last)}

    def piece(self, piece: Piece, first: bool) -> dict[str, Any]:
        role = {"role": "assistant"} if first else {}
        content = {"delta": {**role, "content": piece.text}} if self.chat else {"text": piece.text}
        return self._body([{"index": 0, **content, "finish_reason": piece.finished, "logprobs": None}], True)

    def last(self, last: Piece) -> dict[str, Any]:
        return self._body([], True) | {"usage": self.usage(last)}

    def usage(self, last: Piece) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": last.tokens,
            "total_tokens": self.prompt + last.tokens,
        }


async def _complete(
    request: Request,
    service: Service,
    metrics: Metrics,
    body: CompletionRequest | ChatRequest,
    prompt: list[int],
    limit: int,
    answer: _Answer,
) -> Any:
    if not service.generates:
        raise Refused("this model classifies texts; use /v1/classify.")
    sampling = Sampling(body.temperature, body.top_p, body.seed)
    pieces = service.generate(service.delta(body.model), prompt, limit, sampling, body.stops)

    def note(last: Piece) -> None:
        metrics.tokens.labels("read").inc(len(prompt))
        metrics.tokens.labels("made").inc(last.tokens)
        request.state.noted = {"model": body.model, "tokens": last.tokens}

    if body.stream:
        # What is wrong shows before the first piece, and can still be told by the status.
        first = await _unless_gone(request, anext(pieces))
        return StreamingResponse(_stream(first, pieces, answer, note), media_type="text/event-stream")
    async with contextlib.aclosing(pieces):
        text, last = await _unless_gone(request, _gather(pieces))
    note(last)
    return answer.whole(text, last)


async def _gather(pieces: AsyncIterator[Piece]) -> tuple[str, Piece]:
    found = [piece async for piece in pieces]
    return "".join(piece.text for piece in found), found[-1]


async def _unless_gone(request: Request, wanted: Awaitable[T]) -> T:
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


async def _disconnected(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.2)


async def _stream(first: Piece, rest: Any, answer: _Answer, note: Any) -> AsyncIterator[str]:
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
            yield event(_told(error)[1])
            return
    note(last)
    if answer.with_usage:
        yield event(answer.last(last))
    yield "data: [DONE]\n\n"


def _authorise(request: Request, token: str | None) -> None:
    if token is None:
        raise Refused("this server takes no deltas: it was started without a token.", 403)
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    # Whatever is given takes the same time to compare.
    if kind.lower() != "bearer" or not hmac.compare_digest(given.encode(), token.encode()):
        raise Refused("a valid token is needed: Authorization: Bearer …", 401, "invalid_api_key")


async def _receive(request: Request, folder: Path, limit: int) -> None:
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
