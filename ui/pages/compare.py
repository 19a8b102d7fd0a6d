"""Compare: what small models gained and lost, beside the original. The landing page.

A first visitor sees the stored comparison at once; then the same two recipes run on this machine and the
numbers change. Texts stream from one worker process for each model through one generator that merges them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import gradio as gr
from gradio.blocks import Block
from markupsafe import Markup

from engine.records import Status
from ui import ballot, comparing, links, markup, panes, wording
from ui.asked import LONGEST, LONGEST_STOPS, Asked, Writing, read_keys, read_writing
from ui.comparing import COSTS, QUALITIES
from ui.desk import STORED, Desk
from ui.edge import edge, visitor
from ui.pages import sets
from ui.turns import CLICKED, Turns
from ui.wiring import on
from ui.wording import say

PICKERS = 4
FIELDS = PICKERS + len(Writing.model_fields)  # inputs that say what is compared and how it is written


@dataclass(frozen=True)
class ComparePage:
    """The components that others on the page reach for."""

    pickers: list[gr.Dropdown]
    writing: list[Block]  # in the order of `Writing`
    size: list[Block]  # how many pickers are shown, and the buttons that change it
    banner: gr.HTML
    timer: gr.Timer
    cost: gr.Radio
    quality: gr.Radio
    shown: list[Block]
    first: Asked | None  # what it was laid out with

    @property
    def fields(self) -> list[Block]:
        return [*self.pickers, *self.writing]


def build(desk: Desk) -> ComparePage:
    """Lay the tab out and wire it."""
    first, view = comparing.first_view(desk)  # in the page itself: who has nothing of their own asks for nothing
    summary_of, texts_of, differing_of, *figures_of, numbers_of, link_of = view
    banner = gr.HTML(elem_id="mq-banner")
    count = gr.State(2)  # pickers that are shown
    names = [(entry.label, entry.key) for entry in desk.stored_entries()]
    keys = (*(first.compare if first else ()), *[None] * PICKERS)
    with gr.Row(equal_height=True):
        pickers = [
            gr.Dropdown(
                names, value=key, label=say(f"compare.{side}"), min_width=240, visible=number < 2,
                elem_id=f"mq-pick-{side}",
            )
            for number, (side, key) in enumerate(zip("abcd", keys, strict=False))
        ]  # fmt: skip
    with gr.Row():
        more = gr.Button(say("compare.more"), size="sm", scale=0, min_width=170, elem_id="mq-more")
        fewer = gr.Button(say("compare.fewer"), size="sm", scale=0, min_width=170, visible=False)
    summary = gr.HTML(summary_of, elem_id="mq-summary")
    link = gr.HTML(link_of, elem_id="mq-link")
    with gr.Row(visible=not desk.local):
        lend = gr.Button(say("share.comparison"), size="sm", scale=0, min_width=220, elem_id="mq-lend")
    lent = gr.HTML()
    text = _texts(first.writing.prompt if first else "", texts_of, differing_of)
    cost, quality, figures, numbers = _drawings(figures_of, numbers_of)
    timer = gr.Timer(1.5, active=False)
    shown: list[Block] = [summary, text.output, text.differing, *figures, numbers, link]
    page = ComparePage(pickers, text.writing, [count, more, fewer], banner, timer, cost, quality, shown, first)
    _wire_choice(desk, page, text, more, fewer)
    _wire_sharing(desk, page, lend, lent)
    turns, clicked = Turns(), gr.Number(0, visible=False)
    _wire_texts(desk, page, text, link, turns, clicked)
    with text.place:
        sets.build(desk, page.fields, text.output, text.prompt, turns, collect, (clicked, CLICKED))
    return page


@dataclass(frozen=True)
class _Texts:
    writing: list[Block]
    prompt: gr.Textbox
    mode: gr.Radio
    start: gr.Button
    stop: gr.Button
    output: gr.HTML
    differing: gr.HTML
    voting: gr.Row
    votes: list[gr.Button]
    ballot: gr.State
    reveal: gr.HTML
    place: gr.Column


def _texts(first_prompt: str, texts_of: object, differing_of: object) -> _Texts:
    """The prompt, how it is written on, the panes, and the vote."""
    with gr.Column(elem_classes="mq-block") as place:
        gr.HTML(markup.heading(say("panes.title"), say("panes.about")))
        with gr.Row(equal_height=True):
            prompt = gr.Textbox(
                first_prompt, label=say("prompt"), lines=1, max_lines=4, max_length=LONGEST, scale=4, min_width=260,
                elem_id="mq-prompt",
            )  # fmt: skip
            modes = [(say(f"mode.{name}"), name) for name in ("same", "free", "blind")]
            mode = gr.Radio(modes, value="same", label=say("mode"), scale=3, min_width=260)
        with gr.Accordion(say("writing.title"), open=False, elem_id="mq-writing"):
            with gr.Row():
                chat = gr.Checkbox(False, label=say("writing.chat"), info=say("writing.chat.about"), min_width=240)
                system = gr.Textbox(
                    label=say("writing.system"), max_lines=4, max_length=LONGEST, min_width=260, scale=2
                )
            with gr.Row():
                names = ("temperature", "top_p", "top_k", "max_tokens", "seed")
                numbers = [_number(name) for name in names]
                ends = gr.Textbox(
                    label=say("writing.stop_strings"), info=say("writing.stop_strings.about"), lines=1, max_lines=8,
                    max_length=LONGEST_STOPS, min_width=240,
                )  # fmt: skip
        with gr.Row():
            start = gr.Button(say("panes.run"), variant="primary", elem_id="mq-run-both", scale=2, min_width=140)
            stop = gr.Button(say("panes.stop"), elem_id="mq-stop", scale=1, min_width=100)
            with gr.Column(scale=6, min_width=280):
                legend = gr.HTML(_legend())
        output = panes.token_panes(texts_of)
        ballot = gr.State(None)
        with gr.Row(visible=False) as voting:
            votes = [gr.Button(say(f"vote.{name}"), size="sm") for name in ("left", "tie", "right")]
        reveal = gr.HTML(elem_id="mq-vote")
        differing = gr.HTML(differing_of, elem_id="mq-differing")
    on([mode.change], _is_shaded, [mode], [legend], queue=False)
    writing: list[Block] = [prompt, mode, chat, system, *numbers, ends]
    return _Texts(writing, prompt, mode, start, stop, output, differing, voting, votes, ballot, reveal, place)


def _number(name: str) -> gr.Number:
    field = Writing.model_fields[name]
    whole = field.annotation is int
    return gr.Number(
        field.default, label=say(f"writing.{name}"), precision=0 if whole else None, step=1 if whole else 0.1,
        min_width=120,
    )  # fmt: skip


def _drawings(figures: list[object], numbers_of: object) -> tuple[gr.Radio, gr.Radio, list[gr.Plot], gr.HTML]:
    """The two axes of the front, five figures, and their numbers."""
    with gr.Column(elem_classes="mq-block"):
        gr.HTML(markup.heading(say("charts.title"), say("charts.about")))
        with gr.Row():
            cost, quality = (
                gr.Radio([(wording.name(k), k) for k in keys], value=keys[0], label=say(label), min_width=240)
                for keys, label in ((COSTS, "axis.cost"), (QUALITIES, "axis.quality"))
            )
        front = gr.Plot(figures[0], show_label=False, elem_id="mq-front")
        with gr.Row():
            with gr.Column(min_width=320):
                accuracy = gr.Plot(figures[1], show_label=False)
                memory = gr.Plot(figures[3], show_label=False)
            with gr.Column(min_width=320):
                latency = gr.Plot(figures[2], show_label=False)
                batches = gr.Plot(figures[4], show_label=False, elem_id="mq-batches")
        numbers = gr.HTML(numbers_of, elem_id="mq-numbers")
    return cost, quality, [front, accuracy, latency, memory, batches], numbers


def collect(values: Sequence[object]) -> Asked | None:
    """What the fields say; None where nothing is there to be picked.

    Raises:
        BadParams: too few results or too many, or a setting out of its bounds.
    """
    picked = values[:PICKERS]
    if not any(picked):
        return None
    written = dict(zip(Writing.model_fields, values[PICKERS:FIELDS], strict=True))
    return Asked(compare=read_keys(picked), writing=read_writing(written))


def usual(desk: Desk, owner: str) -> Asked | None:
    """What a visitor sees first; None where there is nothing yet."""
    a, b = comparing.default_pair(desk, owner)
    return None if a is None or b is None else comparing.pair_of(desk.entry(a, owner), desk.entry(b, owner))


def fill(desk: Desk, owner: str, asked: Asked, known: Writing | None = None) -> list[object]:
    """Updates of `fields` and `size`, so that they say `asked`.

    Settings that are as in `known` are left alone: the visitor may have changed them since.
    """
    names = comparing.choices(desk, owner)
    keys = [*asked.compare, *[None] * (PICKERS - len(asked.compare))]
    pickers = [
        gr.update(choices=names, value=key, visible=place < len(asked.compare)) for place, key in enumerate(keys)
    ]
    settings = [(name, getattr(asked.writing, name)) for name in Writing.model_fields]
    written = [gr.skip() if known and getattr(known, name) == value else value for name, value in settings]
    return [*pickers, *written, *_size(len(asked.compare))]


def _size(count: int) -> list[object]:
    """The number of pickers that are shown, and the two buttons that change it."""
    label = say("compare.more" if count == 2 else "compare.fourth")
    return [count, gr.update(visible=count < PICKERS, value=label), gr.update(visible=count > 2)]


def _wire_sharing(desk: Desk, page: ComparePage, lend: gr.Button, lent: gr.HTML) -> None:
    """The link of a comparison opens for others once the visitor's own runs in it are shared."""

    @edge
    def share(request: gr.Request, *values: object) -> object:
        asked = collect(values)
        return "" if asked is None else comparing.share(desk, visitor(request), asked, desk.hub(request))

    on([lend.click], share, page.fields, [lent])


def _wire_choice(desk: Desk, page: ComparePage, text: _Texts, more: gr.Button, fewer: gr.Button) -> None:
    """Pickers, axes, and the first comparison that paints itself."""

    @edge
    def show(request: gr.Request, *values: object) -> object:
        drawn = comparing.render(desk, visitor(request), collect(values), *map(str, values[FIELDS:]))
        return [*drawn, "", gr.update(visible=False), None]

    @edge
    def redraw(request: gr.Request, *values: object) -> object:
        drawn = comparing.render(desk, visitor(request), collect(values), *map(str, values[FIELDS:]))
        return [drawn[3], drawn[8]]  # the front, and the numbers of all charts

    @edge
    def tick(request: gr.Request, *values: object) -> object:
        owner = visitor(request)
        first = comparing.first_runs(desk, owner)
        live = [run for run in first if run.status is Status.SUCCEEDED]
        picked = [key for key in values[:PICKERS] if key]
        if len(live) == 2 and len(picked) < 3 and all(str(key).startswith(STORED) for key in picked):
            keys = [run.id for run in live]
            asked = collect([*keys, None, None, *values[PICKERS:]])
            names = comparing.choices(desk, owner)
            pickers = [gr.update(choices=names, value=key) for key in keys]
            drawn = comparing.render(desk, owner, asked, *map(str, values[FIELDS:]))
            return [gr.update(active=False), comparing.banner_for(first), *pickers, *drawn]
        working = any(not run.status.final for run in first)
        still = [gr.skip()] * (2 + len(page.shown))
        return [gr.skip() if working else gr.update(active=False), comparing.banner_for(first), *still]

    def step(change: int) -> Callable[..., object]:
        @edge
        def resize(count: int, request: gr.Request) -> object:
            wanted = min(PICKERS, max(2, (count if isinstance(count, int) else 2) + change))
            names = comparing.choices(desk, visitor(request))
            gone = [gr.update(visible=True, choices=names) if n < wanted else gr.update(visible=False, value=None)
                    for n in range(2, PICKERS)]  # fmt: skip
            return [*_size(wanted), *gone]

        return resize

    chosen = [*page.fields, page.cost, page.quality]
    outputs = [*page.shown, text.reveal, text.voting, text.ballot]
    on([*(picker.input for picker in page.pickers), text.mode.input], show, chosen, outputs)
    on([page.cost.input, page.quality.input], redraw, chosen, [page.shown[3], page.shown[8]])
    on([page.timer.tick], tick, chosen, [page.timer, page.banner, *page.pickers[:2], *page.shown], queue=False)
    resized = [*page.size, *page.pickers[2:]]
    on([more.click], step(1), page.size[:1], resized)
    smaller = on([fewer.click], step(-1), page.size[:1], resized)
    smaller.then(show, chosen, outputs, show_progress="hidden", api_visibility="private")


def _wire_texts(
    desk: Desk, page: ComparePage, text: _Texts, link: gr.HTML, turns: Turns, clicked: gr.Number
) -> None:  # fmt: skip
    """Run, Stop, the vote, and the link that follows what is written in the fields."""

    @edge
    def run_all(request: gr.Request, *values: object) -> Iterator[object]:
        owner, moment = desk.enter(request, "stream"), values[-1]
        place = request.session_hash or owner
        turn = turns.begin(place, float(moment) if isinstance(moment, int | float) else 0.0, owner)
        try:
            asked = collect(values)
            if asked is None:
                return
            yield [gr.skip(), gr.update(visible=False), None, "", "", links.bar(asked)]
            for each in comparing.stream(desk, owner, asked, turn.stop):
                if turn.replaced:
                    return
                yield _changes(each)
        finally:
            turns.end(place, turn)

    @edge
    def stop_all(clicked: float, request: gr.Request) -> None:
        turns.stop(request.session_hash or visitor(request), clicked)

    @edge
    def vote(held: dict[str, str] | None, choice: str, request: gr.Request) -> object:
        return [ballot.cast(desk, visitor(request), held, choice), gr.update(visible=False), None]

    @edge
    def address(request: gr.Request, *values: object) -> object:
        asked = collect(values)
        return "" if asked is None else links.bar(asked)

    written = [text.output, text.voting, text.ballot, text.reveal, text.differing, link]
    on([text.start.click, text.prompt.submit], run_all, [*page.fields, clicked], written, concurrency_limit=4,
       js=CLICKED, trigger_mode="multiple")  # fmt: skip
    on([text.stop.click], stop_all, [clicked], queue=False, js=CLICKED)
    on([text.prompt.blur], address, page.fields, [link], queue=False)
    for button, choice in zip(text.votes, ("left", "tie", "right"), strict=True):
        on([button.click], vote, [text.ballot, gr.State(choice)], [text.reveal, text.voting, text.ballot])


def _changes(each: comparing.Round) -> list[object]:
    """Panes, voting, ballot, reveal, differing words, link."""
    if each.ballot is not None:
        return [each.panes, gr.update(visible=True), each.ballot, say("vote.ask"), gr.skip(), gr.skip()]
    if each.alike:
        return [each.panes, gr.skip(), gr.skip(), markup.notice(each.alike), gr.skip(), gr.skip()]
    if each.done is not None:
        return [each.panes, *[gr.skip()] * 3, comparing.differing(each.done), gr.skip()]
    return [each.panes, *[gr.skip()] * 5]


@edge
def _is_shaded(mode: str) -> object:
    """The legend is that of the one mode in which texts are shaded."""
    return gr.update(visible=mode == "same")


def _legend() -> Markup:
    parts = [markup.tag("span", say(f"kl.{level}"), class_=f"tok kl{level}") for level in (1, 2, 3)]
    return markup.tag("p", say("kl.legend"), " ", *(markup.join((part, " ")) for part in parts), class_="mq-sub legend")
