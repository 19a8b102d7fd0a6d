"""Numbers in the units that people read: bytes in MiB, seconds in ms, shares in per cent; ± is a 95 % interval.

Records hold SI units and standard errors. Pure functions, in no language: `ui.wording` has the page's words for these.
"""

from __future__ import annotations

import math

from engine.records import Measurement
from engine.significance import Z95

FRACTIONS = ("accuracy", "top1_agreement", "flips", "size.sparsity")
SECONDS = ("s", "second", "seconds")  # how a record may call them
INTERVAL = "± is a 95 % interval."


def digits(value: float, figures: int = 3) -> str:
    """`value` with about three significant figures and no exponent where one can read without."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    places = max(0, figures - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}" if places <= 6 else f"{value:.1e}"


def size(count: float) -> tuple[str, str]:
    """Bytes in binary units with three digits: `7.42`, `MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1000 or unit == "TiB":
            return (f"{count:.0f}" if unit == "B" else digits(count)), unit
        count /= 1024
    raise AssertionError


def duration(seconds: float) -> tuple[str, str]:
    """Seconds as `420`, `µs`; `31`, `ms` or `4.2`, `s`."""
    if seconds < 0.001:
        return digits(seconds * 1e6), "µs"
    if seconds < 1:
        return digits(seconds * 1e3), "ms"
    return digits(seconds, 2), "s"


def percent(fraction: float) -> str:
    """A fraction in per cent with one decimal, or none where it is round: `92.4`."""
    return f"{100 * fraction:.1f}".removesuffix(".0")


def scaled(value: float, unit: str, label: str = "") -> tuple[str, str]:
    """A number of a record called `label` and its unit, both as they are read; of a plain number no unit."""
    family = label.split(".")[0]
    if unit in ("B", "byte", "bytes", "B/s"):
        text, prefix = size(value)
        return text, f"{prefix}/s" if unit == "B/s" else prefix
    if unit in SECONDS:
        return duration(value)
    if unit in ("fraction", "%") or family in FRACTIONS or label in FRACTIONS:
        return percent(value), "%"
    if family == "throughput":
        return digits(value), "tokens/s"
    return digits(value), "" if unit in ("", "1", "ratio", label) else unit


def shown(measurement: Measurement) -> str:
    """Its value and, where an error is known, its 95 % interval: `31.2 ms ± 1.3 ms`."""
    text = _one(measurement, measurement.value)
    return f"{text} ± {_one(measurement, Z95 * measurement.error)}" if measurement.error else text


def difference(a: Measurement, b: Measurement) -> str:
    """From A to B with its sign: `-2.74 MiB`, of shares in points."""
    change = b.value - a.value
    text, unit = scaled(abs(change), a.unit, a.name)
    return f"{'-' if change < 0 else '+'}{text} {'points' if unit == '%' else unit}".rstrip()


def _one(measurement: Measurement, value: float) -> str:
    return " ".join(scaled(value, measurement.unit, measurement.name)).rstrip()
