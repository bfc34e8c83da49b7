"""What a server makes of clients that are odd, slow or hostile, and what it tells them."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import logging
import math
import re
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pydantic
import pytest
import torch
from safetensors.torch import save

from peft_dst.delta import SparseDelta
from peft_dst.delta.packed import DESCRIPTION
from peft_dst.server.app import create_app
from peft_dst.server.engine import Stopped
from peft_dst.server.limits import Limits
from peft_dst.server.protocol import ChatRequest
from peft_dst.server.sampling import Sampling
from peft_dst.server.service import Service
from peft_dst.serving import UnknownDelta
from tests.server.engines import SECONDS, Gate, generating
from tests.server.servers import TOKEN, parts_of, put, served, write_deltas


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A tiny causal model and its tokenizer."""
    return parts_of(tmp_path_factory.mktemp("serving"))


@pytest.fixture
def service(parts, tmp_path):
    """The model with two deltas, in tmp_path/deltas; tmp_path/new/task7 is another one."""
    base, tokenizer = copy.deepcopy(parts[0]), parts[1]
    write_deltas(base, tmp_path / "deltas", 2)
    write_deltas(base, tmp_path / "new", 1, start=7)
    return Service(base, tokenizer, "base", tmp_path / "deltas", limits=Limits(seconds=20.0))


@pytest.fixture
def url(service):
    with served(service) as address:
        yield address


def ask(url, **changes):
    body = {"model": "base", "prompt": "who is", "max_tokens": 2, "temperature": 0} | changes
    # Written by hand: httpx refuses what is no text.
    return httpx.post(f"{url}/v1/completions", content=json.dumps(body), headers={"Content-Type": "application/json"})


def chat(url, **changes):
    body = {"model": "base", "messages": [{"role": "user", "content": "who is"}], "max_tokens": 2, "temperature": 0}
    return httpx.post(f"{url}/v1/chat/completions", json=body | changes)


def message(response):
    return response.json()["error"]["message"]


# What is taken and what is refused


def test_what_asks_for_nothing_is_taken(url):
    plain = ask(url).json()["choices"]
    nulls = dict.fromkeys(("n", "top_p", "stream", "stream_options", "logprobs", "stop", "seed", "suffix", "user"))
    # What is meant then is not what `ask` would ask for.
    assert ask(url, max_tokens=None, temperature=None).status_code == 200
    for changes in (
        nulls,
        {"frequency_penalty": 0, "presence_penalty": 0.0, "logprobs": False, "echo": False, "best_of": 1, "n": 1},
        {"stop": ["b" * 256] * 16},
        {"stop": [], "stream_options": {"include_usage": True, "include_obfuscation": False}},
        {"prompt": ["who is"]},
    ):
        answer = ask(url, **changes)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"] == plain
    plain = chat(url).json()["choices"]
    said = {"role": "user", "name": None, "refusal": None, "tool_calls": None}
    for content in (
        "who is",
        [{"type": "text", "text": "who is"}],
        [{"type": "text", "text": t} for t in ("who ", "is")],
    ):
        answer = chat(url, messages=[said | {"content": content}], max_completion_tokens=2, max_tokens=None, tools=None)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"] == plain


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": ["12", "34"]}, "prompt: Value error, one prompt a request is served; send a request for each"),
        ({"prompt": [[3], [4]]}, "prompt: Value error, one prompt a request is served; send a request for each"),
        ({"prompt": [True, False]}, "prompt: Value error, a prompt is a text, or its tokens as integers"),
        ({"prompt": [12.0]}, "prompt: Value error, a prompt is a text, or its tokens as integers"),
        ({"prompt": None}, "prompt: Field required"),
        ({"prompt": "\ud800"}, "half of a surrogate pair"),
        ({"model": "\ud800"}, "model: Value error, it has half of a surrogate pair"),
        ({"\ud800": 1}, "Input should be a valid string"),
        ({"stop": ""}, "stop.0: String should have at least 1 character"),
        ({"stop": ["a", ""]}, "stop.1: String should have at least 1 character"),
        ({"stop": ["a"] * 17}, "stop: List should have at most 16 items"),
        ({"seed": 2**70}, "seed: Input should be less than"),
        ({"seed": True}, "seed: Input should be a valid integer"),
        ({"presence_penalty": 0.1}, "presence_penalty: Input should be less than or equal to 0"),
        ({"logprobs": 0}, "logprobs: Input should be a valid boolean"),
        ({"logprobs": True}, "logprobs: Value error, this is not served"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation: Value error"),
        ({"suffix": "."}, "suffix: Extra inputs are not permitted"),
        # JSON has no such number, but Python's reader takes it.
        ({"temperature": math.nan}, "temperature: Input should be less than or equal to 100"),
        ({"top_p": math.nan}, "top_p: Input should be less than or equal to 1"),
        ({"frequency_penalty": math.nan}, "frequency_penalty: Input should be less than or equal to 0"),
        ({"stop": ["a", "b" * 257]}, "stop.1: String should have at most 256 characters"),
    ],
)
def test_what_would_be_ignored_or_misread_is_refused(url, changes, said):
    answer = ask(url, **changes)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert said in message(answer)


def test_a_body_that_is_no_object_is_refused(url):
    answer = httpx.post(f"{url}/v1/completions", json=["who"])
    assert (answer.status_code, message(answer).startswith("Input should be")) == (400, True)


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [0] * 1000},
        {"messages": [{"role": "user", "content": [0] * 1000}]},
        {"messages": [{"role": "user", "content": "a"}]} | {f"no{i}": 0 for i in range(1000)},
        {"messages": [{"role": "user", "content": "a"} | {f"no{i}": 0 for i in range(1000)}]},
    ],
)
def test_no_more_errors_are_made_than_are_told(body):
    """Each takes time and memory, while nobody else is answered."""
    with pytest.raises(pydantic.ValidationError) as error:
        ChatRequest.model_validate({"model": "base"} | body)
    assert error.value.error_count() < 3


def test_a_service_that_closes_says_so(service, url, tmp_path):
    service.close(1.0)
    answers = [ask(url, model="task0"), put(url, "new", tmp_path / "new" / "task7")]
    assert [answer.status_code for answer in answers] == [503, 503]
    assert not (tmp_path / "deltas" / "new").exists()


def test_who_closes_again_does_not_wait_again(service):
    """As the server does: when it is told to stop, and when its last answer has gone. A pass may last beyond both."""
    gate = Gate(service.model)
    asked = generating(None, [5], 9)
    service.engine.submit(asked.request)
    assert gate.reached.wait(SECONDS)
    begin = time.monotonic()
    assert not service.close(0.2)
    assert time.monotonic() - begin >= 0.2
    assert not service.close(SECONDS)
    assert time.monotonic() - begin < SECONDS
    assert isinstance(asked.wait(), Stopped)
    gate.open.set()


def test_other_parts_than_texts_are_refused(url):
    part = {"type": "image_url", "image_url": {"url": "data:"}}
    answer = chat(url, messages=[{"role": "user", "content": [part]}])
    assert (answer.status_code, message(answer).startswith("messages.0.content")) == (400, True)


# Sizes and times


def test_a_request_has_a_limit_of_bytes(parts):
    base, tokenizer = parts
    calls = []

    class Watched(type(tokenizer)):
        def __call__(self, text, **options):
            calls.append((len(text), threading.current_thread().name))
            return super().__call__(text, **options)

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.__class__ = Watched
    with served(Service(copy.deepcopy(base), tokenizer, "base")) as url:
        calls.clear()
        for changes in ({"prompt": "who " * 2**19}, {"model": "none", "prompt": "who " * 2**19}):
            answer = ask(url, **changes)
            assert (answer.status_code, message(answer)) == (413, "a request may have 1,048,576 bytes.")

        def chunks():
            yield b'{"model": "base", "prompt": "'
            for _ in range(20):
                yield b"who " * 2**14

        # Without a length: counted as it comes.
        answer = httpx.post(f"{url}/v1/completions", content=chunks(), headers={"Content-Type": "application/json"})
        assert answer.status_code == 413
        # Less than that, but more than can be the tokens that are allowed; of an unknown model; no text of tokens at all.
        assert ask(url, prompt="who " * 2**17).json()["error"]["code"] == "context_length_exceeded"
        assert chat(url, messages=[{"role": "user", "content": "who " * 2**17}]).status_code == 400
        assert ask(url, model="none").status_code == 404
        assert chat(url, model="none").status_code == 404
        assert calls == []
        assert ask(url).status_code == chat(url).status_code == 200
    assert [size for size, _ in calls] == [len("who is"), len("user who is answer: ")]
    # Not in the server's own thread, where others would wait.
    assert all("asyncio" in name for _, name in calls)


def test_a_request_that_does_not_come_to_its_end(parts, tmp_path):
    base, tokenizer = parts
    service = Service(copy.deepcopy(base), tokenizer, "base", tmp_path, limits=Limits(seconds=0.5))
    with served(service) as url:
        host, port = url.removeprefix("http://").split(":")
        form = f"Content-Type: multipart/form-data; boundary=x\r\nAuthorization: Bearer {TOKEN}"
        for head in (
            "POST /v1/completions HTTP/1.1\r\nContent-Type: application/json",
            f"PUT /v1/deltas/new HTTP/1.1\r\n{form}",
        ):
            with socket.create_connection((host, int(port)), 30) as connection:
                connection.sendall(f"{head}\r\nHost: x\r\nContent-Length: 100\r\n\r\n-".encode())
                # Until the server closes it.
                answer = b"".join(iter(lambda connection=connection: connection.recv(2**16), b""))
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b"connection: close" in answer.lower()
            assert b"the request has not come within 0.5 seconds." in answer
        assert list(tmp_path.iterdir()) == []


def test_who_waits_for_a_delta_is_told_in_time(parts, tmp_path, monkeypatch):
    """And others do not wait with it."""
    base, tokenizer = copy.deepcopy(parts[0]), parts[1]
    write_deltas(base, tmp_path, 1)
    service = Service(base, tokenizer, "base", tmp_path, limits=Limits(seconds=2.0))
    reading, go, load = threading.Event(), threading.Event(), SparseDelta.load

    def slowly(path):
        reading.set()
        assert go.wait(SECONDS)
        return load(path)

    monkeypatch.setattr(SparseDelta, "load", slowly)
    with served(service) as url, ThreadPoolExecutor(1) as threads:
        waits = threads.submit(ask, url, model="task0")
        try:
            assert reading.wait(SECONDS)
            assert ask(url).status_code == 200
            answer = waits.result()
            assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        finally:
            go.set()
        assert ask(url, model="task0").status_code == 200


def test_an_upload_whose_description_is_too_large_is_not_parsed(url, tmp_path, monkeypatch):
    folder = tmp_path / "new" / "task7"
    parsed = []
    real = json.loads
    monkeypatch.setattr(json, "loads", lambda text, **options: parsed.append(len(text)) or real(text, **options))
    header = json.dumps({"__metadata__": {"dst_records": "[" + "[]," * 2**21 + "0]"}}).encode()
    answer = put(url, "new", folder, **{"adapter_model.safetensors": ("x", struct.pack("<Q", len(header)) + header)})
    assert (answer.status_code, "the header of adapter_model.safetensors may have" in answer.text) == (413, True)
    for shape in ((10**6,), (1, 10**6)):
        blob = save({DESCRIPTION: torch.zeros(shape, dtype=torch.uint8)})
        answer = put(url, "new", folder, **{"adapter_model.safetensors": ("x", blob)})
        assert (answer.status_code, DESCRIPTION in answer.text) == (413, True)
    answer = put(url, "new", folder, **{"adapter_config.json": ("x", b" " * (2**20 + 1))})
    assert (answer.status_code, "adapter_config.json may have 1,048,576 bytes" in answer.text) == (413, True)
    assert max(parsed, default=0) < 2**20


# Errors


def test_a_connection_survives_an_error(service):
    def fail(*_):
        raise ZeroDivisionError("of our own")

    with served(service) as url, httpx.Client(base_url=url) as client:
        service.prompts.read = fail
        body = {"model": "base", "prompt": "who"}
        sockets = []
        for _ in range(3):
            with client.stream("POST", "/v1/completions", json=body) as answer:
                sockets.append(answer.extensions["network_stream"].get_extra_info("socket").getsockname())
                answer.read()
            assert answer.status_code == 500
            assert "of our own" not in answer.text
            assert answer.json()["error"]["type"] == "server_error"
        assert len(set(sockets)) == 1
        lines = client.get("/metrics").text.splitlines()
    assert 'peft_dst_requests_total{path="/v1/completions",status="500"} 3.0' in lines


def test_headers_of_errors(url):
    answer = httpx.get(f"{url}/v1/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    answer = httpx.delete(f"{url}/v1/deltas/task0")
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")


def test_a_damaged_delta_is_the_server_s_fault(service, tmp_path, caplog):
    path = tmp_path / "deltas" / "task0" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with served(service) as url:
        for answer in (ask(url, model="task0"), ask(url, model="task0", stream=True)):
            assert answer.status_code == 500
            error = answer.json()["error"]
            assert (error["type"], error["code"]) == ("server_error", "bad_delta")
            assert error["message"] == "the delta 'task0' cannot be used; the server's log says why."
        assert ask(url, model="task1").status_code == 200
        # Of an upload it is the client's; nothing is said of where the server keeps it.
        answer = put(url, "new", tmp_path / "new" / "task7", **{"adapter_model.safetensors": ("x", path.read_bytes())})
        assert answer.status_code == 422
        assert str(tmp_path) not in answer.text
        answer = put(url, "new", tmp_path / "new" / "task7", **{"adapter_config.json": ("x", b"{")})
        assert (answer.status_code, message(answer).startswith("adapter_config.json cannot be read")) == (422, True)
        assert str(tmp_path) not in answer.text
    assert str(path) in caplog.text


def test_not_every_key_error_is_an_unknown_model(service):
    def fail(*_):
        raise KeyError

    with served(service) as url:
        service.model.register_forward_pre_hook(fail)
        answer = ask(url, model="task0")
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, None)
    told = service._as_told(UnknownDelta("the delta 'task0' was removed."), "task0")
    assert (told.status, told.code) == (404, "model_not_found")
    assert isinstance(service._as_told(KeyError(), "task0"), KeyError)


# Tokens


@pytest.mark.parametrize("token", ["", "tök", "two words", "line\n"])
def test_a_token_that_no_client_could_send_is_refused(service, token):
    with pytest.raises(ValueError, match="must be printable ASCII without spaces"):
        create_app(service, token=token)
    service.close(10)


# Metrics and the log


def test_metrics_have_their_kinds(url):
    assert ask(url, model="task1").status_code == 200
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    counters = ("batches", "mixed_batches", "delta_switches", "delta_hits", "delta_loads", "delta_evictions")
    for kind, names in (("counter", counters), ("gauge", ("waiting", "deltas", "deltas_host_bytes"))):
        for name in names:
            suffix = "_total" if kind == "counter" else ""
            assert f"# TYPE peft_dst_{name}{suffix} {kind}" in lines
    assert "peft_dst_delta_switches_total 1.0" in lines
    assert "peft_dst_delta_loads_total 1.0" in lines
    assert "peft_dst_deltas 2.0" in lines
    assert "peft_dst_deltas_host_bytes 0.0" in lines


def test_a_stream_that_ends_with_an_error_is_counted_as_that(service, caplog):
    """Its status was sent long before."""
    caplog.set_level(logging.INFO, "peft_dst.server")
    pieces = []

    def fail(*_):
        pieces.append(0)
        if len(pieces) > 3:
            raise ZeroDivisionError("of our own")

    service.model.generation_config.eos_token_id, service.ends = None, frozenset()
    service.model.register_forward_pre_hook(fail)
    with served(service) as url:
        answer = ask(url, stream=True, max_tokens=9)
        assert answer.status_code == 200
        assert '"error"' in answer.text
        lines = httpx.get(f"{url}/metrics").text.splitlines()
    assert 'peft_dst_requests_total{path="/v1/completions",status="500"} 1.0' in lines
    (answered,) = (r.fields for r in caplog.records if r.getMessage() == "answered" and r.fields["method"] == "POST")
    assert (answered["status"], answered["model"]) == (500, "base")


def test_answers_that_take_long_are_told_apart(url):
    """--timeout is 120 seconds for a request to come, and again for its answer."""
    assert ask(url).status_code == 200
    text = httpx.get(f"{url}/metrics").text
    bounds = {float(bound) for bound in re.findall(r'seconds_bucket\{le="([\d.]+)",path="/v1/completions"\}', text)}
    assert {30.0, 60.0, 120.0, 240.0} < bounds


def test_what_was_read_is_kept_in_the_host_s_memory(parts, tmp_path):
    base, tokenizer = copy.deepcopy(parts[0]), parts[1]
    write_deltas(base, tmp_path, 2)
    with served(Service(base, tokenizer, "base", tmp_path, budget=0, host_budget=2**20)) as url:
        for task in ("task0", "task1"):
            assert ask(url, model=task).status_code == 200
        lines = httpx.get(f"{url}/metrics").text.splitlines()
    (kept,) = (float(line.split()[1]) for line in lines if line.startswith("peft_dst_deltas_host_bytes "))
    assert kept > 0


def test_the_engine_outlives_a_client_s_loop(service):
    service.model.generation_config.eos_token_id, service.ends = None, frozenset()

    async def leave():
        answer = service.generate(None, [5, 6], 200, Sampling(), [])
        await anext(answer)
        return answer

    # Its generator is not closed before the loop is.
    loop = asyncio.new_event_loop()
    answer = loop.run_until_complete(leave())
    loop.close()
    assert service.close(30)
    with contextlib.suppress(StopIteration):
        answer.aclose().send(None)
