"""A Hub of one's own: an HTTP server that speaks the protocol of huggingface.co for models, and processes that use it.

Nothing in the clients is patched: they are processes of their own whose `HF_ENDPOINT` is this server. It knows what
`huggingface_hub`, transformers and PEFT ask for: making repositories, checking metadata, uploads by LFS and commits,
branches, listings, and downloads by redirect to another host, in ranges. It has no git history, only the files of every
commit; and no Xet storage. Requests that it does not know get status 501 and are kept in `HubServer.unknown`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parents[1]
PATIENCE = 120.0  # seconds for one client process
SOCKET_TIMEOUT = 30.0  # seconds without a byte, after which the server hangs up
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")  # of the Hub's default .gitattributes, those that we write
REPOSITORY_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
EMPTY_COMMIT = {".gitattributes": "".join(f"*{suffix} filter=lfs\n" for suffix in LFS_SUFFIXES).encode()}


class Blob(NamedTuple):
    """A file of a commit."""

    content: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.git_oid


@dataclass
class Repository:
    """Branches, and the files and the title of every commit."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, Blob], title: str) -> str:
        content = json.dumps([self.branches.get(branch), len(self.commits), title])
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.titles.append(title)
        return sha


class Refusal(Exception):
    """An answer with an error status."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


class HubServer:
    """The server, running while used as a context.

    Args:
        directory: where uploaded large files are kept.
        users: token → user name.
        large_files: whether weights are uploaded by LFS; otherwise they are part of the commit like every other file.
    """

    def __init__(self, directory: Path, users: dict[str, str], *, large_files: bool = True) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.users, self.large_files = directory, users, large_files
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.unknown: list[str] = []
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        # files come from a host of their own, as they do from the real one: clients must not send it their token
        self.files_url = f"http://localhost:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        """Path → content."""
        found = self.repositories[repository]
        return {path: blob.content for path, blob in found.commits[found.branches[revision]].items()}

    def text(self, repository: str, path: str = "README.md") -> str:
        return self.files(repository)[path].decode()


class HubClient:
    """Processes that use a server, with a cache of their own.

    Args:
        server: that they use.
        home: the directory of their caches, of which every process has its own.
    """

    def __init__(self, server: HubServer, home: Path) -> None:
        self.server, self.home = server, home
        self._started = 0

    def start(self, *arguments: str, token: str | None, xet: bool = False) -> subprocess.Popen[str]:
        """Start Python with these arguments; as a user who has Xet installed if `xet`, who is logged in if `token`."""
        kept = {key: value for key, value in os.environ.items() if not key.upper().startswith(("HF_", "TRANSFORMERS_"))}
        kept = {key: value for key, value in kept.items() if not key.lower().endswith("_proxy")}
        self._started += 1
        settings = {
            "HF_ENDPOINT": self.server.url,
            "HF_HOME": str(self.home / f"cache-{self._started}"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            # where it is installed, huggingface_hub uploads what the server calls large by Xet alone, and does not ask
            "HF_HUB_DISABLE_XET": "0" if xet else "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(SUPPORT)]),
            **({} if token is None else {"HF_TOKEN": token}),
        }
        return subprocess.Popen(
            [sys.executable, *arguments],
            env=kept | settings,
            cwd=self.home,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    @staticmethod
    def finish(process: subprocess.Popen[str]) -> str:
        """What the process printed; an error if it failed."""
        try:
            output, _ = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            raise AssertionError(f"no end after {PATIENCE} s:\n{output}") from None
        assert process.returncode == 0, output
        return output

    def run(self, *arguments: str, token: str | None, xet: bool = False) -> str:
        return self.finish(self.start(*arguments, token=token, xet=xet))


# ---- the protocol --------------------------------------------------------------------------------------------------------


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    return type("Handler", (_Handler,), {"hub": hub})


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    timeout = SOCKET_TIMEOUT

    def log_message(self, *_: Any) -> None:
        pass

    def handle_any(self) -> None:
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        # branches may have quoted slashes, so that each part is unquoted by itself
        self.content = self.body()
        self.hub.requests.append(f"{self.command} {parts.path}")
        try:
            for methods, pattern, answer in _ROUTES:
                match = re.fullmatch(pattern, parts.path)
                if match and self.command in methods.split():
                    with self.hub.lock:
                        answer(self, *map(unquote, match.groups(default="")))
                    return
            self.hub.unknown.append(f"{self.command} {self.path}")
            raise Refusal(HTTPStatus.NOT_IMPLEMENTED, "unknown request")
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message}
            if refusal.code is not None:
                headers["X-Error-Code"] = refusal.code
            self.send({"error": refusal.message, **refusal.body}, refusal.status, headers)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def json(self) -> Any:
        return json.loads(self.content or b"{}")

    def send(self, answer: Any, status: int = HTTPStatus.OK, headers: dict[str, str] | None = None) -> None:
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        defaults = {} if isinstance(answer, bytes) else {"Content-Type": "application/json; charset=utf-8"}
        self.send_response(status)
        for name, value in {**defaults, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # ---- who asks, and for what

    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise Refusal(HTTPStatus.UNAUTHORIZED, "Invalid credentials in Authorization header")
        return self.hub.users.get(token)

    def writer(self, owner: str) -> str:
        user = self.user()
        if user is None:
            raise Refusal(HTTPStatus.UNAUTHORIZED, "Invalid username or password.")
        if user != owner:
            raise Refusal(HTTPStatus.FORBIDDEN, f"You don't have the rights to write in the namespace {owner}")
        return user

    def repository(self, name: str, *, write: bool = False) -> Repository:
        user, owner = self.user(), name.partition("/")[0]
        found = self.hub.repositories.get(name)
        if found is None or (found.private and user != owner):
            status = HTTPStatus.UNAUTHORIZED if user is None else HTTPStatus.NOT_FOUND
            raise Refusal(status, "Repository not found", "RepoNotFound")
        if write:
            self.writer(owner)
        return found

    def commit_of(self, name: str, revision: str) -> tuple[str, dict[str, Blob]]:
        found = self.repository(name)
        sha = found.branches.get(revision, revision)
        if sha not in found.commits:
            raise Refusal(HTTPStatus.NOT_FOUND, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, found.commits[sha]

    # ---- repositories

    def who_am_i(self) -> None:
        user = self.user()
        if user is None:
            raise Refusal(HTTPStatus.UNAUTHORIZED, "Invalid username or password.")
        self.send({"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self) -> None:
        asked = self.json()
        user = self.user()
        owner = self.writer(asked.get("organization") or user or "")
        name = f"{owner}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        if name in self.hub.repositories:
            raise Refusal(HTTPStatus.CONFLICT, "You already created this model repo", **answer)
        made = self.hub.repositories[name] = Repository(private=asked.get("visibility") == "private")
        first = {path: Blob(content, is_lfs=False) for path, content in EMPTY_COMMIT.items()}
        made.commit("main", first, "initial commit")
        self.send(answer)

    def info(self, name: str, revision: str) -> None:
        sha, files = self.commit_of(name, revision or "main")
        card = yaml.safe_load(_metadata(files["README.md"].content.decode()) or "") if "README.md" in files else None
        self.send(
            {
                "_id": sha[:24],
                "id": name,
                "modelId": name,
                "sha": sha,
                "private": self.repository(name).private,
                "tags": (card or {}).get("tags", []),
                "cardData": card,
                "siblings": [{"rfilename": path} for path in files],
            }
        )

    def refs(self, name: str) -> None:
        branches = self.repository(name).branches.items()
        listed = [{"name": key, "ref": f"refs/heads/{key}", "targetCommit": sha} for key, sha in branches]
        self.send({"branches": listed, "tags": [], "converts": []})

    def create_branch(self, name: str, branch: str) -> None:
        found = self.repository(name, write=True)
        if branch in found.branches:
            raise Refusal(HTTPStatus.CONFLICT, "Reference already exists")
        found.branches[branch] = self.commit_of(name, self.json().get("startingPoint", "main"))[0]
        self.send({})

    def tree(self, name: str, revision: str, folder: str) -> None:
        _, files = self.commit_of(name, revision)
        inside = {path: blob for path, blob in files.items() if not folder or path.startswith(f"{folder}/")}
        if folder and not inside:
            raise Refusal(HTTPStatus.NOT_FOUND, f"{folder} does not exist", "EntryNotFound")
        if self.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            inside = {path: blob for path, blob in inside.items() if "/" not in path.removeprefix(f"{folder}/")}
        self.send([_listed(path, blob) for path, blob in inside.items()])

    def paths_info(self, name: str, revision: str) -> None:
        _, files = self.commit_of(name, revision)
        self.send([_listed(path, files[path]) for path in self.json()["paths"] if path in files])

    # ---- uploads

    def validate(self) -> None:
        warnings, errors = _judged(self.json()["content"])
        answer = {
            "warnings": [{"message": text} for text in warnings],
            "errors": [{"message": text} for text in errors],
        }
        self.send(answer, HTTPStatus.BAD_REQUEST if errors else HTTPStatus.OK)

    def preupload(self, name: str, revision: str) -> None:
        self.repository(name, write=True)
        _, files = self.commit_of(name, revision)
        answers = []
        for file in self.json()["files"]:
            path = file["path"]
            is_lfs = self.hub.large_files and path.endswith(LFS_SUFFIXES)
            answer = {"path": path, "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False}
            answers.append({**answer, "oid": files[path].etag} if path in files else answer)
        self.send({"files": answers})

    def lfs_batch(self, name: str) -> None:
        self.repository(name, write=True)
        asked = self.json()
        assert asked["operation"] == "upload"
        assert "basic" in asked["transfers"]
        objects = []
        for item in asked["objects"]:
            actions = {
                "upload": {"href": f"{self.hub.files_url}/upload/{item['oid']}"},
                "verify": {"href": f"{self.hub.url}/{name}.git/info/lfs/objects/verify"},
            }
            has = self.stored(item["oid"]).is_file()
            objects.append({**item, **({} if has else {"actions": actions})})
        self.send({"transfer": "basic", "objects": objects}, headers={"Content-Type": "application/vnd.git-lfs+json"})

    def stored(self, oid: str) -> Path:
        return self.hub.directory / oid

    def put_object(self, oid: str) -> None:
        self.require_no_token()
        if hashlib.sha256(self.content).hexdigest() != oid:
            raise Refusal(HTTPStatus.BAD_REQUEST, "content does not match its hash")
        self.stored(oid).write_bytes(self.content)
        self.send(b"")

    def verify_object(self, name: str) -> None:
        self.repository(name, write=True)
        asked = self.json()
        file = self.stored(asked["oid"])
        if not file.is_file() or file.stat().st_size != asked["size"]:
            raise Refusal(HTTPStatus.NOT_FOUND, "Object does not exist")
        self.send({})

    def commit(self, name: str, branch: str) -> None:
        found = self.repository(name, write=True)
        if branch not in found.branches:
            raise Refusal(HTTPStatus.NOT_FOUND, f"Invalid rev id: {branch}", "RevisionNotFound")
        header, *operations = [json.loads(line) for line in self.content.splitlines()]
        assert header["key"] == "header"
        parent = header["value"].get("parentCommit")
        if parent not in (None, found.branches[branch]):
            raise Refusal(HTTPStatus.PRECONDITION_FAILED, "A commit has happened since. Please refresh and try again.")
        files = dict(found.commits[found.branches[branch]])
        for operation in operations:
            self.apply(files, operation["key"], operation["value"])
        if "README.md" in files:
            _, errors = _judged(files["README.md"].content.decode())
            if errors:
                raise Refusal(HTTPStatus.BAD_REQUEST, errors[0])
        sha = found.commit(branch, files, header["value"]["summary"])
        self.send({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

    def apply(self, files: dict[str, Blob], kind: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if kind == "file":
            assert value["encoding"] == "base64"
            files[path] = Blob(base64.b64decode(value["content"]), is_lfs=False)
        elif kind == "lfsFile":
            if not self.stored(value["oid"]).is_file():
                raise Refusal(HTTPStatus.BAD_REQUEST, f"LFS object of {path} was not uploaded")
            files[path] = Blob(self.stored(value["oid"]).read_bytes(), is_lfs=True)
        elif kind == "deletedFile":
            if files.pop(path, None) is None:
                raise Refusal(HTTPStatus.NOT_FOUND, "A file with this name doesn't exist", "EntryNotFound")
        elif kind == "deletedFolder":
            for inside in [other for other in files if other.startswith(path.rstrip("/") + "/")]:
                del files[inside]
        else:
            raise Refusal(HTTPStatus.BAD_REQUEST, f"unknown operation {kind}")

    # ---- downloads

    def resolve(self, name: str, revision: str, path: str) -> None:
        sha, files = self.commit_of(name, revision)
        if path not in files:
            raise Refusal(HTTPStatus.NOT_FOUND, "Entry not found", "EntryNotFound")
        blob, headers = files[path], {"X-Repo-Commit": sha}
        if not blob.is_lfs:
            self.send_range(blob.content, {**headers, "ETag": f'"{blob.etag}"'})
            return
        linked = {"X-Linked-Size": str(len(blob.content)), "X-Linked-ETag": f'"{blob.etag}"'}
        location = {"Location": f"{self.hub.files_url}/download/{blob.sha256}"}
        self.send(b"", HTTPStatus.FOUND, {**headers, **linked, **location})

    def download(self, oid: str) -> None:
        self.require_no_token()
        self.send_range(self.stored(oid).read_bytes(), {"ETag": f'"{oid}"'})

    def require_no_token(self) -> None:
        if "Authorization" in self.headers:
            self.hub.unknown.append(f"{self.command} {self.path} with a token")
            raise Refusal(HTTPStatus.BAD_REQUEST, "a token was sent to the host of the files")

    def send_range(self, content: bytes, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
        if asked is None:
            self.send(content, HTTPStatus.OK, headers)
            return
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if first > last:
            raise Refusal(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "Range Not Satisfiable")
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self.send(content[first : last + 1], HTTPStatus.PARTIAL_CONTENT, headers)


_MODEL = r"/api/models/([^/]+(?:/[^/]+)?)"  # a few old repositories have no owner
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", _Handler.who_am_i),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", f"{_MODEL}/preupload/([^/]+)", _Handler.preupload),
    ("POST", f"{_MODEL}/commit/([^/]+)", _Handler.commit),
    ("POST", f"{_MODEL}/branch/([^/]+)", _Handler.create_branch),
    ("POST", f"{_MODEL}/paths-info/([^/]+)", _Handler.paths_info),
    ("GET", f"{_MODEL}/refs", _Handler.refs),
    ("GET", f"{_MODEL}/tree/([^/]+)(?:/(.+))?", _Handler.tree),
    ("GET", f"{_MODEL}(?:/revision/([^/]+))?", _Handler.info),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/verify", _Handler.verify_object),
    ("PUT", "/upload/([0-9a-f]{64})", _Handler.put_object),
    ("GET HEAD", "/download/([0-9a-f]{64})", _Handler.download),
    ("GET HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", _Handler.resolve),
]


def _listed(path: str, blob: Blob) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.git_oid}
    if blob.is_lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134}
    return entry


def _metadata(card: str) -> str | None:
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", card, re.DOTALL)
    return None if match is None else match[1]


def _judged(card: str) -> tuple[list[str], list[str]]:
    """What the Hub warns of in the metadata of a card, and what it refuses."""
    block = _metadata(card)
    data = yaml.safe_load(block) if block else None
    if not data:
        return ["empty or missing yaml metadata in repo card"], []
    if not isinstance(data, dict):
        return [], ["metadata must be a mapping"]
    errors = []
    named = data.get("base_model", [])
    for name in named if isinstance(named, list) else [named]:
        if not isinstance(name, str) or not REPOSITORY_ID.fullmatch(name):
            errors.append(f'"base_model" with value "{name}" is not valid. Use a model id from https://hf.co/models.')
    for name in ("tags", "datasets"):
        if not all(isinstance(item, str) for item in data.get(name, [])):
            errors.append(f'"{name}" must be a list of strings')
    return [], errors
