"""Methods: the catalogue, generated from the method files."""

from __future__ import annotations

import gradio as gr

from engine.methods import methods
from ui import markup, views
from ui.wording import say


def build() -> None:
    """Lay the tab out; nothing on it changes."""
    gr.HTML(markup.heading(say("methods.title"), say("methods.about")))
    gr.HTML(views.catalogue(methods()), elem_id="mq-catalogue")
