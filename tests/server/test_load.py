"""The server under load: 64 clients, 100 subsets; no wrong answer, none lost, while deltas come, go and are cut off."""

from __future__ import annotations

import asyncio
import logging
import random
import shutil
import socket
import struct
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch

from benchmarks import load
from benchmarks.load import Answer, Ask
from peft_dst.server.service import Service
from tests import toys
from tests.server.servers import AUTHORISED, files, parts_of, served, write_deltas
from tests.serving.helpers import until


CLIENTS, EACH, SUBSETS, LIMIT = 64, 4, 100, 6
# Removed while it is asked for; those that come and go again.
GOES, NEW = "task99", ["task100", "task101", "task102", "task103"]
SECONDS = 60


@pytest.fixture
def parts(tmp_path):
    """A tiny causal model in double precision, so that no rounding of a batch changes a token; and folders of deltas.

    Of the server, and all that there are.
    """
    base, tokenizer = parts_of(tmp_path, dtype=torch.float64)
    write_deltas(base, tmp_path / "all", SUBSETS + len(NEW))
    shutil.copytree(tmp_path / "all", tmp_path / "deltas", ignore=lambda *_: NEW)
    return base, tokenizer, tmp_path / "deltas", tmp_path / "all"


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


async def cut_off(url: str, deltas: Path, folder: Path, share: float) -> None:
    """A client that is killed when so much of its upload is sent."""
    request = httpx.Request("PUT", f"{url}/v1/deltas/cut", files=files(folder), headers=AUTHORISED)
    head = "".join(f"{key}: {value}\r\n" for key, value in request.headers.items())
    sent = f"PUT {request.url.path} HTTP/1.1\r\n{head}\r\n".encode() + request.read()
    _, writer = await asyncio.open_connection(request.url.host, request.url.port)
    writer.write(sent[: int(share * len(sent))])
    await writer.drain()
    while not any(name.startswith(".") for name in names_in(deltas)):
        await asyncio.sleep(0.005)
    # Not even a goodbye, as when a process dies.
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()


async def come_and_go(client: httpx.AsyncClient, folder: Path) -> list[Answer]:
    """Upload a delta, ask it, and remove it while it is asked again; afterwards it is not there."""
    path = f"/v1/deltas/{folder.name}"
    answer = await client.put(path, files=files(folder), headers=AUTHORISED)
    assert answer.status_code == 200, answer.text
    asks = [Ask(folder.name, "who is the cat", LIMIT, stream, chat) for stream in (0, 1) for chat in (0, 1)]
    answers = await asyncio.gather(*(load.send(client, ask) for ask in asks))
    assert all(answer.error is None for answer in answers)
    *during, removed = await asyncio.gather(
        *(load.send(client, ask) for ask in asks), client.delete(path, headers=AUTHORISED)
    )
    assert removed.json()["deleted"]
    after = await load.send(client, asks[0])
    assert after.status == 404
    return [*answers, *during, after]


async def until_it_is_gone(client: httpx.AsyncClient, ask: Ask, asked: asyncio.Event) -> list[Answer]:
    found = []
    while not found or found[-1].error is None:
        found.append(await load.send(client, ask))
        asked.set()
    return found


async def everything(url: str, plans: list[list[Ask]], deltas: Path, others: Path) -> tuple[list[Answer], list[Answer]]:
    """The answers of the 64 clients; and meanwhile of those that ask for deltas that come or go."""
    asked = asyncio.Event()
    going = [Ask(GOES, "where is the dog", LIMIT, stream, chat) for stream in (False, True) for chat in (False, True)]
    async with load.connections(url) as client:

        async def change() -> list[Answer]:
            found = []
            for name, share in zip(NEW, (0.2, 0.5, 0.9, 0.9999), strict=True):
                await cut_off(url, deltas, others / name, share)
                found += await come_and_go(client, others / name)
            await asked.wait()
            assert (await client.delete(f"/v1/deltas/{GOES}", headers=AUTHORISED)).json()["deleted"]
            return found

        beside = [change(), *(until_it_is_gone(client, ask, asked) for ask in going)]
        clients, *found = await asyncio.wait_for(asyncio.gather(load.traffic(url, plans), *beside), SECONDS)
    return clients, [answer for answers in found for answer in answers]


def test_64_clients_and_100_subsets(parts, caplog):
    base, tokenizer, deltas, others = parts
    seed = {name: p.detach().clone() for name, p in base.named_parameters()}
    rng = random.Random(0)
    names = [load.BASE, *(f"task{i}" for i in range(SUBSETS - 1))]
    texts = [" ".join(rng.choices(toys.WORDS[:12], k=k)) for k in (1, 3, 6)]
    plans = load.planned(rng, names, texts, CLIENTS, EACH, LIMIT, chats=True)
    service = Service(base, tokenizer, load.BASE, deltas)
    with served(service) as url:
        clients, beside = asyncio.run(everything(url, plans, deltas, others))
        # Of uploads that were cut off, and of deltas that went again, there is nothing left.
        until(lambda: not any(name.startswith(".") for name in names_in(deltas)))
        left = {f"task{i}" for i in range(SUBSETS)} - {GOES}
        assert names_in(deltas) == set(service.pool.names()) == left
        assert {model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]} == left | {load.BASE}
        metrics = httpx.get(f"{url}/metrics").text
    # None lost; nobody suffers from what becomes of others' deltas.
    assert [answer.ask for answer in clients] == [ask for plan in plans for ask in plan]
    assert all((answer.status, answer.error) == (200, None) for answer in clients)
    # To those whose delta went away it is said.
    for answer in beside:
        if answer.error is not None:
            assert answer.error["code"] == "model_not_found"
            assert answer.ask.model in answer.error["message"]
            assert answer.status == 404 or (answer.ask.stream and answer.status == 200)
    # None wrong: whatever came is what the model by itself answers with that delta written in.
    known: dict[Ask, str] = {}
    for answer in (*clients, *beside):
        if answer.error is None:
            plain = replace(answer.ask, stream=False)
            if plain not in known:
                known[plain] = load.offline(base, tokenizer, others, plain)
            assert answer.text == known[plain], answer
    assert len(set(known.values())) > len(known) / 2
    assert any(answer.error is None and answer.ask.model == GOES for answer in beside)
    # The server has let go of everything, and has nothing to complain of.
    assert all(torch.equal(parameter, seed[name]) for name, parameter in base.named_parameters())
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    check_metrics(metrics, [*clients, *beside])


def check_metrics(text: str, answers: list[Answer]) -> None:
    """What the server says of it: each request once, its latency, and what was computed for it."""
    found = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    for path, chat in (("/v1/completions", False), ("/v1/chat/completions", True)):
        # What ends a stream with an error counts by it: here a delta that went away, which is a 404.
        statuses = [404 if answer.error else answer.status for answer in answers if answer.ask.chat == chat]
        for status in set(statuses):
            key = f'peft_dst_requests_total{{path="{path}",status="{status}"}}'
            assert float(found[key]) == statuses.count(status)
        assert float(found[f'peft_dst_request_seconds_count{{path="{path}"}}']) == len(statuses)
    assert float(found['peft_dst_requests_total{path="/v1/deltas/{name}",status="499"}']) == len(NEW)
    assert float(found["peft_dst_waiting"]) == float(found["peft_dst_running"]) == 0
    assert float(found["peft_dst_mixed_batches_total"]) > 0
    figures = load.summary(answers)
    assert 0 < figures["latency"]["p50"] <= figures["latency"]["p90"] <= figures["latency"]["p99"]
    assert figures["first_token"]["p50"] < figures["latency"]["p99"]
