"""Our charts as still SVG: the same traces that plotly draws, for files that may run no script.

Reads the figures of `ui.charts` - lines, points and bars, their whiskers, one band - and draws these with attributes
alone, so that a page that forbids inline styles shows them too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
from markupsafe import Markup

from ui.markup import join, tag

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 70, 16, 14, 46
INK, LINE = "#3f3f46", "#d4d4d8"
LETTER = 6.6  # pixels of one letter of the axis, about


@dataclass(frozen=True)
class Axis:
    """From values, or names of categories, to pixels."""

    low: float
    high: float
    start: float
    end: float
    names: tuple[str, ...] = ()

    def place(self, value: object) -> float:
        """Where a value lies; a category in the middle of its share."""
        number = self.names.index(str(value)) + 0.5 if self.names else float(str(value))
        return self.start + (number - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """About five round numbers, or every category."""
        if self.names:
            return [(self.place(name), name) for name in self.names]
        step = _round_step((self.high - self.low) / 5)
        first = math.ceil(self.low / step - 1e-9)
        numbers = [step * i for i in range(first, math.floor(self.high / step + 1e-9) + 1)]
        return [(self.place(number), f"{number:.10g}") for number in numbers]


def draw(figure: go.Figure, label: str) -> Markup:
    """One figure as SVG that screen readers know by `label`."""
    traces = list(figure.data)
    names = {axis: _categories([getattr(trace, axis) for trace in traces]) for axis in "xy"}
    longest = max((len(name) for name in names["y"]), default=0)
    left = max(LEFT, min(300, round(12 + LETTER * longest)))
    x = _axis(traces, "x", names["x"], left, WIDTH - RIGHT, figure.layout.xaxis)
    y = _axis(traces, "y", names["y"], HEIGHT - BOTTOM, TOP, figure.layout.yaxis)
    bars = [trace for trace in traces if trace.type == "bar"]
    parts: list[Markup] = [*_bands(figure, x, y), *_grid(x, y, figure)]
    for trace in traces:
        parts += _bars(trace, bars, x, y) if trace.type == "bar" else _points(trace, x, y)
    named = [trace for trace in traces if trace.name and trace.showlegend is not False]
    return tag(
        "figure", tag("figcaption", label), tag(
            "svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label, width=WIDTH, height=HEIGHT
        ), _legend(named),
    )  # fmt: skip


def _categories(rows: Sequence[Sequence[object] | None]) -> tuple[str, ...]:
    """The names along an axis in order of appearance; none where its values are numbers."""
    values = [value for row in rows if row is not None for value in row]
    return tuple(dict.fromkeys(map(str, values))) if any(isinstance(value, str) for value in values) else ()


def _axis(
    traces: Sequence[go.Figure], axis: str, names: tuple[str, ...], start: float, end: float, layout: go.layout.XAxis
) -> Axis:  # fmt: skip
    if names:
        if axis == "y":  # from the top, as our charts with names on that axis are read
            start, end = end, start
        return Axis(0, len(names), start, end, names)
    ends: list[float] = [0.0] if layout.rangemode == "tozero" or any(t.type == "bar" for t in traces) else []
    for trace in traces:
        values = getattr(trace, axis)
        whiskers = _whiskers(trace, len(values)) if axis == "y" else [(0.0, 0.0)] * len(values)
        for value, (down, up) in zip(values, whiskers, strict=True):
            ends += [] if value is None else [float(value) - down, float(value) + up]
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    if layout.range is not None:
        low, high = float(layout.range[0]), float(layout.range[1])
    room = (high - low or abs(high) or 1.0) * 0.06
    return Axis(low if low == 0 or layout.range is not None else low - room, high + room, start, end)


def _whiskers(trace: go.Figure, count: int) -> list[tuple[float, float]]:
    """How far each reaches down and up."""
    if trace.error_y is None or trace.error_y.array is None:
        return [(0.0, 0.0)] * count
    up = [float(half or 0) for half in trace.error_y.array]
    below = trace.error_y.arrayminus
    return list(zip(up if below is None else [float(half or 0) for half in below], up, strict=True))


def _bands(figure: go.Figure, x: Axis, y: Axis) -> list[Markup]:
    """The noise: between two heights, over the whole width."""
    found = []
    for shape in figure.layout.shapes:
        top, bottom = (min(max(y.place(v), TOP), HEIGHT - BOTTOM) for v in (shape.y1, shape.y0))
        found.append(
            tag("rect", x=x.start, y=_n(top), width=_n(x.end - x.start), height=_n(bottom - top), fill="#ececef")
        )
    for note in figure.layout.annotations:
        at = min(max(y.place(note.y), TOP + 12), HEIGHT - BOTTOM)
        found.append(_text(note.text, x.end - 4, at - 4, "end", "#71717a"))
    return found


def _grid(x: Axis, y: Axis, figure: go.Figure) -> list[Markup]:
    """Lines and numbers of both axes, and their titles."""
    parts = []
    left, right, bottom = x.start, x.end, HEIGHT - BOTTOM
    for place, name in y.ticks():
        parts.append(_line(left, place, right, place, LINE))
        parts.append(_text(name, left - 8, place + 4, "end", INK))
    for place, name in x.ticks():
        if not x.names:
            parts.append(_line(place, TOP, place, bottom, LINE))
        parts.append(_text(name, place, bottom + 17, "middle", INK))
    parts.append(_line(left, bottom, right, bottom, INK))
    for text, where in ((figure.layout.xaxis.title.text, ((left + right) / 2, HEIGHT - 8, None)),
                        (figure.layout.yaxis.title.text, (14, (TOP + bottom) / 2, True))):  # fmt: skip
        if text:
            across, down, turned = where
            parts.append(
                _text(text, across, down, "middle", INK, f"rotate(-90 {_n(across)} {_n(down)})" if turned else None)
            )
    return parts


def _bars(trace: go.Figure, bars: Sequence[go.Figure], x: Axis, y: Axis) -> list[Markup]:
    """A bar beside those of the other traces, with its whiskers."""
    parts: list[Markup] = []
    share = (x.end - x.start) / max(1, len(x.names)) * 0.75
    width = share / len(bars)
    offset = -share / 2 + width * next(i for i, each in enumerate(bars) if each is trace)
    for name, value, reach in zip(trace.x, trace.y, _whiskers(trace, len(trace.y)), strict=True):
        if value is None:
            continue
        left, top, base = x.place(name) + offset, y.place(value), y.place(max(0.0, y.low))
        colour = str(trace.marker.color)
        parts.append(
            tag("rect", x=_n(left), y=_n(top), width=_n(width - 2), height=_n(max(0.0, base - top)), fill=colour)
        )
        parts += _whisker(left + width / 2 - 1, value, reach, y, INK)
    return parts


def _points(trace: go.Figure, x: Axis, y: Axis) -> list[Markup]:
    """A line through its points, the points with their whiskers, and what is written beside them."""
    places = [(x.place(a), y.place(b)) for a, b in zip(trace.x, trace.y, strict=True) if b is not None]
    mode, parts = trace.mode or "lines", []
    if "lines" in mode and len(places) > 1:
        dash = "3 4" if trace.line.dash == "dot" else None
        points = " ".join(f"{_n(a)},{_n(b)}" for a, b in places)
        parts.append(tag("polyline", points=points, fill="none", stroke=str(trace.line.color), stroke_width=2,
                         stroke_dasharray=dash))  # fmt: skip
    if "markers" not in mode:
        return parts
    colour = str(trace.marker.color or trace.line.color)
    for number, (across, down) in enumerate(places):
        reach = _whiskers(trace, len(places))[number]
        parts += [] if y.names else _whisker(across, float(trace.y[number]), reach, y, colour)
        parts.append(tag("circle", cx=_n(across), cy=_n(down), r=5 if number == 0 or not y.names else 3, fill=colour))
    if "text" in mode and places:
        across, down = places[0]
        end = across > (x.start + x.end) / 2
        parts.append(_text(str(trace.text[0]), across + (-9 if end else 9), down - 8, "end" if end else "start", INK))
    return parts


def _whisker(across: float, value: float, reach: tuple[float, float], y: Axis, colour: str) -> list[Markup]:
    if max(reach) <= 0:
        return []
    bottom, top = y.place(value - reach[0]), y.place(value + reach[1])
    ends = [_line(across - 4, place, across + 4, place, colour) for place in (top, bottom)]
    return [_line(across, top, across, bottom, colour), *ends]


def _legend(traces: Sequence[go.Figure]) -> Markup | None:
    if len(traces) < 2:
        return None
    items = []
    for trace in traces:
        colour = str(trace.marker.color or trace.line.color)
        key = tag("svg", tag("rect", width=12, height=12, fill=colour), width=12, height=12, aria_hidden="true")
        items.append(tag("li", key, f" {trace.name}"))
    return tag("ul", join(items), class_="key")


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> Markup:
    return tag("line", x1=_n(x1), y1=_n(y1), x2=_n(x2), y2=_n(y2), stroke=colour)


def _text(text: str, x: float, y: float, anchor: str, colour: str, transform: str | None = None) -> Markup:
    return tag("text", text, x=_n(x), y=_n(y), text_anchor=anchor, font_size=12, fill=colour, transform=transform)


def _n(number: float) -> str:
    return f"{number:.1f}"


def _round_step(rough: float) -> float:
    """1, 2 or 5 times a power of ten, not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
