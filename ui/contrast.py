"""Two texts word by word: which words stand in only one of them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from markupsafe import Markup

from ui import markup
from ui.markup import tag
from ui.wording import say

WORDS = re.compile(r"\s*\S+|\s+")
Part = tuple[bool, str]  # whether the words stand in this text only, and the words


def words(a: str, b: str) -> tuple[list[Part], list[Part]]:
    """Both texts in parts; put together again, the parts are the text."""
    left, right = WORDS.findall(a), WORDS.findall(b)
    matcher = difflib.SequenceMatcher(None, [w.strip() for w in left], [w.strip() for w in right], autojunk=False)
    parts: tuple[list[Part], list[Part]] = ([], [])
    for kind, i, j, k, end in matcher.get_opcodes():
        for side, found in enumerate((left[i:j], right[k:end])):
            if found:
                parts[side].append((kind != "equal", "".join(found)))
    return parts


def view(titles: Sequence[str], texts: Sequence[str]) -> Markup:
    """The first text beside each other one, the words that differ marked for eyes and screen readers."""
    if len(texts) < 2 or not all(texts):
        return Markup("")
    pairs = []
    for title, text in zip(titles[1:], texts[1:], strict=True):
        left, right = words(texts[0], text)
        if not any(differs for differs, _ in (*left, *right)):
            pairs.append(tag("p", say("contrast.same", a=titles[0], b=title), class_="mq-sub"))
            continue
        columns = (_column(titles[0], left, "gone"), _column(title, right, "new"))
        pairs.append(tag("div", *columns, class_="mq-contrast"))
    return markup.details(say("contrast.title"), tag("p", say("contrast.about"), class_="mq-sub"), *pairs)


def _column(title: str, parts: Sequence[Part], kind: str) -> Markup:
    shown = [_marked(text, kind) if differs else text for differs, text in parts]
    return tag("section", tag("h4", title), tag("p", *shown, class_="text"), aria_label=title)


def _marked(text: str, kind: str) -> Markup:
    """Words in one text only; what a screen reader hears of it stands before and after."""
    before, after = (tag("span", f" [{say(f'contrast.{end}')}] ", class_="unseen") for end in ("begins", "ends"))
    return tag("mark", before, text, after, class_=kind)
