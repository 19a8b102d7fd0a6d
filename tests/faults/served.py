"""The page as it is started by everybody, in a process of its own, with a few runs in its store."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from functools import cached_property
from pathlib import Path

from engine.records import Event, EventKind, Recipe, Run
from engine.store import Store
from tests.faults.visitor import Visitor

ROOT = Path(__file__).parents[2]
ANNA, BEN = "anna-0123456789abcdef", "ben-0123456789abcdef"
MARKUP = "<script>document.title='owned'</script>"
FORMULA = "=cmd|' /C calc'!A0"


class Served:
    """A running page: `address`, its data folder `home`, and the visitor Anna."""

    def __init__(self, home: Path, **settings: str) -> None:
        self.home = home
        with Store(home / "maquette.db") as store:
            self.hers, self.his = (finished(store, owner) for owner in (ANNA, BEN))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        environment = {key: value for key, value in os.environ.items() if not key.startswith("GRADIO_SERVER")}
        with open(home / "server.log", "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "app.py"], cwd=ROOT, stdout=log, stderr=log,
                env={**environment, "MAQUETTE_HOME": str(home), "PORT": str(port), "HOST": "127.0.0.1", **settings},
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """The server's process."""
        return self._process.pid

    @property
    def log(self) -> str:
        """What the server has said so far."""
        return (self.home / "server.log").read_text()

    def wait(self) -> None:
        """Return when it answers."""
        for _ in range(600):
            assert self._process.poll() is None, self.log
            try:
                urllib.request.urlopen(f"{self.address}/healthz", timeout=2).close()
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError(self.log)

    @cached_property
    def visitor(self) -> Visitor:
        """Anna, with her cookie."""
        return Visitor(self.address, ANNA)

    def runs(self, owner: str) -> list[Run]:
        """What the page's store holds for a visitor."""
        return Store(self.home / "maquette.db", read_only=True).runs(owner)

    def close(self) -> None:
        if "visitor" in self.__dict__:
            self.visitor.close()
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def finished(store: Store, owner: str) -> Run:
    """A run that ended well, whose names, prompts and outputs are markup and formulas."""
    recipe = Recipe.model_validate({"model": MARKUP, "steps": [{"quantize/rtn": {"targets": MARKUP}}], "measure": []})
    run = store.begin_attempt(store.add_run(recipe, owner).id)
    token = {"text": MARKUP, "probability": 0.5, "top": [[MARKUP, 0.5]]}
    events: list[tuple[EventKind, dict]] = [
        ("phase", {"name": MARKUP}),
        ("log", {"text": MARKUP}),
        ("measurement", {"name": FORMULA, "value": 1.0, "unit": "@SUM(A1)"}),
        ("measurement", {"name": "perplexity", "value": 2.0, "unit": "1", "details": {"kernel": MARKUP}}),
        ("output", {"prompt": MARKUP, "tokens": [token]}),
        ("finished", {"status": "succeeded", "reason": ""}),
    ]
    store.append(
        Event(run=run.id, attempt=1, number=number, time=time.time(), kind=kind, data=data)
        for number, (kind, data) in enumerate(events, 1)
    )
    return store.run(run.id)
