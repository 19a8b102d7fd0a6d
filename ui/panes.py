"""Panes in which two to four models write side by side, token by token; the page's part is in assets/panes.js.

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
from ui.shelf import Timing
from ui.theme import ASSETS
from ui.wording import say

INTERVAL = 1 / 18  # seconds between two updates: more freeze the page, fewer look jerky
Value = dict[str, JsonValue]
Event = tuple[int, str, dict[str, JsonValue]]


def token_panes(value: object) -> gr.HTML:
    """The panes as a component whose value is made by `Panes.value`."""
    return gr.HTML(
        value,
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
    timing: Timing | None = None

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)

    @property
    def speed(self) -> float | None:
        """Tokens a second after the first."""
        return 1 / self.timing.tpot if self.timing and self.timing.tpot else None

    @property
    def stats(self) -> str:
        """How much was written and how fast, in words; empty until it is done."""
        if self.timing is None:
            return ""
        parts = [say("panes.tokens", count=self.timing.tokens)]
        if self.speed:
            parts.append(f"{self.speed:.0f} {say('unit.tokens_per_second')}")
        if self.timing.ttft:
            parts.append(say("panes.first", span=wording.duration(self.timing.ttft)))
        return " · ".join(parts)

    def as_json(self, blind: bool, split: int | None) -> dict[str, JsonValue]:
        """For the script; a blind pane tells neither drift nor speed. `split`: where it left the first."""
        tokens: list[JsonValue] = [
            [t.text, t.probability, [[text, p] for text, p in t.top], None if blind else t.kl] for t in self.tokens
        ]
        drift = [t.kl for t in self.tokens if t.kl is not None]
        mean = say("panes.drift", kl=wording.digits(sum(drift) / len(drift), 2)) if drift else ""
        stats = "" if blind else " · ".join(part for part in (self.stats, mean) if part)
        return {
            "title": self.title, "note": self.note, "state": self.state, "stats": stats, "split": split,
            "tokens": tokens,
        }  # fmt: skip


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
            "panes": [pane.as_json(self.blind, at) for pane, at in zip(self.panes, self.splits(), strict=True)],
        }  # fmt: skip

    def split(self) -> int | None:
        """Where freely written texts first part; None for a common text, a blind vote, or no parting yet."""
        return min((place for place in self.splits() if place is not None), default=None)

    def splits(self) -> list[int | None]:
        """Where each text leaves the first one; for the first, where the earliest of the others leaves it."""
        if self.same_text or self.blind or len(self.panes) < 2:
            return [None] * len(self.panes)
        found = [parting(self.panes[0], pane) for pane in self.panes[1:]]
        return [min((place for place in found if place is not None), default=None), *found]

    def take(self, place: int, kind: str, data: dict[str, JsonValue]) -> None:
        """One event of `Scheduler.stream`."""
        pane = self.panes[place]
        if kind == "loading":
            pane.state, pane.note = "loading", say("panes.loading")
        elif kind == "token":
            pane.state, pane.note = "running", ""
            pane.tokens.append(Token.model_validate({key: data[key] for key in Token.model_fields if key in data}))
        elif kind == "done":
            pane.state, pane.note = "done", _ending(data)
            count = data.get("tokens")
            pane.timing = Timing(
                tokens=count if isinstance(count, int) else len(pane.tokens),
                tpot=_seconds(data.get("tpot")), ttft=_seconds(data.get("ttft")),
            )  # fmt: skip
        elif kind == "error":
            pane.state, pane.note = "failed", translate(str(data.get("text", "")))


def parting(a: Pane, b: Pane) -> int | None:
    """The first token that differs; None where none does so far."""
    pairs = enumerate(zip(a.tokens, b.tokens, strict=False))
    return next((i for i, (left, right) in pairs if left.text != right.text), None)


def stored(titles: Sequence[str], outputs: Sequence[Output | None], same_text: bool, key: str) -> Panes:
    """What runs wrote after the same fixed prompt. Same text: the others' view of the first's words, with their KL.

    A run keeps its view of its own original's words; where the first wrote others, there is nothing to show.
    """
    first, *others = outputs
    shown = [Pane(titles[0], list(first.tokens) if first else [])]
    shared = same_text and any(output and output.forced for output in others)
    for title, output in zip(titles[1:], others, strict=True):
        tokens = [] if output is None else list(output.forced if shared else output.tokens)
        if shared and "".join(token.text for token in tokens) != shown[0].text:
            tokens = []
        shown.append(Pane(title, tokens))
    for pane in shown:
        pane.note = "" if pane.tokens else say("panes.empty")
    return Panes(key, shown, shared)


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


def _ending(data: dict[str, JsonValue]) -> str:
    """Why a text ended before its time: a reader stopped it, or it came to a stop text."""
    if data.get("stopped"):
        return say("panes.stopped")
    ended = data.get("stop_string")
    return say("panes.ended", text=str(ended).replace("\n", "\\n")) if ended else ""


def _seconds(value: JsonValue) -> float | None:
    return float(value) if isinstance(value, int | float) and value > 0 else None


def prompts(outputs: Sequence[Output]) -> list[str]:
    """The fixed prompts that a run has answered."""
    return [output.prompt for output in outputs]
