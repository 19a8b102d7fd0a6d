"""The k-bit scaling picture: the bits a whole model stores against its quality, for all runs of one family.

Dettmers and Zettlemoyer, 2023, "The case for 4-bit precision: k-bit Inference Scaling Laws" (arXiv 2212.09720): a line
a bit width, a point a model. Of two lines the higher one buys more for the same bits; there, a larger model of fewer
bits won down to four. Here a line is a recipe's method and bits, so that methods can be told apart, too.

A family: models whose size measurement names the same architecture and the same vocabulary. Runs that were measured
before it did so belong to the family of their source.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.errors import UnknownName
from engine.methods import get
from engine.records import Measurement, Recipe
from ui import charts, wording
from ui.charts import Chart
from ui.desk import Entry
from ui.wording import say

QUALITIES = ("accuracy", "kl", "perplexity")
NAMING = ("bits", "scheme", "budget")  # settings that name a line also where they are left at their default
MOST_TICKS = 7


@dataclass(frozen=True)
class Point:
    """A run in the picture. bits: all that are stored; parameters: how many of them share these bits."""

    line: str
    label: str
    bits: float
    parameters: float
    quality: Measurement


def families(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """The entries of each family by its name, in the order of their first entry."""
    by_source: dict[str, str] = {}
    for entry in entries:
        if (name := _recorded(entry)) is not None:
            by_source.setdefault(entry.run.recipe.model.source, name)
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        source = entry.run.recipe.model.source
        name = _recorded(entry) or by_source.get(source) or wording.source(source)
        found.setdefault(name, []).append(entry)
    return found


def _recorded(entry: Entry) -> str | None:
    size = entry.measured.get("size.parameters")
    known: Mapping[str, object] = size.details if size else {}
    if "architecture" not in known:
        return None
    return say("scaling.name", architecture=str(known["architecture"]), vocabulary=str(known.get("vocabulary", "–")))


def line(recipe: Recipe) -> str:
    """The line that a recipe's runs lie on: its methods with bits or scheme, also where these are the defaults."""
    steps = []
    for step in recipe.steps:
        try:
            fields = get(step.method).params.model_fields
        except UnknownName:  # a run of a method that is no more
            fields = {}
        filled = {key: fields[key].default for key in NAMING if key in fields}
        steps.append(step.model_copy(update={"params": filled | step.params}))
    return wording.title(recipe.model_copy(update={"steps": tuple(steps)}))


def points(entries: Sequence[Entry], quality: str) -> list[Point]:
    """The entries of which size and quality are known; the fewest bits come first."""
    found = []
    for entry in entries:
        m = entry.measured
        if quality in m and "size.bits_per_weight" in m and "size.parameters" in m:
            parameters = m["size.parameters"].value
            bits = m["size.bits_per_weight"].value * parameters
            found.append(Point(line(entry.run.recipe), entry.label, bits, parameters, m[quality]))
    return sorted(found, key=lambda point: point.bits)


def best_quality(entries: Sequence[Entry]) -> str:
    """The first of `QUALITIES` that was measured."""
    return next((quality for quality in QUALITIES if points(entries, quality)), QUALITIES[0])


def chart(entries: Sequence[Entry], quality: str) -> Chart:
    """Total stored bits (logarithmic, written as a size) against quality with 95 % intervals, a line a recipe."""
    found = points(entries, quality)
    caption = say("scaling.caption", quality=wording.name(quality))
    if not found:
        return Chart(None, caption)
    share = 100 if quality in wording.FRACTIONS else 1
    figure = charts.empty_figure(say("scaling.axis"), charts.axis_title(found[0].quality))
    original = say("original.title")
    names = sorted({point.line for point in found}, key=lambda name: (name != original, name))
    for index, name in enumerate(names):
        place = index if original in names else index + 1  # the original alone is grey
        mine = [point for point in found if point.line == name]
        figure.add_scatter(
            x=[point.bits / 8 for point in mine], y=[point.quality.value * share for point in mine], name=name,
            mode="lines+markers", line={"color": charts.colour(place), "width": 1.5},
            marker={"size": 10, "color": charts.colour(place), "symbol": charts.symbol(place)},
            error_y={**charts.whiskers([p.quality for p in mine], share), "width": 4},
            text=[_hover(point) for point in mine], hovertemplate="%{text}<extra></extra>",
        )  # fmt: skip
    sizes = ticks(found[0].bits / 8, found[-1].bits / 8)
    figure.update_xaxes(type="log", tickvals=sizes, ticktext=[wording.size(size) for size in sizes])
    figure.update_layout(height=360 + 11 * len(names))  # the legend takes a row for two names on a phone
    rows = tuple(
        (
            p.line, p.label, wording.size(p.bits / 8), wording.digits(p.bits / p.parameters),
            wording.digits(p.parameters), wording.shown(p.quality),
        )
        for p in found
    )  # fmt: skip
    headers = ("scaling.line", "run", "scaling.axis", "name.size.bits_per_weight", "name.size.parameters")
    return Chart(figure, caption, (*map(say, headers), wording.name(quality)), rows)


def ticks(low: float, high: float) -> list[float]:
    """Sizes (bytes) to name on an axis from `low` to `high`: powers of two, and 1.5 times them where there is room."""
    first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
    if last - first < MOST_TICKS // 2:
        return [share * 2.0**power for power in range(first, last + 1) for share in (1, 1.5)]
    step = math.ceil((last - first + 1) / MOST_TICKS)
    return [2.0**power for power in range(first, last + step, step)]


def _hover(point: Point) -> str:
    size = say("scaling.hover", size=wording.size(point.bits / 8), bits=wording.digits(point.bits / point.parameters))
    return f"{point.label}<br>{size}<br>{wording.shown(point.quality)}"
