"""How often somebody may do something: a bucket for each name, which fills again by itself.

    rates.take("start", owner, 6)                   # six in a minute, or the seconds to wait
    rates.take("request", owner, 600, at_once=120)  # ten a second, and no more than 120 together

Names that were not seen for longest are forgotten, and begin with a full bucket.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict

from engine.errors import TooMany

MINUTE = 60.0
MOST = 20_000  # names that are remembered; who was not seen for longest is forgotten, with a full bucket


class RateLimits:
    """Buckets by (what, who). The first come at once, `per_minute` or `at_once`, then one every 60 / per_minute s."""

    def __init__(self) -> None:
        self._buckets: OrderedDict[tuple[str, str], tuple[float, float]] = OrderedDict()  # (left, as of when)
        self._guard = threading.Lock()

    def take(
        self, what: str, who: str, per_minute: int | None, now: float | None = None, at_once: int | None = None
    ) -> float:
        """0 where it may be done, and counts it; else the seconds to wait. None: no limit."""
        if per_minute is None:
            return 0.0
        now = time.monotonic() if now is None else now
        most = float(at_once or per_minute)
        with self._guard:
            left, then = self._buckets.pop((what, who), (most, now))
            left = min(most, left + (now - then) * per_minute / MINUTE)
            allowed = left >= 1
            self._buckets[what, who] = (left - allowed, now)
            while len(self._buckets) > MOST:
                self._buckets.popitem(last=False)
        return 0.0 if allowed else (1 - left) * MINUTE / per_minute

    def require(self, what: str, who: str, per_minute: int | None) -> None:
        """As `take`.

        Raises:
            TooMany: it may not be done yet; with the seconds to wait.
        """
        wait = self.take(what, who, per_minute)
        if wait:
            raise TooMany(f"That was too often in a short time. Try again in {math.ceil(wait)} seconds.")
