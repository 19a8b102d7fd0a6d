"""The k-bit scaling picture on the Runs tab: all results of one family of models, by what they store in all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import gradio as gr

from engine.errors import BadParams
from ui import markup, scaling, wording
from ui.desk import Desk, Entry
from ui.edge import edge, visitor
from ui.wiring import on
from ui.wording import say


def build(desk: Desk, changes: Sequence[Callable[..., object]]) -> None:
    """Lay the section out; it is drawn anew where one of these events comes and the finished runs have changed."""
    drawn = gr.State("")
    with gr.Column(elem_classes="mq-block"):
        gr.HTML(markup.heading(say("scaling.title"), say("scaling.about")))
        with gr.Row():
            family = gr.Dropdown([], label=say("scaling.family"), visible=False, min_width=240, elem_id="mq-family")
            names = [(wording.name(key), key) for key in scaling.QUALITIES]
            quality = gr.Radio(names, value=names[0][1], label=say("axis.quality"), min_width=240)
        note = gr.HTML()
        figure = gr.Plot(show_label=False, elem_id="mq-scaling")
        numbers = gr.HTML(elem_id="mq-scaling-numbers")

    @edge
    def follow(family: str | None, quality: str, drawn: str, request: gr.Request) -> object:
        now = ",".join(entry.key for entry in shown(desk, visitor(request)))
        if now == drawn:
            return [gr.skip()] * 6
        return [now, *draw(desk, visitor(request), family, quality)]

    @edge
    def choose(family: str | None, quality: str, request: gr.Request) -> object:
        return draw(desk, visitor(request), family, quality)

    views = [family, quality, note, figure, numbers]
    on(changes, follow, [family, quality, drawn], [drawn, *views])
    on([family.input, quality.input], choose, [family, quality], views)


def shown(desk: Desk, owner: str) -> list[Entry]:
    """The visitor's finished runs; the stored comparison while there are fewer than two."""
    entries = desk.entries(owner)
    own = [entry for entry in entries if not entry.stored]
    return own if len(own) > 1 else entries


def draw(desk: Desk, owner: str, family: str | None, quality: str) -> list[object]:
    """The two pickers, a remark, the figure, its numbers; another quality where this one was not measured.

    Raises:
        BadParams: a quality that is not offered.
    """
    if quality not in scaling.QUALITIES:
        raise BadParams(say("error.axis"))
    found = scaling.families(shown(desk, owner))
    name = family if family in found else next(iter(found), None)
    entries = found[name] if name is not None else []
    used = quality if scaling.points(entries, quality) else scaling.best_quality(entries)
    chart = scaling.chart(entries, used)
    remark = ""
    if chart.figure is None:
        remark = say("scaling.nothing")
    elif used != quality:
        remark = say("scaling.instead", wanted=wording.name(quality), shown=wording.name(used))
    elif len({entry.run.recipe.model.source for entry in entries}) == 1:
        remark = say("scaling.one")
    picker = gr.update(choices=list(found), value=name, visible=len(found) > 1)
    return [picker, used, markup.notice(remark), chart.figure, chart.table()]
