"""HTML, and the only place that makes it: every text and attribute passes through `tag`, which escapes.

`tag` returns `markupsafe.Markup`; a plain string that reaches it as a child or an attribute is escaped,
whoever wrote it: a visitor, a model, a recipe, an error.
"""

from __future__ import annotations

import base64
import hashlib
import re
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence

from markupsafe import Markup, escape

from engine.records import Status
from ui import language, wording
from ui.wording import say

Child = str | Markup | None
Attribute = str | int | float | bool | None

EMPTY = {"meta", "input", "br", "hr", "line", "path", "rect", "circle", "polyline", "img"}
NAME = re.compile(r"[a-z][a-zA-Z0-9-]*")
ITEM = re.compile(r"(?:-|\d+\.)[ ]+")  # how an item of a list begins
# What prose marks in a line: code, words that weigh, papers by their number. A star beside a space multiplies.
MARKED = re.compile(
    r"``(?P<quoted>.+?)``|`(?P<code>[^`]+)`|(?<![A-Za-z0-9*])(?:\*\*(?P<strong>[^\s*](?:[^*]*[^\s*])?)\*\*"
    r"|\*(?P<em>[^\s*](?:[^*]*[^\s*])?)\*)(?![A-Za-z0-9*])|\b(?P<paper>arXiv \d{4}\.\d{4,5})\b"
)


def tag(name: str, /, *children: Child, **attributes: Attribute) -> Markup:
    """`<name attributes>children</name>`, escaped. `class_` becomes class, `data_run` data-run.

    None leaves a child or an attribute out; True gives a bare attribute.
    """
    written = [name]
    for key, value in attributes.items():
        label = key.rstrip("_").replace("_", "-")
        assert NAME.fullmatch(label), label
        if value is True:
            written.append(label)
        elif value is not None and value is not False:
            written.append(f'{label}="{escape(value)}"')
    inside = Markup("").join(escape(child) for child in children if child is not None)
    opening = " ".join(written)
    if name in EMPTY:
        return Markup(f"<{opening}/>")
    return Markup(f"<{opening}>{inside}</{name}>")


def document(title: str, style: str, *body: Child, alone: bool = False) -> Markup:
    """A whole page of ours, beside Gradio's. `style` is CSS of our own files, never a visitor's text.

    alone: a file to take away, which runs no script and loads nothing but the style that it holds.
    """
    assert "</" not in style
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    head = (
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy) if alone else None,
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"), tag("title", title),
        tag("style", Markup(style)),  # as it is: escaped it would have another hash
    )  # fmt: skip
    whole = tag("html", tag("head", *head), tag("body", *body), lang=language.current())
    return Markup("<!doctype html>\n") + whole + "\n"


def join(parts: Iterable[Child]) -> Markup:
    """The parts one after the other, escaped."""
    return Markup("").join(escape(part) for part in parts if part is not None)


def table(
    headers: Sequence[Child], rows: Iterable[Sequence[Child]], *, caption: str, visible_caption: bool = False
) -> Markup:
    """A table with a caption for screen readers; the first cell of a row is its header."""
    head = tag("tr", *(tag("th", header, scope="col") for header in headers))
    body = [
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows if len(row)
    ]
    title = tag("caption", caption, class_=None if visible_caption else "unseen")
    inner = tag("table", title, tag("thead", head), tag("tbody", *body))
    return tag("div", inner, class_="mq-scroll", tabindex="0", role="region", aria_label=caption)


def details(summary: str, *children: Child, open_: bool = False) -> Markup:
    """A line that opens."""
    return tag("details", tag("summary", summary), *children, class_="mq-details", open=open_)


def notice(text: str, kind: str = "info") -> Markup:
    """One line that says something: `info`, `good`, `warn` or `bad`. Nothing where the text is empty."""
    if not text:
        return Markup("")
    return tag("p", text, class_=f"mq-notice {kind}", role="alert" if kind == "bad" else "status")


def badge(state: Status) -> Markup:
    """A run's status as a small label whose colour is never its only sign."""
    return tag("span", wording.status(state), class_=f"mq-badge {state.value}")


def chip(text: str, kind: str = "") -> Markup:
    """A small label."""
    return tag("span", text, class_=f"mq-chip {kind}".strip())


def heading(text: str, sub: str = "", level: int = 2) -> Markup:
    """A heading with a quiet line below it."""
    return join((tag(f"h{level}", text), tag("p", sub, class_="mq-sub") if sub else None))


def progress(done: float, total: float, label: str) -> Markup:
    """A progress bar; without a total it says only that work goes on."""
    known = total > 0
    share = min(1.0, max(0.0, done / total)) if known else 0.0
    bar = tag(
        "span", class_="mq-fill" if known else "mq-fill busy", style=f"width:{100 * share:.1f}%" if known else None
    )
    return tag(
        "div", bar, class_="mq-bar", role="progressbar", aria_label=label, aria_valuemin="0", aria_valuemax="100",
        aria_valuenow=f"{100 * share:.0f}" if known else None,
    )  # fmt: skip


def prose(text: str, say_it: Callable[[str], str] = str) -> Markup:
    """Text as docstrings are written: paragraphs, lists, and indented lines that stay as they are.

    say_it: what stands on the page for each paragraph, written in the same way.
    """
    return join(_paragraph(say_it(block)) for block in re.split(r"\n\s*\n", text.strip("\n")) if block.strip())


def _paragraph(block: str) -> Markup:
    if block.startswith("    "):
        return tag("pre", marked(block))
    if not ITEM.match(block):
        return tag("p", marked(" ".join(block.split())))
    items = [" ".join(item.split()) for item in re.split(rf"^{ITEM.pattern}", block, flags=re.MULTILINE)[1:]]
    return tag("ul" if block.startswith("-") else "ol", *(tag("li", marked(item)) for item in items))


def marked(text: str) -> Markup:
    """One line of such text."""
    parts: list[Child] = []
    done = 0
    for found in MARKED.finditer(text):
        kind, said = found.lastgroup, found[found.lastgroup or 0]
        parts.append(text[done : found.start()])
        if kind == "paper":
            parts.append(link(said, f"https://arxiv.org/abs/{said.removeprefix('arXiv ')}"))
        else:
            parts.append(tag(kind if kind in ("strong", "em") else "code", said.strip()))
        done = found.end()
    return join((*parts, text[done:]))


def code(text: str, label: str) -> Markup:
    """Text to copy, with a button that copies it."""
    button = tag("button", say("copy"), type="button", class_="mq-copy", data_copy=text)
    return tag("div", tag("div", tag("span", label), button, class_="mq-code-head"), tag("pre", text), class_="mq-code")


def link(text: str, href: str, download: bool = False) -> Markup:
    """A link; only addresses on this server or on the web, never `javascript:`."""
    assert href.startswith(("/", "./", "?", "#", "https://", "http://")), href
    return tag("a", text, href=href, download=download)


def file_link(text: str, content: str, name: str) -> Markup:
    """A link that saves `content` as the CSV file `name`; it stands in the page, the server is not asked."""
    address = f"data:text/csv;charset=utf-8,{urllib.parse.quote(content)}"
    return tag("p", tag("a", text, href=address, download=name), class_="mq-sub")


def facts(pairs: Mapping[str, Child]) -> Markup:
    """Names and values as a description list."""
    return tag("dl", *(join((tag("dt", key), tag("dd", value))) for key, value in pairs.items()), class_="mq-facts")
