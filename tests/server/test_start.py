"""What is served and what is not, and how it ends."""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
import transformers as hf
import uvicorn

from benchmarks.load import served
from peft_dst.server.app import create_app
from peft_dst.server.limits import Limits
from peft_dst.server.logs import JsonLines
from peft_dst.server.service import Service
from peft_dst.server.start import Server, load
from tests.models import BUILDERS, bert
from tests.server.servers import parts_of
from tests.server.test_cohorts import SMALL
from tests.serving.helpers import until


def test_what_a_base_is_is_read_off_its_config(tmp_path):
    for name, model in (("gpt2", BUILDERS["gpt2"]()), ("llama", BUILDERS["llama"]()), ("bert", bert())):
        model.save_pretrained(tmp_path / name)
    for name in ("gpt2", "llama"):
        assert load(str(tmp_path / name), None, "auto", "cpu").can_generate()
    model = load(str(tmp_path / "bert"), None, "bfloat16", "cpu")
    assert type(model) is hf.BertForSequenceClassification
    assert (model.dtype, model.training) == (torch.bfloat16, False)


HEADS = {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("model", "task", "message"),
    [
        (BUILDERS["t5"], None, "is T5ForConditionalGeneration, where a causal model"),
        (BUILDERS["t5"], "classify", "which T5ForSequenceClassification needs and would have random values for"),
        (BUILDERS["llama"], "classify", r"\(LlamaForCausalLM\) has no score.weight, which LlamaForSequenceClassification"),
        (lambda: bert().bert, None, "is BertModel, where a causal model"),
        (lambda: bert().bert, "classify", "has no classifier.bias, classifier.weight, which BertForSequenceClassification"),
        (lambda: hf.MistralForCausalLM(hf.MistralConfig(**SMALL, **HEADS)), None, "keeps a DynamicSlidingWindowLayer"),
        (lambda: hf.MambaForCausalLM(hf.MambaConfig(**SMALL)), None, "keeps a LinearAttentionLayer"),
    ],
)  # fmt: skip
def test_what_is_not_served(tmp_path, model, task, message):
    model().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=message):
        load(str(tmp_path / "base"), task, "auto", "cpu")


def test_health_is_that_of_what_computes(tmp_path):
    service = Service(*parts_of(tmp_path), "base")
    with served(service) as url:
        assert (httpx.get(f"{url}/health").status_code, service.engine.alive) == (200, True)
        assert service.engine.stop(60)
        assert httpx.get(f"{url}/health").status_code == 503
        answer = httpx.post(f"{url}/v1/completions", json={"model": "base", "prompt": "who"})
        assert (answer.status_code, answer.json()["error"]["message"]) == (503, "the engine was stopped.")


def started(service, grace):
    """A server, its thread, and where it takes completions."""
    server = Server(uvicorn.Config(create_app(service, grace=grace), port=0, log_level="error"), service, grace)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    return server, thread, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1/completions"


def test_what_is_left_when_the_grace_is_over_is_told_so(tmp_path, caplog):
    """In OpenAI's form, a whole answer by its status, a stream by its last event; and the log does not say otherwise."""
    base, tokenizer = parts_of(tmp_path)
    base.generation_config.eos_token_id = None
    service = Service(base, tokenizer, "base")
    hanging, over = threading.Event(), threading.Event()

    def hang(*_):
        if hanging.is_set():
            over.wait(60)

    base.register_forward_pre_hook(hang)
    caplog.set_level(logging.INFO, "peft_dst.server")
    server, thread, url = started(service, 0.2)
    body = {"model": "base", "prompt": "who", "max_tokens": 1000}
    try:
        with ThreadPoolExecutor(2) as threads:
            streaming = httpx.stream("POST", url, json=body | {"stream": True}, timeout=60)
            with streaming as stream:
                lines = (line for line in stream.iter_lines() if line)
                assert "choices" in next(lines)
                hanging.set()
                whole = threads.submit(httpx.post, url, json=body, timeout=60)
                until(lambda: service.engine.waiting + service.engine.running == 2)
                server.should_exit = True
                *_, last = lines
            answer = whole.result()
        assert json.loads(last[6:])["error"]["type"] == "server_error"
        assert "the server was stopped" in json.loads(last[6:])["error"]["message"]
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")
    finally:
        server.should_exit = True
        over.set()
        thread.join(60)
    assert not thread.is_alive()
    (stopped,) = (record for record in caplog.records if record.getMessage() == "stopped")
    assert stopped.fields == {"all_answered": False}


def test_a_second_interrupt_does_not_wait_for_the_grace(tmp_path):
    """As uvicorn has it: the first Ctrl-C ends in peace, the second at once."""
    base, tokenizer = parts_of(tmp_path)
    base.generation_config.eos_token_id = None
    service = Service(base, tokenizer, "base", limits=Limits(tokens=10**6))
    base.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    server, thread, url = started(service, 60)
    body = {"model": "base", "prompt": "who", "max_tokens": 1000, "stream": True}
    with httpx.stream("POST", url, json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        assert "choices" in next(lines)
        server.handle_exit(signal.SIGINT, None)
        time.sleep(0.5)
        assert thread.is_alive()
        server.handle_exit(signal.SIGINT, None)
        thread.join(20)
        ended = not thread.is_alive()
    assert service.engine.stop(60) is False
    thread.join(60)
    assert ended


def test_lines_of_the_log():
    record = logging.LogRecord("some.one", logging.WARNING, "", 0, "%s times", (3,), None)
    record.fields = {"status": 200}
    line = json.loads(JsonLines().format(record))
    assert line.pop("time").endswith("+00:00")
    assert line == {"level": "WARNING", "logger": "some.one", "message": "3 times", "status": 200}
    try:
        raise KeyError("this")
    except KeyError as error:
        record.exc_info = (type(error), error, None)
    assert json.loads(JsonLines().format(record))["error"] == "KeyError: 'this'"
