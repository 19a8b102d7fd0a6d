"""Which of a page's texts are being written, and which were stopped.

A page is one Gradio session. Its clicks arrive over HTTP and may overtake one another, so each carries the
time at which the visitor clicked: a Stop ends what was started before it, even what arrives after it. However many
pages a visitor has, one text is written at a time: the newest.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field

CLICKED = "(...values) => [...values.slice(0, -1), Date.now()]"  # the last input becomes the time of the click
MOST = 1000  # pages whose last Stop is remembered


@dataclass(eq=False)
class Turn:
    """One text being written. `replaced`: the page has begun another, so this one must not draw any more."""

    clicked: float
    owner: str = ""
    stop: threading.Event = field(default_factory=threading.Event)
    replaced: bool = False


class Turns:
    """The turn of each page; the times are the browser's, in milliseconds."""

    def __init__(self) -> None:
        self._running: dict[str, Turn] = {}
        self._stops: OrderedDict[str, float] = OrderedDict()
        self._guard = threading.Lock()

    def begin(self, page: str, clicked: float, owner: str = "") -> Turn:
        """A new turn of the page, stopped already where a later Stop came first.

        It ends the page's earlier one, and stops what the same visitor has written on other pages.
        """
        turn = Turn(clicked, owner)
        with self._guard:
            for other in self._running.values():
                if owner and other.owner == owner:
                    other.stop.set()
            earlier = self._running.get(page)
            if earlier is not None:
                earlier.replaced = True
                earlier.stop.set()
            if self._stops.get(page, 0.0) >= clicked:
                turn.stop.set()
            self._running[page] = turn
        return turn

    def end(self, page: str, turn: Turn) -> None:
        """The turn writes no more."""
        turn.stop.set()
        with self._guard:
            if self._running.get(page) is turn:
                del self._running[page]

    def stop(self, page: str, clicked: float) -> None:
        """End what the page started before this click."""
        with self._guard:
            self._stops[page] = clicked
            self._stops.move_to_end(page)
            while len(self._stops) > MOST:
                self._stops.popitem(last=False)
            turn = self._running.get(page)
            if turn is not None and turn.clicked <= clicked:
                turn.stop.set()
