"""Runs: everything the visitor has started, live while it works, to take away when it is done.

Runs live in the store, not in the web session: a reload finds them again. A tick only asks whether there is news, which
takes a fraction of what showing it takes: for Gradio makes a new component of each that is left as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import gradio as gr
from gradio.blocks import Block
from markupsafe import Markup

from engine import rescue
from engine.errors import BadParams
from engine.records import Run, Status
from ui import comparing, hosting, markup, views, wording
from ui.desk import Desk
from ui.edge import edge, visitor
from ui.journal import Journal
from ui.pages import exports, models, push, scaling
from ui.wiring import on, signal
from ui.wording import say

SELECT = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-run]");
  if (button) trigger("select", {run: button.dataset.run});
});
"""
# Where the focus goes, so that a screen reader tells what was asked: to the mild answer, which the question describes.
ASKED = """() => {
  const look = (tries) => {
    const keep = document.querySelector("#mq-keep");
    if (!keep?.offsetParent) return tries && setTimeout(look, 30, tries - 1);
    keep.setAttribute("aria-describedby", "mq-sure");
    keep.focus();
  };
  look(40);
}"""
KEPT = """() => { document.querySelector("#mq-delete").focus(); return []; }"""
DELETED = """() => document.querySelector("#mq-runs [tabindex]")?.focus()"""
PICKS = 6
SLOWER = 0.1  # times the learning rate, after a training that diverged
Shown = tuple[str, str, str]  # hash of the table, of the detail, and the state of the buttons


@dataclass(frozen=True)
class RunsPage:
    """The components that others on the page reach for."""

    picked: gr.State
    last: gr.State
    timer: gr.Timer
    tick: Callable[..., object]
    inputs: list[Block]
    outputs: list[Block]
    compare: gr.Button
    picks: gr.Dropdown
    journal: Journal


def build(desk: Desk, journal: Journal, token: gr.Textbox) -> RunsPage:
    """Lay the tab out and wire it. `token`: where the visitor may have left the hub's, for a run that is resumed."""
    picked, last, known, results = gr.State(""), gr.State(("", "", "")), signal(), signal()
    doomed = gr.State("")  # the run that the visitor was asked about before it is deleted
    with gr.Row(equal_height=True):
        with gr.Column(min_width=280):
            gr.HTML(markup.heading(say("runs.title"), say("runs.about")))
        needle = gr.Textbox(label=say("runs.filter"), max_lines=1, max_length=100, min_width=200, elem_id="mq-filter")
    # A click on a title is a `select` event that carries the run's id.
    table = gr.HTML(js_on_load=SELECT, elem_id="mq-runs")
    with gr.Row(elem_id="mq-actions"):
        compare = gr.Button(say("runs.compare"), variant="primary", interactive=False, size="md", min_width=110)
        cancel = gr.Button(
            say("runs.cancel"), variant="stop", interactive=False, elem_id="mq-cancel", size="md", min_width=110
        )
        resume = gr.Button(say("runs.resume"), interactive=False, size="md", min_width=110)
        slower = gr.Button(say("runs.slower"), visible=False, size="md", min_width=110, elem_id="mq-slower")
        finish = gr.Button("", visible=False, size="md", min_width=110, elem_id="mq-finish")
        delete = gr.Button(say("runs.delete"), interactive=False, size="md", min_width=110, elem_id="mq-delete")
        sure = gr.Button("", variant="stop", visible=False, size="md", min_width=110, elem_id="mq-sure")
        keep = gr.Button(say("runs.keep"), visible=False, size="md", min_width=110, elem_id="mq-keep")
        share = gr.Button(
            say("share.start"), interactive=False, size="md", min_width=110, visible=not desk.local,
            elem_id="mq-share",
        )  # fmt: skip
    detail = gr.HTML(elem_id="mq-detail")
    offers = exports.build(desk, picked, last, shown)
    with gr.Column(elem_classes="mq-block"):
        gr.HTML(markup.heading(say("diff.title"), say("diff.about")))
        picks = gr.Dropdown([], multiselect=True, max_choices=PICKS, label=say("diff.runs"), elem_id="mq-picks")
        difference = gr.HTML()
    push.build(desk, picked, last, shown)
    scaling.build(desk, [last.change, results.change])
    timer = gr.Timer(1.5, active=False)
    buttons = [compare, cancel, resume, delete, share, slower, finish]
    outputs: list[Block] = [table, detail, last, *buttons, *offers]
    inputs: list[Block] = [picked, needle, last]

    def look(owner: str, run_id: str, needle: str, last: Shown) -> list[object]:
        return refresh(desk, journal, owner, run_id, needle, last)

    @edge
    def tick(run_id: str, needle: str, last: Shown, request: gr.Request) -> object:
        return look(visitor(request), run_id, needle, last)

    @edge
    def ask(run_id: str, needle: str, request: gr.Request) -> object:
        return news(desk, journal, visitor(request), run_id, needle)

    @edge
    def select(needle: str, last: Shown, request: gr.Request, event: gr.EventData) -> object:
        run_id = str(getattr(event, "run", ""))
        return [run_id, *look(visitor(request), desk.run(run_id, visitor(request)).id, needle, last)]

    def act(name: str) -> Callable[..., object]:
        @edge
        def handler(run_id: str, needle: str, last: Shown, token: str, request: gr.Request) -> object:
            owner = desk.enter(request, "start") if name == "resume" else visitor(request)
            run = desk.own(run_id if name == "delete" else shown(run_id, last), owner)
            if name == "resume":
                desk.scheduler.resume(run.id, owner=run.owner, token=models.clean(token))
            else:
                getattr(desk.scheduler, name)(run.id, owner=run.owner)
            return [run.id if name != "delete" else "", *look(owner, run.id if name != "delete" else "", needle, last)]

        return handler

    def go_on(factor: float) -> Callable[..., object]:
        @edge
        def rescued(run_id: str, needle: str, last: Shown, token: str, request: gr.Request) -> object:
            owner = desk.enter(request, "start")
            run = desk.own(shown(run_id, last), owner)
            desk.scheduler.resume(run.id, owner=run.owner, token=models.clean(token), factor=factor)
            return [run.id, *look(owner, run.id, needle, last)]

        return rescued

    @edge
    def doubt(run_id: str, last: Shown, request: gr.Request) -> object:
        run = desk.own(shown(run_id, last), visitor(request))
        return [
            run.id,
            gr.update(value=say("runs.sure", run=wording.title(run.recipe)), visible=True),
            gr.update(visible=True),
        ]

    @edge
    def settle() -> object:
        return [gr.update(visible=False)] * 2

    @edge
    def toggle(run_id: str, needle: str, last: Shown, request: gr.Request) -> object:
        owner = visitor(request)
        run = desk.run(shown(run_id, last), owner)
        desk.share(run, owner, not run.shared, desk.hub(request))
        return [run.id, *look(owner, run.id, needle, last)]

    @edge
    def count_results(request: gr.Request) -> object:
        return comparing.offered(desk, visitor(request))

    @edge
    def list_results(request: gr.Request) -> object:
        return gr.update(choices=comparing.choices(desk, visitor(request)))

    @edge
    def differ(keys: list[str], request: gr.Request) -> object:
        if not isinstance(keys, list) or len(keys) > PICKS:
            raise BadParams(say("error.picks", limit=PICKS))
        return views.differences([desk.entry(key, visitor(request)) for key in keys])

    on([timer.tick], ask, [picked, needle], [known], queue=False)
    on([known.change, needle.change], tick, inputs, outputs, queue=False)
    on([known.change], count_results, [], [results], queue=False)
    on([results.change], list_results, [], [picks])
    on([table.select], select, [needle, last], [picked, *outputs])
    on([delete.click], doubt, [picked, last], [doomed, sure, keep]).success(None, js=ASKED)
    on([keep.click], settle, [], [sure, keep], js=KEPT)
    on([sure.click, table.select], settle, [], [sure, keep])
    for button, name in ((cancel, "cancel"), (resume, "resume")):
        on([button.click], act(name), [picked, needle, last, token], [picked, *outputs])
    for button, factor in ((slower, SLOWER), (finish, 0.0)):
        on([button.click], go_on(factor), [picked, needle, last, token], [picked, *outputs])
    gone = on([sure.click], act("delete"), [doomed, needle, last, token], [picked, *outputs])
    gone.success(None, js=DELETED)
    on([share.click], toggle, inputs, [picked, *outputs])
    on([picks.input], differ, [picks], [difference])
    return RunsPage(picked, last, timer, tick, inputs, outputs, compare, picks, journal)


def news(desk: Desk, journal: Journal, owner: str, run_id: str, needle: str) -> str:
    """Another text whenever `refresh` may have other things to show."""
    runs = desk.runs(owner)
    run = _picked(desk, runs, owner, run_id)
    clock = 1 if any(each.status is Status.RUNNING for each in runs) else 60  # seconds; what is past is told in minutes
    states = [(each.id, each.attempt, each.status, each.shared, each.expired) for each in runs]
    seen = (journal.story(run).seen, *exports.ready(run)) if run else ()
    return str(hash((run_id, str(needle), seen, time.time() // clock, *states)))


def _picked(desk: Desk, runs: list[Run], owner: str, run_id: str) -> Run | None:
    """The run that is shown: the one that was chosen, in the list or by a link, else the newest."""
    if not run_id:
        return runs[0] if runs else None
    listed = next((run for run in runs if run.id == run_id), None)
    return listed or (desk.find(run_id, owner) if run_id in desk.opened.of(owner) else None)


def open_link(desk: Desk, owner: str, run_id: str) -> str:
    """The id of the run that an address names, to be picked.

    Raises:
        UnknownName: there is none that the visitor may see.
    """
    run = desk.run(run_id, owner)
    desk.open_link([run.id], owner)
    return run.id


def shown(run_id: str, last: Shown) -> str:
    """The run whose page stands there: the one that was chosen, else the newest of when it was painted."""
    return run_id or str(last[2]).partition(" ")[0]


def refresh(desk: Desk, journal: Journal, owner: str, run_id: str, needle: str, last: Shown) -> list[object]:
    """Table, detail, what is shown now, seven buttons, other formats; what has not changed is left as it is."""
    runs = desk.runs(owner)
    run = _picked(desk, runs, owner, run_id)
    marks = hosting.marks(runs, owner)
    table = views.runs_table(runs, run.id if run else "", str(needle or "")[:100], time.time(), marks)
    detail = describe(desk, journal, owner, run) if run else Markup("")
    state = f"{run.id} {run.status.value} {run.shared} {run.attempt} {run.expired}" if run else ""
    now: Shown = (str(hash(table)), str(hash(detail)), state)
    before = tuple(last) if isinstance(last, list | tuple) and len(last) == 3 else ("", "", "")
    changed = [gr.skip() if now[i] == before[i] else part for i, part in enumerate((table, detail))]
    if now[2] == before[2]:
        return [*changed, now, *[gr.skip()] * 9]
    mine = run if run is not None and desk.owns(run, owner) else None
    return [*changed, now, *buttons_for(desk, owner, run), *exports.offer(mine)]


def buttons_for(desk: Desk, owner: str, run: Run | None) -> list[object]:
    """Compare, cancel, resume, delete, share, slower, finish: which make sense for this run, and are this visitor's."""
    status = run.status if run else None
    mine = run is not None and desk.owns(run, owner)
    able = (
        status is Status.SUCCEEDED,
        mine and status in (Status.QUEUED, Status.RUNNING),
        mine and status in (Status.INTERRUPTED, Status.FAILED),
        mine and status is not None and status.final,
    )
    label = say("share.stop" if run is not None and run.shared else "share.start")
    usual = [*(gr.update(interactive=each) for each in able), gr.update(interactive=mine, value=label)]
    return [*usual, *rescues(desk, run if mine else None)]


def rescues(desk: Desk, run: Run | None) -> list[object]:
    """Slower and finish: shown where a training diverged and left a checkpoint from which that can be."""
    found = desk.store.divergences(run.id) if run else []
    if run is None or (left := rescue.left(run, found)) is None:
        return [gr.update(visible=False)] * 2
    return [
        gr.update(visible=True),
        gr.update(value=say("runs.finish", step=left.kept), visible=rescue.may_end(run, found)),
    ]


def describe(desk: Desk, journal: Journal, owner: str, run: Run) -> Markup:
    """One run's page."""
    entry = desk.entry(run.id, owner)
    progress = None
    if run.status is Status.RUNNING:
        status = desk.now().status
        found = status.get("progress")
        progress = found if status.get("running") == run.id and isinstance(found, dict) else None
    baseline = desk.baseline(run.recipe, owner)
    note = hosting.run_note(run, desk.limits, desk.owns(run, owner), time.time())
    story, series, formats = journal.story(run), journal.series(run), exports.ready(run)
    shown = views.run_detail(run, story, series, progress, entry, baseline, formats)
    return markup.join((note, shown))
