"""What the process writes to stderr: a JSON object a line, whoever has something to say."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone

import huggingface_hub
import transformers


class JsonLines(logging.Formatter):
    """A record as JSON: time, level, logger and message, what went wrong, and what `extra={"fields": {…}}` gave."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line | getattr(record, "fields", {}), default=str)


def log_to_stderr() -> None:
    """Have all that is logged written so, warnings and what transformers has to say included; no bars."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.captureWarnings(True)
    huggingface_hub.utils.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()
    # One line a request is our own.
    for other in ("uvicorn.access", "httpx"):
        logging.getLogger(other).setLevel(logging.WARNING)
