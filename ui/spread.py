"""How far a measured time spreads: the one place that decides which percentiles its values can tell."""

from __future__ import annotations

from dataclasses import dataclass

from engine.records import Measurement
from engine.significance import tells


@dataclass(frozen=True)
class Spread:
    """Seconds of `count` values: their median, and of the tail what so many can tell; None for the rest."""

    count: int
    p50: float
    p95: float | None
    p99: float | None
    largest: float | None

    @property
    def tail(self) -> dict[str, float]:
        """What lies above the median by its name: percentiles, and instead of the last, where it is none, the largest.

        Nothing of one value, which is its own median.
        """
        last = ("p99", self.p99) if self.p99 is not None else ("largest", self.largest)
        named = (("p95", self.p95), last)
        return {name: seconds for name, seconds in named if seconds is not None} if self.count > 1 else {}


def spread(measurement: Measurement) -> Spread:
    """The spread that a latency's details tell of; runs that kept no count have it from their protocol."""
    count = _count(measurement)
    p50, p95, p99, largest = (_seconds(measurement, key) for key in ("p50", "p95", "p99", "largest"))
    if largest is None and round((count - 1) * 0.99) == count - 1:  # of so few the 99th percentile was the largest
        largest = p99
    return Spread(
        count, measurement.value if p50 is None else p50, p95 if tells(count, 95) else None,
        p99 if tells(count, 99) else None, largest if count else None,
    )  # fmt: skip


def _count(measurement: Measurement) -> int:
    """How many values there were; 0 where nothing says so."""
    known = measurement.details
    count, rows, tokens = (known.get(key) for key in ("count", "repetitions", "new_tokens"))
    if isinstance(count, int):
        return count
    if not isinstance(rows, int) or not isinstance(tokens, int):
        return 0
    return rows if measurement.name == "latency.ttft" else rows * (tokens - 1)


def _seconds(measurement: Measurement, key: str) -> float | None:
    found = measurement.details.get(key)
    return float(found) if isinstance(found, int | float) else None
