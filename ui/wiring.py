"""One way to connect events to handlers: no progress overlay, no entry in the public API's documentation.

Every handler is callable over HTTP all the same; what it may do is decided in the handler, by its visitor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import gradio as gr
from gradio.events import Dependency

Target = gr.blocks.Block


def signal() -> gr.Textbox:
    """A text that nobody sees. Its change is an event, also where a request that does not queue brings it.

    A `gr.State`'s is one only in answers that come through the queue.
    """
    return gr.Textbox("", visible="hidden", show_label=False)


def on(
    triggers: Sequence[Callable[..., object]], handler: Callable[..., object], inputs: Sequence[Target] = (),
    outputs: Sequence[Target] = (), *, queue: bool = True, concurrency_limit: int | None = 8,
    js: str | None = None, trigger_mode: Literal["once", "multiple", "always_last"] | None = None,
) -> Dependency:  # fmt: skip
    """Call `handler` with the inputs' values when one of `triggers` fires, and show what it returns.

    Without `queue` the call is a plain request: right for ticks, which are many and short. `js` may change the inputs
    in the browser; `trigger_mode` says what becomes of a click while an earlier one is served.
    """
    made: Dependency = gr.on(
        list(triggers), handler, list(inputs), list(outputs), queue=queue, show_progress="hidden",
        api_visibility="private", concurrency_limit=concurrency_limit, js=js, trigger_mode=trigger_mode,
    )  # fmt: skip
    return made
