"""examples/serving: what its README says is run, line by line, and answers as it says."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest


ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "serving"


def sections() -> dict[str, str]:
    """Heading → the commands below it, in their order."""
    found = re.findall(
        r"^## ([^\n]+)\n(?:(?!^## ).)*?```bash\n(.*?)```", (FOLDER / "README.md").read_text(), re.S | re.M
    )
    return dict(found)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The script, and where it has made a base and its deltas."""
    folder = tmp_path_factory.mktemp("example")
    command = sections()["Make a base and three deltas"].split()
    assert command[:2] == ["python", "examples/serving/make.py"]
    script = runpy.run_path(str(FOLDER / "make.py"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        script["main"](command[2:])
    return script, folder


@pytest.fixture(scope="module")
def shell(made):
    """Runs commands beside the server, which the README's own command has started."""
    if shutil.which("curl") is None:
        pytest.skip("the README's commands need curl, which is not installed")
    _, folder = made
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "PORT": str(port), "NO_PROXY": "127.0.0.1"}
    options: dict[str, Any] = {"cwd": folder, "env": environment | {"PEFT_DST_TOKEN": "secret"}, "text": True}
    log = folder / "log"
    with log.open("w") as stream:
        server = subprocess.Popen(
            ["bash", "-ec", sections()["Serve them"]],
            cwd=folder, env=environment, stdout=stream, stderr=stream, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False)
                break
            except httpx.TransportError:
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield (
            lambda command: (
                subprocess.run(["bash", "-ec", command], **options, capture_output=True, check=True, timeout=60).stdout
            )
        )
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)
    assert '"message": "stopped", "all_answered": true' in log.read_text()


def test_what_the_readme_says(made, shell):
    script, folder = made
    said = {
        (Path(delta).name, question): f" {answer}"
        for delta, answers in script["ANSWERS"].items()
        for question, answer in zip(script["QUESTIONS"], answers, strict=True)
    }
    three = {"base", "friendly", "grumpy"}

    def health(text: str) -> None:
        assert json.loads(text) == {"status": "ok"}

    def models(text: str) -> None:
        assert {model["id"] for model in json.loads(text)["data"]} == three

    def completion(text: str) -> None:
        found = json.loads(text)
        assert found["choices"][0] | {"logprobs": 0} == {
            "index": 0,
            "text": said["friendly", "Where is my parcel?"],
            "finish_reason": "stop",
            "logprobs": 0,
        }

    def stream(text: str) -> None:
        events = [line.removeprefix("data: ") for line in text.splitlines() if line]
        *pieces, usage = map(json.loads, events[:-1])
        assert "".join(piece["choices"][0]["text"] for piece in pieces) == said["grumpy", "Where is my parcel?"]
        assert usage["usage"]["completion_tokens"] == len(pieces) - 1 > 3
        assert events[-1] == "[DONE]"

    def chat(model: str, question: str) -> Callable[[str], None]:
        def check(text: str) -> None:
            assert json.loads(text)["choices"][0]["message"] == {"role": "assistant", "content": said[model, question]}

        return check

    def upload(text: str) -> None:
        assert json.loads(text).items() > {"id": "pirate", "object": "model"}.items()
        assert (folder / "out/serving/deltas/pirate/adapter_model.safetensors").is_file()

    def delete(text: str) -> None:
        assert json.loads(text)["deleted"]
        assert {path.name for path in (folder / "out/serving/deltas").iterdir()} == three - {"base"}

    def again(text: str) -> None:
        assert json.loads(text)["error"]["code"] == "model_not_found"

    def metrics(text: str) -> None:
        assert 'peft_dst_requests_total{path="/v1/completions",status="200"} 2.0' in text.splitlines()
        assert 'peft_dst_requests_total{path="/v1/completions",status="404"} 1.0' in text.splitlines()

    checks = {
        "Health": health,
        "Models": models,
        "Completion": completion,
        "Stream": stream,
        "Chat": chat("grumpy", "Can I have a refund?"),
        "Upload": upload,
        "Ask the new one": chat("pirate", "When do you open?"),
        "Delete": delete,
        "Ask it again": again,
        "Metrics": metrics,
    }
    commands = {heading: command for heading, command in sections().items() if "curl" in command}
    assert list(commands) == list(checks)
    assert (FOLDER / "README.md").read_text().count("\ncurl ") == len(commands)
    for heading, command in commands.items():
        checks[heading](shell(command))
