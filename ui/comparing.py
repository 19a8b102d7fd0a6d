"""What the Compare tab shows and does, without its components: entries in, markup, figures and texts out."""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import gradio as gr
import plotly.graph_objects as go
from markupsafe import Markup

from engine.errors import BadParams, MaquetteError
from engine.hub import Hub
from engine.records import Output, Run, Status
from ui import cards, charts, contrast, links, markup, panes, wording
from ui.asked import Asked, Writing, check_prompt
from ui.charts import Chart
from ui.desk import BASELINE, FIRST, Desk, Entry
from ui.edge import has_cookie, visitor
from ui.messages import translate
from ui.panes import Pane, Panes
from ui.shelf import Written, WrittenPane
from ui.wording import say

log = logging.getLogger(__name__)

SIZE = "size.bytes"
COSTS = (SIZE, "latency.tpot", "memory.peak")
QUALITIES = ("perplexity", "accuracy", "kl")
SHOWN = 10  # values that `render` gives
DICE = secrets.SystemRandom()


def render(desk: Desk, owner: str, asked: Asked | None, cost: str, quality: str) -> list[object]:
    """What the picked entries show: summary, panes, words that differ, five figures, their numbers, links."""
    if asked is None:
        return [Markup(say("compare.nothing")), None, "", None, None, None, None, None, "", ""]
    entries = [desk.entry(key, owner) for key in asked.compare]
    output = unwritten() if asked.writing.mode == "blind" else texts(desk, owner, asked, entries)
    return _paint(desk, asked, entries, front(desk.entries(owner), cost, quality), output)


def first_view(desk: Desk) -> tuple[Asked | None, list[object]]:
    """What the page holds when it is built, for all who have nothing of their own: the stored comparison."""
    entries = desk.stored_entries()
    if len(entries) < 2:
        return None, render(desk, "", None, COSTS[0], QUALITIES[0])
    asked, pair = pair_of(*entries[:2]), entries[:2]
    output = panes.stored(cards.named(pair), fixed(pair, asked.writing), True, secrets.token_hex(4))
    return asked, _paint(desk, asked, pair, front(entries, COSTS[0], QUALITIES[0]), output)


def _paint(desk: Desk, asked: Asked, entries: Sequence[Entry], pareto: Chart, output: Panes) -> list[object]:
    machine = desk.stored.machine if desk.stored else ""
    drawn = [pareto, *drawings(entries)]
    figures = [front_figure(pareto), *(chart.figure for chart in drawn[1:])]
    return [
        cards.comparison(entries, machine), output.value(), differing(output), *figures,
        markup.join(chart.table() for chart in drawn), links.bar(asked),
    ]  # fmt: skip


def front_figure(pareto: Chart) -> go.Figure:
    """The front as it is drawn, or that no run has measured both axes: other charts without numbers are not shown."""
    return pareto.figure or charts.remark(say("charts.nothing"))


def drawings(entries: Sequence[Entry]) -> list[Chart]:
    """The charts of the picked entries; the front, of all runs, is not one of them."""
    named = list(zip(cards.named(entries), [entry.measured for entry in entries], strict=True))
    return [draw(named) for draw in (charts.accuracy, charts.latency, charts.memory, charts.batches)]


def share(desk: Desk, owner: str, asked: Asked, hub: Hub) -> Markup:
    """Share what is the visitor's own in a comparison, and say what the link gives now.

    Raises:
        MaquetteError: as `Desk.share`.
    """
    entries = [desk.entry(key, owner) for key in asked.compare]
    own = [each for each in entries if not each.stored and desk.owns(each.run, owner)]
    for each in own:
        desk.share(each.run, owner, True, hub)
    titles = ", ".join(wording.title(each.run.recipe) for each in own)
    return markup.notice(say("share.comparison.done", titles=titles) if own else say("share.comparison.none"))


def front(entries: Sequence[Entry], cost: str, quality: str) -> Chart:
    """All results that a visitor has; the stored ones while there are fewer than two.

    Of the same model, stored ones whose recipe the visitor has not run stay beside, where the cost is the size: that
    depends on no machine.

    Raises:
        BadParams: axes that are not offered.
    """
    if cost not in COSTS or quality not in QUALITIES:
        raise BadParams(say("error.axis"))
    own = [entry for entry in entries if not entry.stored]
    if len(own) < 2:
        named = [(wording.run_name(entry.run), entry.measured) for entry in entries]
    else:
        named = [(wording.run_name(entry.run), entry.measured) for entry in own]
        ran = [(entry.run.recipe.model, entry.run.recipe.steps) for entry in own]
        of_same = [entry for entry in entries if entry.stored and entry.run.recipe.model in [model for model, _ in ran]]
        not_ran = [entry for entry in of_same if (entry.run.recipe.model, entry.run.recipe.steps) not in ran]
        named += [(entry.label, entry.measured) for entry in not_ran if cost == SIZE]
    return charts.pareto(named[:40], cost, quality)


def texts(desk: Desk, owner: str, asked: Asked, entries: Sequence[Entry]) -> Panes:
    """What the entries wrote: the visitor's last texts where these are meant, else what their runs have stored."""
    written = desk.shelf.find(owner, asked)
    if written is not None:
        kept = [Pane(p.title, list(p.tokens), note=p.note, timing=p.timing) for p in written.panes]
        for pane, title in zip(kept, cards.named(entries), strict=False):  # the language may be another than then
            pane.title = title
        return Panes(secrets.token_hex(4), kept, asked.writing.mode == "same")
    same = asked.writing.mode == "same"
    return panes.stored(cards.named(entries), fixed(entries, asked.writing), same, secrets.token_hex(4))


def unwritten() -> Panes:
    """The two panes of a blind round before it is run: what is known of the models would give them away."""
    titles = (say("blind.left"), say("blind.right"))
    return Panes(secrets.token_hex(4), [Pane(title, note=say("panes.empty")) for title in titles], False, True)


def fixed(entries: Sequence[Entry], writing: Writing) -> list[Output | None]:
    """What each run wrote after a fixed prompt, greedily: the visitor's where it is one of them, else the first.

    Nothing for another prompt, or other settings. A run's view of its original's words counts only beside that.
    """
    known = panes.prompts(next((entry.outputs for entry in entries if entry.outputs), ()))
    usual = writing.model_copy(update={"prompt": "", "mode": "same"}) == Writing()
    if not known or not usual or (writing.prompt and writing.prompt not in known):
        return [None] * len(entries)
    wanted = writing.prompt or known[0]
    found: list[Output | None] = []
    for entry in entries:
        output = next((o for o in entry.outputs if o.prompt == wanted), None)
        of_first = not entries[0].run.recipe.steps and entries[0].run.recipe.model == entry.run.recipe.model
        found.append(output if of_first or output is None else output.model_copy(update={"forced": ()}))
    return found


def differing(shown: Panes) -> Markup:
    """The words in which freely written texts differ; nothing for a common text or a blind round."""
    if shown.same_text or shown.blind:
        return Markup("")
    return contrast.view([pane.title for pane in shown.panes], [pane.text for pane in shown.panes])


@dataclass(frozen=True)
class Round:
    """What changes on the page while texts are written.

    Each holds the panes: a browser that gets two in one frame keeps the last alone, also where that says "as it is".
    """

    panes: panes.Value
    ballot: dict[str, str] | None = None
    alike: str = ""  # said where a blind round has no ballot, for both wrote the same text
    done: Panes | None = None


def stream(desk: Desk, owner: str, asked: Asked, stop: threading.Event | None = None) -> Iterator[Round]:
    """The models' texts as they are written, until `stop` is set; at the end of a blind round the ballot."""
    writing = check_prompt(asked.writing)
    entries = [desk.entry(key, owner) for key in asked.compare]
    blind, same = writing.mode == "blind", writing.mode == "same"
    titles = cards.named(entries)
    if blind:  # of more than two models, two by lot: a vote is about a pair
        entries = DICE.sample(entries, 2)
        titles = [pane.title for pane in unwritten().panes]
    shown = Panes(secrets.token_hex(4), [Pane(title, state="loading") for title in titles], same, blind)
    events = write(desk, owner, entries, writing, stop)
    try:
        for value in panes.follow(shown, events):
            yield Round(value)
    finally:
        close = getattr(events, "close", None)
        if close is not None:
            close()
    if blind and all(pane.tokens for pane in shown.panes):
        yield _voting(shown, entries, writing.prompt)
    elif not blind:
        desk.shelf.put(owner, Written(asked=asked, panes=tuple(_kept(pane) for pane in shown.panes)))
        yield Round(shown.value(), done=shown)


def _voting(shown: Panes, pair: Sequence[Entry], prompt: str) -> Round:
    """The end of a blind round: its ballot, or that a vote on two equal texts would say nothing."""
    left, right = pair
    if len({pane.text.rstrip() for pane in shown.panes}) == 1:
        who = say("vote.reveal", left=wording.title(left.run.recipe), right=wording.title(right.run.recipe))
        return Round(shown.value(), alike=f"{say('vote.alike')} {who}")
    return Round(shown.value(), ballot={"left": left.key, "right": right.key, "prompt": prompt})


def write(
    desk: Desk, owner: str, entries: Sequence[Entry], writing: Writing, stop: threading.Event | None
) -> Iterator[panes.Event]:
    """The engine's stream for these entries."""
    sources = [desk.source(entry, owner) for entry in entries]
    return desk.scheduler.stream(
        sources, writing.prompt, max_tokens=writing.max_tokens, temperature=writing.temperature, seed=writing.seed,
        same_text=writing.mode == "same", top_p=writing.top_p, top_k=writing.top_k,
        stop_strings=writing.stops, chat=writing.chat, system=writing.system if writing.chat else "", stop=stop,
    )  # fmt: skip


def _kept(pane: Pane) -> WrittenPane:
    return WrittenPane(title=pane.title, tokens=tuple(pane.tokens), note=pane.note, timing=pane.timing)


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
        return [desk.scheduler.submit(BASELINE, owner), desk.scheduler.submit(FIRST, owner)]
    except MaquetteError as error:  # too often, or no room for it: the stored comparison is there all the same
        log.info("the first comparison was not started: %s", error)
        return []


def choices(desk: Desk, owner: str) -> list[tuple[str, str]]:
    """The pickers' choices."""
    return [(entry.label, entry.key) for entry in desk.entries(owner)]


def offered(desk: Desk, owner: str) -> str:
    """What `choices` offers, as a word that changes when it does; empty while there is nothing of the visitor's own."""
    entries = desk.entries(owner)
    if all(entry.stored for entry in entries):
        return ""
    return hashlib.sha256(repr([(entry.label, entry.key) for entry in entries]).encode()).hexdigest()[:16]


def pair_of(a: Entry, b: Entry) -> Asked:
    """Two entries on the first fixed prompt that the first of them has answered."""
    known = panes.prompts(a.outputs)
    return Asked(compare=(a.key, b.key), writing=Writing(prompt=known[0] if known else say("prompt.default")))


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
