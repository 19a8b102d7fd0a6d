"""The texts that visitors had written last, kept for a while so that a report can show them.

In memory only, compressed, one a visitor and bounded in all: the oldest goes first.
"""

from __future__ import annotations

import threading
import zlib
from collections import OrderedDict

from engine.records import Record, Token
from ui.asked import Asked

MOST = 200  # visitors
BYTES = 32 << 20  # of all together, compressed


class Timing(Record):
    """How many tokens were written and how fast: seconds for each further one, and until the first; None: unknown."""

    tokens: int
    tpot: float | None = None
    ttft: float | None = None


class WrittenPane(Record):
    """One model's text: its title, its tokens, how fast it was, and what was said about it."""

    title: str
    tokens: tuple[Token, ...] = ()
    note: str = ""
    timing: Timing | None = None


class Written(Record):
    """What was asked, and what each model wrote."""

    asked: Asked
    panes: tuple[WrittenPane, ...]


class Shelf:
    """The last texts of each visitor."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._guard = threading.Lock()

    def put(self, owner: str, written: Written) -> None:
        """Keep a visitor's texts instead of the earlier ones."""
        packed = zlib.compress(written.model_dump_json().encode(), 1)
        with self._guard:
            self._kept[owner] = packed
            self._kept.move_to_end(owner)
            while len(self._kept) > MOST or (len(self._kept) > 1 and sum(map(len, self._kept.values())) > BYTES):
                self._kept.popitem(last=False)

    def find(self, owner: str, asked: Asked) -> Written | None:
        """The visitor's texts for exactly this comparison, if they were the last that were written."""
        with self._guard:
            packed = self._kept.get(owner)
        if packed is None:
            return None
        written = Written.model_validate_json(zlib.decompress(packed))
        return written if written.asked == asked else None
