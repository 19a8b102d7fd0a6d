"""A fake scheduler over a real store in a fresh folder, the desk over both, and visitors who ask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import gradio as gr
import pytest

from engine.modes import Mode
from engine.records import Recipe, Run, Status
from engine.scheduler import Scheduler
from tests.ui import fakes
from tests.ui.fakes import FakeScheduler
from ui import edge
from ui.asked import Asked, read_writing
from ui.desk import BASELINE, FIRST, Desk, StoredComparison, StoredRun

ANNA, BEN = "anna-0123456789abcdef", "ben-0123456789abcdefg"


class FakeRequest:
    """What handlers read of a gr.Request."""

    def __init__(self, owner: str = "", session: str = "s1") -> None:
        self.cookies = {edge.COOKIE: owner} if owner else {}
        self.session_hash = session
        self.query_params: dict[str, str] = {}
        self.headers: dict[str, str] = {}


def request(owner: str = "", session: str = "s1") -> gr.Request:
    return cast(gr.Request, FakeRequest(owner, session))


def asked(a: str, b: str, prompt: str = "", mode: str = "same", *more: str, **writing: object) -> Asked:
    """What the form says."""
    return Asked(compare=(a, b, *more), writing=read_writing({"prompt": prompt, "mode": mode, **writing}))


def stored() -> StoredComparison:
    def one(name: str, recipe: Recipe, shrink: float, worse: float) -> StoredRun:
        run = Run(id=name, recipe=recipe, status=Status.SUCCEEDED, created=1.0)
        measured = tuple(fakes.measured(shrink, worse))
        return StoredRun(run=run, measurements=measured, outputs=tuple(fakes.outputs(shrink != 1)))

    return StoredComparison(machine="a test", runs=(one("aaaa0000", BASELINE, 1, 0), one("aaaa0001", FIRST, 3.2, 0.1)))


@pytest.fixture
def desk(scheduler: FakeScheduler) -> Desk:
    return Desk(scheduler.store, cast(Scheduler, scheduler), stored(), Mode.PUBLIC)


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[FakeScheduler]:
    made = FakeScheduler(tmp_path)
    yield made
    made.store.close()
