"""From a command's options to a running server."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
import uvicorn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from .access import check_token
from .app import create_app
from .cohorts import check_model
from .limits import Limits
from .logs import log_to_stderr
from .service import Service


TASKS = ("completions", "classify")
# Seconds to send the last answers in, when the grace is over.
SENDING = 5


class Server(uvicorn.Server):
    """Ends what was asked of a service within a grace; what is left then is told so.

    Args:
        config: uvicorn's; its own limit becomes one that comes later.
        service: what the application serves.
        grace: seconds that requests have left when it is told to stop.
    """

    def __init__(self, config: uvicorn.Config, service: Service, grace: float) -> None:
        super().__init__(config)
        config.timeout_graceful_shutdown = math.ceil(grace) + SENDING
        self.service, self.grace = service, grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn does it, the service closing meanwhile: the application's own end comes after its last answer."""
        closing = asyncio.ensure_future(asyncio.to_thread(self.service.close, self.grace))
        hurrying = asyncio.ensure_future(self._hurry())
        try:
            await super().shutdown(sockets)
            await closing
        finally:
            hurrying.cancel()

    async def _hurry(self) -> None:
        """At a second interrupt, leave no grace."""
        while not self.force_exit:
            await asyncio.sleep(0.1)
        await asyncio.to_thread(self.service.close, 0)


def load(base: str, task: str | None, dtype: str, device: str | None) -> Any:
    """A base's model, in evaluation mode.

    Args:
        base: hub id or folder.
        task: one of TASKS; read off the base's config if not given.
        dtype: torch's name, or "auto" for the checkpoint's.
        device: where to compute; the first accelerator if there is one.

    Raises:
        ValueError: if it is neither a causal model nor a classifier of sequences, if its files do not have all of its
            weights, or if it cannot continue texts as it is done here.
    """
    kind = next(iter(AutoConfig.from_pretrained(base).architectures or []), "a model without a name")
    if task is None:
        if kind.endswith(("ForCausalLM", "LMHeadModel")):
            task = "completions"
        elif kind.endswith("ForSequenceClassification"):
            task = "classify"
        else:
            raise ValueError(
                f"{base} is {kind}, where a causal model (…ForCausalLM) or a classifier (…ForSequenceClassification) can "
                "be served. If it has the weights of one, say which by --task."
            )
    auto = AutoModelForCausalLM if task == "completions" else AutoModelForSequenceClassification
    model, found = auto.from_pretrained(
        base, dtype=dtype if dtype == "auto" else getattr(torch, dtype), output_loading_info=True
    )
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{base} ({kind}) has no {', '.join(missing[:3])}{' …' if missing[3:] else ''}, which {type(model).__name__} "
            "needs and would have random values for. Save the base with that model's save_pretrained, and serve this."
        )
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval().requires_grad_(False)
    if task == "completions":
        check_model(model)
    return model


def serve(
    base: str,
    folder: Path | None,
    *,
    name: str | None = None,
    task: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    limits: Limits | None = None,
    grace: float = 30.0,
    **options: Any,
) -> None:
    """Load a base and serve it until the process is told to stop.

    Args:
        base: as in `load`.
        folder: of deltas.
        name: what the base is called; the last part of `base`, or its folder's name, if not given.
        task: as in `load`.
        dtype: as in `load`.
        device: as in `load`.
        host: address to listen on.
        port: there.
        token: what uploads must send.
        limits: of requests.
        grace: seconds that requests have left when the process is told to stop; then what is left gets 503.
        **options: of `Service`.

    Raises:
        ValueError: for a task or dtype that does not exist, a model that cannot be served, or a token that no client could
            send.
    """
    check_token(token)
    if task not in (None, *TASKS):
        raise ValueError(f"there is no task {task!r}; use one of {', '.join(TASKS)}.")
    if dtype not in ("auto", "float64", "float32", "bfloat16", "float16"):
        raise ValueError(f"there is no dtype {dtype!r}; use auto, float32, bfloat16, float16 or float64.")
    log_to_stderr()
    model = load(base, task, dtype, device)
    tokenizer = AutoTokenizer.from_pretrained(base)
    # Also of "." and what ends in a slash.
    name = name or Path(os.path.abspath(base)).name
    service = Service(model, tokenizer, name, folder, limits=limits, **options)
    app = create_app(service, token=token, grace=grace)
    server = Server(uvicorn.Config(app, host=host, port=port, log_config=None), service, grace)
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    if not server.started:
        sys.exit(uvicorn.main.STARTUP_FAILURE)
