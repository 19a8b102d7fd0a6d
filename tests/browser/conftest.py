"""A real server (`python app.py`) with its own data folder, and Chromium.

The first visitor's comparison takes about a minute and is made once; later tests come back as that
visitor, with the same cookie. Every page records its console and the hosts it talked to.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.places import DEMO
from tests.hub import Hub

playwright = pytest.importorskip("playwright.sync_api")
from playwright.sync_api import Browser, Page, StorageState, expect, sync_playwright  # noqa: E402

ROOT = Path(__file__).parents[2]
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
PATIENCE = 240_000  # milliseconds for work that a busy machine may stretch
# Gradio hands the place of a removed input to the next, which for an instant holds the value of the old one.
# And a page that is left (another language is another page) gives up what it was asking for.
HARMLESS = re.compile(
    r"^The specified value \"\w+\" cannot be parsed|AbortError|signal is aborted|Connection errored out"
)
Open = Callable[..., Page]


def chromium() -> str | None:
    """The browser that is there: Debian's, or any on the path; None leaves the choice to Playwright."""
    return next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )


@pytest.fixture(scope="package")
def hub() -> Iterator[Hub]:
    """The hub of models that the page asks, on loopback."""
    with Hub() as made:
        made.add("org/tiny", DEMO / "model", downloads=1234, licence="mit")
        made.add("org/gated", DEMO / "model", gated=True, tokens=("hf_may_read",))
        yield made


@pytest.fixture(scope="package")
def server(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running page."""
    with running(tmp_path_factory.mktemp("home"), HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0") as address:
        yield address


@contextmanager
def running(home: Path, **settings: str) -> Iterator[str]:
    """`python app.py` on a data folder, with more in its environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (home / "server.log").open("wb")
    keep = {key: value for key, value in os.environ.items() if not key.startswith("GRADIO_SERVER")}
    process = subprocess.Popen(
        [sys.executable, "app.py"], cwd=ROOT, stdout=log, stderr=log,
        env={**keep, "MAQUETTE_HOME": str(home), "PORT": str(port), "HOST": "127.0.0.1", **settings},
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(240):
            assert process.poll() is None, (home / "server.log").read_text()
            try:
                urllib.request.urlopen(f"{address}healthz", timeout=2).close()
                break
            except OSError:
                time.sleep(0.25)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
        log.close()


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Chromium; without `make test` the tests are left out where there is none at all."""
    with sync_playwright() as engine:
        try:
            made = engine.chromium.launch(executable_path=chromium(), args=FLAGS)
        except playwright.Error as error:
            if os.environ.get("REQUIRE_CHROMIUM"):  # `make test` has installed it: tests that vanish prove nothing
                raise
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield made
        made.close()


class Watch:
    """What a page said on its console and whom it asked."""

    def __init__(self, page: Page, address: str) -> None:
        self.problems: list[str] = []
        self.foreign: list[str] = []
        host = address.rstrip("/")
        page.on(
            "console",
            lambda m: (
                self.problems.append(m.text) if m.type in ("error", "warning") and not HARMLESS.search(m.text) else None
            ),
        )
        page.on("pageerror", lambda error: None if HARMLESS.search(str(error)) else self.problems.append(str(error)))
        page.on(
            "request",
            lambda r: None if r.url.startswith((host, "data:", "blob:")) else self.foreign.append(r.url),
        )


def barriers(page: Page) -> list[tuple[str, list[str]]]:
    """What axe finds on the page as it stands: each rule of WCAG 2.1 A and AA that is broken, and where."""
    axe = pytest.importorskip("axe_playwright_python")
    page.evaluate(next(Path(axe.__file__).parent.rglob("axe.min.js")).read_text())
    found = page.evaluate("axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa']})")
    return [(broken["id"], [node["html"][:120] for node in broken["nodes"]]) for broken in found["violations"]]


@pytest.fixture
def open_page(server: str, browser: Browser, returning: StorageState) -> Iterator[Open]:
    """Open the page as a visitor; at the end nothing foreign was asked and the console is clean.

    The first visit of all is over by then: beside what another's has begun, its comparison would not begin.
    """
    watched: list[Watch] = []
    contexts = []

    def open_(path: str = "", *, state: StorageState | None = None, width: int = 1280) -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme="light",
            storage_state=state,
            base_url=server,
        )
        contexts.append(context)
        page = context.new_page()
        watched.append(Watch(page, server))
        page.goto(server + path)
        expect(page.locator(".mq-strip")).to_be_visible(timeout=60_000)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert [url for watch in watched for url in watch.foreign] == []
    assert [text for watch in watched for text in watch.problems] == []


@pytest.fixture(scope="package")
def returning(server: str, browser: Browser) -> StorageState:
    """The cookie of a visitor who did nothing but wait until both models were measured here."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.goto(server)
    expect(page.locator("#mq-summary .mq-chip.good")).to_be_visible(timeout=PATIENCE)
    state = context.storage_state()
    context.close()
    return state
