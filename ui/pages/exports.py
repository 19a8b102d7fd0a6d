"""Other formats, on the Runs tab: the model of the run at hand as other programs read it, to take away as a zip."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import gradio as gr
from gradio.blocks import Block
from markupsafe import Markup

from engine.errors import MaquetteError
from engine.exporting import made, notes, offered
from engine.records import Run, Status
from ui import markup, wording
from ui.desk import Desk
from ui.edge import edge, line, visitor
from ui.messages import translate
from ui.turns import CLICKED, Turns
from ui.wiring import on
from ui.wording import say

Painted = tuple[str, str, str]  # what the Runs tab shows


def build(desk: Desk, picked: gr.State, last: gr.State, whose: Callable[[str, Painted], str]) -> list[Block]:
    """Lay the section out and wire it; what `offer` changes. `whose`: as the section that pushes has it."""
    turns, clicked = Turns(), gr.Number(0, visible=False)
    with gr.Column(visible=False, elem_classes="mq-block", elem_id="mq-export") as section:
        gr.HTML(markup.heading(say("formats.title"), say("formats.about")))
        choice = gr.Radio([], label=say("formats.choice"), elem_id="mq-export-format")
        with gr.Row():
            start = gr.Button(say("formats.start"), size="sm", elem_id="mq-export-start")
            stop = gr.Button(say("panes.stop"), size="sm", elem_id="mq-export-stop")
        told = gr.HTML(elem_id="mq-export-told")

    @edge
    def export(run_id: str, painted: Painted, name: str, moment: float, request: gr.Request) -> Iterator[object]:
        page = request.session_hash or visitor(request)
        turn = turns.begin(page, moment or 0.0)
        try:
            owner = desk.enter(request, "start")
            yield from go(desk, owner, whose(run_id, painted), name, turn.stop)
        except MaquetteError as error:
            yield markup.notice(line(error), "bad")
        finally:
            turns.end(page, turn)

    @edge
    def end(moment: float, request: gr.Request) -> None:
        turns.stop(request.session_hash or visitor(request), moment or 0.0)  # its own last line says so

    on([start.click], export, [picked, last, choice, clicked], [told], concurrency_limit=2, js=CLICKED)
    on([stop.click], end, [clicked], queue=False, js=CLICKED)
    return [section, choice]


def offer(run: Run | None) -> list[object]:
    """The section and its choice, for a run of the visitor's own."""
    artifact = run.artifact if run is not None and run.status is Status.SUCCEEDED else None
    names = offered(Path(artifact)) if artifact else []
    choices = [(say(f"format.{name}.for"), name) for name in names]
    return [gr.update(visible=bool(names)), gr.update(choices=choices, value=names[0] if names else None)]


def ready(run: Run) -> list[str]:
    """The formats in which a run's model can be downloaded beside its own."""
    return made(Path(run.artifact)) if run.artifact else []


def go(desk: Desk, owner: str, run_id: str, name: str, stop: threading.Event) -> Iterator[Markup]:
    """The line to show, as the export goes on; setting `stop`, or closing the iterator, ends it.

    Raises:
        UnknownName: no run that the visitor may see, or no such format.
        MaquetteError: it is another's, has no model, or cannot be exported; or `stop` was set.
    """
    run, name = desk.own(run_id, owner), str(name)
    words = {"title": wording.title(run.recipe), "format": wording.known(f"format.{name}", name)}
    for seconds in desk.scheduler.export(run.id, name, owner=run.owner, stop=stop):
        yield markup.notice(say("formats.working", span=wording.duration(max(1.0, seconds)), **words))
    taken = markup.link(say("formats.take"), f"./runs/{run.id}/{name}.zip", download=True)
    done = markup.tag("p", say("formats.done", **words), " ", taken, class_="mq-notice good", role="status")
    told = [markup.tag("li", translate(note)) for note in notes(Path(str(run.artifact)), name)]
    yield done + markup.tag("ul", *told) if told else done
