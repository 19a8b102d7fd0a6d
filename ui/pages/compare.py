"""Compare: what a small model gained and lost, beside the original. The landing page.

A first visitor sees the stored comparison at once; then the same two recipes run on this machine and the
numbers change. Texts stream from two worker processes through one generator that merges them.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import gradio as gr
from gradio.blocks import Block
from markupsafe import Markup

from engine.errors import BadParams, InputError, TooMany
from engine.records import Run, Status
from ui import charts, markup, panes, views, wording
from ui.desk import BASELINE, FIRST, STORED, Desk, Entry
from ui.edge import edge, has_cookie, visitor
from ui.messages import translate
from ui.panes import Pane, Panes
from ui.turns import Turns
from ui.wiring import on
from ui.wording import say

PROMPT_LIMIT = 2000
COSTS = ("size.bytes", "latency.tpot", "memory.peak")
CLICKED = "(...values) => [...values.slice(0, -1), Date.now()]"  # the last input becomes the time of the click
QUALITIES = ("perplexity", "accuracy", "kl")


@dataclass(frozen=True)
class ComparePage:
    """The components that others on the page reach for."""

    a: gr.Dropdown
    b: gr.Dropdown
    banner: gr.HTML
    timer: gr.Timer
    prompt: gr.Textbox
    cost: gr.Radio
    quality: gr.Radio
    pair: list[Block]


def build(desk: Desk) -> ComparePage:
    """Lay the tab out and wire it."""
    banner = gr.HTML(elem_id="mq-banner")
    with gr.Row(equal_height=True):
        a = gr.Dropdown([], label=say("compare.a"), min_width=240)
        b = gr.Dropdown([], label=say("compare.b"), min_width=240)
    summary = gr.HTML(elem_id="mq-summary")
    with gr.Column(elem_classes="mq-block"):
        gr.HTML(markup.heading(say("panes.title"), say("panes.about")))
        with gr.Row(equal_height=True):
            prompt = gr.Textbox(
                label=say("prompt"), lines=1, max_lines=4, max_length=PROMPT_LIMIT, scale=4, min_width=260,
                elem_id="mq-prompt",
            )  # fmt: skip
            modes = [(say("mode.same"), "same"), (say("mode.free"), "free"), (say("mode.blind"), "blind")]
            mode = gr.Radio(modes, value="same", label=say("mode"), scale=3, min_width=260)
        with gr.Row():
            start = gr.Button(say("panes.run"), variant="primary", elem_id="mq-run-both", scale=2, min_width=140)
            stop = gr.Button(say("panes.stop"), elem_id="mq-stop", scale=1, min_width=100)
            with gr.Column(scale=6, min_width=280):
                gr.HTML(_legend())
        output = panes.token_panes()
        ballot = gr.State(None)
        with gr.Row(visible=False) as voting:
            left, tie, right = (gr.Button(say(f"vote.{name}"), size="sm") for name in ("left", "tie", "right"))
        reveal = gr.HTML()
    with gr.Column(elem_classes="mq-block"):
        gr.HTML(markup.heading(say("charts.title"), say("charts.about")))
        with gr.Row():
            cost = gr.Radio(
                [(wording.name(k), k) for k in COSTS], value=COSTS[0], label=say("axis.cost"), min_width=240
            )
            quality = gr.Radio(
                [(wording.name(k), k) for k in QUALITIES], value=QUALITIES[0], label=say("axis.quality"), min_width=240
            )
        front = gr.Plot(show_label=False, elem_id="mq-front")
        with gr.Row():
            with gr.Column(min_width=320):
                accuracy = gr.Plot(show_label=False)
                memory = gr.Plot(show_label=False)
            with gr.Column(min_width=320):
                latency = gr.Plot(show_label=False)
                numbers = gr.HTML(elem_id="mq-numbers")
    timer = gr.Timer(1.5, active=True)
    clicked = gr.Number(0, visible=False)
    turns = Turns()

    pair: list[Block] = [summary, output, front, accuracy, latency, memory, numbers]
    shown: list[Block] = [*pair, reveal, voting, ballot]
    chosen = [a, b, prompt, mode, cost, quality]

    @edge
    def show(a: str, b: str, prompt: str, mode: str, cost: str, quality: str, request: gr.Request) -> object:
        return [*render(desk, visitor(request), a, b, prompt, mode, cost, quality), "", gr.update(visible=False), None]

    @edge
    def redraw(cost: str, quality: str, request: gr.Request) -> object:
        return _front(desk, visitor(request), cost, quality).figure

    @edge
    def tick(a: str, b: str, prompt: str, mode: str, cost: str, quality: str, request: gr.Request) -> object:
        owner = visitor(request)
        first = first_runs(desk, owner)
        live = [run for run in first if run.status is Status.SUCCEEDED]
        if len(live) == 2 and all(not key or str(key).startswith(STORED) for key in (a, b)):
            left, right = live
            views_ = render(desk, owner, left.id, right.id, prompt, mode, cost, quality)
            names = choices(desk, owner)
            picked = (gr.update(choices=names, value=left.id), gr.update(choices=names, value=right.id))
            return [gr.update(active=False), banner_for(first), *picked, *views_]
        working = any(not run.status.final for run in first)
        return [gr.skip() if working else gr.update(active=False), banner_for(first), *[gr.skip()] * (2 + len(pair))]

    @edge
    def run_both(
        a: str, b: str, prompt: str, mode: str, clicked: float, request: gr.Request
    ) -> Iterator[object]:  # fmt: skip
        owner = desk.enter(request, "stream")
        page = request.session_hash or owner
        turn = turns.begin(page, clicked, owner)
        try:
            for values in stream(desk, owner, a, b, prompt, mode, turn.stop):
                if turn.replaced:
                    return
                yield values
        finally:
            turns.end(page, turn)

    @edge
    def stop_both(clicked: float, request: gr.Request) -> None:
        turns.stop(request.session_hash or visitor(request), clicked)

    @edge
    def vote(ballot: dict[str, str] | None, choice: str, request: gr.Request) -> object:
        return [reveal_vote(desk, visitor(request), ballot, choice), gr.update(visible=False), None]

    on([a.input, b.input, mode.input], show, chosen, shown)
    on([cost.input, quality.input], redraw, [cost, quality], [front])
    on([timer.tick], tick, chosen, [timer, banner, a, b, *pair], queue=False)
    writing = [output, voting, ballot, reveal]
    on([start.click, prompt.submit], run_both, [a, b, prompt, mode, clicked], writing, concurrency_limit=4, js=CLICKED,
       trigger_mode="multiple")  # fmt: skip
    on([stop.click], stop_both, [clicked], queue=False, js=CLICKED)
    for button, choice in ((left, "left"), (tie, "tie"), (right, "right")):
        on([button.click], vote, [ballot, gr.State(choice)], [reveal, voting, ballot])
    return ComparePage(a, b, banner, timer, prompt, cost, quality, pair)


def render(desk: Desk, owner: str, a: str, b: str, prompt: str, mode: str, cost: str, quality: str) -> list[object]:
    """What the two picked entries show: summary, panes, four figures and their numbers, in this order."""
    if not a or not b:
        return [Markup(say("compare.nothing")), None, None, None, None, None, ""]
    left, right = desk.entry(a, owner), desk.entry(b, owner)
    machine = desk.stored.machine if desk.stored else ""
    named = [
        (f"A · {wording.title(left.run.recipe)}", left.measured),
        (f"B · {wording.title(right.run.recipe)}", right.measured),
    ]
    drawn = [_front(desk, owner, cost, quality), charts.accuracy(named), charts.latency(named), charts.memory(named)]
    output = fixed(left, right, prompt, mode)
    tables = markup.join(chart.table() for chart in drawn)
    return [
        views.comparison(left, right, machine), gr.skip() if output is None else output.value(),
        *(chart.figure for chart in drawn), tables,
    ]  # fmt: skip


def fixed(left: Entry, right: Entry, prompt: str, mode: str) -> Panes | None:
    """The texts that both wrote after a fixed prompt: the visitor's where it is one of them, else the first."""
    known = panes.prompts(left.outputs or right.outputs)
    if not known or mode == "blind":
        return None
    wanted = prompt if prompt in known else known[0]
    a, b = (next((o for o in entry.outputs if o.prompt == wanted), None) for entry in (left, right))
    return panes.stored(
        f"A · {wording.title(left.run.recipe)}", f"B · {wording.title(right.run.recipe)}", a, b, mode == "same",
        secrets.token_hex(4),
    )  # fmt: skip


def stream(
    desk: Desk, owner: str, a: str, b: str, prompt: str, mode: str, stop: threading.Event | None = None
) -> Iterator[object]:
    """Both models' texts as they write, until `stop` is set; at the end of a blind round the ballot."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise BadParams(say("error.empty_prompt"))
    if len(prompt) > PROMPT_LIMIT:
        raise BadParams(say("error.long_prompt", count=len(prompt), limit=PROMPT_LIMIT))
    entries = [desk.entry(a, owner), desk.entry(b, owner)]
    blind = mode == "blind"
    if blind and secrets.randbelow(2):
        entries.reverse()
    titles = [say("blind.left"), say("blind.right")]
    if not blind:
        titles = [f"{side} · {wording.title(entry.run.recipe)}" for side, entry in zip("AB", entries, strict=True)]
    sources = [desk.source(entry, owner) for entry in entries]
    shown = Panes(secrets.token_hex(4), [Pane(title, state="loading") for title in titles], mode == "same", blind)
    events = desk.scheduler.stream(sources, prompt, same_text=mode == "same", stop=stop)
    try:
        for value in panes.follow(shown, events):
            yield [value, gr.skip(), gr.skip(), ""]
    finally:
        close = getattr(events, "close", None)
        if close is not None:
            close()
    if blind and all(pane.tokens for pane in shown.panes):
        ballot = {"left": entries[0].key, "right": entries[1].key, "prompt": prompt}
        yield [gr.skip(), gr.update(visible=True), ballot, say("vote.ask")]


def reveal_vote(desk: Desk, owner: str, ballot: dict[str, str] | None, choice: str) -> Markup:
    """Keep a vote and tell which was which."""
    if not ballot or choice not in ("left", "right", "tie"):
        raise InputError(say("error.no_ballot"))
    left, right = desk.entry(ballot["left"], owner), desk.entry(ballot["right"], owner)
    winner = "tie" if choice == "tie" else ballot[choice]
    desk.store.add_vote(owner, left.key, right.key, ballot["prompt"], winner)
    first, second = wording.title(left.run.recipe), wording.title(right.run.recipe)
    text = say("vote.reveal", left=first, right=second)
    mine = [v for v in desk.store.votes() if v.owner == owner and {v.run_a, v.run_b} == {left.key, right.key}]
    counts = {key: sum(vote.winner == key for vote in mine) for key in (left.key, right.key, "tie")}
    tally = say(
        "vote.tally", left=first, left_count=counts[left.key], right=second, right_count=counts[right.key],
        ties=counts["tie"],
    )  # fmt: skip
    return markup.join((markup.notice(text, "good"), markup.tag("p", tally, class_="mq-sub")))


def first_runs(desk: Desk, owner: str) -> list[Run]:
    """The visitor's newest runs of the two recipes of the first comparison: original, then 4-bit GPTQ."""
    mine = desk.runs(owner)
    found = []
    for recipe in (BASELINE, FIRST):
        same = [r for r in mine if r.recipe.model == recipe.model and r.recipe.steps == recipe.steps]
        found += [r for r in same if r.status is Status.SUCCEEDED][:1] or same[:1]
    return found


def start_first(desk: Desk, request: gr.Request) -> list[Run]:
    """On a first visit to an idle engine, start the first comparison; nothing for one who keeps no cookie."""
    owner = visitor(request)
    status = desk.scheduler.status()
    if not has_cookie(request) or desk.runs(owner) or status.get("running") or status.get("queued"):
        return []
    try:
        desk.enter(request, "start")
    except TooMany:
        return []
    return [desk.scheduler.submit(BASELINE, owner), desk.scheduler.submit(FIRST, owner)]


def choices(desk: Desk, owner: str) -> list[tuple[str, str]]:
    """The pickers' choices."""
    return [(entry.label, entry.key) for entry in desk.entries(owner)]


def default_pair(desk: Desk, owner: str) -> tuple[str | None, str | None]:
    """What a visitor sees first: the newest finished run beside its original, else the stored comparison."""
    entries = desk.entries(owner)
    for entry in entries:
        if entry.run.recipe.steps and not entry.stored:
            baseline = desk.baseline(entry.run.recipe, owner)
            if baseline is not None:
                return baseline.key, entry.key
    stored = desk.stored_entries()
    if len(stored) > 1:
        return stored[0].key, stored[1].key
    first = entries[0].key if entries else None
    return first, first


def banner_for(first: list[Run]) -> Markup:
    """How far the live comparison is."""
    if not first or all(run.status is Status.SUCCEEDED for run in first):
        return Markup("")
    bad = [run for run in first if run.status.final and run.status is not Status.SUCCEEDED]
    if bad:
        return markup.notice(
            say("first.failed", title=wording.title(bad[0].recipe), reason=translate(bad[0].reason)), "warn"
        )
    done = sum(run.status is Status.SUCCEEDED for run in first)
    return markup.notice(say("first.working", done=done, total=len(first)))


def _front(desk: Desk, owner: str, cost: str, quality: str) -> charts.Chart:
    if cost not in COSTS or quality not in QUALITIES:
        raise BadParams(say("error.axis"))
    entries = desk.entries(owner)
    own = [entry for entry in entries if not entry.stored]
    shown = own if len(own) > 1 else entries
    return charts.pareto([(wording.run_name(entry.run), entry.measured) for entry in shown[:40]], cost, quality)


def _legend() -> Markup:
    parts = [markup.tag("span", say(f"kl.{level}"), class_=f"tok kl{level}") for level in (1, 2, 3)]
    return markup.tag("p", say("kl.legend"), " ", *(markup.join((part, " ")) for part in parts), class_="mq-sub legend")
