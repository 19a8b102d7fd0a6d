"""Push, as the page's buttons call it: the run that is shown, and a Stop that stops."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import gradio as gr
import pytest
from pydantic import JsonValue

from engine import bundle
from engine.errors import Cancelled
from engine.records import Recipe
from tests.ui import fakes
from tests.ui.conftest import ANNA, request
from tests.ui.fakes import FakeScheduler
from tests.ui.hosts import close_no_loops
from ui.desk import Desk
from ui.pages import push, runs

Handlers = Mapping[str, Callable[..., object]]


@pytest.fixture
def handlers(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Handlers:
    """What the section's buttons do, by name."""
    close_no_loops(monkeypatch)
    monkeypatch.setattr(bundle, "contents", lambda folder, card: {"config.json": folder / "config.json"})
    with gr.Blocks() as page:
        push.build(desk, gr.State(""), gr.State(("", "", "")), runs.shown)
    return {str(function.name): function.fn for function in page.fns.values() if function.fn is not None}


def artifact(scheduler: FakeScheduler) -> str:
    """A run of Anna's with a model on this machine."""
    run = fakes.finished(scheduler, Recipe(), ANNA)
    Path(str(run.artifact), "config.json").write_text('{"model_type": "llama", "dtype": "bfloat16"}')
    return run.id


def test_stop_ends_the_upload_of_the_page_that_asks(
    handlers: Handlers, scheduler: FakeScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(files: object, repo: str, token: str, *, stop: threading.Event, **rest: object) -> Iterator[object]:
        while not stop.is_set():
            yield "uploading", {"seconds": 1.0, "bytes": 1 << 20, "files": 1}
        raise Cancelled("Stopped; what was uploaded so far is no commit.")

    monkeypatch.setattr(push, "push", endless)
    run = artifact(scheduler)
    steps = handlers["upload"](run, ("", "", ""), "anna/small", "hf_token", True, 5.0, request(ANNA))
    assert isinstance(steps, Iterator)
    assert "Uploading" in str([next(steps) for _ in range(3)])
    handlers["end"](6.0, request(ANNA, session="s2"))  # another page's
    assert "Uploading" in str(next(steps))
    handlers["end"](6.0, request(ANNA))
    assert "Stopped." in str(list(steps)[-1])
    late = handlers["upload"](run, ("", "", ""), "anna/small", "t", True, 5.5, request(ANNA))  # it had to wait
    assert [str(each) for each in late if "Uploading" in str(each)] == []  # type: ignore[attr-defined]


def test_the_run_that_is_shown_is_pushed_and_no_other(
    handlers: Handlers, scheduler: FakeScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Mapping[str, object]] = []

    def seen(files: Mapping[str, object], *rest: object, **more: object) -> Iterator[tuple[str, dict[str, JsonValue]]]:
        asked.append(files)
        yield "done", {"url": "https://example.org/anna/small"}

    monkeypatch.setattr(push, "push", seen)
    older = artifact(scheduler)
    newest = fakes.running(scheduler, Recipe(), ANNA).id  # which has no model yet
    warned: list[str] = []
    monkeypatch.setattr(gr, "Warning", lambda text, **rest: warned.append(text))
    for painted, count in ((newest, 0), (older, 1)):
        list(handlers["upload"]("", ("", "", f"{painted} x False"), "anna/small", "t", True, 1.0, request(ANNA)))  # type: ignore[call-overload]
        assert len(asked) == count
    assert len(warned) == 1
