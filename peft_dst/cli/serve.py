"""The command that serves deltas over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .program import app


@app.command("serve", epilog="Example: peft-dst serve base --deltas adapters --port 8000")
def _serve(
    base: Annotated[str, typer.Argument(help="Hub id or folder of the base.")],
    deltas: Annotated[
        Path | None, typer.Option("--deltas", "-d", file_okay=False, help="Folder of adapters, a folder each.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What clients call the base; its folder's name if not given.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="completions or classify; read off the base if not given.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights; auto is the checkpoint's.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Where to compute; an accelerator if there is one.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="PEFT_DST_TOKEN",
            help="What clients must send to upload and remove deltas, printable ASCII; none: nobody may.",
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt and its answer together.")] = 2048,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for a request to come, and for its answer.")] = 120.0,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds that requests have left when it is told to stop.")
    ] = 30.0,
    max_upload: Annotated[int, typer.Option(min=1, help="MiB of an uploaded delta.")] = 64,
    budget: Annotated[int, typer.Option(min=0, help="MiB of deltas held ready.")] = 1024,
    host_budget: Annotated[
        int, typer.Option(min=0, help="MiB of deltas kept as they were read, so that they need not be read again.")
    ] = 0,
    capacity: Annotated[int, typer.Option(min=1, help="Sequences in computation at most.")] = 32,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait.")] = 256,
) -> None:
    """Serve a base and any number of deltas over HTTP.

    Causal models answer as OpenAI's API does (/v1/completions, /v1/chat/completions, /v1/models), where the model's name is
    the delta's; classifiers at /v1/classify. Also /metrics and /health. Ends with what was begun when it is told to stop.
    """
    try:
        from ..server.start import Limits, serve
    except ModuleNotFoundError as error:
        raise ValueError(
            f"serving needs {error.name}, which is not installed: pip install 'peft-dst[serve]'."
        ) from None
    limits = Limits(max_tokens, timeout, max_upload * 2**20)
    serve(
        base,
        deltas,
        name=name,
        task=task,
        dtype=dtype,
        device=device,
        host=host,
        port=port,
        token=token,
        limits=limits,
        grace=grace,
        budget=budget * 2**20,
        host_budget=host_budget * 2**20,
        capacity=capacity,
        queue=queue,
    )
