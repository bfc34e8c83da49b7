"""A stand-in for the hub on this machine: what huggingface_hub asks of it to make, fill and read repositories of models.

Importing this module starts it and points huggingface_hub at it, which reads its environment when it is first imported.
So no test of this suite speaks to the real one. It is as strict as the real one where that concerns an adapter: writing
needs the token and so does reading what is private, uploads must have the announced checksum, and a README whose metadata
name no proper base model, tags or results is refused.
"""

from __future__ import annotations

import atexit
import base64
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


TOKEN = "hf_a_token_of_the_tests"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass
class Repository:
    private: bool
    #: Commit → path → content; branch → commit.
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    messages: list[str] = field(default_factory=list)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]

    def commit(self, revision: str, files: dict[str, bytes], message: str = "") -> str:
        files = {**self.files(revision), **files}
        commit = hashlib.sha1(repr((sorted(files.items()), len(self.commits))).encode()).hexdigest()
        self.commits[commit] = files
        self.branches[revision] = commit
        self.messages.append(message)
        return commit


class Hub:
    """Repositories by id, and what has been asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        #: A pattern of requests ("POST /api/models/user/repo/commit") → the status they are answered with.
        self.failures: dict[str, int] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *unused: object) -> None:
        return

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        asked = f"{self.command} {path}"
        self.hub.requests.append(asked)
        try:
            for pattern, status in self.hub.failures.items():
                if re.search(pattern, asked):
                    raise _Refused(status, f"refused: {asked}")
            for pattern, method in _ROUTES:
                if found := re.fullmatch(pattern, asked):
                    self.send(*method(self, body, *found.groups()))
                    return
            raise _Refused(404, f"the stand-in does not know {asked}")
        except _Refused as error:
            headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
            self.send(json.dumps({"error": str(error)}).encode(), headers, error.status)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def send(self, body: bytes | dict, headers: dict[str, str] | None = None, status: int = 200) -> None:
        body = json.dumps(body).encode() if isinstance(body, dict) else body
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def may(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, name: str, write: bool = False) -> Repository:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self.may()):
            raise _Refused(404, "Repository not found", "RepoNotFound")
        if write and not self.may():
            raise _Refused(403, "writing needs the token")
        return found

    def files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repository = self.repository(name)
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            raise _Refused(404, f"no revision {revision}", "RevisionNotFound")
        return commit, repository.commits[commit]

    # What is asked

    def create(self, body: bytes) -> tuple:
        asked = json.loads(body)
        name = f"{asked['organization'] or 'user'}/{asked['name']}"
        if not self.may():
            raise _Refused(401, "creating needs the token")
        if name in self.hub.repositories:
            return {"url": f"{self.hub.endpoint}/{name}", "error": "You already created this model repo"}, {}, 409
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repositories[name] = Repository(private)
        return ({"url": f"{self.hub.endpoint}/{name}", "id": name, "name": name},)

    def validate(self, body: bytes) -> tuple:
        errors = metadata_errors(json.loads(body)["content"])
        answer = json.dumps({"errors": [{"message": error} for error in errors], "warnings": []}).encode()
        return answer, {}, 400 if errors else 200

    def information(self, body: bytes, name: str, revision: str | None = None) -> tuple:
        commit, files = self.files(name, revision or "main")
        siblings = [{"rfilename": path} for path in files]
        return (
            {"id": name, "sha": commit, "private": self.repository(name).private, "siblings": siblings, "tags": []},
        )

    def branch(self, body: bytes, name: str, branch: str) -> tuple:
        repository = self.repository(name, write=True)
        if branch in repository.branches:
            raise _Refused(409, "Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        return ({},)

    def preupload(self, body: bytes, name: str, revision: str) -> tuple:
        self.repository(name, write=True)
        binary = (".safetensors", ".bin", ".pt")
        return (
            {
                "files": [
                    {
                        "path": f["path"],
                        "uploadMode": "lfs" if f["path"].endswith(binary) else "regular",
                        "shouldIgnore": False,
                    }
                    for f in json.loads(body)["files"]
                ]
            },
        )

    def batch(self, body: bytes, name: str) -> tuple:
        self.repository(name, write=True)
        objects = [
            {**o, "actions": {"upload": {"href": f"{self.hub.endpoint}/objects/{o['oid']}"}}}
            for o in json.loads(body)["objects"]
        ]
        return {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}

    def upload(self, body: bytes, oid: str) -> tuple:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(422, "the content is not what was announced")
        self.hub.objects[oid] = body
        return (b"",)

    def commit(self, body: bytes, name: str, revision: str) -> tuple:
        repository = self.repository(name, write=True)
        lines = [json.loads(line) for line in body.splitlines()]
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        if errors := metadata_errors(files.get("README.md", b"").decode()):
            raise _Refused(400, f"Invalid metadata in README.md: {errors}")
        target = "refs/pr/1" if "create_pr=1" in self.path else revision
        repository.branches.setdefault(target, repository.branches["main"])
        oid = repository.commit(target, files, lines[0]["value"]["summary"])
        url = f"{self.hub.endpoint}/{name}"
        return (
            {
                "success": True,
                "commitOid": oid,
                "commitUrl": f"{url}/commit/{oid}",
                "pullRequestUrl": f"{url}/discussions/1",
                "hookOutput": "",
            },
        )

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> tuple:
        commit, files = self.files(name, revision)
        if path not in files:
            raise _Refused(404, f"no {path}", "EntryNotFound")
        etag = hashlib.sha256(files[path]).hexdigest()
        return files[path], {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "none"}


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    ("POST /api/repos/create", _Handler.create),
    ("POST /api/validate-yaml", _Handler.validate),
    (f"POST /api/models/{_NAME}/branch/(.+)", _Handler.branch),
    (f"POST /api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    (f"POST /api/models/{_NAME}/commit/(.+)", _Handler.commit),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /objects/(\w+)", _Handler.upload),
    (f"GET /api/models/{_NAME}(?:/revision/(.+))?", _Handler.information),
    (rf"(?:GET|HEAD) /{_NAME}/resolve/(refs/pr/\d+|[^/]+)/(.+)", _Handler.resolve),
]


def metadata_errors(readme: str) -> list[str]:
    """What the hub refuses a model card for, as far as adapters are concerned."""
    found = re.match(r"---\n(.*?)\n---\n", readme, flags=re.DOTALL)
    try:
        data = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError as error:
        return [f"no YAML: {error}"]
    if not isinstance(data, dict):
        return ["no mapping"]
    errors = []
    bases = data.get("base_model", [])
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str) or not _HUB_ID.fullmatch(base):
            errors.append(f'"base_model" with value {base!r} is not valid. Use a model id from https://hf.co/models.')
    tags = data.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        errors.append('"tags" must be a list of strings')
    for key in ("library_name", "pipeline_tag", "license"):
        if key in data and not isinstance(data[key], str):
            errors.append(f"{key!r} must be a string")
    for model in data.get("model-index", []):
        for result in model["results"]:
            if not {"task", "dataset", "metrics"} <= result.keys():
                errors.append('"model-index" results need task, dataset and metrics')
    return errors


HUB = Hub()
_home = tempfile.mkdtemp(prefix="peft-dst-hub-")
atexit.register(shutil.rmtree, _home, ignore_errors=True)
os.environ |= {"HF_ENDPOINT": HUB.endpoint, "HF_HOME": _home, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1,localhost"}
for _name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN_PATH"):
    os.environ.pop(_name, None)
