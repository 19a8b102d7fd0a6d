"""The page: an always visible strip and four tabs, wired to the store and the scheduler.

Handlers return in milliseconds: they read the store or put a run into the queue. Timers update the same
few components; nothing is created on a tick, and a timer rests while its tab is not looked at.
"""

from __future__ import annotations

import secrets

import gradio as gr
from gradio.blocks import Block

from engine.modes import Mode
from engine.scheduler import Scheduler
from engine.store import Store
from ui import comparing, hosting, links, markup, translated, views, wording
from ui.asked import read_link
from ui.desk import Desk, read_stored
from ui.edge import edge, tell, visitor
from ui.journal import Journal
from ui.pages import compare, compress, methods, models, runs
from ui.theme import ASSETS
from ui.translated import Page
from ui.wiring import on, signal
from ui.wording import say


def build(store: Store, scheduler: Scheduler, *, mode: Mode = Mode.LOCAL) -> tuple[gr.Blocks, Desk]:
    """The page and the desk behind it, for those whom the mode serves."""
    desk = Desk(store, scheduler, read_stored(ASSETS / "demo" / "comparison.json"), mode)
    journal = Journal(store)
    page = translated.in_each(lambda: lay_out(desk, journal))
    return page, desk


def lay_out(desk: Desk, journal: Journal) -> Page:
    """The page in the language that is spoken now."""
    page = Page(title="Maquette", analytics_enabled=False, delete_cache=(600, 3600))
    with page:
        gr.HTML(views.masthead())
        if limits := getattr(desk.scheduler, "call_limits", None):
            text = say("zero.about", span=wording.duration(limits[0]), size=wording.size(limits[1]))
            gr.HTML(markup.notice(text))
        who = gr.HTML(elem_id="mq-who", visible=desk.mode is Mode.TEAM)
        with gr.Row(elem_id="mq-top"):
            with gr.Column(min_width=300):
                strip = gr.HTML(elem_id="mq-status")
            cancel = gr.Button(
                say("runs.cancel"),
                variant="stop",
                size="sm",
                scale=0,
                min_width=90,
                visible=False,
                elem_id="mq-cancel-now",
            )
        with gr.Tabs(elem_id="mq-tabs") as tabs:
            with gr.Tab(say("tab.compare"), id="compare") as compare_tab:
                compared = compare.build(desk)
            with gr.Tab(say("tab.compress"), id="compress") as compress_tab:
                making = compress.build(desk, compress_tab.select)
            with gr.Tab(say("tab.runs"), id="runs") as runs_tab:
                running = runs.build(desk, journal, making.token)
            with gr.Tab(say("tab.methods"), id="methods"):
                methods.build()
        ticker = gr.Timer(2.0)
        _wire_strip(desk, page, strip, cancel, ticker)
        _wire_load(desk, page, tabs, compared, making, running)
        _wire_between(desk, tabs, compared, making, running)
        _wire_tabs(desk, compare_tab, runs_tab, compared, running)

        @edge
        def greet(request: gr.Request) -> object:
            return hosting.who(visitor(request))

        if desk.mode is Mode.TEAM:
            on([page.load], greet, [], [who], queue=False)
    return page


def _wire_strip(desk: Desk, page: gr.Blocks, strip: gr.HTML, cancel: gr.Button, ticker: gr.Timer) -> None:
    own = signal()  # the run that works, where this visitor may cancel it

    @edge
    def look(request: gr.Request) -> object:
        now, owner = desk.now(), visitor(request)
        mine = desk.find(now.status.get("running"), owner)
        return [views.strip(now.status, now.history, mine), mine.id if mine and desk.owns(mine, owner) else ""]

    @edge
    def offer(run_id: str) -> object:
        return gr.update(visible=bool(run_id))

    @edge
    def stop(run_id: str, request: gr.Request) -> object:
        mine = desk.find(run_id, visitor(request))  # the one that was shown: by now another may work
        if mine is not None and desk.owns(mine, visitor(request)):
            desk.scheduler.cancel(mine.id, owner=mine.owner)
        return gr.update(visible=False)

    on([page.load, ticker.tick], look, [], [strip, own], queue=False)
    on([own.change], offer, [own], [cancel], queue=False)
    on([cancel.click], stop, [own], [cancel])


def _wire_load(
    desk: Desk, page: gr.Blocks, tabs: gr.Tabs, compared: compare.ComparePage, making: compress.CompressPage,
    running: runs.RunsPage,
) -> None:  # fmt: skip
    # Whether it is to show what it was not laid out with: a comparison, a recipe, another tab or a certain run.
    own, linked, turned = signal(), signal(), signal()

    @edge
    def arrive(request: gr.Request) -> object:
        owner, query = visitor(request), set(request.query_params)
        first = comparing.first_runs(desk, owner) or comparing.start_first(desk, request)
        working = any(not run.status.final for run in first)
        shows = secrets.token_hex(4) if "compare" in query or comparing.offered(desk, owner) else ""
        reads = secrets.token_hex(4) if "recipe" in query else ""
        turns = secrets.token_hex(4) if query & {"tab", "run", "recipe"} else ""
        return [shows, reads, turns, comparing.banner_for(first), gr.update(active=working)]

    @edge
    def fill(request: gr.Request) -> object:
        owner, query = visitor(request), dict(request.query_params)
        asked, known = compare.usual(desk, owner), compared.first.writing if compared.first else None
        try:
            if "compare" in query:
                wanted = read_link(query)
                desk.open_link(wanted.compare, owner)  # refuses what the visitor may not see
                asked, known = wanted, None
        except Exception as error:
            tell(error)
        drawn = comparing.render(desk, owner, asked, comparing.COSTS[0], comparing.QUALITIES[0])
        return [*([gr.skip()] * len(both) if asked is None else compare.fill(desk, owner, asked, known)), *drawn]

    @edge
    def read(request: gr.Request) -> object:
        recipe = compress.recipe_from_link(desk, dict(request.query_params).get("recipe", ""))
        return [compress.as_draft(recipe), 1, models.written(recipe.model)]

    @edge
    def turn(request: gr.Request) -> object:
        query, picked = dict(request.query_params), ""
        tab = links.tab_of(query)
        try:
            if "run" in query:
                picked = runs.open_link(desk, visitor(request), query["run"])
        except Exception as error:
            tell(error)
        return [gr.Tabs(selected=tab) if tab else gr.skip(), picked]

    both = [*compared.fields, *compared.size]
    on([page.load], arrive, [], [own, linked, turned, compared.banner, compared.timer], queue=False)
    on([own.change], fill, [], [*both, *compared.shown])
    on([linked.change], read, [], [making.draft, making.shape, making.source])
    on([turned.change], turn, [], [tabs, running.picked])


def _wire_between(
    desk: Desk, tabs: gr.Tabs, compared: compare.ComparePage, making: compress.CompressPage, running: runs.RunsPage
) -> None:
    """What begins on one tab and shows on another: Start opens the run, Compare opens the comparison."""

    @edge
    def start(draft: compress.Draft, original: bool, token: str, request: gr.Request) -> object:
        run_id = compress.submit(desk, draft, original is True, request, token)
        return [gr.Tabs(selected="runs"), run_id, gr.update(active=True)]

    @edge
    def compare_it(run_id: str, last: runs.Shown, cost: str, quality: str, request: gr.Request) -> object:
        owner = visitor(request)
        newest = next((run.id for run in desk.runs(owner)), "")  # for a page that has painted nothing yet
        run = desk.run(runs.shown(run_id, last) or newest, owner)
        baseline = desk.baseline(run.recipe, owner)
        asked = comparing.pair_of(baseline or desk.entry(run.id, owner), desk.entry(run.id, owner))
        drawn = comparing.render(desk, owner, asked, cost, quality)
        return [gr.Tabs(selected="compare"), *compare.fill(desk, owner, asked), *drawn]

    @edge
    def look(draft: compress.Draft, token: str, request: gr.Request) -> object:
        return [gr.Tabs(selected="runs"), compress.submit_look(desk, draft, request, token), gr.update(active=True)]

    opened: list[Block] = [tabs, running.picked, running.timer]
    for begun in (
        on([making.start.click], start, [making.draft, making.original, making.token], opened),
        on([making.look.click], look, [making.draft, making.token], opened),
    ):
        begun.then(running.tick, running.inputs, running.outputs, show_progress="hidden", api_visibility="private")
    chosen = [running.picked, running.last, compared.cost, compared.quality]
    shown = [tabs, *compared.fields, *compared.size, *compared.shown]
    on([running.compare.click], compare_it, chosen, shown)


def _wire_tabs(
    desk: Desk, compare_tab: gr.Tab, runs_tab: gr.Tab, compared: compare.ComparePage, running: runs.RunsPage
) -> None:
    @edge
    def open_runs(run_id: str, needle: str, request: gr.Request) -> object:
        owner = visitor(request)
        shown = runs.refresh(desk, running.journal, owner, run_id, needle, ("", "", ""))
        return [gr.update(active=True), gr.update(choices=comparing.choices(desk, owner)), *shown]

    known = signal()  # what the pickers offer: where nothing is new, nothing is sent

    @edge
    def open_compare(request: gr.Request) -> object:
        return [gr.update(active=False), comparing.offered(desk, visitor(request))]

    @edge
    def offer(request: gr.Request) -> object:
        names = comparing.choices(desk, visitor(request))
        return [gr.update(choices=names) for _ in compared.pickers]

    on([runs_tab.select], open_runs, running.inputs[:2], [running.timer, running.picks, *running.outputs])
    on([compare_tab.select], open_compare, [], [running.timer, known], queue=False)
    on([known.change], offer, [], compared.pickers)
