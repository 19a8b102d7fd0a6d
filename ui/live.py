"""Charts that move: small SVG lines for the status strip and for a run that works.

Plain SVG through one `gr.HTML` costs a few milliseconds a tick where a Plotly figure costs sixty. Pure
functions from points to markup; no axis is drawn that does not carry a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ui import markup, wording
from ui.wording import say

Point = tuple[float, float]
WIDTH, HEIGHT = 640, 150


@dataclass(frozen=True)
class Series:
    """A line of a live chart: points are (seconds since the epoch, value), `unit` as in the sample events."""

    name: str
    unit: str
    points: tuple[Point, ...]


def sparkline(values: Sequence[float], label: str, top: float | None = None) -> Markup:
    """The last minute as a line of 120 x 24 without axes; `top` fixes the scale (100 for a percentage)."""
    if len(values) < 2:
        values = [values[0] if values else 0.0] * 2
    high = top or max(max(values), 1e-9)
    step = 120 / (len(values) - 1)
    line = " ".join(f"{i * step:.1f},{23 - 21 * min(1.0, max(0.0, v / high)):.1f}" for i, v in enumerate(values))
    return markup.tag(
        "svg", markup.tag("polyline", points=line), viewBox="0 0 120 24", preserveAspectRatio="none",
        class_="mq-spark", role="img", aria_label=label,
    )  # fmt: skip


@dataclass(frozen=True)
class Expected:
    """What a run was estimated to take: its peak in the series' unit, and when it would be done (epoch seconds)."""

    peak: float
    done: float


def lines(series: Series, phases: Sequence[tuple[float, str]] = (), expected: Expected | None = None) -> Markup:
    """One series over time, the phases as bands below it, and what was expected as two dashed lines."""
    if not series.points:
        return Markup("")
    start, last_seen = series.points[0][0], max(series.points[-1][0], series.points[0][0] + 1e-3)
    end = max(last_seen, expected.done) if expected else last_seen
    high = 1.08 * max([value for _, value in series.points] + ([expected.peak] if expected else [])) or 1.0

    def x(moment: float) -> float:
        return WIDTH * min(1.0, max(0.0, (moment - start) / (end - start)))

    def y(value: float) -> float:
        return HEIGHT * (1 - max(0.0, value) / high)

    drawn = " ".join(f"{x(t):.1f},{y(v):.1f}" for t, v in series.points)
    if phases and phases[0][0] > start:  # what came before the first phase has a width, too
        phases = [(start, say("phase.start")), *phases]
    edges = [*(moment for moment, _ in phases[1:]), last_seen] if phases else []
    bands = [
        markup.tag(
            "rect", x=f"{x(moment):.1f}", y=0, width=f"{max(0.0, x(until) - x(moment)):.1f}", height=HEIGHT,
            class_="band even" if index % 2 == 0 else "band",
        )
        for index, ((moment, _), until) in enumerate(zip(phases, edges, strict=True))
        if until > start
    ]  # fmt: skip
    bounds = _bounds(x(expected.done), y(expected.peak)) if expected else ()
    peak = max(value for _, value in series.points)
    last = series.points[-1][1]
    text = say(
        "live.summary", name=series.name, last=wording.quantity(last, series.unit),
        peak=wording.quantity(peak, series.unit), span=wording.duration(last_seen - start),
    )  # fmt: skip
    drawing = markup.tag(
        "svg", *bands, *bounds, markup.tag("polyline", points=drawn), viewBox=f"0 0 {WIDTH} {HEIGHT}",
        preserveAspectRatio="none", class_="mq-lines", role="img", aria_label=text,
    )  # fmt: skip
    items = [_phase(*p, edges[i], start, end) for i, p in enumerate(phases) if edges[i] > start]
    names = markup.tag("ol", *items, class_="mq-phases")
    head = markup.tag(
        "div", markup.tag("strong", series.name), markup.tag("span", text.split(": ", 1)[-1]), class_="mq-line"
    )
    note = _note(expected, series.unit, start) if expected else None
    return markup.tag("figure", head, drawing, names if phases else None, note, class_="mq-live")


def _note(expected: Expected, unit: str, start: float) -> Markup:
    span = wording.duration(max(0.0, expected.done - start))
    text = say("live.expected", peak=wording.quantity(expected.peak, unit), span=span)
    return markup.tag("figcaption", text, class_="mq-sub")


def _bounds(x: float, y: float) -> tuple[Markup, Markup]:
    """A dashed line across at `y` and one down at `x`."""
    across = markup.tag("line", x1=0, x2=WIDTH, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="limit")
    return across, markup.tag("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=0, y2=HEIGHT, class_="limit")


def _phase(moment: float, label: str, until: float, start: float, end: float) -> Markup:
    span = max(until - max(moment, start), 0.0)
    share = f"width:{100 * span / (end - start):.2f}%"  # as wide as its band above
    return markup.tag("li", label, markup.tag("small", wording.duration(span)), style=share, title=label)


def thin(points: Sequence[Point], limit: int = 400) -> tuple[Point, ...]:
    """At most `limit` points: each bucket keeps its highest, so that no peak is lost."""
    if len(points) <= limit:
        return tuple(points)
    step = len(points) / limit
    buckets = [points[int(i * step) : int((i + 1) * step)] for i in range(limit)]
    kept = [max(bucket, key=lambda point: point[1]) for bucket in buckets if bucket]
    kept[-1] = points[-1]
    return tuple(kept)
