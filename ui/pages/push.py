"""Push to the hub, on the Runs tab: the model of the run at hand, with the visitor's own token.

The token goes from its field into the upload's process and nowhere else; the field is emptied when the upload begins.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import gradio as gr
from gradio.blocks import Block
from markupsafe import Markup
from pydantic import JsonValue

from engine import bundle
from engine.errors import Cancelled
from engine.push import push
from engine.store import scratch_of
from ui import markup, report, wording
from ui.desk import Desk
from ui.edge import edge, visitor
from ui.turns import CLICKED, Turns
from ui.wiring import on
from ui.wording import say

Painted = tuple[str, str, str]  # what the Runs tab shows


def build(desk: Desk, picked: gr.State, last: gr.State, whose: Callable[[str, Painted], str]) -> None:
    """Lay the section out and wire it; `whose`: the run on the page, by what was picked and what was painted `last`."""
    turns, clicked = Turns(), gr.Number(0, visible=False)
    with gr.Accordion(say("push.title"), open=False, elem_id="mq-push"):
        gr.HTML(markup.tag("p", say("push.about"), class_="mq-sub"))
        with gr.Row():
            repo = gr.Textbox(label=say("push.repo"), placeholder="name/model", max_lines=1, max_length=200,
                              min_width=220, elem_id="mq-push-repo")  # fmt: skip
            token = gr.Textbox(label=say("push.token"), type="password", max_lines=1, max_length=400, min_width=220,
                               elem_id="mq-push-token")  # fmt: skip
            private = gr.Checkbox(True, label=say("push.private"), min_width=140)
        with gr.Row():
            start = gr.Button(say("push.start"), size="sm", elem_id="mq-push-start")
            stop = gr.Button(say("panes.stop"), size="sm")
        told = gr.HTML(elem_id="mq-push-told")

    @edge
    def upload(
        run_id: str, painted: Painted, repo: str, token: str, private: bool, moment: float, request: gr.Request
    ) -> Iterator[object]:
        page = request.session_hash or visitor(request)
        turn = turns.begin(page, moment or 0.0)
        try:
            yield ["", markup.notice(say("push.begins"))]  # the first thing: the token leaves the page
            owner = desk.enter(request, "start")
            for line in go(desk, owner, whose(run_id, painted), repo, token, private is not False, turn.stop):
                yield [gr.skip(), line]
        except Cancelled:
            yield [gr.skip(), markup.notice(say("push.stopped"))]
        finally:
            turns.end(page, turn)

    @edge
    def end(moment: float, request: gr.Request) -> None:
        turns.stop(request.session_hash or visitor(request), moment or 0.0)  # its own last line says so

    given: list[Block] = [picked, last, repo, token, private, clicked]
    on([start.click], upload, given, [token, told], concurrency_limit=2, js=CLICKED)
    on([stop.click], end, [clicked], queue=False, js=CLICKED)


def go(
    desk: Desk, owner: str, run_id: str, repo: str, token: str, private: bool, stop: threading.Event | None = None
) -> Iterator[Markup]:
    """The line to show, as the upload goes on; setting `stop`, or closing the iterator, ends the upload.

    Raises:
        UnknownName: no run that the visitor may see.
        MaquetteError: it has no model, a field is wrong, or the hub refused.
        Cancelled: `stop` was set.
    """
    entry = desk.entry(desk.run(run_id, owner).id, owner)
    files = bundle.contents(report.folder(entry), report.card(entry, desk.baseline(entry.run.recipe, owner)))
    stop = stop or threading.Event()
    try:
        scratch = scratch_of(desk.store.home)
        for kind, data in push(
            files, str(repo).strip(), str(token).strip(), private=private, stop=stop, scratch=scratch
        ):
            yield _line(kind, data)
    finally:
        stop.set()


def _line(kind: str, data: dict[str, JsonValue]) -> Markup:
    if kind == "done":
        url = str(data["url"])
        shown = markup.link(url, url) if url.startswith(("https://", "http://")) else url
        return markup.tag("p", say("push.done"), " ", shown, class_="mq-notice good", role="status")
    if kind == "creating":
        return markup.notice(say("push.creating"))
    size, seconds = float(str(data["bytes"])), float(str(data["seconds"]))
    return markup.notice(
        say("push.uploading", size=wording.size(size), files=data["files"], span=wording.duration(max(1.0, seconds)))
    )
