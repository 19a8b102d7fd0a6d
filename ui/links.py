"""Addresses: the link that reopens a comparison, its downloads, and the tab that an address opens."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from ui import markup
from ui.asked import Asked, write_link
from ui.markup import tag
from ui.wording import say

TABS = ("compare", "compress", "runs", "methods")
FILES = ("report.html", "comparison.csv", "comparison.json")


def tab_of(query: Mapping[str, str]) -> str:
    """The tab that an address asks for, else that of the run or recipe it names; empty: the first."""
    if query.get("tab") in TABS:
        return query["tab"]
    return "runs" if "run" in query else "compress" if "recipe" in query else ""


def bar(asked: Asked) -> Markup:
    """The link and the files, in a row."""
    query = write_link(asked)
    files = [markup.link(say(f"export.{name}"), f"./compare/{name}?{query}", download=True) for name in FILES]
    again = markup.link(say("compare.link"), f"./?{query}")
    return tag("ul", *(tag("li", each) for each in (again, *files)), class_="mq-files")
