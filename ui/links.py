"""A comparison as addresses: the link that reopens it, and its downloads."""

from __future__ import annotations

from markupsafe import Markup

from ui import markup
from ui.asked import Asked, write_link
from ui.markup import tag
from ui.wording import say

FILES = ("report.html", "comparison.csv", "comparison.json")


def bar(asked: Asked) -> Markup:
    """The link and the files, in a row."""
    query = write_link(asked)
    files = [markup.link(say(f"export.{name}"), f"./compare/{name}?{query}", download=True) for name in FILES]
    again = markup.link(say("compare.link"), f"./?{query}")
    return tag("ul", *(tag("li", each) for each in (again, *files)), class_="mq-files")
