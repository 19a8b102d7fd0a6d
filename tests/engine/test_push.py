"""Pushing to a hub on loopback: the true client, its files, and a token that is nowhere but on the wire."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from engine.errors import BadParams, Cancelled, RunError
from engine.push import push

TOKEN = "hf_canary0123456789"


class Hub(ThreadingHTTPServer):
    """The routes that an upload needs; keeps what it was given."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.made: list[dict] = []
        self.tokens: set[str] = set()
        self.paths: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.status, self.hang = 200, threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *words: object) -> None:
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, body: dict, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_PUT(self) -> None:
        self.server.objects[self.path.rsplit("/", 1)[1]] = self.body()
        self.answer({})

    def do_POST(self) -> None:
        hub, data = self.server, self.body()
        hub.paths.append(self.path)
        hub.tokens.add(self.headers.get("Authorization", ""))
        if hub.status != 200:
            self.answer({"error": f"no, {TOKEN}"}, hub.status)
        elif self.path == "/api/repos/create":
            hub.made.append(json.loads(data))
            self.answer({"url": f"{hub.address}/anna/small"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            hub.hang.wait(20) if hub.hang.is_set() else None
            files = [{"path": f["path"], "uploadMode": "lfs" if f["size"] > 1000 else "regular", "shouldIgnore": False}
                     for f in json.loads(data)["files"]]  # fmt: skip
            self.answer({"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [{**o, "actions": {"upload": {"href": f"{hub.address}/lfs/{o['oid']}"}}}
                       for o in json.loads(data)["objects"]]  # fmt: skip
            self.answer({"transfer": "basic", "objects": objects})
        else:
            for line in map(json.loads, data.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.objects[value["oid"]]
            self.answer({"commitUrl": f"{hub.address}/anna/small/commit/1", "commitOid": "1" * 40})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub()
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", made.address)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_ofTheServer")
    yield made
    made.hang.clear()
    made.shutdown()
    made.server_close()


def test_files_arrive_whole_in_a_private_repository(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # said by whoever wants to be sure
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(range(256)) * 40)
    files: dict[str, Path | bytes] = {"README.md": b"# small", "model.safetensors": weights}
    events = list(push(files, "anna/small", TOKEN))
    assert events[-1] == ("done", {"url": f"{hub.address}/anna/small"})
    assert [kind for kind, _ in events][:2] == ["creating", "uploading"]
    assert hub.files == {"README.md": b"# small", "model.safetensors": weights.read_bytes()}
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in hub.objects
    assert (hub.made[0]["name"], hub.made[0]["organization"]) == ("small", "anna")
    assert hub.made[0].get("visibility") == "private" or hub.made[0].get("private") is True
    assert hub.tokens == {f"Bearer {TOKEN}"}  # the visitor's own, and not the server's
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes()


@pytest.mark.parametrize(
    ("status", "words"), [(401, "does not accept the token"), (403, "may not write there"), (500, "answered 500")]
)
def test_what_the_hub_refuses_is_one_line_without_the_token(hub: Hub, status: int, words: str) -> None:
    hub.status = status
    with pytest.raises(RunError, match=words) as caught:
        list(push({"README.md": b"x"}, "anna/small", TOKEN))
    assert TOKEN not in str(caught.value)


def test_a_stop_ends_the_upload(hub: Hub) -> None:
    hub.hang.set()
    stop = threading.Event()
    events = push({"README.md": b"x"}, "anna/small", TOKEN, stop=stop)
    while next(events)[0] != "uploading":
        pass
    stop.set()
    with pytest.raises(Cancelled):
        list(events)
    assert not any("/commit/" in path for path in hub.paths)


@pytest.mark.parametrize("repo", ["", "small", "a/b/c", "../x/y", "anna/..", "anna/sm all", "http://x/y", "a/b.git"])
def test_a_bad_name_is_refused_before_any_process(repo: str) -> None:
    with pytest.raises(BadParams, match="no name of a repository"):
        push({}, repo, TOKEN)


@pytest.mark.parametrize("token", ["", "hf", "hf_with space", "hf_\n", "x" * 401])
def test_what_can_be_no_token_is_refused_and_not_repeated(token: str) -> None:
    with pytest.raises(BadParams) as caught:
        push({}, "anna/small", token)
    assert len(token) < 4 or token not in str(caught.value)


def test_a_server_that_is_offline_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RunError, match="This server is offline"):
        list(push({"README.md": b"x"}, "anna/small", TOKEN))


def test_a_hub_that_hangs_up_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(RunError, match="cannot be reached"):
        list(push({"README.md": b"x"}, "anna/small", TOKEN))
