"""peft-dst serve, as a process: it comes up, answers, and ends when it is told to."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import time

import httpx
import transformers as hf

from peft_dst.cli import main
from peft_dst.server import start
from tests import toys


def serve(folder, arguments):
    """The command, in a process that writes to a file."""
    os.chdir(folder)
    log = os.open("log", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    main([*arguments])


def test_serve(tmp_path, forkserver):
    toys.model(tmp_path / "llama", "llama")
    hf.AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ("serve", ".", "--deltas", "../deltas", "--port", str(port))
    process = multiprocessing.get_context("forkserver").Process(target=serve, args=(tmp_path / "llama", arguments))
    process.start()
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while True:
            try:
                assert httpx.get(f"{url}/health").json() == {"status": "ok"}
                break
            except httpx.TransportError:
                assert process.is_alive(), (tmp_path / "llama" / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
        assert [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]] == ["llama"]
        body = {"model": "llama", "prompt": "who is", "max_tokens": 3, "temperature": 0}
        answer = httpx.post(f"{url}/v1/completions", json=body).json()
        assert answer["usage"]["prompt_tokens"] == 2
        assert httpx.put(f"{url}/v1/deltas/new").status_code == 403
        # SIGTERM.
        process.terminate()
        process.join(60)
        assert not process.is_alive()
    finally:
        process.kill()
        process.join()
    # Every line, from the first on.
    lines = [json.loads(line) for line in (tmp_path / "llama" / "log").read_text().splitlines()]
    assert any(line["message"].startswith("there are no deltas in ") for line in lines)
    ours = [line for line in lines if line["logger"] == "peft_dst.server"]
    assert {"message": "started", "base": "llama", "deltas": 0}.items() <= ours[0].items()
    assert {"method": "POST", "path": "/v1/completions", "status": 200, "model": "llama"}.items() <= ours[-3].items()
    assert (ours[-1]["message"], ours[-1]["all_answered"]) == ("stopped", True)
    assert any(line["logger"] == "uvicorn.error" for line in lines)


def test_budgets_are_told_to_the_pool(desk, run, monkeypatch):
    given = {}

    def service(*arguments, **options):
        given.update(options)
        raise ValueError("no further")

    for name, made in (("log_to_stderr", lambda: None), ("load", lambda *given: None), ("Service", service)):
        monkeypatch.setattr(start, name, made)
    monkeypatch.setattr(start.AutoTokenizer, "from_pretrained", lambda base: None)
    code, _, err = run("serve", "base", "--budget", "3", "--host-budget", "5")
    assert (code, err) == (1, "error: no further")
    assert (given["budget"], given["host_budget"]) == (3 * 2**20, 5 * 2**20)


def test_serve_says_what_is_wrong(desk, run, monkeypatch):
    code, _, err = run("serve", "base", "--task", "chat")
    assert (code, err) == (1, "error: there is no task 'chat'; use one of completions, classify.")
    code, _, err = run("serve", "base", "--dtype", "int3")
    assert (code, "there is no dtype 'int3'" in err) == (1, True)
    code, _, err = run("serve", "base", "--token", "")
    assert (code, "the token must be printable ASCII" in err) == (1, True)
    for name in [name for name in sys.modules if name.startswith("peft_dst.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, err = run("serve", "base")
    assert (code, err) == (1, "error: serving needs uvicorn, which is not installed: pip install 'peft-dst[serve]'.")
