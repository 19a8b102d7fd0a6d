"""A comparison to send around: one HTML file that asks nobody for anything, a CSV, and JSON with everything.

The HTML runs no script and loads nothing: its policy allows only the style sheet whose hash it names. Paths of this
machine are cut to their last part, for the files go to others.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version

from markupsafe import Markup
from pydantic import JsonValue

from engine import hardware
from engine.card import shareable
from engine.recipes import dump_recipe
from engine.records import Token
from ui import cards, comparing, flips, markup, sheet, still, wording
from ui.asked import Asked
from ui.desk import Desk, Entry
from ui.markup import join, tag
from ui.messages import translate, translate_list
from ui.panes import Panes
from ui.theme import ASSETS
from ui.wording import say

PACKAGES = ("torch", "transformers", "gradio")
KERNELS = ("kernels", "kernel")
PROTOCOL = ("protocol", *KERNELS, "device", "batch", "items")  # details of a measurement that say how


def html(desk: Desk, owner: str, asked: Asked) -> str:
    """The report.

    Raises:
        UnknownName: an entry that the visitor may not see.
    """
    entries = [desk.entry(key, owner) for key in asked.compare]
    title = say("report.title", titles=" / ".join(cards.named(entries)))
    shown = comparing.texts(desk, owner, asked, entries) if asked.writing.mode != "blind" else None
    body = tag(
        "main", tag("h1", title), about(desk, entries), cards.verdicts(entries), *cards.rescued(entries),
        tag("div", *cards.cards(entries), class_="mq-cards"), _quiet("noise.about"),
        cards.flipped(entries),
        tag("section", tag("h2", say("charts.title")), _quiet("charts.about"), *_charts(entries)),
        None if shown is None else _texts(asked, shown),
        tag("section", tag("h2", say("compare.all")), cards.compare_table(entries)),
        tag("section", tag("h2", say("report.protocols")), _protocols(entries)),
        tag("section", tag("h2", say("recipe")), *_recipes(entries)),
    )  # fmt: skip
    return str(markup.document(title, (ASSETS / "report.css").read_text(), body, alone=True))


def _quiet(key: str) -> Markup:
    return tag("p", say(key), class_="mq-sub")


def about(desk: Desk, entries: Sequence[Entry]) -> Markup:
    """Where, when and with what it was measured."""
    facts: dict[str, markup.Child] = {
        say("report.date"): _day(time.time()),
        say("report.machine"): " · ".join(map(translate, machines(desk, entries))),
        say("report.versions"): say("list.comma").join(f"{name} {number}" for name, number in versions().items()),
    }  # fmt: skip
    for title, entry in zip(cards.named(entries), entries, strict=True):
        facts[title] = (
            f"{wording.source(entry.run.recipe.model.source)} · {_day(entry.run.finished or entry.run.created)}"
        )
    return join((_origin(desk, entries), markup.facts(facts)))


def _origin(desk: Desk, entries: Sequence[Entry]) -> Markup:
    """As on the page; but "here" and "now" mean nothing to who gets the file: it names the machine and the days."""
    if any(entry.stored for entry in entries):
        return cards.origin(entries, desk.stored.machine if desk.stored else "")
    days = sorted({_day(entry.run.finished or entry.run.created)[: len("2000-01-01")] for entry in entries})
    where = say("list.comma").join(map(translate, machines(desk, entries)))
    return tag("p", say("report.where", machine=where, days=say("list.comma").join(days)), class_="mq-sub")


def machines(desk: Desk, entries: Sequence[Entry]) -> list[str]:
    """The machines that the measurements name; the stored comparison's, or this one, where they name none."""
    found = [str(m.details["machine"]) for e in entries for m in e.measured.values() if m.details.get("machine")]
    if desk.stored and any(entry.stored for entry in entries):
        found.append(desk.stored.machine)
    return list(dict.fromkeys(found)) or [hardware.machine()]


def versions() -> dict[str, str]:
    """The versions of what computed and drew."""
    return {name: version(name) for name in PACKAGES}


def _day(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(moment))


def _charts(entries: Sequence[Entry]) -> list[Markup]:
    parts = []
    for chart in comparing.drawings(entries):
        if chart.figure is not None:
            parts.append(still.draw(chart.figure, chart.caption))
            numbers = markup.table(chart.headers, chart.rows, caption=chart.caption)
            parts.append(markup.details(say("chart.numbers", chart=chart.caption), numbers))
    return parts


def _texts(asked: Asked, shown: Panes) -> Markup:
    """The prompt, how it was written on, and each text with its shades."""
    writing = asked.writing
    texts = {"system": writing.chat and writing.system, "stop_strings": writing.stop_strings}
    usual = {"prompt", "mode", *texts}
    settings = {
        say(f"writing.{key}"): _setting(value) for key, value in writing.model_dump().items() if key not in usual
    }  # fmt: skip
    settings |= {say(f"writing.{key}"): text for key, text in texts.items() if text}
    shade = shown.same_text
    written = [
        tag("section", tag("h3", pane.title),
            tag("p", " · ".join(filter(None, (pane.stats, pane.note))), class_="mq-sub"),
            tag("p", *(_token(t, shade, place == split) for place, t in enumerate(pane.tokens)), class_="text"))
        for pane, split in zip(shown.panes, shown.splits(), strict=True)
    ]  # fmt: skip
    legend = [tag("span", say(f"kl.{level}"), class_=f"tok kl{level}") for level in (1, 2, 3)]
    return tag(
        "section", tag("h2", say("panes.title")), tag("h3", say("prompt")), tag("blockquote", writing.prompt),
        markup.facts({say("mode"): say(f"mode.{writing.mode}"), **settings}),
        tag("p", say("kl.legend"), *(join((" ", each)) for each in legend), class_="mq-sub") if shade else None,
        tag("div", *written, class_="panes"), comparing.differing(shown),
    )  # fmt: skip


def _setting(value: object) -> str:
    return say("yes" if value else "no") if isinstance(value, bool) else str(value)


def _token(token: Token, shade: bool, split: bool) -> Markup | str:
    """A token with its KL as colour, underline and words; plain where nothing is to be said."""
    kl = token.kl if shade and token.kl is not None else 0.0
    level = sum(kl >= bound for bound in (0.005, 0.05, 0.5))
    if not level and not split:
        return token.text
    note = say("panes.split") if split else say("panes.kl", kl=f"{kl:.3f}")
    return tag("span", token.text, class_=f"tok{f' kl{level}' if level else ''}{' split' if split else ''}", title=note)


def _protocols(entries: Sequence[Entry]) -> Markup:
    """How each number was taken, and with which kernels."""
    rows = []
    for title, entry in zip(cards.named(entries), entries, strict=True):
        for name in wording.sort(entry.measured):
            details = entry.measured[name].details
            said = [say(f"protocol.{key}", value=(translate_list if key in KERNELS else translate)(str(details[key])))
                    for key in PROTOCOL if isinstance(details.get(key), str | int)]  # fmt: skip
            if said:
                rows.append((wording.name(name), title, " · ".join(said)))
    return markup.table((say("measurement"), say("model"), say("report.how")), rows, caption=say("report.protocols"))


def _recipes(entries: Sequence[Entry]) -> list[Markup]:
    return [
        join((tag("h3", title), tag("pre", dump_recipe(shareable(entry.run.recipe)))))
        for title, entry in zip(cards.named(entries), entries, strict=True)
    ]


def as_csv(desk: Desk, owner: str, asked: Asked) -> str:
    """A row for each model and measurement, with its difference to the first and whether that is noise."""
    entries = [desk.entry(key, owner) for key in asked.compare]
    rows: list[list[str | float | None]] = [
        [
            "model",
            "run",
            "name",
            "value",
            "standard_error",
            "unit",
            "higher_is_better",
            "difference",
            "inside_noise",
            "details",
        ]
    ]
    for title, entry in zip(cards.named(entries), entries, strict=True):
        for name in wording.sort(entry.measured):
            m, base = entry.measured[name], entries[0].measured.get(name)
            beside = base if base is not None and entry is not entries[0] else None
            rows.append([
                title, entry.run.id, m.name, m.value, m.error, m.unit,
                "" if m.higher_is_better is None else str(m.higher_is_better),
                None if beside is None else m.value - beside.value,
                "" if beside is None else str(wording.is_noise(beside, m)), json.dumps(m.details),
            ])  # fmt: skip
    return sheet.write(rows)


def as_json(desk: Desk, owner: str, asked: Asked) -> str:
    """Everything the report says, as data."""
    entries = [desk.entry(key, owner) for key in asked.compare]
    first = entries[0]
    models: list[JsonValue] = []
    for title, entry in zip(cards.named(entries), entries, strict=True):
        found = None if entry is first else flips.between(first.measured, entry.measured)
        models.append({
            "title": title, "run": entry.run.id, "stored": entry.stored,
            "recipe": shareable(entry.run.recipe).model_dump(mode="json"),
            "measurements": [entry.measured[name].model_dump(mode="json") for name in wording.sort(entry.measured)],
            "verdict": None if entry is first else wording.verdict(first.measured, entry.measured),
            "diverged": list[JsonValue](map(translate, cards.story(entry))),
            "flips": None if found is None else {"lost": found.lost, "won": found.won, "total": found.total,
                                                 "mcnemar_p": found.p},
        })  # fmt: skip
    texts: list[JsonValue] = []
    if asked.writing.mode != "blind":
        shown = comparing.texts(desk, owner, asked, entries)
        texts = [
            {"title": pane.title, "parts_at": split, "tokens": [t.model_dump(mode="json") for t in pane.tokens]}
            for pane, split in zip(shown.panes, shown.splits(), strict=True)
        ]  # fmt: skip
    body: dict[str, JsonValue] = {
        "made": _day(time.time()), "machines": list[JsonValue](machines(desk, entries)),
        "versions": dict[str, JsonValue](versions()), "writing": asked.writing.model_dump(mode="json"),
        "models": models, "texts": texts,
    }  # fmt: skip
    return json.dumps(body, ensure_ascii=False, indent=1, allow_nan=False) + "\n"


WRITERS: dict[str, tuple[Callable[[Desk, str, Asked], str], str]] = {
    "report.html": (html, "text/html; charset=utf-8"),
    "comparison.csv": (as_csv, "text/csv; charset=utf-8"),
    "comparison.json": (as_json, "application/json"),
}
