"""Panes in which two models write side by side, token by token; the page's part is in assets/panes.js.

The value always holds every token so far: an update that the browser skips loses nothing, and the script
appends only what is new.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import gradio as gr
from pydantic import JsonValue

from engine.records import Output, Token
from ui import wording
from ui.messages import translate
from ui.theme import ASSETS
from ui.wording import say

INTERVAL = 1 / 18  # seconds between two updates: more freeze the page, fewer look jerky
Value = dict[str, JsonValue]


def token_panes() -> gr.HTML:
    """The panes as a component whose value is made by `Panes.value`."""
    return gr.HTML(
        html_template='<div class="mq-panes"></div><div class="mq-token" aria-live="polite" hidden></div>',
        js_on_load=(ASSETS / "panes.js").read_text(),
        elem_id="mq-panes",
    )


@dataclass
class Pane:
    """One model's text as it grows. `state` is loading, running, done or failed."""

    title: str
    tokens: list[Token] = field(default_factory=list)
    state: str = "done"
    note: str = ""
    stats: str = ""

    def as_json(self, blind: bool) -> dict[str, JsonValue]:
        """For the script; a blind pane tells neither probabilities' drift nor speed."""
        tokens: list[JsonValue] = [
            [t.text, t.probability, [[text, p] for text, p in t.top], None if blind else t.kl] for t in self.tokens
        ]
        drift = [t.kl for t in self.tokens if t.kl is not None]
        mean = say("panes.drift", kl=wording.digits(sum(drift) / len(drift), 2)) if drift else ""
        stats = "" if blind else " · ".join(part for part in (self.stats, mean) if part)
        return {"title": self.title, "note": self.note, "state": self.state, "stats": stats, "tokens": tokens}


@dataclass
class Panes:
    """All panes of one comparison. `key` changes when the script must start afresh."""

    key: str
    panes: list[Pane]
    same_text: bool
    blind: bool = False

    def value(self) -> Value:
        """What the component shows."""
        words: dict[str, JsonValue] = {name: say(f"panes.{name}") for name in ("token", "kl", "split", "apart")}
        return {
            "key": self.key, "shade": self.same_text and not self.blind, "split": self.split(), "words": words,
            "panes": [pane.as_json(self.blind) for pane in self.panes],
        }  # fmt: skip

    def split(self) -> int | None:
        """Where freely written texts first part; None for a common text, a blind vote, or no parting yet."""
        if self.same_text or self.blind or len(self.panes) < 2:
            return None
        texts = [[token.text for token in pane.tokens] for pane in self.panes]
        return next((i for i, here in enumerate(zip(*texts, strict=False)) if len(set(here)) > 1), None)

    def take(self, place: int, kind: str, data: dict[str, JsonValue]) -> None:
        """One event of `Scheduler.stream`."""
        pane = self.panes[place]
        if kind == "loading":
            pane.state, pane.note = "loading", say("panes.loading")
        elif kind == "token":
            pane.state, pane.note = "running", ""
            pane.tokens.append(Token.model_validate({key: data[key] for key in Token.model_fields if key in data}))
        elif kind == "done":
            pane.state, pane.note = "done", say("panes.stopped") if data.get("stopped") else ""
            pane.stats = _stats(data, len(pane.tokens))
        elif kind == "error":
            pane.state, pane.note = "failed", translate(str(data.get("text", "")))


def stored(title_a: str, title_b: str, a: Output | None, b: Output | None, same_text: bool, key: str) -> Panes:
    """What two runs wrote after the same fixed prompt. Same text: B's view of A's words, with its KL."""
    left = Pane(title_a, list(a.tokens) if a else [])
    right = Pane(title_b, list(b.forced if same_text and b.forced else b.tokens) if b else [])
    for pane in (left, right):
        pane.note = "" if pane.tokens else say("panes.empty")
    return Panes(key, [left, right], same_text and bool(b and b.forced))


def follow(panes: Panes, events: Iterator[tuple[int, str, dict[str, JsonValue]]]) -> Iterator[Value]:
    """The value after each bunch of events, at most 18 times a second, and once at the end."""
    last = 0.0
    yield panes.value()
    for place, kind, data in events:
        panes.take(place, kind, data)
        now = time.monotonic()
        if kind != "token" or now - last >= INTERVAL:
            last = now
            yield panes.value()
    yield panes.value()


def _stats(data: dict[str, JsonValue], shown: int) -> str:
    count, tpot, ttft = data.get("tokens"), data.get("tpot"), data.get("ttft")
    parts = [say("panes.tokens", count=count if isinstance(count, int) else shown)]
    if isinstance(tpot, int | float) and tpot > 0:
        parts.append(f"{1 / tpot:.0f} {say('unit.tokens_per_second')}")
    if isinstance(ttft, int | float) and ttft > 0:
        parts.append(say("panes.first", span=wording.duration(ttft)))
    return " · ".join(parts)


def prompts(outputs: Sequence[Output]) -> list[str]:
    """The fixed prompts that a run has answered."""
    return [output.prompt for output in outputs]
