"""Real servers for tests of the door: one for each mode, in this process, over a store without workers."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import gradio as gr
import httpx
import pytest
from starlette.routing import BaseRoute

from engine import sources
from engine.modes import LIMITS, Mode
from engine.records import Recipe, Run, Step
from engine.scheduler import Scheduler
from engine.users import UserFile
from tests.ui import fakes
from tests.ui.fakes import FakeScheduler
from ui import login
from ui.desk import Desk
from ui.page import build
from ui.server import serve
from ui.visitors import COOKIE

PASSWORD = "canary-password-0b6f"
ANNAS = Recipe(
    steps=(Step(method="quantize/gptq", params={"bits": 5, "group_size": 32}),), calibration="canary-of-anna.txt"
)
CANARY = "canary-of-anna"
NAMED = "GPTQ 5 bit"  # how her run is called, and nothing else is


@dataclass
class Host:
    """A running server."""

    mode: Mode
    page: gr.Blocks
    desk: Desk
    scheduler: FakeScheduler
    url: str
    clients: list[httpx.Client] = field(default_factory=list)

    def nobody(self, **options: Any) -> httpx.Client:
        """Somebody who has not come before."""
        self.clients.append(httpx.Client(base_url=self.url, timeout=30, **options))
        return self.clients[-1]

    def visit(self) -> httpx.Client:
        """Somebody who has opened the page, where that is enough to be somebody."""
        client = self.nobody()
        client.get("/")
        return client

    def enter(self, name: str) -> httpx.Client:
        """A visitor; on a team server the one of that name."""
        client = self.visit()
        if self.mode is Mode.TEAM:
            assert client.post("/login", data={"name": name, "password": PASSWORD}).status_code == 303
        return client

    def owner(self, name: str, client: httpx.Client) -> str:
        """Under which name the visitor's runs are kept."""
        return f"member:{name}" if self.mode is Mode.TEAM else client.cookies[COOKIE].partition(".")[0]

    def routes(self) -> list[tuple[str, str]]:
        """Every (method, path) of the running app."""
        return [
            (method, route.path)
            for route in flat(self.page.app.router.routes)
            for method in sorted(getattr(route, "methods", None) or ["GET"])
        ]

    def run_of(self, owner: str) -> Run:
        """A finished run that says whose it is."""
        return fakes.finished(self.scheduler, ANNAS, owner, 3.0, 0.1)


def flat(routes: Sequence[BaseRoute]) -> Iterator[BaseRoute]:
    """Routes, also those of routers that FastAPI has included as they are."""
    for route in routes:
        if hasattr(route, "path"):
            yield route
        else:
            yield from flat(route.original_router.routes)


def close_no_loops(changed: pytest.MonkeyPatch) -> None:
    """Let Gradio make no event loops that nobody closes."""
    for place in ("queueing.safe_get_lock", "utils.safe_get_lock"):
        changed.setattr(f"gradio.{place}", asyncio.Lock)
    changed.setattr("gradio.utils.safe_get_stop_event", asyncio.Event)


@contextmanager
def host(mode: Mode, home: Path) -> Iterator[Host]:
    """A server of a mode, with anna and ben as its people."""
    before = Path.cwd()
    changed = pytest.MonkeyPatch()
    changed.setattr(login, "TRIES_BY_ADDRESS", 1000)
    changed.setattr(sources, "_base", [])  # serving sets it, for the process that serves and does nothing else
    close_no_loops(changed)
    scheduler = FakeScheduler(home)
    floods = dict.fromkeys(("requests", "starts", "streams", "questions"), 10**6)  # which have their own tests
    scheduler.limits = replace(LIMITS[mode], **floods)  # type: ignore[arg-type]
    if mode is Mode.TEAM:
        for name in ("anna", "ben"):
            UserFile(home).add(name, PASSWORD)
    page, desk = build(scheduler.store, cast(Scheduler, scheduler), mode=mode)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    try:
        serve(page, desk, "127.0.0.1", port, block=False)
        made = Host(mode, page, desk, scheduler, f"http://127.0.0.1:{port}")
        yield made
        for client in made.clients:
            client.close()
    finally:
        os.chdir(before)
        page.close(verbose=False)
        scheduler.store.close()
        changed.undo()
