"""What quantization did to each linear: a map of errors, what was unusual, weights before and after, the budget.

Pure functions from the events `linear` and `budget` of a run to markup. Colour repeats a number that is written in
the cell or stands in the table below.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup
from pydantic import JsonValue

from ui import markup, wording
from ui.markup import tag
from ui.wording import say

Audit = Mapping[str, JsonValue]
WIDTH, HEIGHT = 360, 150
SHOWN = 3  # histograms


def report(linears: Sequence[Audit], budget: Audit | None) -> Markup | None:
    """The whole section of a run's page; None where nothing was quantized."""
    if not linears:
        return None
    parts: list[Markup | None] = [
        tag("h3", say("audit.title")),
        tag("p", summary(linears), class_="mq-sub"),
        heat_map(linears),
    ]
    parts += [notes(linears), curve(budget) if budget else None, histograms(linears)]
    return tag("section", *parts, class_="mq-audit")


def summary(linears: Sequence[Audit]) -> str:
    """How many linears, at how many bits, and what their errors are."""
    bits = sorted({int(_number(each["bits"])) for each in linears})
    errors = sorted(_number(each["error"]) for each in linears)
    of = say("audit.output") if all(each.get("of") == "output" for each in linears) else say("audit.weight")
    return say(
        "audit.summary", count=len(linears), bits=", ".join(map(str, bits)), of=of,
        median=wording.digits(100 * errors[len(errors) // 2], 2), worst=wording.digits(100 * errors[-1], 2),
    )  # fmt: skip


def heat_map(linears: Sequence[Audit]) -> Markup:
    """Blocks down, linears across: the relative error in per cent, darker where it is larger, and the bits."""
    cells = {split(str(each["name"])): each for each in linears}
    rows = list(dict.fromkeys(block for block, _ in cells))
    columns = list(dict.fromkeys(leaf for _, leaf in cells))
    logs = [math.log10(max(_number(each["error"]), 1e-12)) for each in linears]
    low, high = min(logs), max(max(logs), min(logs) + 1e-9)

    def cell(block: str, leaf: str) -> Markup:
        each = cells.get((block, leaf))
        if each is None:
            return tag("td")
        error = _number(each["error"])
        share = (math.log10(max(error, 1e-12)) - low) / (high - low)
        text = wording.digits(100 * error, 2)
        detail = f"{each['name']}: {text} %, {_number(each['bits_per_weight']):.3g} bits"
        bits = tag("small", f"{each['bits']} bit")
        return tag("td", text, bits, style=f"--heat: {12 + 68 * share:.0f}%", title=detail)

    head = tag("tr", tag("th", say("audit.block"), scope="col"), *(tag("th", leaf, scope="col") for leaf in columns))
    body = [tag("tr", tag("th", row, scope="row"), *(cell(row, leaf) for leaf in columns)) for row in rows]
    table = tag("table", tag("caption", say("audit.map")), tag("thead", head), tag("tbody", *body))
    return tag("div", table, class_="mq-heat", tabindex="0", role="region", aria_label=say("audit.map"))


def notes(linears: Sequence[Audit]) -> Markup:
    """Every linear that fell back, needed more damping or saw too little; or that none did."""
    odd = [each for each in linears if each.get("note")]
    if not odd:
        return tag("p", say("audit.clean"), class_="mq-sub")
    listed = [tag("li", tag("code", str(each["name"])), f": {each['note']}") for each in odd]
    return markup.details(say("audit.odd", count=len(odd)), tag("ul", *listed, class_="mq-notes"))


def histograms(linears: Sequence[Audit]) -> Markup:
    """The weights of the linears with the largest errors: before as an area, after as the bars of the grid."""
    worst = sorted(linears, key=lambda each: -_number(each["error"]))[:SHOWN]
    drawn = [figure for each in worst if (figure := histogram(each)) is not None]
    return markup.details(say("audit.histograms", count=len(drawn)), tag("div", *drawn, class_="mq-bars"))


def histogram(each: Audit) -> Markup | None:
    """One linear's weights before and after."""
    found = each.get("histogram")
    if not isinstance(found, dict):
        return None
    before, after = (_numbers(found.get(key)) for key in ("before", "after"))
    if not before or len(before) != len(after):
        return None
    top = max(*before, *after, 1.0)
    step = WIDTH / len(before)

    def y(value: float) -> float:
        return HEIGHT * (1 - math.sqrt(value / top))  # by the root, so that the tails can be seen

    bars = [
        tag(
            "rect", x=f"{i * step:.1f}", y=f"{y(v):.1f}", width=f"{max(step - 1, 1):.1f}", height=f"{HEIGHT - y(v):.1f}"
        )
        for i, v in enumerate(after)
        if v
    ]
    line = " ".join(f"{(i + 0.5) * step:.1f},{y(v):.1f}" for i, v in enumerate(before))
    low, high = _number(found.get("low")), _number(found.get("high"))
    text = say(
        "audit.histogram", name=str(each["name"]), low=f"{low:.3g}", high=f"{high:.3g}",
        levels=sum(v > 0 for v in after), bits=str(each["bits"]),
    )  # fmt: skip
    drawing = tag(
        "svg", *bars, tag("polyline", points=line), viewBox=f"0 0 {WIDTH} {HEIGHT}", preserveAspectRatio="none",
        role="img", aria_label=text,
    )  # fmt: skip
    return tag("figure", drawing, tag("figcaption", text))


def curve(budget: Audit) -> Markup:
    """Expected KL against stored bits a weight: what mixed options reach, equal bits, and the budget that was kept."""
    points, chosen = [_pair(p) for p in _list(budget.get("points"))], _pair(budget.get("chosen"))
    uniform = [_numbers(each) for each in _list(budget.get("uniform"))]
    marks = [(bits, size, stored, cost) for bits, size, stored, cost in (u for u in uniform if len(u) == 4)]
    everything = [*points, chosen, *((stored, cost) for _, _, stored, cost in marks)]
    left, right = min(p[0] for p in everything), max(p[0] for p in everything)
    logs = [math.log10(max(p[1], 1e-12)) for p in everything]
    low, high = min(logs), max(max(logs), min(logs) + 1e-9)

    def at(point: tuple[float, float]) -> tuple[str, str]:
        x = 8 + (WIDTH - 16) * (point[0] - left) / max(right - left, 1e-9)
        y = 8 + (HEIGHT - 16) * (1 - (math.log10(max(point[1], 1e-12)) - low) / (high - low))
        return f"{x:.1f}", f"{y:.1f}"

    line = " ".join(",".join(at(point)) for point in points)
    dots = []
    for bits, size, stored, cost in marks:
        x, y = at((stored, cost))
        title = tag("title", say("audit.equal", bits=f"{bits:.0f}", size=f"{size:.0f}"))
        dots.append(tag("g", title, tag("circle", cx=x, cy=y, r=3, class_="equal")))
    x, y = at(chosen)
    text = say("audit.chosen", bits=f"{chosen[0]:.2f}", kl=wording.digits(chosen[1], 2))
    drawing = tag(
        "svg", tag("polyline", points=line), *dots, tag("circle", cx=x, cy=y, r=5, class_="chosen"),
        viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=text,
    )  # fmt: skip
    rows = [(say("audit.equal", bits=f"{b:.0f}", size=f"{s:.0f}"), f"{x:.2f}", f"{c:.3g}") for b, s, x, c in marks]
    rows.append((say("audit.mixed"), f"{chosen[0]:.2f}", f"{chosen[1]:.3g}"))
    headers = (say("audit.grid"), say("audit.bits"), say("audit.kl"))
    table = markup.details(
        say("chart.numbers", chart=say("audit.budget")), markup.table(headers, rows, caption=say("audit.budget"))
    )
    return tag("figure", tag("strong", say("audit.budget")), drawing, tag("figcaption", text), table, class_="mq-curve")


def split(name: str) -> tuple[str, str]:
    """A linear's block number and its name within the block: `model.layers.3.mlp.up_proj` is ("3", "mlp.up_proj")."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ("–", name) if number is None else (parts[number], ".".join(parts[number + 1 :]))


def _number(value: JsonValue) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _list(value: JsonValue) -> list[JsonValue]:
    return value if isinstance(value, list) else []


def _numbers(value: JsonValue) -> list[float]:
    return [_number(each) for each in _list(value)]


def _pair(value: JsonValue) -> tuple[float, float]:
    first, second = [*_numbers(value), 0.0, 0.0][:2]
    return first, second
