"""What a run has said so far, followed event by event: phases, live series, the last lines of its log.

A run of hours emits many thousands of samples. Each is read from the store once, however many visitors
look on, and a series keeps at most a thousand points, its peaks among them.
"""

from __future__ import annotations

import re
import threading
from collections import deque
from dataclasses import dataclass, field

from pydantic import JsonValue

from engine.records import Event, EventKind, Run
from engine.store import Store
from ui.live import Point, Series, thin

KINDS: tuple[EventKind, ...] = ("estimate", "phase", "progress", "sample", "log", "linear", "kept", "budget")
KEPT = 1000


@dataclass
class Story:
    """One attempt of one run as far as it is known. `phases` are (start, name); `seen` is a place in the store."""

    attempt: int
    seen: int = 0
    estimate: dict[str, JsonValue] = field(default_factory=dict)
    phases: list[tuple[float, str]] = field(default_factory=list)
    series: dict[str, tuple[str, list[Point]]] = field(default_factory=dict)
    log: deque[tuple[float, str]] = field(default_factory=lambda: deque(maxlen=200))
    linears: dict[str, dict[str, JsonValue]] = field(default_factory=dict)  # by name; also those of earlier attempts
    kept: dict[str, JsonValue] | None = None  # what quantization left as it is
    budget: dict[str, JsonValue] | None = None
    progress: dict[str, object] = field(default_factory=dict)

    def add(self, event: Event) -> None:
        """Take one event in."""
        self.seen = max(self.seen, event.number)
        if event.attempt < self.attempt and event.kind not in ("linear", "kept", "budget"):
            return
        if event.attempt > self.attempt:
            self.attempt = event.attempt
            self.estimate, self.phases, self.series, self.progress = {}, [], {}, {}
            self.log.clear()
        data = event.data
        if event.kind == "estimate":
            self.estimate = dict(data)
        elif event.kind == "phase":
            self.phases.append((event.time, str(data.get("name", ""))))
            self.progress = {}
        elif event.kind == "linear":
            self.linears[str(data.get("name"))] = dict(data)
        elif event.kind == "kept":
            self.kept = dict(data)
        elif event.kind == "budget":
            self.budget = dict(data)
        elif event.kind == "progress":
            self.progress = dict(data)
        elif event.kind == "log":
            self.log.append((event.time, str(data.get("text", ""))))
        elif event.kind == "sample" and isinstance(value := data.get("value"), int | float):
            _, points = self.series.setdefault(str(data.get("series")), (str(data.get("unit", "")), []))
            points.append((event.time, float(value)))
            if len(points) > 2 * KEPT:
                points[:] = thin(points, KEPT)


class Journal:
    """Stories of the runs somebody looks at; the least recently read is forgotten first."""

    def __init__(self, store: Store, capacity: int = 64) -> None:
        self._store, self._capacity = store, capacity
        self._stories: dict[str, Story] = {}
        self._guard = threading.Lock()

    def story(self, run: Run) -> Story:
        """The story of a run up to now. Read only; the next call may extend the same object."""
        with self._guard:
            story = self._stories.pop(run.id, None) or Story(run.attempt)
            # Nothing can come of a run that waits.
            fresh = self._store.events(run.id, after=story.seen, kinds=KINDS) if run.attempt else ()
            for event in fresh:
                story.add(event)
            self._stories[run.id] = story
            while len(self._stories) > self._capacity:
                self._stories.pop(next(iter(self._stories)))
            return story

    def series(self, run: Run) -> list[Series]:
        """The live series of a run, thinned to what a chart can show."""
        found = self.story(run).series
        return [Series(name, found[name][0], thin(found[name][1])) for name in sorted(found, key=_by_number)]


def _by_number(name: str) -> list[str | int]:
    """Sorts batch 4 before batch 16."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
