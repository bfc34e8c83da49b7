"""Clients that go away while they wait leave the queue at once, and nothing is computed for them."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from benchmarks.load import served
from peft_dst.server.service import Service
from tests.server.engines import SECONDS, Gate
from tests.server.servers import classifier_of, parts_of
from tests.serving.helpers import until


@pytest.mark.parametrize("kind", ["stream", "whole", "texts"])
def test_who_went_away_does_not_wait(tmp_path, kind):
    base, tokenizer = classifier_of(tmp_path) if kind == "texts" else parts_of(tmp_path)
    service = Service(base, tokenizer, "base", capacity=1, queue=1)
    gate = Gate(base)
    path = "/v1/classify" if kind == "texts" else "/v1/completions"

    def body(text):
        return (
            {"model": "base", "input": text}
            if kind == "texts"
            else {"model": "base", "prompt": text, "max_tokens": 2, "stream": kind == "stream"}
        )

    with served(service) as url, ThreadPoolExecutor(2) as threads:
        try:
            first = threads.submit(httpx.post, url + path, json=body("who"), timeout=SECONDS)
            assert gate.reached.wait(SECONDS)
            host, port = url.removeprefix("http://").split(":")
            content = json.dumps(body("who is the cat of the house")).encode()
            with socket.create_connection((host, int(port))) as leaving:
                head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                leaving.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
                until(lambda: service.engine.waiting == 1)
            until(lambda: service.engine.waiting == 0)
            # Its place is free, while the first one is still being computed.
            second = threads.submit(httpx.post, url + path, json=body("red cat"), timeout=SECONDS)
            until(lambda: service.engine.waiting == 1)
        finally:
            gate.open.set()
        assert (first.result().status_code, second.result().status_code) == (200, 200)
    # The texts of one and of two words, and for encoders a beginning and an end.
    assert max(length for _, length in gate.shapes) <= 4
