"""Methods: the catalogue, generated from the method files."""

from __future__ import annotations

import json
from collections.abc import Mapping

import gradio as gr
from markupsafe import Markup

from engine.fields import bounds
from engine.methods import FAMILIES, Method, methods
from ui import markup
from ui.markup import tag
from ui.messages import translate, translate_paragraph
from ui.wording import say


def build() -> None:
    """Lay the tab out; nothing on it changes."""
    gr.HTML(markup.heading(say("methods.title"), say("methods.about")))
    gr.HTML(catalogue(methods()), elem_id="mq-catalogue")


def catalogue(methods: Mapping[str, Method]) -> Markup:
    """Every method: what it is, what it really improves, its settings; generated from the method files."""
    parts = []
    for family in FAMILIES:
        cards = [_method(method) for method in methods.values() if method.family == family]
        if cards:
            parts.append(tag("section", markup.heading(say(f"family.{family}"), say(f"family.{family}.about")), *cards))
    return tag("div", *parts, class_="mq-catalogue")


def _method(method: Method) -> Markup:
    title = translate(method.title)
    chips = [markup.chip(say(f"change.{change}"), "good") for change in method.changes]
    if not chips:
        chips = [markup.chip(say("change.none"))]
    rows = []
    for name, info in method.params.model_fields.items():
        low, high = bounds(info)
        span = (
            ""
            if low is None and high is None
            else f"{'' if low is None else f'{low:g}'} … {'' if high is None else f'{high:g}'}"
        )
        choices = getattr(info.annotation, "__args__", None)
        rows.append(
            (
                tag("code", name),
                markup.marked(translate(info.description or "")),
                tag("code", json.dumps(info.default)),
                tag("code", ", ".join(map(str, choices)) if choices else span),
            )
        )
    headers = (say("setting"), say("meaning"), say("default"), say("values"))
    settings = markup.table(headers, rows, caption=say("methods.settings", title=title))
    rest = method.documentation.split("\n", 1)[1] if "\n" in method.documentation else ""
    about = tag("div", markup.prose(rest, translate_paragraph), class_="mq-prose")
    return tag(
        "article", tag("header", tag("h3", title), tag("code", method.name), class_="mq-run-head"),
        tag("p", translate(method.summary)), tag("p", *chips, class_="mq-chips"),
        markup.details(say("methods.more"), about, settings),
        class_="mq-card wide",
    )  # fmt: skip
