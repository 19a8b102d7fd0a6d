"""Download a model of the hub: a process of its own does it (`engine.download`), which can be killed and is watched.

A server that sends a byte a second never times out by itself. So bytes are counted: below a floor the process is
killed, and another goes on where it stopped. The token goes to it over stdin and stands nowhere else.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from engine.children import lines
from engine.download import Json, Patience
from engine.errors import BadModel, HubError, NeedsToken, RunError, TooBig
from engine.hub import Hub
from engine.methods import Emit
from engine.records import Model
from engine.sources import Repo, classify

SAY = 1.0  # seconds between two events
STARTING = 30.0  # seconds that the process may take until it says its first word
ERRORS = {"NeedsToken": NeedsToken, "BadModel": BadModel, "TooBig": TooBig}


def fetch(
    model: Model, hub: Hub, token: str, emit: Emit, check_cancelled: Callable[[], None],
    patience: Patience | None = None,
) -> Path:  # fmt: skip
    """The folder of a pinned model's complete snapshot, downloaded where it is not here.

    Raises:
        BadModel, NeedsToken, TooBig: it cannot be had.
        HubError: the hub does not answer, or too slowly; what came is kept for the next attempt.
        Cancelled, Interrupted: as `check_cancelled` says.
    """
    repo = classify(model, folders=False)
    assert isinstance(repo, Repo), "only a repo is downloaded"
    if (known := hub.here.find(repo)) is not None:
        return known.absolute()
    if hub.offline:
        raise HubError(f"{repo.name} is not complete on this machine, and Maquette is offline (HF_HUB_OFFLINE).")
    emit("phase", {"name": "downloading"})
    patience = patience or Patience()
    order: Json = {
        "source": model.source, "revision": model.revision, "folder": str(hub.here.folder.absolute()),
        "endpoint": hub.endpoint, "patience": asdict(patience),
    }  # fmt: skip
    failed = furthest = 0
    while True:
        pace = Pace(emit, patience)
        try:
            _child({**order, "token": token}, pace, check_cancelled)
        except (Stalled, HubError) as error:
            check_cancelled()
            failed = 1 if pace.done - furthest >= patience.enough else failed + 1
            furthest = max(furthest, pace.done)
            if isinstance(error, HubError) or failed >= patience.tries:
                raise HubError(str(error)) from None
            emit("log", {"text": f"{error} Trying again."})
            _wait(patience.before(failed), check_cancelled)
            continue
        folder = hub.here.find(repo)
        if folder is None:
            raise HubError(f"{repo.name} is still incomplete after its download. Try again.")
        return folder.absolute()


class Stalled(RunError):
    """Too little came for too long."""


class Pace:
    """Bytes over time: what is told of a download, and whether it stands still."""

    def __init__(self, emit: Emit, patience: Patience) -> None:
        self._emit, self._patience = emit, patience
        self.done = self._total = 0  # bytes
        self._points: deque[tuple[float, int]] = deque()  # when how much had come: the last window, and one before
        self._since = time.monotonic() + STARTING  # before, nothing is expected
        self._said = 0.0

    def follow(self, body: Json) -> None:
        """Take in what the process said."""
        now = time.monotonic()
        if isinstance(text := body.get("log"), str):
            self._emit("log", {"text": text})
        if isinstance(rest := body.get("rest"), int | float):
            self._since = now + rest
            self._points.clear()
        done, total, came = body.get("done"), body.get("total"), body.get("came")
        if isinstance(done, int) and isinstance(total, int) and isinstance(came, int):
            self.done, self._total = done, total
            self._points.append((now, came))
            if now - self._said >= SAY or done == total:
                self._said = now
                self._say()

    def look(self) -> None:
        """Return while enough comes.

        Raises:
            Stalled: within the last window too little came.
        """
        now, window = time.monotonic(), self._patience.window
        while len(self._points) > 1 and self._points[1][0] <= now - window:
            self._points.popleft()
        if now - self._since < window:
            return
        came = self._points[-1][1] - self._points[0][1] if self._points else 0
        if came < self._patience.enough and not (self._points and self._points[0][0] > now - window):
            raise Stalled(f"The hub sent {came:,} bytes in {window:.0f} s.")

    def _say(self) -> None:
        (first, begun), (last, came) = self._points[0], self._points[-1]
        speed = (came - begun) / (last - first) if last > first else 0.0
        told: Json = {"done": self.done, "total": self._total, "unit": "B"}
        if speed > 0:
            told["eta"] = (self._total - self.done) / speed
            self._emit("sample", {"series": "download.speed", "value": speed, "unit": "B/s"})
        self._emit("progress", told)


def _child(order: Json, pace: Pace, check_cancelled: Callable[[], None]) -> None:
    process = subprocess.Popen([sys.executable, "-m", "engine.download"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    ended: Json = {"error": "HubError", "text": "The process that downloads ended without a word."}

    def look() -> None:
        check_cancelled()
        pace.look()

    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(order).encode() + b"\n")
        process.stdin.close()
        for line in lines(process.stdout, look):
            body = json.loads(line)
            if "error" in body:
                ended = body
            pace.follow(body)
        process.wait()
    except BrokenPipeError:
        pass  # it died before it read; `ended` says so
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
    if ended["error"]:
        check_cancelled()
        raise ERRORS.get(str(ended["error"]), HubError)(str(ended["text"]))


def _wait(seconds: float, check_cancelled: Callable[[], None]) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        check_cancelled()
        time.sleep(min(0.2, left))
