"""How the page answers 50 visitors who do what visitors do, while a run works. `python -m benchmarks.load`.

Starts `python app.py` in public mode with a fresh data folder. A first visitor's run keeps the engine busy. A second
opens the page in Chromium, and what the browser asks for is written down. Then 50 visitors, each with a cookie, a
session and an address of its own, do for half a minute each of three things. They come: each within fifteen seconds,
loads the page and all that the browser asked for, with nothing kept from earlier visits, and submits four runs with
up to six seconds of thought before each, two more than may wait while none of its own works. They look: their pages
refresh the strip every two seconds and ask for news of their runs every one and a half, as they have done since they
came. One floods: 200 submissions as fast as it can, while the others look on. Writes the section between `<!-- load
-->` marks in benchmarks/README.md, and fails where a refresh took longer than it may, or anything went wrong.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import sys
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvloop
from playwright.async_api import Request, async_playwright

from benchmarks.sections import CHROMIUM, FLAGS, README, running_page, write_section
from engine import hardware

VISITORS = 50
SECONDS = 30.0  # of each part
ARRIVAL = 15.0  # seconds within which all come
STRIP, RUNS = 2.0, 1.5  # seconds between two ticks
BOUND = 0.15  # seconds that 95 of 100 refreshes may take
REFRESHES = ("the strip", "news of runs?")
THOUGHT = 6.0  # seconds before a submission, at most
TOGETHER = 6  # connections of a browser
FILE = "Accept-Encoding: gzip, deflate, br"
RECIPE = "model: demo\nmeasure: [size]\nsteps: [{quantize/rtn: {group_size: 64}}]\nseed: %d"
START = [None, False, ""]  # a draft that the server keeps, no original beside it, no token
LONG = "model: demo\nmeasure: []\nsteps: [{distill/logits: {steps: 20000}}]"


@dataclass
class Tally:
    """Seconds of each kind of request, and what went wrong."""

    times: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    refused: int = 0
    taken: int = 0
    errors: list[str] = field(default_factory=list)


class Visitor:
    """One browser."""

    def __init__(self, address: str, number: int, tally: Tally) -> None:
        self.number, self.tally = number, tally
        self.session = f"load{number:04d}"
        self.http = httpx.AsyncClient(
            base_url=address, timeout=60, headers={"X-Forwarded-For": f"192.0.2.{number}"},
            limits=httpx.Limits(keepalive_expiry=3.0),  # before the server closes what rests
        )  # fmt: skip

    async def timed(self, what: str, work: Awaitable[httpx.Response]) -> httpx.Response | None:
        began = time.perf_counter()
        try:
            answer = await work
            answer.raise_for_status()
        except httpx.HTTPError as error:
            self.tally.errors.append(f"{what}: {error!r}")
            return None
        self.tally.times[what].append(time.perf_counter() - began)
        return answer

    async def load(self, opening: Opening) -> None:
        """Open the page, and ask for what a browser asks for then."""
        began = time.perf_counter()
        await self.timed("the document", self.http.get("/"))
        await asyncio.gather(*(self.files(opening.files[lane::TOGETHER]) for lane in range(TOGETHER)))
        calls = [
            self.event(handler, data) if queued else self.tick("an event of a page that opens", handler, data)
            for handler, queued, data in opening.events
        ]
        await asyncio.gather(*calls)
        self.tally.times["the page, until it stands"].append(time.perf_counter() - began)

    async def files(self, paths: Sequence[str]) -> None:
        """Scripts and styles over one connection, packed as a browser takes them.

        By hand: httpx would take longer to ask than the server to answer, and on the same cores.
        """
        address = self.http.base_url
        reader, writer = await asyncio.open_connection(address.host, address.port)
        for path in paths:
            began = time.perf_counter()
            writer.write(f"GET {path} HTTP/1.1\r\nHost: {address.netloc.decode()}\r\n{FILE}\r\n\r\n".encode())
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = re.search(rb"content-length: (\d+)", head)
            if not head.startswith(b"http/1.1 200") or length is None:
                self.tally.errors.append(f"{path}: {head[:40]!r}")
                break
            await reader.readexactly(int(length[1]))
            self.tally.times["a file of the page"].append(time.perf_counter() - began)
        writer.close()

    async def tick(self, what: str, handler: int, data: list[Any]) -> list[Any]:
        """The outputs of a request that does not queue."""
        body = {"fn_index": handler, "data": data, "session_hash": self.session}
        answer = await self.timed(what, self.http.post("/gradio_api/run/predict", json=body))
        return [] if answer is None else list(answer.json()["data"])

    async def event(self, handler: int, data: list[Any], tab: int = 0) -> list[str]:
        """An event through the queue, from a tab of the browser; the lines in the corner."""
        session = f"{self.session}{tab:04d}" if tab else self.session  # a session's messages go to one listener
        body = {"fn_index": handler, "data": data, "session_hash": session}
        joined = await self.timed("an event is taken", self.http.post("/gradio_api/queue/join", json=body))
        if joined is None:
            return []
        event, lines = joined.json()["event_id"], []
        params = {"session_hash": session}
        async with self.http.stream("GET", "/gradio_api/queue/data", params=params) as answer:
            async for line in answer.aiter_lines():
                message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if message.get("event_id") == event and message["msg"] == "log":
                    lines.append(str(message["log"]))
                if message.get("event_id") == event and message["msg"] == "process_completed":
                    if not message["success"]:
                        self.tally.errors.append(f"event {handler}: {message['output']}")
                    break
        return lines

    async def submit(self, handlers: Handlers, recipe: str) -> None:
        began = time.perf_counter()
        lines = await self.event(handlers.paste, [recipe, None]) or await self.event(handlers.start, START)
        self.tally.times["paste and start"].append(time.perf_counter() - began)
        if any("are waiting already" in line for line in lines):
            self.tally.refused += 1
        elif lines:
            self.tally.errors.append(lines[0])
        else:
            self.tally.taken += 1


@dataclass(frozen=True)
class Handlers:
    """The indices of the page's handlers."""

    strip: int
    news: int
    runs: int
    paste: int
    start: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> Handlers:
        ids = {c["props"].get("elem_id"): c["id"] for c in config["components"]}

        def find(fits: Callable[[dict[str, Any]], bool]) -> int:
            return int(next(d["id"] for d in config["dependencies"] if fits(d)))

        def on(d: dict[str, Any], event: str) -> bool:
            return any(target[1] == event for target in d["targets"])

        return cls(
            strip=find(lambda d: ids["mq-status"] in d["outputs"] and on(d, "tick")),
            news=find(lambda d: on(d, "tick") and ids["mq-filter"] in d["inputs"]),
            runs=find(lambda d: ids["mq-runs"] in d["outputs"] and on(d, "change")),
            paste=find(lambda d: ids["mq-paste"] in d["inputs"]),
            start=find(lambda d: [ids["mq-start"], "click"] in [list(target) for target in d["targets"]]),
        )


@dataclass(frozen=True)
class Opening:
    """What a browser asks for when it opens the page, but for the document."""

    files: tuple[str, ...]
    events: tuple[tuple[int, bool, list[Any]], ...]  # handler, whether through the queue, its inputs

    @classmethod
    async def seen(cls, address: str, config: dict[str, Any]) -> Opening:
        """In Chromium, before the first tick of a timer."""
        asked: list[Request] = []
        async with async_playwright() as engine:
            browser = await engine.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            context = await browser.new_context(extra_http_headers={"X-Forwarded-For": "192.0.2.250"})
            page = await context.new_page()
            page.on("request", lambda request: asked.append(request))
            await page.goto(address)
            await page.wait_for_timeout(5000)
            await browser.close()
        ticks = {d["id"] for d in config["dependencies"] if {event for _, event in d["targets"]} == {"tick"}}
        files, events = [], {}
        for request in asked:
            path = request.url.removeprefix(address)
            if request.method == "GET" and path.startswith(("/assets/", "/static/", "/theme.css")):
                files.append(path)
            if request.method == "POST":
                body = request.post_data_json
                if body["fn_index"] not in ticks:  # the strip's is asked for again with each tick: it counts once
                    events.setdefault(body["fn_index"], (body["fn_index"], "/queue/join" in path, body["data"]))
        return cls(tuple(files), tuple(events.values()))


async def every(interval: float, until: float, work: Callable[[], Awaitable[object]]) -> None:
    """Do it again and again, each time after the interval or as soon as it is done."""
    await asyncio.sleep(random.random() * interval)
    while time.monotonic() < until:
        began = time.monotonic()
        await work()
        await asyncio.sleep(max(0.0, interval - (time.monotonic() - began)))


async def refresh(visitor: Visitor, handlers: Handlers, until: float) -> None:
    """Strip and Runs tab of a visitor for a while."""

    async def strip() -> None:
        await visitor.tick("the strip", handlers.strip, [])

    known: list[Any] = []

    async def runs() -> None:
        nonlocal known
        before, known = known, await visitor.tick("news of runs?", handlers.news, ["", ""])
        if known != before:
            await visitor.tick("the Runs tab", handlers.runs, ["", "", None])

    await asyncio.gather(every(STRIP, until, strip), every(RUNS, until, runs))


async def come(visitor: Visitor, handlers: Handlers, opening: Opening, until: float) -> None:
    """Open the page, look on, and submit runs."""
    await asyncio.sleep(random.random() * ARRIVAL)
    await visitor.load(opening)

    async def submit() -> None:
        for number in range(4):
            await asyncio.sleep(random.random() * THOUGHT)
            await visitor.submit(handlers, RECIPE % (visitor.number * 10 + number))

    await asyncio.gather(submit(), refresh(visitor, handlers, until))


async def measure(address: str) -> tuple[list[Tally], Opening, bool]:
    """What happened while they came, looked, and while one flooded; what each asked for; whether a run worked on."""
    parts = [Tally(), Tally(), Tally()]
    visitors = [Visitor(address, number, Tally()) for number in range(VISITORS + 1)]
    await visitors[0].http.get("/")
    config = (await visitors[0].http.get("/config")).json()
    handlers = Handlers.of(config)
    await visitors[0].submit(handlers, LONG)
    await asyncio.sleep(8)
    opening = await Opening.seen(address, config)
    crowd = visitors[1:]

    async def flood(visitor: Visitor) -> None:
        for _ in range(8):
            await asyncio.gather(*(visitor.event(handlers.start, START, tab) for tab in range(1, 26)))

    for number, tally in enumerate(parts):
        until = time.monotonic() + SECONDS
        for visitor in crowd:
            visitor.tally = tally
        if number == 0:
            await asyncio.gather(*(come(visitor, handlers, opening, until) for visitor in crowd))
        else:
            bad = crowd[:1] if number == 2 else []
            for visitor in bad:
                visitor.tally = Tally()  # what it is refused is no error
            lookers = (refresh(visitor, handlers, until) for visitor in crowd[len(bad) :])
            await asyncio.gather(*lookers, *map(flood, bad))
    shown = await visitors[0].tick("the strip", handlers.strip, [])
    for visitor in visitors:
        await visitor.http.aclose()
    return parts, opening, "Nothing is running" not in str(shown)


def report(parts: list[Tally], opening: Opening, working: bool) -> str:
    """The numbers as a table."""
    came = parts[0]
    ended = "" if working else " (it had ended before)"
    lines = [
        f"{VISITORS} visitors beside a distillation that works{ended}; they come, they look, one of them floods with "
        f"200 submissions, {SECONDS:.0f} s each; public mode. A page that opens asks for {len(opening.files)} files "
        f"and {len(opening.events)} events. {hardware.machine()}, load average {os.getloadavg()[0]:.1f} at the end, "
        f"the visitors on the same machine. Of {came.taken + came.refused} submissions {came.taken} were taken, the "
        f"others refused: two may wait. Errors: {', '.join(str(len(part.errors)) for part in parts)}. "
        "Milliseconds: median / 95th / 99th percentile.",
        "", "| request | count | they come | they look | one floods |", "|---|---:|---:|---:|---:|",
    ]  # fmt: skip
    for name in sorted({name for part in parts for name in part.times}):
        times = [part.times.get(name, []) for part in parts]
        cells = [
            " / ".join(f"{1e3 * quantile(each, q):.0f}" for q in (0.5, 0.95, 0.99)) if each else "–" for each in times
        ]
        lines.append(f"| {name} | {sum(map(len, times)):,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def problems(parts: list[Tally], working: bool) -> list[str]:
    """What must not be."""
    found = [error[:300] for part in parts for error in part.errors[:10]]
    found += [] if working else ["the run ended before the visitors"]
    for part, does in zip(parts, ("come", "look", "see one flood"), strict=True):
        for name in REFRESHES:
            if (seconds := quantile(part.times[name], 0.95)) > BOUND:
                found.append(f"while they {does}, {name} takes {1e3 * seconds:.0f} ms: more than {1e3 * BOUND:.0f}")
    return found


def quantile(times: list[float], share: float) -> float:
    """A quantile of what was measured."""
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def main() -> None:
    """Measure and write the result."""
    with running_page(MAQUETTE_MODE="public", MAQUETTE_PROXIES="1") as (address, _):
        parts, opening, working = uvloop.run(measure(address))
    text = report(parts, opening, working)
    write_section(README, "load", text)
    sys.stdout.write(text + "\n")
    sys.exit("\n".join(problems(parts, working)) or 0)


if __name__ == "__main__":
    main()
