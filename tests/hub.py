"""A model hub on loopback: the routes of the real one that downloading needs, and every way in which it can fail.

    with Hub() as hub:
        hub.add("org/tiny", folder, tags=("v1",))
        hub.fail("org/tiny", status=429, retry_after=1, times=2)
        ... hub.url ...

Repos are served from folders that tests made. `requests` holds what was asked and with which headers; `elsewhere` the
same of a second address, to which `redirect=True` sends those who ask for a file.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit

CHUNK = 1 << 14


@dataclass(frozen=True)
class Asked:
    """One request as it came."""

    method: str
    path: str
    headers: dict[str, str]

    @property
    def token(self) -> str:
        """The token that came with it, or nothing."""
        return self.headers.get("authorization", "").removeprefix("Bearer ")


@dataclass
class Repo:
    """One model: its folder, the names of its commit, who may read it."""

    name: str
    folder: Path
    tags: tuple[str, ...]
    downloads: int
    gated: bool
    private: bool
    tokens: tuple[str, ...]
    licence: str | None
    hashes: dict[tuple[str, int], str] = field(default_factory=dict)

    def files(self) -> dict[str, Path]:
        return {str(path.relative_to(self.folder)): path for path in sorted(self.folder.rglob("*")) if path.is_file()}

    @property
    def commit(self) -> str:
        """Follows from the files, so that another content is another commit."""
        digest = hashlib.sha1(self.name.encode())
        for name, path in self.files().items():
            digest.update(f"{name} {self.etag(path)}".encode())
        return digest.hexdigest()

    def etag(self, path: Path) -> str:
        """As the real hub has it: SHA-256 of a large file, git's name for the blob of a small one."""
        key = (str(path), path.stat().st_mtime_ns)
        if key not in self.hashes:
            body = path.read_bytes()
            large = path.suffix in (".safetensors", ".bin", ".pt")
            blob = hashlib.sha1(b"blob %d\0" % len(body) + body)
            self.hashes[key] = hashlib.sha256(body).hexdigest() if large else blob.hexdigest()
        return self.hashes[key]


@dataclass
class Failure:
    """What goes wrong with requests for a repo (or all), for one of its files (or all), so many times."""

    repo: str
    file: str
    times: float
    status: int | None
    retry_after: float | None
    stall: int | None
    rate: float | None
    truncate: int | None
    redirect: bool
    method: str


class Hub:
    """The server; everything about it can be changed while it serves."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.renamed: dict[str, str] = {}
        self.failures: list[Failure] = []
        self.requests: list[Asked] = []
        self.elsewhere: list[Asked] = []
        self.sent = 0  # bytes of files
        self.ranges = True  # whether a part of a file can be asked for
        self.watch: Callable[[], object] = lambda: None  # called while who asks still waits
        self.closed = threading.Event()
        self.guard = threading.Lock()
        self._servers = [self._server(self.requests), self._server(self.elsewhere)]
        self.url, self.other = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def __enter__(self) -> Self:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closed.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add(
        self, name: str, folder: Path, *, tags: tuple[str, ...] = (), downloads: int = 0, gated: bool = False,
        private: bool = False, tokens: tuple[str, ...] = (), licence: str | None = None,
    ) -> Repo:  # fmt: skip
        """Serve a folder as a repo. `tokens`: those that may read it where it is gated or private."""
        self.repos[name] = Repo(name, folder, tags, downloads, gated, private, tokens, licence)
        return self.repos[name]

    def rename(self, old: str, new: str) -> None:
        """Let a repo have another name; the old one leads to it."""
        repo = self.repos.pop(old)
        repo.name, self.renamed[old] = new, new
        self.repos[new] = repo

    def fail(
        self, repo: str = "*", *, file: str = "*", times: float = float("inf"), status: int | None = None,
        retry_after: float | None = None, stall: int | None = None, rate: float | None = None,
        truncate: int | None = None, redirect: bool = False, method: str = "*",
    ) -> None:  # fmt: skip
        """Fail requests: with a status; after so many bytes stall or break off; at so many bytes a second; elsewhere.

        file: a file's name, `api` for what is known of a repo, `search`, or `*` for all. `method`: `GET` or `HEAD`.
        """
        self.failures.append(Failure(repo, file, times, status, retry_after, stall, rate, truncate, redirect, method))

    def mend(self) -> None:
        """Let nothing fail any more."""
        self.failures.clear()

    def asked(self, method: str, file: str) -> list[Asked]:
        """The requests for a file so far."""
        return [each for each in self.requests if each.method == method and each.path.endswith(f"/{file}")]

    def take(self, repo: str, file: str, method: str) -> Failure | None:
        """The failure that meets this request; one of its times is used up."""
        with self.guard:
            for each in self.failures:
                met = each.repo in ("*", repo) and each.file in ("*", file) and each.method in ("*", method)
                if met and each.times > 0:
                    each.times -= 1
                    return each
        return None

    def _server(self, seen: list[Asked]) -> ThreadingHTTPServer:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub, Handler.seen = hub, seen
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        return server


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    seen: list[Asked]
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Tests read `requests`."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        """Nothing can be written here; the answer is that of a hub which talks too much."""
        self._seen()
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.dumps({"error": f"{self._token()} may not write"}).encode()
        self._head(403, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        self.wfile.write(body)

    def _seen(self) -> None:
        self.seen.append(Asked(self.command, self.path, {key.lower(): value for key, value in self.headers.items()}))
        self.hub.watch()

    def _answer(self) -> None:
        self._seen()
        with suppress(BrokenPipeError, ConnectionResetError):
            self._route()

    def _route(self) -> None:
        address = urlsplit(self.path)
        path, query = unquote(address.path), parse_qs(address.query)
        if path == "/api/models":
            return self._search(query)
        if found := re.fullmatch(r"/api/models/(.+?)(?:/(revision|tree)/(.+))?", path):
            return self._info(found[1], found[2] or "", found[3] or "main")
        if found := re.fullmatch(r"/(.+?)/resolve/(.+?)/(.+)", path):
            return self._file(found[1], found[2], found[3])
        return self._refuse(404, "not found")

    def _search(self, query: dict[str, list[str]]) -> None:
        if self._failed("", "search"):
            return
        needle, limit = query.get("search", [""])[0].casefold(), int(query.get("limit", ["20"])[0])
        found = [repo for repo in self.hub.repos.values() if needle in repo.name.casefold() and self._may(repo, True)]
        found.sort(key=lambda repo: -repo.downloads)
        self._json([self._described(repo) for repo in found[:limit]])

    def _described(self, repo: Repo) -> dict[str, object]:
        total = sum(path.stat().st_size for path in repo.files().values() if path.suffix == ".safetensors") // 2
        return {
            "id": repo.name, "modelId": repo.name, "sha": repo.commit, "downloads": repo.downloads,
            "gated": "manual" if repo.gated else False, "private": repo.private,
            "tags": ["transformers", "safetensors", *([f"license:{repo.licence}"] if repo.licence else [])],
            "pipeline_tag": "text-generation", "library_name": "transformers",
            "safetensors": {"parameters": {"BF16": total}, "total": total},
        }  # fmt: skip

    def _info(self, name: str, what: str, revision: str) -> None:
        if self._moved(name) or self._failed(name, "api"):
            return
        repo = self._open(name, revision, listing=True)
        if repo is None:
            return
        blobs = []
        for path, place in repo.files().items():
            etag, size = repo.etag(place), place.stat().st_size
            large = {"lfs": {"oid": etag, "sha256": etag, "size": size, "pointerSize": 134}} if len(etag) == 64 else {}
            blobs.append((path, size, etag if not large else "0" * 40, large))
        if what == "tree":
            self._json([{"type": "file", "path": p, "size": s, "oid": oid, **lfs} for p, s, oid, lfs in blobs])
            return
        siblings = [{"rfilename": p, "size": s, "blobId": oid, **lfs} for p, s, oid, lfs in blobs]
        card = {"cardData": {"license": repo.licence}} if repo.licence else {}
        self._json({**self._described(repo), **card, "siblings": siblings})

    def _file(self, name: str, revision: str, file: str) -> None:
        if self._moved(name):
            return
        failure = self.hub.take(name, file, self.command)
        if failure is not None and failure.status is not None:
            self._refuse(failure.status, "as the test asked", retry_after=failure.retry_after)
            return
        elsewhere = self.seen is self.hub.elsewhere  # a signed address: it asks for no token
        repo = self.hub.repos.get(name) if elsewhere else self._open(name, revision)
        if repo is None:
            return
        place = repo.files().get(file)
        if place is None:
            self._refuse(404, "Entry not found", "EntryNotFound", commit=repo.commit)
            return
        size, etag = place.stat().st_size, f'"{repo.etag(place)}"'
        if failure is not None and failure.redirect and not elsewhere:
            linked = {"X-Linked-ETag": etag, "X-Linked-Size": str(size), "X-Repo-Commit": repo.commit}
            self._head(302, {"Location": f"{self.hub.other}{self.path}", "Content-Length": "0", **linked})
            return
        begin, end = 0, size
        asked = self.headers.get("Range", "") if self.hub.ranges else ""
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", asked):
            begin, end = int(found[1]), min(size, int(found[2]) + 1 if found[2] else size)
            if begin >= size:
                self._head(416, {"Content-Range": f"bytes */{size}", "Content-Length": "0"})
                return
        partial = {"Content-Range": f"bytes {begin}-{end - 1}/{size}"} if found else {}
        known = {"ETag": etag, "X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"}
        self._head(206 if found else 200, {**known, **partial, "Content-Length": str(end - begin)})
        if self.command == "GET":
            self._send(place, begin, end, failure)

    def _send(self, place: Path, begin: int, end: int, failure: Failure | None) -> None:
        chunk = CHUNK if failure is None or failure.rate is None else max(1, int(failure.rate / 20))
        with place.open("rb") as stream:
            stream.seek(begin)
            done = 0
            while done < end - begin:
                part = stream.read(min(chunk, end - begin - done))
                if failure is not None:
                    limit = failure.stall if failure.stall is not None else failure.truncate
                    if limit is not None and done + len(part) > limit:
                        self.wfile.write(part[: max(0, limit - done)])
                        self.wfile.flush()
                        if failure.stall is not None:
                            self.hub.closed.wait(120)
                        self.close_connection = True
                        return
                self.wfile.write(part)
                done += len(part)
                self.hub.sent += len(part)
                if failure is not None and failure.rate is not None:
                    time.sleep(0.05 if failure.rate >= 20 else 1 / failure.rate)
                    if self.hub.closed.is_set():
                        return

    def _open(self, name: str, revision: str, listing: bool = False) -> Repo | None:
        """The repo at a revision where whoever asks may read it, else an answer that says why not."""
        repo = self.hub.repos.get(name)
        token = self._token()
        if token and not any(token in each.tokens for each in self.hub.repos.values()):
            self._refuse(401, "Invalid credentials in Authorization header")
            return None
        if repo is None or (repo.private and not self._may(repo)):
            self._refuse(404 if token else 401, "Repository not found", "RepoNotFound")
            return None
        if revision not in ("main", repo.commit, *repo.tags):
            self._refuse(404, "Invalid rev id", "RevisionNotFound")
            return None
        if repo.gated and not listing and not self._may(repo):
            self._refuse(403 if token else 401, f"Access to model {name} is restricted", "GatedRepo")
            return None
        return repo

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _may(self, repo: Repo, search: bool = False) -> bool:
        open_to_all = not repo.private and (search or not repo.gated)
        return open_to_all or self._token() in repo.tokens

    def _moved(self, name: str) -> bool:
        if name not in self.hub.renamed:
            return False
        new = self.path.replace(f"/{name}", f"/{self.hub.renamed[name]}", 1)
        self._head(307, {"Location": new, "Content-Length": "0"})
        return True

    def _failed(self, repo: str, file: str) -> bool:
        failure = self.hub.take(repo, file, self.command)
        if failure is None:
            return False
        if failure.stall is not None:
            self.hub.closed.wait(120)
        if failure.truncate is not None:
            self._head(200, {"Content-Type": "application/json", "Content-Length": "100000"})
            self.wfile.write(b"{" * failure.truncate)
            self.close_connection = True
        elif failure.status is not None:
            self._refuse(failure.status, "as the test asked", retry_after=failure.retry_after)
        else:
            return False
        return True

    def _refuse(
        self, status: int, message: str, code: str = "", *, retry_after: float | None = None, commit: str = ""
    ) -> None:
        body = json.dumps({"error": message}).encode()
        headers = {"Content-Length": str(len(body)), "X-Error-Message": message}
        headers |= {"X-Error-Code": code} if code else {}
        headers |= {"Retry-After": f"{retry_after:g}"} if retry_after is not None else {}
        headers |= {"X-Repo-Commit": commit} if commit else {}
        self._head(status, headers)
        if self.command == "GET":
            self.wfile.write(body)

    def _json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self._head(200, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        if self.command == "GET":
            self.wfile.write(body)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
