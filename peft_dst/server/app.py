"""The HTTP server: OpenAI's API over a service, uploads of deltas, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response, StreamingResponse
from prometheus_client import generate_latest

from .access import authorise, check_token
from .answers import Answer, events, unless_gone, whole
from .errors import handle_errors
from .limits import Refused
from .observing import LOGGER, Metrics, Observed
from .protocol import ChatRequest, ClassifyRequest, CompletionRequest
from .receiving import UPLOADS, Bounded, receive
from .sampling import Sampling
from .service import Piece, Service


def create_app(service: Service, *, token: str | None = None, grace: float = 30.0) -> FastAPI:
    """The application.

    Args:
        service: what it serves; closed when the application ends.
        token: what clients must send (Authorization: Bearer …) to upload and remove deltas. None: nobody may.
        grace: seconds that requests have left when the application ends.

    Raises:
        ValueError: for a token that no client could send.
    """
    check_token(token)
    metrics = Metrics(service)
    # Deltas come and go one after the other, in one of the threads that prompts are read in.
    changing = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        LOGGER.info("started", extra={"fields": {"base": service.name, "deltas": len(service.pool)}})
        service.deltas.report()
        yield
        done = await asyncio.to_thread(service.close, grace)
        LOGGER.info("stopped", extra={"fields": {"all_answered": done}})

    app = FastAPI(title="peft-dst", lifespan=lifespan)
    handle_errors(app)
    app.add_middleware(Bounded, limits=service.limits)
    app.add_middleware(Observed, metrics=metrics)

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
        return {"object": "list", "data": [_model(name) for name in service.names()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        service.delta(name)
        return _model(name)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Any:
        delta = _generating(service, body.model)
        prompt = await asyncio.to_thread(service.prompts.read, body.prompt, body.max_tokens)
        return await _complete(request, service, metrics, body, delta, prompt, body.max_tokens)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Any:
        delta = _generating(service, body.model)
        messages = [message.for_template() for message in body.messages]
        room = body.max_completion_tokens or body.max_tokens
        prompt, limit = await asyncio.to_thread(service.prompts.read_chat, messages, room)
        return await _complete(request, service, metrics, body, delta, prompt, limit)

    @app.post("/v1/classify")
    async def classify(body: ClassifyRequest, request: Request) -> dict[str, Any]:
        if service.generates:
            raise Refused("this model continues texts; use /v1/completions.")
        texts = [body.input] if isinstance(body.input, str) else body.input
        verdicts = await unless_gone(request, service.classify(service.delta(body.model), texts))
        request.state.noted = {"model": body.model, "texts": len(texts)}
        data = [{"index": i, **found} for i, found in enumerate(verdicts)]
        return {"object": "list", "model": body.model, "data": data}

    @app.put(UPLOADS + "{name}")
    async def upload(name: str, request: Request) -> dict[str, Any]:
        authorise(request, token)
        service.deltas.check_name(name)
        with service.deltas.incoming() as folder:
            await receive(request, folder)
            async with changing:
                delta = await asyncio.to_thread(service.deltas.take, name, folder)
        request.state.noted = {"model": name, "entries": delta.num_entries}
        return {"id": name, "object": "model", "entries": delta.num_entries}

    @app.delete(UPLOADS + "{name}")
    async def remove(name: str, request: Request) -> dict[str, Any]:
        authorise(request, token)
        async with changing:
            await asyncio.to_thread(service.deltas.remove, name)
        return {"id": name, "object": "model", "deleted": True}

    return app


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "peft-dst"}


def _generating(service: Service, model: str) -> str | None:
    """The delta of a request that wants a text continued."""
    if not service.generates:
        raise Refused("this model classifies texts; use /v1/classify.")
    return service.delta(model)


async def _complete(
    request: Request,
    service: Service,
    metrics: Metrics,
    body: CompletionRequest | ChatRequest,
    delta: str | None,
    prompt: list[int],
    limit: int,
) -> Any:
    chat = isinstance(body, ChatRequest)
    sampling = Sampling(body.temperature, body.top_p, body.seed)
    pieces = service.generate(delta, prompt, limit, sampling, body.stop, alone=chat)
    answer = Answer(chat, body.model, len(prompt), body.stream_options.include_usage)

    def note(last: Piece) -> None:
        metrics.tokens.labels("read").inc(len(prompt))
        metrics.tokens.labels("made").inc(last.tokens)
        request.state.noted = {"model": body.model, "tokens": last.tokens}

    def failed(status: int) -> None:
        request.state.noted = {"model": body.model, "status": status}

    if body.stream:
        # What is wrong shows before the first piece, and can still be told by the status.
        first = await unless_gone(request, anext(pieces))
        return StreamingResponse(events(first, pieces, answer, note, failed), media_type="text/event-stream")
    text, last = await whole(request, pieces)
    note(last)
    return answer.whole(text, last)
