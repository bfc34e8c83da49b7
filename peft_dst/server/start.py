"""From a command's options to a running server."""

from __future__ import annotations

import logging
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
from .limits import Limits
from .observing import LOGGER, log_line
from .service import Service


TASKS = ("completions", "classify")


class JsonLines(logging.Formatter):
    """A JSON object a line, whoever writes it."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.name == LOGGER.name and record.levelno == logging.INFO:
            # It is one already.
            return text
        error = {"error": self.formatException(record.exc_info)} if record.exc_info else {}
        return log_line(level=record.levelname, logger=record.name, message=text, **error)


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
        base: hub id or folder.
        folder: of deltas.
        name: what the base is called; the last part of `base` if not given.
        task: one of TASKS; read off the base's config if not given.
        dtype: torch's name, or "auto" for the checkpoint's.
        device: where to compute; the first accelerator if there is one.
        host: address to listen on.
        port: there.
        token: what uploads must send.
        limits: of requests.
        grace: seconds that requests have left at the end.
        **options: of `Service`.

    Raises:
        ValueError: for a task or dtype that does not exist, or a token that no client could send.
    """
    check_token(token)
    if task not in (None, *TASKS):
        raise ValueError(f"there is no task {task!r}; use one of {', '.join(TASKS)}.")
    if dtype not in ("auto", "float64", "float32", "bfloat16", "float16"):
        raise ValueError(f"there is no dtype {dtype!r}; use auto, float32, bfloat16, float16 or float64.")
    kinds = AutoConfig.from_pretrained(base).architectures or [""]
    if task is None:
        task = "completions" if kinds[0].endswith(("ForCausalLM", "LMHeadModel")) else "classify"
    kind = AutoModelForCausalLM if task == "completions" else AutoModelForSequenceClassification
    model = kind.from_pretrained(base, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(base)
    service = Service(model, tokenizer, name or Path(base).name, folder, limits=limits, **options)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    # One line a request is our own.
    for other in ("uvicorn.access", "httpx"):
        logging.getLogger(other).setLevel(logging.WARNING)
    app = create_app(service, token=token, grace=grace)
    uvicorn.run(app, host=host, port=port, log_config=None, timeout_graceful_shutdown=round(grace))
