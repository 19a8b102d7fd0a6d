"""What processes that a run started say, as it comes."""

from __future__ import annotations

import os
import selectors
from collections.abc import Callable, Iterator
from typing import IO

from engine.records import EventKind


def lines(
    stream: IO[bytes], check_cancelled: Callable[[], None], look: Callable[[], None] = lambda: None
) -> Iterator[bytes]:
    """The lines of a pipe until its end; cancellation is looked at five times a second.

    look: is called whenever nothing was said for that long.
    """
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while True:
            check_cancelled()
            if not selector.select(0.2):
                look()
                continue
            got = os.read(stream.fileno(), 1 << 16)
            if not got:
                return
            *complete, rest = (rest + got).split(b"\n")
            yield from complete


def event_kind(name: str) -> EventKind:
    """The kind of that name, but for those that a run alone may say."""
    kinds: dict[str, EventKind] = {
        "phase": "phase", "progress": "progress", "sample": "sample", "log": "log", "estimate": "estimate",
        "measurement": "measurement", "output": "output", "diverged": "diverged",
    }  # fmt: skip
    return kinds[name]
