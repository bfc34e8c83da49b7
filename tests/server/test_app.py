"""The server as its clients see it: a real one on the loopback, OpenAI's own client, uploads, errors, limits."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
from peft import get_peft_model

from peft_dst import DSTConfig
from peft_dst.delta import SparseDelta
from peft_dst.server.limits import Limits
from peft_dst.server.service import Service
from tests import toys
from tests.server.servers import AUTHORISED, classifier_of, files, parts_of, put, served, write_deltas
from tests.serving.helpers import until


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A tiny causal model in double precision, its tokenizer, and a folder of deltas."""
    folder = tmp_path_factory.mktemp("serving")
    base, tokenizer = parts_of(folder, dtype=torch.float64)
    write_deltas(base, folder / "deltas")
    return base, tokenizer, folder / "deltas"


@pytest.fixture
def deltas(parts, tmp_path):
    return shutil.copytree(parts[2], tmp_path / "deltas")


@pytest.fixture
def url(parts, deltas):
    base, tokenizer, _ = parts
    with served(Service(copy.deepcopy(base), tokenizer, "base", deltas)) as address:
        yield address


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def offline(parts, model, prompt, limit, chat=False):
    """The answer of the model by itself, the delta written into a copy: what it adds to the prompt, or as a text alone."""
    base, tokenizer, folder = parts
    alone = copy.deepcopy(base)
    if model != "base":
        SparseDelta.load(folder / model).apply(alone)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    made = alone.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False)
    if chat:
        return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    return tokenizer.decode(made[0], skip_special_tokens=True).removeprefix(
        tokenizer.decode(ids[0], skip_special_tokens=True)
    )


def test_the_model_is_the_delta(client, parts):
    names = [model.id for model in client.models.list()]
    assert names == ["base", "task0", "task1", "task2"]
    assert client.models.retrieve("task1").id == "task1"
    answers = {}
    for name in names:
        made = client.completions.create(model=name, prompt="who is the cat", max_tokens=12, temperature=0)
        answers[name] = made.choices[0].text
        assert made.choices[0].text == offline(parts, name, "who is the cat", 12)
        assert made.choices[0].finish_reason in ("stop", "length")
        assert made.usage.prompt_tokens == 4
        assert made.usage.total_tokens == 4 + made.usage.completion_tokens
    assert len(set(answers.values())) > 2


def test_a_base_whose_name_has_a_slash(parts):
    base, tokenizer, folder = parts
    with served(Service(copy.deepcopy(base), tokenizer, "org/model", folder)) as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            assert client.models.retrieve("org/model").id == "org/model"
        for name, status in (
            ("org/model", 200),
            ("org%2Fmodel", 200),
            ("task1", 200),
            ("org", 404),
            ("org/model/", 404),
        ):
            answer = httpx.get(f"{url}/v1/models/{name}")
            assert answer.status_code == status, name
            assert status == 200 or answer.json()["error"]["code"] == "model_not_found"


def test_streaming(client, parts):
    pieces = list(
        client.completions.create(
            model="task1",
            prompt="red cat",
            max_tokens=9,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(piece.choices[0].text for piece in pieces if piece.choices)
    assert text == offline(parts, "task1", "red cat", 9)
    assert len(pieces) > 3
    assert [piece.choices[0].finish_reason for piece in pieces[:-1]].count(None) == len(pieces) - 2
    assert pieces[-1].usage.completion_tokens > 0


def test_chat(client, parts):
    messages = [{"role": "user", "content": "where is the dog"}]
    made = client.chat.completions.create(model="task2", messages=messages, max_tokens=7, temperature=0)
    want = offline(parts, "task2", "user where is the dog answer:", 7, chat=True)
    assert made.choices[0].message.content == want
    pieces = client.chat.completions.create(model="task2", messages=messages, max_tokens=7, temperature=0, stream=True)
    assert "".join(piece.choices[0].delta.content for piece in pieces) == want


def test_stops_and_seeds(client, parts):
    options = {"model": "task0", "prompt": "the house", "max_tokens": 20}
    whole = client.completions.create(**options, temperature=0).choices[0].text
    word = whole.split()[2]
    for stream in (False, True):
        made = client.completions.create(**options, temperature=0, stop=[word], stream=stream)
        choices = [piece.choices[0] for piece in made] if stream else [made.choices[0]]
        assert "".join(choice.text for choice in choices) == whole[: whole.find(word)]
        assert choices[-1].finish_reason == "stop"
    one, other = (client.completions.create(**options, seed=s).choices[0].text for s in (1, 2))
    assert one != other
    assert client.completions.create(**options, seed=1).choices[0].text == one


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"model": "none"}, 404, "the model 'none' does not exist"),
        ({"max_tokens": 3000}, 400, "more than the 2048 that are allowed"),
        ({"max_tokens": 0}, 400, "max_tokens: Input should be greater than or equal to 1"),
        ({"prompt": []}, 400, "the prompt has no tokens"),
        ({"prompt": [3, 10**9]}, 400, "the prompt has tokens outside 0 to"),
        ({"temperature": -1}, 400, "temperature: Input should be greater"),
        ({"n": 2}, 400, "n: Input should be 1"),
        ({"frequency_penalty": 1}, 400, "frequency_penalty: Input should be less than or equal to 0"),
    ],
)
def test_what_is_refused(client, change, status, message):
    with pytest.raises(openai.APIStatusError) as error:
        client.completions.create(**{"model": "base", "prompt": "who", "max_tokens": 3} | change)
    assert error.value.status_code == status
    assert message in error.value.body["message"]


def test_there_is_no_chat_without_a_template(parts):
    base, tokenizer, _ = parts
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = None
    with served(Service(copy.deepcopy(base), tokenizer, "base")) as url:
        body = {"model": "base", "messages": [{"role": "user", "content": "who"}]}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body)
        assert (answer.status_code, "no chat template" in answer.text) == (400, True)
        answer = httpx.post(f"{url}/v1/chat/completions", content="{")
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert httpx.get(f"{url}/nothing").json()["error"]["message"] == "Not Found"
        assert httpx.post(f"{url}/v1/classify", json={"model": "base", "input": "who"}).status_code == 400


# Deltas that come and go


def test_a_delta_is_uploaded_and_removed(url, client, parts, deltas, tmp_path):
    base, *_ = parts
    write_deltas(base, tmp_path, 1, start=7)
    answer = put(url, "new", tmp_path / "task7")
    assert answer.status_code == 200, answer.text
    assert answer.json()["entries"] == SparseDelta.load(tmp_path / "task7").num_entries
    assert {path.name for path in deltas.iterdir()} == {"task0", "task1", "task2", "new"}
    assert files(deltas / "new") == files(tmp_path / "task7")
    parts_of_new = (base, parts[1], tmp_path)
    made = client.completions.create(model="new", prompt="who", max_tokens=5, temperature=0)
    assert made.choices[0].text == offline(parts_of_new, "task7", "who", 5)
    assert put(url, "new", tmp_path / "task7").status_code == 409
    assert httpx.delete(f"{url}/v1/deltas/new", headers=AUTHORISED).json()["deleted"]
    assert {path.name for path in deltas.iterdir()} == {"task0", "task1", "task2"}
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="new", prompt="who", max_tokens=5)
    for name in ("new", "base"):
        assert httpx.delete(f"{url}/v1/deltas/{name}", headers=AUTHORISED).status_code == 404


def test_uploads_that_are_refused(url, parts, deltas, tmp_path):
    base, *_ = parts
    write_deltas(base, tmp_path, 1, start=7)
    good = tmp_path / "task7"
    assert put(url, "new", good, token=None).status_code == 401
    assert put(url, "new", good, token="wrong").status_code == 401
    assert httpx.delete(f"{url}/v1/deltas/task0").status_code == 401
    assert put(url, "base", good).status_code == 409
    for name in ("..%2Fnew", "%2Fetc", ".hidden", "a b", "x" * 65):
        assert put(url, name, good).status_code in (400, 404), name
    answer = put(url, "new", good, **{"adapter_config.json": ("adapter_config.json", b"{")})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "bad_delta")
    answer = put(url, "new", good, **{"adapter_model.safetensors": ("x", b"\x00" * 100)})
    assert answer.status_code == 422
    elsewhere = copy.deepcopy(base)
    with torch.no_grad():
        elsewhere.model.embed_tokens.weight.add_(1)
    write_deltas(elsewhere, tmp_path / "elsewhere", 1)
    answer = put(url, "new", tmp_path / "elsewhere" / "task0")
    assert (answer.status_code, "the base model's values differ" in answer.text) == (422, True)
    answer = httpx.put(f"{url}/v1/deltas/new", files={"other": b"x"}, headers=AUTHORISED)
    assert (answer.status_code, "adapter_config.json is missing" in answer.text) == (400, True)
    assert {path.name for path in deltas.iterdir()} == {"task0", "task1", "task2"}


def test_uploads_have_a_limit_and_leave_nothing(parts, deltas, tmp_path):
    base, tokenizer, _ = parts
    write_deltas(base, tmp_path, 1, start=7)
    big = {"adapter_model.safetensors": ("x", bytes(3 * 2**20))}
    (deltas / ".incoming-killed").mkdir()
    os.utime(deltas / ".incoming-killed", (0, 0))
    with served(Service(copy.deepcopy(base), tokenizer, "base", deltas, limits=Limits(upload=10**6))) as url:
        assert not (deltas / ".incoming-killed").exists()
        assert put(url, "new", tmp_path / "task7", **big).status_code == 413

        def chunks():
            yield b'--x\r\nContent-Disposition: form-data; name="adapter_model.safetensors"; filename="a"\r\n\r\n'
            for _ in range(40):
                yield bytes(10**5)

        headers = AUTHORISED | {"Content-Type": "multipart/form-data; boundary=x"}
        # Without a length: counted as it comes.
        assert httpx.put(f"{url}/v1/deltas/new", content=chunks(), headers=headers).status_code == 413
        # A client that dies in the middle.
        with contextlib.suppress(httpx.HTTPError), httpx.Client(timeout=0.3) as client:

            def dying():
                yield next(chunks())
                raise httpx.WriteError("gone")

            client.put(f"{url}/v1/deltas/new", content=dying(), headers=headers)
        until(lambda: not list(deltas.glob(".*")))
        assert {path.name for path in deltas.iterdir()} == {"task0", "task1", "task2"}
    with served(Service(copy.deepcopy(base), tokenizer, "base")) as url:
        assert put(url, "new", tmp_path / "task7").status_code == 403


def test_many_uploads_at_once_keep_nobody_from_an_answer(parts, deltas, tmp_path, monkeypatch):
    """They take one thread of those that prompts are read in, however many there are."""
    base, tokenizer, _ = parts
    write_deltas(base, tmp_path, 1, start=7)
    service = Service(copy.deepcopy(base), tokenizer, "base", deltas)
    go, take = threading.Event(), service.deltas.take
    monkeypatch.setattr(service.deltas, "take", lambda *of_one: (go.wait(60), take(*of_one))[1])
    count = min(32, (os.cpu_count() or 1) + 4)
    with served(service) as url, ThreadPoolExecutor(count) as threads:
        uploads = [threads.submit(put, url, f"new{i}", tmp_path / "task7") for i in range(count)]
        try:
            until(lambda: len(list(deltas.glob(".incoming-*/delta/adapter_model.safetensors"))) == count)
            body = {"model": "base", "prompt": "who", "max_tokens": 2}
            assert httpx.post(f"{url}/v1/completions", json=body, timeout=20).status_code == 200
        finally:
            go.set()
        assert {one.result().status_code for one in uploads} == {200}


# Under load


def test_many_clients(url, parts):
    """Every answer is that of its delta alone, while deltas come and go."""
    folder = parts[2]
    rng = random.Random(0)
    cases = []
    for _ in range(60):
        prompt = " ".join(rng.choices(toys.WORDS[:12], k=rng.randrange(1, 6)))
        cases.append((rng.choice(["base", "task0", "task1", "task2"]), prompt, rng.randrange(1, 12)))
    want = [offline(parts, *case) for case in cases]
    stop = threading.Event()
    changes = []

    def change():
        while not stop.is_set():
            changes.append(put(url, "come-and-go", folder / "task1").status_code)
            changes.append(httpx.delete(f"{url}/v1/deltas/come-and-go", headers=AUTHORISED).status_code)

    changing = threading.Thread(target=change)
    changing.start()
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        ThreadPoolExecutor(16) as threads,
    ):

        def ask(case):
            model, prompt, limit = case
            made = client.completions.create(model=model, prompt=prompt, max_tokens=limit, temperature=0)
            return made.choices[0].text

        assert list(threads.map(ask, cases)) == want
    stop.set()
    changing.join(60)
    assert set(changes) == {200}
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    assert 'peft_dst_requests_total{path="/v1/completions",status="200"} 60.0' in lines
    assert "peft_dst_waiting 0.0" in lines
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}


def test_too_much_and_too_slow(parts):
    base, tokenizer, _ = parts
    limits = Limits(seconds=1.0)
    with served(Service(slowed(base, 0.05), tokenizer, "base", limits=limits, capacity=1, queue=1), grace=5) as url:
        body = {"model": "base", "prompt": "who", "max_tokens": 1000}
        with ThreadPoolExecutor(5) as threads:
            answers = list(threads.map(lambda _: httpx.post(f"{url}/v1/completions", json=body, timeout=60), range(5)))
        codes = sorted(answer.status_code for answer in answers)
        assert codes[0] == 503
        assert codes[-1] == 504
        assert set(codes) == {503, 504}
        overloaded = next(answer for answer in answers if answer.status_code == 503)
        assert overloaded.json()["error"]["code"] == "overloaded"
        assert overloaded.headers["retry-after"] == "1"
        # A stream that takes too long says so in its last event; those before it have to be over.
        wait_until_idle(url)
        with httpx.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}, timeout=60) as answer:
            events = list(events_of(answer))
        assert events[-1]["error"]["message"] == "not finished within 1 seconds."
        # Clients that went away cost nothing more.
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json=body, timeout=0.2)
        wait_until_idle(url)


def wait_until_idle(url):
    until(lambda: {"peft_dst_running 0.0", "peft_dst_waiting 0.0"} <= {*httpx.get(f"{url}/metrics").text.splitlines()})


def slowed(base, seconds):
    """A copy that takes its time for each token, and never ends an answer by itself."""
    slow = copy.deepcopy(base)
    slow.generation_config.eos_token_id = None
    slow.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    return slow


def events_of(response):
    return (json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {"))


def test_a_stream_whose_delta_goes_away_says_so(parts, deltas):
    base, tokenizer, _ = parts
    with served(Service(slowed(base, 0.01), tokenizer, "base", deltas)) as url:
        body = {"model": "task1", "prompt": "who", "max_tokens": 1000, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            events = events_of(answer)
            assert "choices" in next(events)
            httpx.delete(f"{url}/v1/deltas/task1", headers=AUTHORISED)
            *_, last = events
        assert "task1" in last["error"]["message"]
        assert (last["error"]["type"], last["error"]["code"]) == ("invalid_request_error", "model_not_found")


def test_the_time_of_a_stream_is_that_to_its_end(parts):
    base, tokenizer, _ = parts
    with served(Service(slowed(base, 0.02), tokenizer, "base")) as url:
        body = {"model": "base", "prompt": "who", "max_tokens": 10, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            for _ in answer.iter_lines():
                pass
        lines = httpx.get(f"{url}/metrics").text.splitlines()
    (seconds,) = (line for line in lines if line.startswith('peft_dst_request_seconds_sum{path="/v1/completions"}'))
    assert float(seconds.split()[1]) >= 10 * 0.02


# Classifiers


def test_a_classifier(tmp_path):
    base, tokenizer = classifier_of(tmp_path, num_labels=3)
    model = get_peft_model(copy.deepcopy(base), DSTConfig(epsilon=0.05, modules_to_save=["classifier"]))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    batch = tokenizer(["who is the cat", "where is the dog"], return_tensors="pt")
    for _ in range(3):
        model(**batch, labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "deltas" / "tuned")
    with served(Service(base, tokenizer, "base", tmp_path / "deltas")) as url:
        body = {"model": "tuned", "input": ["who is the cat", "where is the dog"]}
        answer = httpx.post(f"{url}/v1/classify", json=body).json()
        with torch.no_grad():
            want = model.eval()(**batch).logits.double().softmax(-1)
        for row, found in zip(want, answer["data"], strict=True):
            assert list(found["scores"].values()) == pytest.approx(row.tolist(), abs=1e-5)
            assert found["label"] == f"LABEL_{int(row.argmax())}"
        assert httpx.post(f"{url}/v1/completions", json={"model": "base", "prompt": "who"}).status_code == 400
        long = httpx.post(f"{url}/v1/classify", json={"model": "base", "input": "cat " * 100})
        assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
