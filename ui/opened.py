"""Which shared runs of others a visitor has opened by a link: they stay in the pickers while the server runs."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable

MOST = 1000  # visitors
EACH = 20  # runs of one visitor; the one that was opened first goes first


class Opened:
    """Run ids by visitor, in memory only."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[str, ...]] = OrderedDict()
        self._guard = threading.Lock()

    def add(self, owner: str, run_ids: Iterable[str]) -> None:
        """Note what a link has opened, the newest last."""
        fresh = tuple(dict.fromkeys(run_ids))
        if not fresh:
            return
        with self._guard:
            known = tuple(each for each in self._kept.pop(owner, ()) if each not in fresh)
            self._kept[owner] = (*known, *fresh)[-EACH:]
            while len(self._kept) > MOST:
                self._kept.popitem(last=False)

    def of(self, owner: str) -> tuple[str, ...]:
        """What one visitor has opened, the first first."""
        with self._guard:
            return self._kept.get(owner, ())
