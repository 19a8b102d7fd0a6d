"""Prompt sets on the Compare tab: the bundled prompts or a visitor's own file, all picked models on each of them."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import PurePath

import gradio as gr
from gradio.blocks import Block

from engine.errors import BadParams
from ui import cards, comparing, sets
from ui.asked import Asked
from ui.desk import Desk
from ui.edge import edge
from ui.markup import notice
from ui.panes import Pane, Panes, Value, follow
from ui.turns import Turns
from ui.wiring import on
from ui.wording import say

SELECT = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-run]");
  if (button) trigger("select", {run: button.dataset.run});
});
"""
KEPT = 3600  # seconds for which a page that was left keeps its results
Step = tuple[list[sets.Result], Value, int]  # results so far, the panes' value, prompts still to come


def build(
    desk: Desk, fields: list[Block], output: gr.HTML, prompt: gr.Textbox, turns: Turns,
    collect: Callable[[list[object]], Asked | None], clicked: tuple[gr.Number, str],
) -> None:  # fmt: skip
    """Lay the section out; its texts appear in the panes above."""
    prompts, results = gr.State(()), gr.State([], time_to_live=KEPT)
    with gr.Accordion(say("sets.title"), open=False, elem_id="mq-sets"):
        with gr.Row():
            file = gr.File(label=say("sets.file"), file_types=[".txt", ".jsonl", ".json"], type="binary", height=120)
            with gr.Column(min_width=260):
                bundled = gr.Button(say("sets.bundled"), size="sm")
                chosen = gr.HTML(notice(say("sets.none")))
                run = gr.Button(say("sets.run"), variant="primary", elem_id="mq-run-set")
        table = gr.HTML(js_on_load=SELECT, elem_id="mq-set")

    def choose(found: tuple[str, ...]) -> list[object]:
        return [found, notice(say("sets.chosen", count=len(found)), "good"), "", []]

    @edge
    def upload(event: gr.EventData, data: bytes | None) -> object:
        if data is None:
            return [(), notice(say("sets.none")), "", []]
        named = getattr(event, "_data", None)
        name = str(named.get("orig_name", "")) if isinstance(named, dict) else ""
        return choose(sets.read(data, PurePath(name).name or _guess(data)))

    @edge
    def take_bundled() -> object:
        return choose(sets.bundled())

    @edge
    def run_set(request: gr.Request, prompts: tuple[str, ...], *values: object) -> Iterator[object]:
        owner, moment = desk.enter(request, "stream"), values[-1]
        place = request.session_hash or owner
        turn = turns.begin(place, float(moment) if isinstance(moment, int | float) else 0.0, owner)
        try:
            asked = collect([*values[:-1]])
            if asked is None:
                return
            titles = cards.named([desk.entry(key, owner) for key in asked.compare])
            for done, value, left in go_through(desk, owner, asked, tuple(prompts), turn.stop):
                if turn.replaced:
                    return
                yield [value, sets.table(titles, done, left), done]
        finally:
            turns.end(place, turn)

    @edge
    def pick(results: list[sets.Result], event: gr.EventData) -> object:
        wanted = str(getattr(event, "run", ""))
        if not wanted.isdigit() or int(wanted) >= len(results):
            raise BadParams(say("error.no_result"))
        found = results[int(wanted)]
        return [found.value, found.prompt]

    number, script = clicked
    on([file.upload, file.clear], upload, [file], [prompts, chosen, table, results])
    on([bundled.click], take_bundled, [], [prompts, chosen, table, results])
    on([run.click], run_set, [prompts, *fields, number], [output, table, results], concurrency_limit=4, js=script,
       trigger_mode="multiple")  # fmt: skip
    on([table.select], pick, [results], [output, prompt])


def go_through(desk: Desk, owner: str, asked: Asked, prompts: tuple[str, ...], stop: threading.Event) -> Iterator[Step]:
    """All models on each prompt, one prompt after the other, until `stop` is set.

    Raises:
        BadParams: there is no set, or the round is blind.
    """
    if not prompts:
        raise BadParams(say("error.no_set"))
    if asked.writing.mode == "blind":
        raise BadParams(say("error.set_blind"))
    entries = [desk.entry(key, owner) for key in asked.compare]
    titles, done = cards.named(entries), list[sets.Result]()
    for number, prompt in enumerate(prompts):
        short = min(asked.writing.max_tokens, sets.TOKENS)
        writing = asked.writing.model_copy(update={"prompt": prompt, "max_tokens": short})
        shown = Panes(secrets.token_hex(4), [Pane(title, state="loading") for title in titles],
                      writing.mode == "same")  # fmt: skip
        for value in follow(shown, comparing.write(desk, owner, entries, writing, stop)):
            yield done, value, len(prompts) - number
        if stop.is_set():
            break
        done = [*done, sets.result(prompt, shown)]
    yield done, shown.value(), 0


def _guess(data: bytes) -> str:
    """A name for a file that came without: JSON lines begin with a brace or a quote."""
    return "prompts.jsonl" if data.lstrip()[:1] in (b"{", b'"') else "prompts.txt"
