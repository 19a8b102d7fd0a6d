"""A visitor's tokens through the page's own fields: in no file, log, command line, environment, and not on the wire."""

from __future__ import annotations

import base64
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from engine.places import DEMO
from engine.records import Run
from engine.store import Store
from tests import hub as loopback
from tests.faults.served import Served
from tests.faults.visitor import Visitor

READS, WRITES = "hf_canaryThatReads0123", "hf_canaryThatWrites4567"
RECIPE = "model: org/gated\nsteps: [{quantize/rtn: {bits: 8}}]\nmeasure: []\n"


class Tap(httpx.HTTPTransport):
    """The wire to the browser; keeps all that came."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[bytes] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.headers["accept-encoding"] = "identity"
        answer = super().handle_request(request)
        self.heard.append(repr(answer.headers.raw).encode())
        return httpx.Response(answer.status_code, headers=answer.headers, stream=Tapped(answer, self.heard))


class Tapped(httpx.SyncByteStream):
    """An answer's body that is kept as it is read."""

    def __init__(self, answer: httpx.Response, heard: list[bytes]) -> None:
        self._answer, self._heard = answer, heard

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._answer.stream:  # type: ignore[union-attr]
            self._heard.append(piece)
            yield piece

    def close(self) -> None:
        self._answer.close()


def processes(server: int) -> Iterator[bytes]:
    """Command line and environment of a process and of all that come from it, as the kernel shows them."""
    for process in (psutil.Process(server), *psutil.Process(server).children(recursive=True)):
        for name in ("cmdline", "environ"):
            try:
                yield Path(f"/proc/{process.pid}/{name}").read_bytes()
            except OSError:  # it has just ended
                continue


def files(*folders: Path) -> Iterator[tuple[str, bytes]]:
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                yield path.name, path.read_bytes()


def forms(token: str) -> list[bytes]:
    """A token as it is, and as base64 would hide it in whatever place."""
    plain = token.removeprefix("hf_").encode()
    return [plain, *(base64.b64encode(b"x" * shift + plain)[4:-4] for shift in range(3))]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are looked at in /proc")
def test_a_token_is_in_no_file_no_process_and_on_no_wire_but_the_hubs(tmp_path: Path) -> None:
    home, aside = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    aside.mkdir()
    seen: set[bytes] = set()
    tap = Tap()
    with loopback.Hub() as hub, socket.create_server(("127.0.0.1", 0)) as elsewhere:
        hub.add("org/gated", DEMO / "model", gated=True, tokens=(READS,))
        hub.fail("org/gated", file="model.safetensors", redirect=True)
        proxy = f"http://127.0.0.1:{elsewhere.getsockname()[1]}"  # the way to any other host
        served = Served(
            home, MAQUETTE_MODE="public", MAQUETTE_ORGANISATIONS="*", HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0",
            TMPDIR=str(aside), HTTP_PROXY=proxy, HTTPS_PROXY=proxy, NO_PROXY="127.0.0.1",
        )  # fmt: skip
        hub.watch = lambda: seen.update(processes(served.pid))
        try:
            served.wait()
            visitor = Visitor(served.address)
            visitor.http.close()
            visitor.http = httpx.Client(base_url=served.address, timeout=60, transport=tap)
            visitor.http.get("/")  # who she is
            compress_and_push(visitor, home)
            seen.update(processes(served.pid))
            visitor.http.get("/")
            visitor.close()
            found = [*files(home, aside)]
        finally:
            served.close()
        elsewhere.setblocking(False)
        with pytest.raises(BlockingIOError):
            elsewhere.accept()
        assert {each.token for each in hub.asked("HEAD", "model.safetensors")} == {READS}
        assert WRITES in {each.token for each in hub.requests if each.method == "POST"}
        assert {each.token for each in hub.elsewhere} == {""}
    # A run's worker waited for it, unless memory is short.
    for names in ((b"engine.runners.standby", b"engine.worker"), (b"engine.download",), (b"engine.uploader",)):
        assert any(name in each for name in names for each in seen), names
    wire = b"".join(tap.heard)
    assert b"may not write there" in wire  # it came so far, and the hub's own words stayed behind
    assert {"server.log", "maquette.db-wal", "worker.log", "MANIFEST.json"} <= {name for name, _ in found}
    found += [*files(home, aside), ("/proc", b"\n".join(seen)), ("the wire", wire)]
    for token in (READS, WRITES):
        assert [name for name, content in found if any(form in content for form in forms(token))] == []


def compress_and_push(visitor: Visitor, home: Path) -> None:
    """A gated model with the token of one field, to its end; then its result with the token of the other."""
    paste, token = visitor.reading("mq-paste"), visitor.handler("mq-token", "blur")
    start, push = visitor.handler("mq-start", "click"), visitor.reading("mq-push-token")
    visitor.call(paste, [RECIPE, None])
    visitor.call(token, [None, READS])
    answer, lines = visitor.call(start, [None, False, READS])
    assert answer["success"], lines
    assert ended(home).artifact is not None
    assert visitor.call(push, [None, None, "anna/small", WRITES, True, 1])[0]["success"]


def ended(home: Path) -> Run:
    """The run that was started, when it is over."""
    store, until = Store(home / "maquette.db", read_only=True), time.monotonic() + 120
    while True:
        run = store.runs()[0]
        if run.status.final:
            return run
        assert time.monotonic() < until, store.events(run.id)[-3:]
        time.sleep(0.05)
