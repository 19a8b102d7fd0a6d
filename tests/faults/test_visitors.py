"""Some visitors at once on a public server with a run at work: each sees own runs, a flood hurts its sender."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from engine.attempts import is_live, read_pid
from engine.records import Status
from tests.faults.served import Served
from tests.faults.visitor import JSON, Visitor
from ui.visitors import COOKIE

LONG = "model: demo\nmeasure: []\nsteps: [{distill/logits: {steps: 20000}}]"
SHORT = "model: demo\nmeasure: []\nsteps: [{quantize/rtn: {group_size: 64}}]\nseed: %d"
MANY, REFRESHES, FLOOD = 12, 3, 6


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    page = Served(tmp_path, MAQUETTE_MODE="public")
    try:
        page.wait()
        yield page
    finally:
        page.close()
        for attempt in filter(is_live, tmp_path.glob("runs/*/attempt-*")):  # a run outlives its server
            if pid := read_pid(attempt):
                os.killpg(pid, signal.SIGKILL)


def come(address: str) -> Visitor:
    visitor = Visitor(address)
    visitor.http.cookies.clear()
    visitor.http.get("/")  # who this is
    visitor.name = visitor.http.cookies[COOKIE].partition(".")[0]
    return visitor


def refresh(visitor: Visitor) -> set[str]:
    """What the timers of a page ask for that was just opened; the runs that the Runs tab shows."""
    session = secrets.token_hex(6)
    status, runs = visitor.component("mq-status"), visitor.component("mq-runs")
    for output, event, data in ((status, "tick", []), (runs, "change", ["", "", None])):
        handler = next(
            d["id"]
            for d in visitor.config["dependencies"]
            if output in d["outputs"] and event in [kind for _, kind in d["targets"]]
        )
        body = {"fn_index": handler, "data": data, "session_hash": session}
        answer = visitor.http.post("/gradio_api/run/predict", content=json.dumps(body), headers=JSON)
        assert answer.status_code == 200, answer.text
    return set(re.findall(r'data-run=\\?"(\w+)', json.dumps(answer.json()["data"])))


def test_many_at_once_see_their_own_runs_and_a_flood_hurts_only_its_sender(served: Served) -> None:
    with ExitStack() as leaving, ThreadPoolExecutor(MANY) as pool:
        visitors = list(pool.map(lambda _: come(served.address), range(MANY)))
        for visitor in visitors:
            leaving.callback(visitor.close)
        busy, *others = visitors
        assert busy.start(LONG) == []
        deadline = time.monotonic() + 60
        while served.runs(busy.name)[0].status is not Status.RUNNING:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert all(said == [] for said in pool.map(lambda each: others[each].start(SHORT % each), range(len(others))))
        flood = pool.submit(lambda: [line for number in range(FLOOD) for line in busy.start(SHORT % number)])
        seen = list(pool.map(refresh, others * REFRESHES))
        said = flood.result()
        mine = [{run.id for run in served.runs(each.name)} for each in others]
        assert [len(each) for each in mine] == [1] * len(others)
        assert seen == mine * REFRESHES
        assert len(served.runs(busy.name)) + len(said) == 1 + FLOOD
        assert len(said) >= FLOOD - 2  # two may wait
        assert all(re.search("of your runs are waiting already|too often in a short time", line) for line in said)
        assert served.runs(busy.name)[-1].status is Status.RUNNING
    assert not re.search("ERROR|Traceback", served.log), served.log
