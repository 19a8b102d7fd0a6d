"""What two to four models measured, side by side: verdicts, cards, flips, and the table of everything."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from engine import rescue
from engine.records import Measurement
from ui import flips, markup, wording
from ui.desk import Entry
from ui.markup import join, tag
from ui.messages import translate
from ui.wording import say

SIDES = "ABCD"
CARDS = ("size.bytes", "latency.tpot", "memory.loaded", "perplexity", "accuracy")


def named(entries: Sequence[Entry]) -> list[str]:
    """`A · original`, `B · GPTQ 4 bit`: the titles under which entries stand everywhere on the page."""
    return [f"{side} · {wording.title(entry.run.recipe)}" for side, entry in zip(SIDES, entries, strict=False)]


def comparison(entries: Sequence[Entry], machine: str) -> Markup:
    """A verdict for each model beside the first, cards, flips, and all other numbers below."""
    rest = compare_table(entries)
    return tag(
        "section", origin(entries, machine), verdicts(entries), *rescued(entries),
        tag("div", *cards(entries), class_="mq-cards"), tag("p", say("noise.about"), class_="mq-sub"),
        flipped(entries), markup.details(say("compare.all"), rest),
    )  # fmt: skip


def origin(entries: Sequence[Entry], machine: str) -> Markup:
    """Whether the numbers are from this machine."""
    stored, mixed = all(e.stored for e in entries), len({e.stored for e in entries}) > 1
    kind = "stored" if stored else "mixed" if mixed else "live"
    many = "" if stored or len(entries) == 2 else ".many"  # two are "both"
    where = say(f"{kind}.where{many}", machine=translate(machine))
    chip = markup.chip(say(f"{kind}.chip"), "good" if kind == "live" else "")
    return tag("div", chip, tag("span", where, class_="mq-sub"), class_="mq-origin")


def verdicts(entries: Sequence[Entry]) -> Markup:
    """One sentence for each model beside the first; with more than two, each under its own title."""
    first, *others = entries
    said = [wording.verdict(first.measured, other.measured) for other in others]
    if len(said) == 1:
        return tag("p", said[0], class_="mq-verdict", role="status")
    titles = named(entries)[1:]
    lines = [tag("p", tag("strong", title), " ", words) for title, words in zip(titles, said, strict=True)]
    return tag("div", *lines, class_="mq-verdicts", role="status")


def story(entry: Entry) -> list[str]:
    """How an entry's trainings diverged, and what its recipe says of it, as the engine's sentences; none of others."""
    return [*map(rescue.told, entry.diverged), *rescue.effects(entry.run.recipe)] if entry.diverged else []


def rescued(entries: Sequence[Entry]) -> list[Markup]:
    """For each model one of whose trainings diverged: that it did, and what came of it."""
    pairs = zip(named(entries), map(story, entries), strict=True)
    return [tag("p", tag("strong", title), " ", " ".join(map(translate, said))) for title, said in pairs if said]


def cards(entries: Sequence[Entry]) -> list[Markup]:
    """A card for each number that matters and that all have measured."""
    return [_card([e.measured[key] for e in entries]) for key in CARDS if all(key in e.measured for e in entries)]


def _card(found: Sequence[Measurement]) -> Markup:
    first, *others = found
    rows, changes = [], []
    for side, m in zip(SIDES, found, strict=False):
        rows += [tag("dt", side), tag("dd", wording.value(m), small(wording.error(m)))]
    for side, m in zip(SIDES[1:], others, strict=False):
        changes.append(_change(first, m, "" if len(others) == 1 else side))
    floor = wording.floor(first, others[0]) if len(others) == 1 else ""
    return tag(
        "div", tag("h3", wording.name(first.name)), tag("dl", *rows), *changes,
        small(say("noise.floor", floor=floor)) if floor else None,
        small(say("simulated") if any(is_simulated(m) for m in others) else ""), class_="mq-card",
    )  # fmt: skip


def _change(a: Measurement, b: Measurement, side: str) -> Markup:
    sense = wording.better(a, b)
    kind = {1: "good", 0: "same", -1: "bad"}[sense]
    mark = {1: "▲", 0: "●", -1: "▼"}[sense]
    return tag(
        "p", tag("span", mark, aria_hidden="true"), f" {side} " if side else " ", wording.change(a, b),
        tag("span", " ", say("aside", text=say(f"sense.{kind}")), class_="unseen"), class_=f"change {kind}",
    )  # fmt: skip


def is_simulated(measurement: Measurement) -> bool:
    """Whether the kernel named in the protocol says that it only simulates."""
    return "simulated" in str(measurement.details.get("kernel", measurement.details.get("kernels", "")))


def small(text: str) -> Markup | None:
    """A quiet remark, or nothing."""
    return tag("small", " ", text) if text else None


def flipped(entries: Sequence[Entry]) -> Markup | None:
    """The flips from the first model to each other, with McNemar's p, explained one click away."""
    first, *others = entries
    lines = []
    for title, other in zip(named(entries)[1:], others, strict=True):
        found = flips.between(first.measured, other.measured)
        if found is not None:
            lines.append(tag("p", tag("strong", title), " ", wording.flipped(found)))
    if not lines:
        return None
    return tag("div", *lines, markup.details(say("flips.what"), tag("p", say("flips.about"))), class_="mq-flips")


def compare_table(entries: Sequence[Entry]) -> Markup:
    """Every measurement of any side, and the difference of each to the first."""
    rows = [(wording.name(name), *cells) for name, cells in table_rows(entries)]
    between = [say("difference")] if len(entries) == 2 else [f"A → {side}" for side in SIDES[1 : len(entries)]]
    return markup.table((say("measurement"), *named(entries), *between), rows, caption=say("compare.all"))


def table_rows(entries: Sequence[Entry]) -> list[tuple[str, list[Markup | str]]]:
    """The name of each measurement, its value on every side, and the change of each from the first."""
    rows = []
    for name in wording.sort({key for entry in entries for key in entry.measured}):
        first, *others = (entry.measured.get(name) for entry in entries)
        changes = [wording.change(first, other) if first and other else "" for other in others]
        rows.append((name, [shown(first), *(shown(other) for other in others), *changes]))
    return rows


def shown(measurement: Measurement | None) -> Markup | str:
    """A value with its 95 % interval, or a dash."""
    if measurement is None:
        return "–"
    return join((wording.value(measurement), small(wording.error(measurement))))
