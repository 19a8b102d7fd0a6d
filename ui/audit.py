"""What quantization did to each linear: a map of errors, what was unusual, weights before and after, the budget.

Pure functions from the events `linear` and `budget` of a run to markup. Colour repeats a number that is written in
the cell or stands in the table below.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from markupsafe import Markup, escape
from pydantic import JsonValue

from ui import markup, wording
from ui.markup import tag
from ui.messages import translate
from ui.wording import say

Audit = Mapping[str, JsonValue]
WIDTH, HEIGHT = 360, 150
TICK = 9  # height of the mark below a histogram that stands for a level of the grid
EXPERT = re.compile(r"\bexperts\.\d+\b")
SHOWN, MOST = 3, 300  # histograms: of the worst, and of all once the run is done


def report(
    linears: Sequence[Audit], budget: Audit | None, whole: float | None = None, left: Audit | None = None,
    healed: bool = False,
) -> Markup | None:  # fmt: skip
    """The whole section of a run's page; None where nothing was quantized.

    whole: bits a weight of the whole file. left: the modules that were left as they are. healed: a later step trained
    what was quantized.
    """
    if not linears:
        return None
    parts: list[Markup | None] = [
        tag("h3", say("audit.title")),
        tag("p", summary(linears), class_="mq-sub"),
        tag("p", storage(linears, whole), class_="mq-sub"),
        tag("p", say("audit.healed"), class_="mq-sub") if healed else None,
        heat_map(linears),
    ]
    parts += [
        outlier_map(linears),
        notes(linears),
        kept(left) if left else None,
        curve(budget) if budget else None,
        histograms(linears),
    ]
    parts.append(None if whole is None else all_histograms(linears))  # not at each tick of a run that works
    return tag("section", *parts, class_="mq-audit")


def summary(linears: Sequence[Audit]) -> str:
    """How many linears, at how many bits, and what their errors are."""
    bits = sorted({int(_number(each["bits"])) for each in linears})
    errors = sorted(_number(each["error"]) for each in linears)
    of = say("audit.output") if all(each.get("of") == "output" for each in linears) else say("audit.weight")
    return say(
        "audit.summary", count=len(linears), bits=say("list.comma").join(map(str, bits)), of=of,
        median=wording.digits(100 * errors[len(errors) // 2], 2), worst=wording.digits(100 * errors[-1], 2),
    )  # fmt: skip


def storage(linears: Sequence[Audit], whole: float | None) -> str:
    """The bits that are stored for each weight: of these linears, and of the whole file where that was measured."""
    stored, weights = stored_bits(linears)
    text = say("audit.stored", bits=f"{stored / max(weights, 1):.3g}", size=wording.size(stored / 8))
    return text if whole is None else f"{text} {say('audit.whole', bits=f'{whole:.3g}')}"


def stored_bits(linears: Iterable[Audit]) -> tuple[float, float]:
    """All bits that linears store, and the number of their weights."""
    counts = [(_number(each["bits_per_weight"]), weights_of(each)) for each in linears]
    return sum(bits * count for bits, count in counts), sum(count for _, count in counts)


def weights_of(each: Audit) -> float:
    """How many weights a linear has; runs of earlier versions say it by their histogram alone."""
    found = each.get("histogram")
    return _number(each.get("weights")) or (sum(_numbers(found.get("before"))) if isinstance(found, dict) else 0.0)


def heat_map(linears: Sequence[Audit]) -> Markup:
    """Blocks down, linears across: the relative error in per cent, darker where larger, the bits, sums at the edges."""

    def small(each: Audit) -> str:
        return say("audit.cell", bits=str(each["bits"]))

    def total(some: Sequence[Audit]) -> tuple[str, str]:
        stored, weights = stored_bits(some)
        error = 100 * sum(_number(each["error"]) for each in some)
        text = say("audit.total", bits=f"{stored / max(weights, 1):.3g}", size=wording.size(stored / 8))
        return wording.digits(error, 2), text

    return _map(linears, "error", say("audit.map"), say("audit.sum"), small, total)


def outlier_map(linears: Sequence[Audit]) -> Markup | None:
    """The share of each linear's input channels that hold outliers; None where the method looked for none."""
    found = [each for each in linears if isinstance(each.get("outliers"), int | float)]
    if not found:
        return None

    def total(some: Sequence[Audit]) -> tuple[str, str]:
        return wording.digits(100 * sum(_number(each["outliers"]) for each in some) / len(some), 2), ""

    table = _map(found, "outliers", say("audit.outliers"), say("audit.mean"), lambda each: "", total)
    return markup.join((tag("p", say("audit.outlier_share", share=total(found)[0]), class_="mq-sub"), table))


def _map(
    linears: Sequence[Audit], key: str, caption: str, edge: str, small: Callable[[Audit], str],
    total: Callable[[Sequence[Audit]], tuple[str, str]],
) -> Markup:  # fmt: skip
    """A table of the fraction `key` of each linear in per cent; `total` gives number and remark for the edges.

    Of the experts of a block the worst stands for all of its kind; the edges count every one.
    """
    cells: dict[tuple[str, str], Audit] = {}
    rows: dict[str, list[Audit]] = {}
    columns: dict[str, list[Audit]] = {}
    for each in linears:
        block, leaf = split(str(each["name"]))
        leaf = EXPERT.sub("experts.*", leaf)
        worst = cells.setdefault((block, leaf), each)
        if _number(each[key]) > _number(worst[key]):
            cells[block, leaf] = each
        rows.setdefault(block, []).append(each)
        columns.setdefault(leaf, []).append(each)
    logs = [math.log10(value) for each in linears if (value := _number(each[key])) > 0] or [0.0]
    low, high = min(logs), max(max(logs), min(logs) + 1e-9)

    def cell(block: str, leaf: str) -> Markup:
        each = cells.get((block, leaf))
        if each is None:
            return tag("td")
        value = _number(each[key])
        heat = f"--heat: {12 + 68 * (math.log10(value) - low) / (high - low):.0f}%" if value > 0 else None
        text = wording.digits(100 * value, 2)
        detail = say("audit.detail", name=str(each["name"]), value=text, bits=f"{_number(each['bits_per_weight']):.3g}")
        return tag("td", text, tag("small", remark) if (remark := small(each)) else None, style=heat, title=detail)

    def sums(some: Sequence[Audit]) -> Markup:
        text, remark = total(some)
        return tag("td", text, tag("small", remark) if remark else None, class_="sum")

    def line(label: str, drawn: Iterable[Markup], some: Sequence[Audit]) -> Markup:
        return tag("tr", tag("th", label, scope="row"), *drawn, sums(some))

    names = (say("audit.block"), *columns, edge)
    body = [line(row, (cell(row, leaf) for leaf in columns), some) for row, some in rows.items()]
    body.append(line(edge, map(sums, columns.values()), linears))
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in names)))
    table = tag("table", tag("caption", caption, class_="unseen"), head, tag("tbody", *body))
    scrolled = tag("div", table, class_="mq-heat", tabindex="0", role="region", aria_label=caption)
    about = tag("p", say("audit.experts"), class_="mq-sub") if len(cells) < len(linears) else None
    return markup.join((tag("p", caption, class_="mq-sub", aria_hidden="true"), about, scrolled))


def notes(linears: Sequence[Audit]) -> Markup:
    """Every linear that fell back, needed more damping or saw too little; or that none did."""
    odd = [each for each in linears if each.get("note")]
    if not odd:
        return tag("p", say("audit.clean"), class_="mq-sub")
    listed = [
        tag("li", tag("code", str(each["name"])), say("audit.note", note=translate(str(each["note"])))) for each in odd
    ]
    summary = say("audit.odd" if len(odd) > 1 else "audit.odd_one", count=len(odd))
    return markup.details(summary, tag("ul", *listed, class_="mq-notes"))


def kept(left: Audit) -> Markup | None:
    """Every module that was left as it is, by the width of its weights; None where there is none."""
    modules = left.get("modules")
    found = [(bits, _list(names)) for bits, names in modules.items()] if isinstance(modules, dict) else []
    lines = []
    for bits, names in found:
        listed = Markup(escape(say("list.comma"))).join(tag("code", str(name)) for name in names)
        lines.append(tag("p", say("audit.kept", bits=bits), listed, class_="mq-sub"))
    return markup.join(lines) if lines else None


def histograms(linears: Sequence[Audit]) -> Markup | None:
    """The weights of the linears with the largest errors: before as a line, after as bars, the grid as ticks."""
    worst = sorted(linears, key=lambda each: -_number(each["error"]))[:SHOWN]
    drawn = [figure for each in worst if (figure := histogram(each)) is not None]
    if not drawn:
        return None
    about = tag("p", say("audit.histogram.about"), class_="mq-sub")
    summary = say("audit.histograms" if len(drawn) > 1 else "audit.histogram.one", count=len(drawn))
    return markup.details(summary, about, tag("div", *drawn, class_="mq-bars"))


def all_histograms(linears: Sequence[Audit]) -> Markup | None:
    """Those of every linear, a line to open for each block; None where the worst are all there are."""
    blocks: dict[str, list[Markup]] = {}
    for each in linears[:MOST]:
        if (figure := histogram(each)) is not None:
            blocks.setdefault(split(str(each["name"]))[0], []).append(figure)
    if sum(map(len, blocks.values())) <= SHOWN:
        return None
    rooms = [
        markup.details(f"{say('audit.block')} {name}", tag("div", *drawn, class_="mq-bars"))
        for name, drawn in blocks.items()
    ]
    shown, total = sum(map(len, blocks.values())), len(linears)
    title = "audit.histograms.all" if total <= MOST else "audit.histograms.some"
    return markup.details(say(title, count=shown, total=total), *rooms)


def histogram(each: Audit) -> Markup | None:
    """One linear's weights before and after, with a tick below for each level of its grid."""
    found = each.get("histogram")
    if not isinstance(found, dict):
        return None
    before, after = (_numbers(found.get(key)) for key in ("before", "after"))
    if not before or len(before) != len(after):
        return None
    top = max(*before, *after, 1.0)
    step = WIDTH / len(before)
    low, high = _number(found.get("low")), _number(found.get("high"))

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
    levels = _numbers(found.get("levels"))
    places = [f"{WIDTH * (level - low) / (high - low):.1f}" for level in levels if low <= level <= high]
    ticks = [tag("line", x1=x, x2=x, y1=HEIGHT + 2, y2=HEIGHT + 2 + TICK) for x in places]
    text = say(
        "audit.histogram", name=str(each["name"]), low=f"{low:.3g}", high=f"{high:.3g}",
        levels=len(levels) or 2 ** int(_number(each["bits"])),
    )  # fmt: skip
    drawing = tag(
        "svg", *bars, *ticks, tag("polyline", points=line), viewBox=f"0 0 {WIDTH} {HEIGHT + 2 + TICK}",
        preserveAspectRatio="none", role="img", aria_label=text,
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
        y = 20 + (HEIGHT - 48) * (1 - (math.log10(max(point[1], 1e-12)) - low) / (high - low))
        return f"{x:.1f}", f"{y:.1f}"

    line = " ".join(",".join(at(point)) for point in points)
    dots = []
    for bits, size, stored, cost in marks:
        x, y = at((stored, cost))
        title = tag("title", say("audit.equal", bits=f"{bits:.0f}", size=f"{size:.0f}"))
        dots.append(tag("g", title, tag("circle", cx=x, cy=y, r=3, class_="equal")))
    x, y = at(chosen)
    text = say("audit.chosen", bits=f"{chosen[0]:.2f}", kl=wording.digits(chosen[1], 2))
    up, along = say("audit.kl"), say("audit.bits")
    edges = (
        tag("text", f"{up}: {10**high:.2g}", x=0, y=10), tag("text", f"{10**low:.2g}", x=0, y=HEIGHT - 16),
        tag("text", f"{left:.3g} {along}", x=0, y=HEIGHT - 3),
        tag("text", f"{right:.3g}", x=WIDTH, y=HEIGHT - 3, class_="end"),
    )  # fmt: skip
    drawing = tag(
        "svg", tag("polyline", points=line), *dots, tag("circle", cx=x, cy=y, r=5, class_="chosen"), *edges,
        viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=text,
    )  # fmt: skip
    rows = [(say("audit.equal", bits=f"{b:.0f}", size=f"{s:.0f}"), f"{x:.2f}", f"{c:.3g}") for b, s, x, c in marks]
    rows.append((say("audit.mixed"), f"{chosen[0]:.2f}", f"{chosen[1]:.3g}"))
    headers = (say("audit.grid"), along, up)
    table = markup.details(
        say("chart.numbers", chart=say("audit.budget")), markup.table(headers, rows, caption=say("audit.budget"))
    )
    figure = tag("figure", tag("strong", say("audit.budget")), drawing, tag("figcaption", text), class_="mq-curve")
    return tag("div", figure, table)


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
