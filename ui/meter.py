"""Whether a recipe fits: the memory it needs as a bar of its parts, a table of every situation, the seconds by part."""

from __future__ import annotations

from markupsafe import Markup

from engine.fit import PARTS, Estimate, Need
from engine.ways import Way
from ui import markup, wording
from ui.markup import tag
from ui.messages import translate
from ui.wording import say


def fit_meter(estimate: Estimate, way: Way | None = None) -> Markup:
    """What a recipe needs against what is free, for compressing and for serving; where it does not fit, a way out."""
    fits = estimate.fits
    numbers = say("fit.of", total=wording.size(estimate.total), free=wording.size(estimate.available))
    head = tag("div", tag("strong", say("fit.yes" if fits else "fit.no")), tag("span", numbers), class_="mq-line")
    scale = max(estimate.available, estimate.total, estimate.serving.total, 1)
    return tag(
        "section", tag("h3", say("fit.title")), head,
        tag("p", way_words(estimate, way), class_="mq-notice bad", role="alert") if not fits else None,
        tag("p", say("fit.compressing", situation=situation(estimate.largest)), class_="mq-sub"),
        bar(estimate.largest, estimate.available, scale),
        tag("p", say("fit.serving"), class_="mq-sub"), bar(estimate.serving, estimate.available, scale),
        legend(estimate.largest, estimate.serving),
        times(estimate), notes(estimate),
        markup.details(say("fit.parts"), table(estimate)),
        markup.details(say("fit.loads"), loads(estimate)) if estimate.loads else None,
        class_="mq-card fit",
    )  # fmt: skip


def bar(need: Need, free: int, scale: int) -> Markup:
    """The parts of a situation side by side, and a line where the free memory ends."""
    segments = [
        tag("span", class_=f"part {part}", style=f"width:{100 * amount / scale:.2f}%")
        for part, amount in need.parts.items()
    ]
    line = tag("span", class_="free", style=f"left:{100 * min(1.0, free / scale):.2f}%")
    words = say("fit.of", total=wording.size(need.total), free=wording.size(free))
    over = "" if need.total <= free else " over"
    inner = tag("div", *segments, class_=f"mq-bar parts{over}")
    return tag("div", inner, line, class_="mq-free", role="img", aria_label=f"{situation(need)}: {words}")


def legend(*needs: Need) -> Markup:
    """A key for each part that occurs, with the bytes of the first situation that has it."""
    found = {part: amount for need in reversed(needs) for part, amount in need.parts.items()}
    rows = [
        tag(
            "li",
            tag("i", class_=f"part {part}", aria_hidden="true"),
            f"{say(f'fit.{part}')} {wording.size(found[part])}",
        )
        for part in PARTS
        if part in found
    ]
    return tag("ul", *rows, class_="mq-legend")


def table(estimate: Estimate) -> Markup:
    """A row for each part, a column for each situation and one for serving."""
    needs = [*estimate.needs, estimate.serving]
    present = [part for part in PARTS if any(part in need.parts for need in needs)]
    rows = [
        (say(f"fit.{part}"), *(wording.size(need.parts[part]) if part in need.parts else "–" for need in needs))
        for part in present
    ]
    rows.append((say("fit.sum"), *(wording.size(need.total) for need in needs)))
    rows.append((say("fit.free"), *(wording.size(estimate.available) for _ in needs)))
    return markup.table((say("fit.part"), *map(situation, needs)), rows, caption=say("fit.parts"))


def loads(estimate: Estimate) -> Markup:
    """What serving needs: a row for each number of sequences, a column for each length; what does not fit says so."""
    batches, lengths = (sorted(set(each)) for each in zip(*estimate.loads, strict=True))

    def cell(batch: int, tokens: int) -> str:
        needed = estimate.loads[batch, tokens]
        size = wording.size(needed)
        return size if needed <= estimate.available else say("fit.beyond", size=size)

    columns = [say("fit.tokens", count=f"{tokens:,}") for tokens in lengths]
    rows = [(f"{batch:,}", *(cell(batch, tokens) for tokens in lengths)) for batch in batches]
    return markup.table((say("fit.sequences"), *columns), rows, caption=say("fit.loads"))


def situation(need: Need) -> str:
    """What happens while a need stands: the step's title, or a word for it."""
    return translate(need.title) or say(f"fit.situation.{need.situation}")


def times(estimate: Estimate) -> Markup | None:
    """The seconds, and of what they are the sum."""
    if estimate.seconds <= 0:
        return None
    parts = [say(f"fit.time.{name}", span=wording.duration(span)) for name, span in estimate.times.items()]
    whole = tag("span", say("fit.seconds", span=wording.duration(estimate.seconds)), " ")
    return tag("p", whole, tag("small", " · ".join(parts)), class_="mq-sub")


def notes(estimate: Estimate) -> Markup | None:
    """What else a reader should know."""
    return (
        tag("ul", *(tag("li", translate(note)) for note in estimate.notes), class_="mq-notes")
        if estimate.notes
        else None
    )


def way_words(estimate: Estimate, way: Way | None) -> str:
    """`Needs 9.1 GiB, 7.8 free: 4 bit needs 5.2.`"""
    numbers = {"total": wording.size(estimate.total), "free": wording.size(estimate.available)}
    if way is None:
        return say("fit.no_way", **numbers)
    return say("fit.way" if way.fits else "fit.no_fit", **numbers, way=way_label(way))


def way_label(way: Way) -> str:
    """A change and what it needs, as the button that makes it says."""
    return say(f"way.{way.name}", size=wording.size(way.total))
