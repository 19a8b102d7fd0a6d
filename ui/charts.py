"""Charts that are studied: pure functions from measurements to a Plotly figure and the same numbers as a table.

Colours hold on light and dark paper; a dark page recolours text and grid by CSS. Every chart has a table
for screen readers, so that nothing is said by colour or position alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
from markupsafe import Markup

from engine.records import Measurement
from ui import markup, sheet, wording
from ui.messages import translate_list
from ui.spread import Spread, spread
from ui.wording import Measured, say

ACCENT = "#4f46e5"
GREY = "#737380"
# Okabe and Ito's palette for colour-blind readers, after our grey and accent; dark enough on white.
COLOURS = (GREY, ACCENT, "#c2570c", "#0e7a5f", "#a21caf", "#0369a1")
FONT = "system-ui, PingFang SC, Microsoft YaHei, Noto Sans CJK SC, sans-serif"
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star")
TIMES = {"p50": "circle", "p95": "line-ns-open", "p99": "x-thin-open", "largest": "diamond-open"}
NAMED_POINTS = 4
Named = tuple[str, Measured]


@dataclass(frozen=True)
class Chart:
    """A figure and the same numbers as rows of text; `figure` is None where there is nothing to draw."""

    figure: go.Figure | None
    caption: str
    headers: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()

    def table(self) -> Markup:
        """The numbers behind the figure, one click away, and as a CSV file."""
        if not self.rows:
            return Markup("")
        file = sheet.write([self.headers, *self.rows])
        return markup.details(
            say("chart.numbers", chart=self.caption),
            markup.table(self.headers, self.rows, caption=self.caption),
            markup.file_link(say("chart.csv"), file, "maquette-chart.csv"),
        )


def pareto(runs: Sequence[Named], cost: str = "size.bytes", quality: str = "perplexity") -> Chart:
    """Cost against quality, one point a run with its 95 % interval, and the front that no other run beats.

    `cost` is lower-is-better; the direction of `quality` stands in its records.
    """
    points = [(label, m[cost], m[quality]) for label, m in runs if cost in m and quality in m]
    caption = say("chart.pareto", cost=wording.name(cost), quality=wording.name(quality))
    if not points:
        return Chart(None, caption)
    divisor, cost_unit = _scale(points[0][1], max(p[1].value for p in points))
    share = 100 if quality in wording.FRACTIONS else 1
    figure = empty_figure(say("axis.with", name=wording.name(cost), what=cost_unit), axis_title(points[0][2]))
    edge = front([(x.value, y.value) for _, x, y in points], higher=bool(points[0][2].higher_is_better))
    line = sorted((points[i][1].value / divisor, points[i][2].value * share) for i in edge)
    figure.add_scatter(
        x=[x for x, _ in line], y=[y for _, y in line], mode="lines", name=say("chart.front"), hoverinfo="skip",
        line={"color": ACCENT, "width": 1.5, "dash": "dot"},
    )  # fmt: skip
    middle = (min(p[1].value for p in points) + max(p[1].value for p in points)) / 2
    named = len(points) <= NAMED_POINTS  # more names would lie on one another: then the legend has them
    for number, (label, x, y) in enumerate(points):
        index = 0 if label == say("original.title") else 1 + number  # the original is grey
        figure.add_scatter(
            x=[x.value / divisor], y=[y.value * share], name=label, text=[label],
            mode="markers+text" if named else "markers",
            textposition="top right" if x.value <= middle else "top left", cliponaxis=False, showlegend=not named,
            marker={"size": 11, "color": colour(index), "symbol": symbol(index)},
            error_y={**whiskers([y], share), "thickness": 1.5, "width": 5},
            hovertemplate=f"%{{text}}<br>{wording.value(x)}<br>{wording.value(y)} {wording.error(y)}<extra></extra>",
        )  # fmt: skip
    _noise(figure, points, share)
    rows = tuple(
        (
            label,
            wording.value(x),
            wording.shown(y),
            say("yes") if i in edge else say("no"),
        )
        for i, (label, x, y) in enumerate(points)
    )
    headers = (say("run"), wording.name(cost), wording.name(quality), say("chart.on_front"))
    return Chart(figure, caption, headers, rows)


def _noise(figure: go.Figure, points: Sequence[tuple[str, Measurement, Measurement]], share: float) -> None:
    """A band around the original's quality: what lies in it is as good as the original as far as one can measure."""
    base = next((y for label, _, y in points if label == say("original.title")), None)
    others = [y for label, _, y in points if label != say("original.title")]
    if base is None or not others or not base.error:
        return
    half = 2 * math.hypot(base.error, max(y.error or 0 for y in others))
    low, high = (base.value - half) * share, (base.value + half) * share
    reach = [(y.value + side * 1.96 * (y.error or 0)) * share for _, _, y in points for side in (-1, 1)]
    bottom, top = min(low, *reach), max(high, *reach)
    room = (top - bottom) * 0.08
    figure.update_yaxes(range=[bottom - room, top + room])  # around the band, which else looks like the chart's ground
    figure.add_hrect(
        y0=low, y1=high, line_width=0, layer="below",
        fillcolor="rgba(128,128,140,0.1)", annotation={"text": say("chart.noise"), "font": {"size": 11}},
        annotation_position="bottom right",
    )  # fmt: skip


def whiskers(found: Sequence[Measurement | None], share: float = 1) -> dict[str, object]:
    """95 % intervals for plotly; none reaches below 0, for nothing that we draw does."""
    up = [1.96 * (m.error or 0) * share if m else 0.0 for m in found]
    down = [min(half, max(0.0, m.value * share)) if m else 0.0 for m, half in zip(found, up, strict=True)]
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down}


def front(points: Sequence[tuple[float, float]], *, higher: bool) -> list[int]:
    """Which (cost, quality) points no other point beats: not dearer and better, or cheaper and as good."""
    sign = -1.0 if higher else 1.0
    kept = []
    for i, (cost, quality) in enumerate(points):
        beaten = any(
            c <= cost and sign * q <= sign * quality and (c < cost or sign * q < sign * quality)
            for j, (c, q) in enumerate(points)
            if j != i
        )
        if not beaten:
            kept.append(i)
    return kept


def accuracy(runs: Sequence[Named]) -> Chart:
    """Share of right answers per task with its 95 % interval, one group of bars a task."""
    tasks = sorted({key for _, m in runs for key in m if key.startswith("accuracy.")})
    caption = say("chart.accuracy")
    if not tasks:
        return Chart(None, caption)
    names = [wording.task(key.removeprefix("accuracy.")) for key in tasks]
    figure = empty_figure("", say("axis.percent"))
    for index, (label, measured) in enumerate(runs):
        found = [measured.get(task) for task in tasks]
        figure.add_bar(
            x=names, y=[100 * m.value if m else None for m in found], name=label, marker_color=colour(index),
            error_y={**whiskers(found, 100), "width": 4},
            marker_pattern_shape="" if index % 2 == 0 else "/", marker_pattern_fillmode="overlay",
            marker_pattern_size=6, marker_pattern_solidity=0.15,
        )  # fmt: skip
    figure.update_layout(barmode="group", bargap=0.25)
    figure.update_yaxes(range=[0, 105])
    return Chart(figure, caption, (say("run"), *names), _rows(runs, tasks))


def latency(runs: Sequence[Named]) -> Chart:
    """Where the times of the first token and of each further one lie: the median, and of the tail what can be told."""
    keys = ("latency.ttft", "latency.tpot")
    caption = say("chart.latency")
    spans = [(label, m[key], spread(m[key])) for label, m in runs for key in keys if key in m]
    if not spans:
        return Chart(None, caption)
    labels = list(dict.fromkeys(label for label, _, _ in spans))
    figure = empty_figure(say("axis.ms"), "")
    for label, found, times in spans:
        index = labels.index(label)
        points = {"p50": times.p50, **times.tail}
        names = [say("chart.largest.of", count=times.count) if key == "largest" else key for key in points]
        row = f"{say('short.' + found.name)} · {label}"
        figure.add_scatter(
            x=[1e3 * p for p in points.values()], y=[row] * len(points), mode="lines+markers", showlegend=False,
            name=label, line={"color": colour(index), "width": 3}, customdata=names,
            marker={"size": [13, 9, 9], "symbol": [TIMES[key] for key in points], "line": {"width": 2}},
            text=[_kernel(found)] * len(points),
            hovertemplate="%{customdata}: %{x:.3g} ms<br>%{text}<extra>%{y}</extra>",
        )  # fmt: skip
    figure.update_xaxes(rangemode="tozero")
    figure.update_yaxes(autorange="reversed")
    rows = tuple((label, wording.name(found.name), *_times(times), _kernel(found)) for label, found, times in spans)
    tail = ("p50", "p95", "p99", say("chart.largest"))
    return Chart(figure, caption, (say("run"), say("measurement"), *tail, say("chart.kernel")), rows)


def _times(times: Spread) -> tuple[str, ...]:
    """Median, 95th and 99th percentile, and the largest of how many; a dash for what so few values cannot tell."""
    percentiles = (wording.duration(p) if p is not None else "–" for p in (times.p50, times.p95, times.p99))
    if times.largest is None:
        return (*percentiles, "–")
    return (*percentiles, f"{wording.duration(times.largest)} ({say('chart.largest.of', count=times.count)})")


def memory(runs: Sequence[Named]) -> Chart:
    """Memory after loading and at its peak while generating, and the bytes on disk beside them."""
    keys = ("size.bytes", "memory.loaded", "memory.peak")
    caption = say("chart.memory")
    present = [key for key in keys if any(key in m for _, m in runs)]
    if not present:
        return Chart(None, caption)
    top = max(m[key].value for _, m in runs for key in present if key in m)
    divisor, unit = _bytes(top)
    figure = empty_figure("", unit)
    names = [wording.name(key) for key in present]
    for index, (label, measured) in enumerate(runs):
        values = [measured[key].value / divisor if key in measured else None for key in present]
        figure.add_bar(x=names, y=values, name=label, marker_color=colour(index), hovertemplate="%{y:.3g} " + unit)
    figure.update_layout(barmode="group", bargap=0.25)
    return Chart(figure, caption, (say("run"), *names), _rows(runs, present))


def batches(runs: Sequence[Named]) -> Chart:
    """Tokens a second of all texts together by batch size, with 95 % intervals; a step's time where it was kept."""
    sizes = sorted({int(key[12:]) for _, m in runs for key in m if re.fullmatch(r"throughput\.b\d{1,4}", key)})
    caption = say("chart.batches")
    if not sizes:
        return Chart(None, caption)
    figure = empty_figure(say("axis.batch"), say("unit.tokens_per_second"))
    rows = []
    for index, (label, measured) in enumerate(runs):
        found = [(size, measured[f"throughput.b{size}"]) for size in sizes if f"throughput.b{size}" in measured]
        figure.add_scatter(
            x=[str(size) for size, _ in found], y=[m.value for _, m in found], name=label, mode="lines+markers",
            line={"color": colour(index), "width": 2}, marker={"size": 9, "symbol": symbol(index)},
            error_y={**whiskers([m for _, m in found]), "thickness": 1.5, "width": 5},
            hovertemplate="%{y:.4g} " + say("unit.tokens_per_second"),
        )  # fmt: skip
        rows += [(label, str(size), wording.shown(m), _step(m), _kernel(m)) for size, m in found]
    figure.update_xaxes(type="category")
    figure.update_yaxes(rangemode="tozero")
    headers = (say("run"), say("axis.batch"), say("chart.throughput"), say("chart.step"), say("chart.kernel"))
    return Chart(figure, caption, headers, tuple(rows))


def _step(measurement: Measurement) -> str:
    """How long one step of the batch took."""
    seconds, error = (measurement.details.get(key) for key in ("tpot", "tpot_error"))
    if not isinstance(seconds, int | float):
        return "–"
    whiskers = f" ± {wording.duration(1.96 * error)}" if isinstance(error, int | float) and error > 0 else ""
    return wording.duration(seconds) + whiskers


def _kernel(measurement: Measurement) -> str:
    """Which kernels computed."""
    known = measurement.details
    return translate_list(str(known.get("kernels", known.get("kernel", "–")))[:120])


def _rows(runs: Iterable[Named], keys: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    return tuple((label, *(wording.shown(m[k]) if k in m else "–" for k in keys)) for label, m in runs)


def _scale(measurement: Measurement, top: float) -> tuple[float, str]:
    if measurement.unit in ("B", "byte", "bytes"):
        return _bytes(top)
    return (1e-3, "ms") if measurement.unit in ("s", "seconds") else (1.0, measurement.unit)


def _bytes(top: float) -> tuple[float, str]:
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    step = next((i for i in range(len(units)) if top < 1000 * 1024**i), len(units) - 1)
    return 1024.0**step, units[step]


def axis_title(measurement: Measurement) -> str:
    """A quality's name with its unit and the direction that is better."""
    direction = say("axis.higher" if measurement.higher_is_better else "axis.lower")
    name = wording.name(measurement.name)
    if measurement.name in wording.FRACTIONS:
        name = say("axis.with", name=name, what="%")
    return say("axis.directed", name=name, direction=direction)


def colour(index: int) -> str:
    """The colour of the series of that index: grey for 0, which is the original's; the others in turn."""
    return COLOURS[index if index == 0 else 1 + (index - 1) % (len(COLOURS) - 1)]


def symbol(index: int) -> str:
    """Its mark; six marks and five colours make thirty pairs."""
    return SYMBOLS[index % len(SYMBOLS)]


def empty_figure(x: str, y: str) -> go.Figure:
    """Axes with titles in our look, for light and dark paper."""
    axis = {"gridcolor": "rgba(128,128,140,0.22)", "zeroline": False, "automargin": True, "title": {"standoff": 12}}
    figure = go.Figure()
    figure.update_layout(
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", margin={"l": 8, "r": 16, "t": 32, "b": 8},
        font={"family": FONT, "size": 13, "color": GREY}, uirevision="keep", height=320,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}, hoverlabel={"namelength": -1},
        xaxis={**axis, "title": {"text": x, "standoff": 12}}, yaxis={**axis, "title": {"text": y, "standoff": 12}},
        dragmode=False, template="none",
    )  # fmt: skip
    return figure


def remark(text: str) -> go.Figure:
    """Words in the place of a chart."""
    figure = empty_figure("", "")
    figure.update_layout(height=90, margin={"l": 8, "r": 8, "t": 8, "b": 8})
    figure.update_xaxes(visible=False).update_yaxes(visible=False)
    figure.add_annotation(text=text, x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False)
    return figure
