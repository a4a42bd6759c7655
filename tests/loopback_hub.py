"""A Hugging Face Hub for tests: real HTTP on the loopback interface, everything in memory.

It answers what huggingface_hub asks to push and pull models, checks what it is given, and records each request. To
what it does not know it answers 501: a client that asks for more fails, it is not led astray.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

Files = dict[str, bytes]

_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_REVISION = r"(?P<revision>[^/]+)"
_ROUTES = {
    "whoami": r"GET /api/whoami-v2",
    "create": r"POST /api/repos/create",
    "validate": r"POST /api/validate-yaml",
    "preupload": rf"POST /api/models/{_REPO}/preupload/{_REVISION}",
    "batch": rf"POST /{_REPO}\.git/info/lfs/objects/batch",
    "upload": r"PUT /lfs/(?P<oid>[0-9a-f]{64})/(?P<size>\d+)",
    "commit": rf"POST /api/models/{_REPO}/commit/{_REVISION}",
    "info": rf"GET /api/models/{_REPO}(/revision/{_REVISION})?",
    "tree": rf"GET /api/models/{_REPO}/tree/{_REVISION}",
    "resolve": rf"(HEAD|GET) /{_REPO}/resolve/{_REVISION}/(?P<path>.+)",
}
_NEEDS_TOKEN = {"whoami", "create", "preupload", "batch", "commit"}


class Refusal(Exception):
    """What a client is told went wrong: a status, a message, and the code by which it knows which error to raise."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass
class Answer:
    """What is sent back: bytes as they are, all else as JSON."""

    body: Any
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


class Repository:
    """One branch, `main`, of commits: {hash: all files}, the last of which is its head."""

    def __init__(self) -> None:
        self.commits: dict[str, Files] = {}
        self.commit({})

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> Files:
        return self.commits[self.head] if self.commits else {}

    def commit(self, changes: Files) -> str:
        """Add or replace files; returns the hash of the new commit."""
        files = {**self.files, **changes}
        content = [len(self.commits), sorted((path, file_hash(path, files[path])) for path in files)]
        name = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.commits[name] = files
        return name


class LoopbackHub:
    """A Hub for as long as its `with` block lasts.

    Attributes:
        endpoint: its address.
        repositories: by id, "owner/name".
        objects: what was uploaded as LFS objects, by sha256.
        requests: (method, path) of each, in order.
        unknown: those that were answered 501.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: Files = {}
        self.requests: list[tuple[str, str]] = []
        self.unknown: list[tuple[str, str]] = []
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LoopbackHub:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def add(self, repo: str, files: Files) -> None:
        """Commit files without a client; a repository that does not exist yet is created."""
        self.repositories.setdefault(repo, Repository()).commit(files)

    def environment(self, home: object) -> dict[str, str]:
        """Variables of a process whose huggingface_hub speaks to this Hub alone and caches in the folder `home`.

        They have to be set before that process imports huggingface_hub. Xet is switched off by one of them, since the
        client chooses it for uploads whatever a server answers.
        """
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": f"{home}",
            "HF_HUB_CACHE": f"{home}/hub",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "hf_loopback",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    # ---- requests ----

    def answer(self, method: str, path: str, body: bytes = b"", token: str | None = None) -> Answer:
        """What this Hub says to one request."""
        self.requests.append((method, path))
        for name, route in _ROUTES.items():
            if match := re.fullmatch(route, f"{method} {path}"):
                return self._checked(name, match.groupdict(), body, token)
        self.unknown.append((method, path))
        return Answer({"error": f"unknown request: {method} {path}"}, 501)

    def _checked(self, name: str, arguments: dict[str, Any], body: bytes, token: str | None) -> Answer:
        try:
            if name in _NEEDS_TOKEN and not token:
                raise Refusal(401, "Invalid username or password.")
            answer: Answer = getattr(self, f"_{name}")(body, **arguments)
            return answer
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            return Answer({"error": refusal.message}, refusal.status, headers)
        except (KeyError, TypeError, ValueError) as error:
            return Answer({"error": f"malformed {name} request: {error!r}"}, 422)

    def _commit_of(self, repo: str, revision: str | None) -> tuple[str, Files]:
        if repo not in self.repositories:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        repository = self.repositories[repo]
        name = repository.head if revision in (None, "main") else revision
        if name not in repository.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return name, repository.commits[name]

    def _whoami(self, _body: bytes) -> Answer:
        return Answer({"type": "user", "name": "someone", "auth": {"type": "access_token"}})

    def _create(self, body: bytes) -> Answer:
        asked = json.loads(body)
        if not asked["organization"] or asked.get("type", "model") != "model":
            raise Refusal(422, "only models are created here, under the name of their owner")
        repo = f"{asked['organization']}/{asked['name']}"
        status = 409 if repo in self.repositories else 200
        self.repositories.setdefault(repo, Repository())
        return Answer({"url": f"{self.endpoint}/{repo}"}, status)

    def _validate(self, body: bytes) -> Answer:
        match = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        warnings = [] if match else [{"message": "empty or missing yaml metadata in repo card"}]
        errors = [{"message": message} for message in front_matter_errors(match[1] if match else "{}")]
        return Answer({"errors": errors, "warnings": warnings}, 400 if errors else 200)

    def _preupload(self, body: bytes, repo: str, revision: str) -> Answer:
        _, files = self._commit_of(repo, revision)
        return Answer({"files": [upload_mode(file["path"], files) for file in json.loads(body)["files"]]})

    def _batch(self, body: bytes, repo: str) -> Answer:
        self._commit_of(repo, "main")
        asked = json.loads(body)
        if asked["operation"] != "upload" or asked["hash_algo"] != "sha256" or "basic" not in asked["transfers"]:
            raise Refusal(422, "only basic uploads by sha256 are served here")
        return Answer({"transfer": "basic", "objects": [self._instructions(**known) for known in asked["objects"]]})

    def _instructions(self, oid: str, size: int) -> dict[str, Any]:
        if oid in self.objects:
            return {"oid": oid, "size": size}
        return {"oid": oid, "size": size, "actions": {"upload": {"href": f"{self.endpoint}/lfs/{oid}/{size}"}}}

    def _upload(self, body: bytes, oid: str, size: str) -> Answer:
        if len(body) != int(size) or hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "the object is not the one that was announced")
        self.objects[oid] = body
        return Answer(b"")

    def _commit(self, body: bytes, repo: str, revision: str) -> Answer:
        self._commit_of(repo, revision)
        if revision != "main":
            raise Refusal(422, "commits are added to main only")
        changes = [json.loads(line) for line in body.splitlines()]
        files = dict(self._change(**change) for change in changes if change["key"] != "header")
        name = self.repositories[repo].commit(files)
        return Answer({"commitUrl": f"{self.endpoint}/{repo}/commit/{name}", "commitOid": name})

    def _change(self, key: str, value: dict[str, Any]) -> tuple[str, bytes]:
        if key == "file" and value["encoding"] == "base64":
            return value["path"], base64.b64decode(value["content"], validate=True)
        if key != "lfsFile":
            raise Refusal(422, f"files are added here, got {key}")
        if len(self.objects.get(value["oid"], b"")) != value["size"]:
            raise Refusal(422, f"{value['path']} was not uploaded")
        return value["path"], self.objects[value["oid"]]

    def _info(self, _body: bytes, repo: str, revision: str | None) -> Answer:
        name, files = self._commit_of(repo, revision)
        return Answer({"id": repo, "sha": name, "siblings": [{"rfilename": path} for path in files]})

    def _tree(self, _body: bytes, repo: str, revision: str) -> Answer:
        _, files = self._commit_of(repo, revision)
        return Answer([described(path, content) for path, content in files.items()])

    def _resolve(self, _body: bytes, repo: str, revision: str, path: str) -> Answer:
        name, files = self._commit_of(repo, revision)
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        return Answer(files[path], headers={"ETag": f'"{file_hash(path, files[path])}"', "X-Repo-Commit": name})


# ---- files ----


def is_lfs(path: str) -> bool:
    """Whether the Hub stores a file as an LFS object."""
    return path.endswith((".safetensors", ".bin"))


def file_hash(path: str, content: bytes) -> str:
    """What the Hub takes for the hash of a file: the sha256 of an LFS object, else git's own."""
    if is_lfs(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()


def described(path: str, content: bytes) -> dict[str, Any]:
    """A file as a listing of the repository has it."""
    entry = {"type": "file", "path": path, "size": len(content), "oid": file_hash(path, content)}
    return {**entry, "lfs": {"oid": entry["oid"], "size": len(content), "pointerSize": 0}} if is_lfs(path) else entry


def upload_mode(path: str, files: Files) -> dict[str, Any]:
    """How a file is to be sent, and the hash of the one that it would replace."""
    mode = {"path": path, "uploadMode": "lfs" if is_lfs(path) else "regular", "shouldIgnore": False}
    return {**mode, "oid": file_hash(path, files[path])} if path in files else mode


def front_matter_errors(text: str) -> list[str]:
    """Two of the Hub's rules: the front matter is a mapping, and its `base_model` the id of a repository."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        return [str(error)]
    if not isinstance(data, dict):
        return ["the metadata is not a mapping"]
    base = data.get("base_model", "owner/name")
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(base)):
        return []
    return [f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.']


# ---- HTTP ----


class _Server(ThreadingHTTPServer):
    def __init__(self, hub: LoopbackHub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.lock = hub, threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        with self.server.lock:
            answer = self.server.hub.answer(self.command, path, body, self.headers.get("Authorization"))
        content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(content)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _serve

    def log_message(self, *_arguments: object) -> None:
        """Say nothing: `LoopbackHub.requests` has it."""
