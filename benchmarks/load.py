"""How the page answers 50 visitors who do what visitors do, while a run works. `python -m benchmarks.load`.

Starts `python app.py` with a fresh data folder. A first visitor's run keeps the engine busy. Then 50 visitors, each
with a cookie and a session of its own, load the page, and for half a minute refresh the strip every two seconds and the
Runs tab every one and a half, as their browsers do; each submits four runs, which is one more than may wait while none
of its own works. Then one of them floods: 200 submissions as fast as it can, while the others go on. Writes the section
between `<!-- load -->` marks in benchmarks/README.md.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.sections import README, running_page, write_section
from engine import hardware

VISITORS = 50
SECONDS = 30.0  # of each part
STRIP, RUNS = 2.0, 1.5  # seconds between two ticks
RECIPE = "model: demo\nmeasure: [size]\nsteps: [{quantize/rtn: {group_size: 64}}]\nseed: %d"
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
            base_url=address, timeout=60, cookies={"maquette_visitor": f"load-visitor-{number:06d}"}
        )

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

    async def load(self) -> None:
        await self.timed("the page", self.http.get("/"))
        await self.timed("its config", self.http.get("/config"))

    async def tick(self, what: str, handler: int, data: list[Any]) -> list[Any]:
        body = {"fn_index": handler, "data": data, "session_hash": self.session}
        answer = await self.timed(what, self.http.post("/gradio_api/run/predict", json=body))
        return [] if answer is None else list(answer.json()["data"])

    async def event(self, handler: int, data: list[Any], tab: int = 0) -> list[str]:
        """An event through the queue, from a tab of the browser; the lines in the corner."""
        session = f"{self.session}{tab:04d}"  # a session's messages go to one listener
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
        lines = await self.event(handlers.paste, [recipe, None]) or await self.event(handlers.start, [None, False])
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
            runs=find(lambda d: ids["mq-runs"] in d["outputs"] and on(d, "tick")),
            paste=find(lambda d: ids["mq-paste"] in d["inputs"]),
            start=find(lambda d: [ids["mq-start"], "click"] in [list(target) for target in d["targets"]]),
        )


async def every(interval: float, until: float, work: Callable[[], Awaitable[object]]) -> None:
    """Do it again and again, each time after the interval or as soon as it is done."""
    await asyncio.sleep(random.random() * interval)
    while time.monotonic() < until:
        began = time.monotonic()
        await work()
        await asyncio.sleep(max(0.0, interval - (time.monotonic() - began)))


async def refresh(visitors: list[Visitor], handlers: Handlers) -> None:
    """Strip and Runs tab of all visitors for a while."""
    until = time.monotonic() + SECONDS

    async def look(visitor: Visitor) -> None:
        last: list[Any] = ["", "", ""]

        async def runs() -> None:
            nonlocal last
            shown = await visitor.tick("the Runs tab", handlers.runs, ["", "", last])
            last = shown[2] if len(shown) > 2 and isinstance(shown[2], list) else last

        await asyncio.gather(
            every(STRIP, until, lambda: visitor.tick("the strip", handlers.strip, [])), every(RUNS, until, runs)
        )

    await asyncio.gather(*(look(visitor) for visitor in visitors))


async def measure(address: str) -> tuple[Tally, Tally, bool]:
    """What happened while all behaved, and while one flooded; and whether a run worked all the time."""
    calm, flooded = Tally(), Tally()
    visitors = [Visitor(address, number, calm) for number in range(VISITORS + 1)]
    handlers = Handlers.of((await visitors[0].http.get("/config")).json())
    await visitors[0].submit(handlers, LONG)
    await asyncio.sleep(8)
    crowd = visitors[1:]
    calm.times.clear()

    async def come(visitor: Visitor) -> None:
        await asyncio.sleep(random.random() * 10)
        await visitor.load()
        for number in range(4):
            await visitor.submit(handlers, RECIPE % (visitor.number * 10 + number))

    await asyncio.gather(refresh(crowd, handlers), *(come(visitor) for visitor in crowd))
    for visitor in crowd[1:]:
        visitor.tally = flooded
    flood = Tally()
    crowd[0].tally = flood

    async def submissions() -> None:
        for _ in range(8):
            await asyncio.gather(*(crowd[0].event(handlers.start, [None, False], tab) for tab in range(25)))

    await asyncio.gather(refresh(crowd[1:], handlers), submissions())
    flooded.refused = len(flood.errors)
    shown = await visitors[0].tick("the strip", handlers.strip, [])
    for visitor in visitors:
        await visitor.http.aclose()
    return calm, flooded, "Nothing is running" not in str(shown)


def report(calm: Tally, flooded: Tally, working: bool) -> str:
    """The numbers as a table."""
    lines = [
        f"{VISITORS} visitors for {SECONDS:.0f} s while a distillation works, then as long while one of them floods "
        f"with 200 submissions. {hardware.machine()}, load average {os.getloadavg()[0]:.1f} at the end"
        f"{'' if working else ' (the run had ended before)'}. Of {calm.taken + calm.refused} submissions {calm.taken} were "  # noqa: E501
        "taken, the fourth of each visitor was refused. "
        f"Errors: {len(calm.errors)}, and {len(flooded.errors)} during the flood.",
        "", "| request | count | p50, ms | p95, ms | p99, ms | p95 during the flood, ms |",
        "|---|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for name, times in calm.times.items():
        others = flooded.times.get(name, [])
        values = [quantile(times, q) for q in (0.5, 0.95, 0.99)] + [quantile(each, 0.95) for each in (others,) if each]
        shown = [f"{1e3 * value:.1f}" for value in values]
        lines.append(f"| {name} | {len(times)} | {' | '.join([*shown, '–'][:4])} |")
    return "\n".join(lines)


def quantile(times: list[float], share: float) -> float:
    """A quantile of what was measured."""
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def main() -> None:
    """Measure and write the result."""
    with running_page() as (address, _):
        calm, flooded, working = asyncio.run(measure(address))
    text = report(calm, flooded, working)
    write_section(README, "load", text)
    sys.stdout.write(text + "\n")
    for error in (*calm.errors, *flooded.errors)[:10]:
        sys.stderr.write(error[:300] + "\n")


if __name__ == "__main__":
    main()
