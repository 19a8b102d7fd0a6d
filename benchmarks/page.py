"""How fast the page answers while a run works: p95 of a refresh with 50 visitors. `python -m benchmarks.page`.

Starts `python app.py` on a free port with a fresh data folder, lets one visitor start a run, and then has
50 visitors refresh the strip every two seconds, as their browsers do. Each refresh is the tick of the
page's own timer: one HTTP request. Writes the section between `<!-- page -->` marks in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import random
import sys
import time

import httpx

from benchmarks.sections import README, running_page, write_section

INTERVAL = 2.0  # seconds between two ticks of a visitor
SECONDS = 20.0  # of each half: the first visitor's runs must outlast it


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--visitors", type=int, default=50)
    options = parser.parse_args()
    with running_page() as (address, _):
        idle, busy, runs = asyncio.run(measure(address, options.visitors))
    text = report(options.visitors, idle, busy, runs)
    write_section(README, "page", text)
    sys.stdout.write(text + "\n")


async def measure(address: str, visitors: int) -> tuple[list[float], list[float], int]:
    """Times of all refreshes in seconds, first with an idle engine, then while runs work."""
    async with httpx.AsyncClient(base_url=address, timeout=60, limits=httpx.Limits(max_connections=200)) as client:
        config = (await client.get("/config")).json()
        strip = component(config, "mq-status")
        tick = next(
            d["id"] for d in config["dependencies"]
            if strip in d["outputs"] and any(target[1] == "tick" for target in d["targets"])
        )  # fmt: skip
        idle = await crowd(client, tick, visitors)
        arrive = next(
            d["id"] for d in config["dependencies"] if len(d["outputs"]) > 10 and d["targets"][0][1] == "load"
        )
        cookie = {"maquette_visitor": "benchmark-visitor-0001"}
        body = {"fn_index": arrive, "data": [None], "session_hash": "benchmark"}
        await client.post("/gradio_api/queue/join", json=body, cookies=cookie)
        await asyncio.sleep(2)
        busy = await crowd(client, tick, visitors)
        answer = await client.post("/gradio_api/run/predict", json={"fn_index": tick, "data": [], "session_hash": "x"})
        working = 0 if "Nothing is running" in answer.text else 1
        return idle, busy, working


def component(config: dict[str, list[dict[str, dict[str, str]]]], name: str) -> object:
    """The id of the component with an `elem_id`."""
    return next(c["id"] for c in config["components"] if c["props"].get("elem_id") == name)


async def crowd(client: httpx.AsyncClient, tick: int, visitors: int) -> list[float]:
    """Refresh times of all visitors, each at its own moment."""
    times: list[float] = []
    end = time.monotonic() + SECONDS

    async def visitor(number: int) -> None:
        await asyncio.sleep(random.random() * INTERVAL)
        body = {"fn_index": tick, "data": [], "session_hash": f"visitor{number}"}
        while time.monotonic() < end:
            began = time.perf_counter()
            answer = await client.post("/gradio_api/run/predict", json=body)
            answer.raise_for_status()
            times.append(time.perf_counter() - began)
            await asyncio.sleep(max(0.0, INTERVAL - times[-1]))

    await asyncio.gather(*(visitor(number) for number in range(visitors)))
    return times


def report(visitors: int, idle: list[float], busy: list[float], working: int) -> str:
    """The numbers as a table."""
    load = os.getloadavg()[0]
    lines = [
        f"{visitors} visitors, a refresh of the strip every {INTERVAL:.0f} s each, {SECONDS:.0f} s long; "
        f"{platform.machine()}, {os.cpu_count()} cores, load average {load:.1f} at the end"
        f"{'' if working else ' (the runs had ended before the measurement did)'}.",
        "", "| engine | refreshes | p50, ms | p95, ms | p99, ms |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, times in (("idle", idle), ("a run works", busy)):
        ordered = sorted(times)
        values = (1e3 * ordered[min(len(ordered) - 1, int(len(ordered) * q))] for q in (0.5, 0.95, 0.99))
        lines.append(f"| {name} | {len(times)} | " + " | ".join(f"{value:.1f}" for value in values) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
