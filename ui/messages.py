"""Sentences that the engine has written in English, in the language that is spoken.

Errors, notes and logs keep their place in the engine and their English in the store; they are recognised by the text
around their values. A line that no template knows stays as it is: English is better than nothing.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache

from ui import language
from ui.chinese_documentation import DOCUMENTATION
from ui.chinese_fragments import FRAGMENTS
from ui.chinese_messages import MESSAGES
from ui.chinese_methods import DESCRIPTIONS, SUMMARIES, TITLES

LONGEST = 2000  # characters of a line that is looked up
METHOD = re.compile(r"[a-z][a-z0-9_]*/[a-z][a-z0-9_]*")
WORD = re.compile(r"\S+")
FIELD = re.compile(r"[a-z][A-Za-z0-9_.]*")
KINDS = {
    "method": METHOD,
    "linear": WORD,
    "field": FIELD,
    "one": WORD,
    "other": WORD,
}  # values that must look like what they are


@dataclass(frozen=True)
class Template:
    """A sentence with gaps: `literals` has one more part than `names`."""

    literals: tuple[str, ...]
    names: tuple[str, ...]

    @staticmethod
    def of(text: str) -> Template:
        """The template that a format string says."""
        literals, names = [""], []
        for literal, name, _, _ in string.Formatter().parse(text):
            literals[-1] += literal
            if name is not None:
                names.append(name)
                literals.append("")
        return Template(tuple(literals), tuple(names))

    def match(self, text: str) -> dict[str, str] | None:
        """The values of the gaps, none of them empty, each ending where its next literal is found first."""
        first, last = self.literals[0], self.literals[-1]
        if not self.names:
            return {} if text == first else None
        end = len(text) - len(last)
        if end <= len(first) or not text.startswith(first) or not text.endswith(last):
            return None
        found, place = {}, len(first)
        for name, literal in zip(self.names, (*self.literals[1:-1], None), strict=True):
            stop = end if literal is None else text.find(literal, place + 1, end)
            if stop <= place:
                return None
            value = text[place:stop]
            if (kind := KINDS.get(name)) is not None and not kind.fullmatch(value):
                return None
            found[name] = value
            place = stop + len(literal or "")
        return found


@dataclass(frozen=True)
class Catalogue:
    """Sentences of one language. `exact` are whole texts, the others templates, the most telling first."""

    exact: Mapping[str, str]
    templates: tuple[tuple[Template, str], ...]
    fragments: Catalogue | None = None

    @staticmethod
    def of(texts: Mapping[str, str], fragments: Catalogue | None = None) -> Catalogue:
        """The catalogue of texts with and without gaps."""
        read = [(Template.of(text), translation) for text, translation in texts.items()]
        exact = {template.literals[0]: translation for template, translation in read if not template.names}
        gaps = [(template, translation) for template, translation in read if template.names]
        gaps.sort(key=lambda each: -sum(map(len, each[0].literals)))
        return Catalogue(exact, tuple(gaps), fragments)

    def find(self, text: str) -> str | None:
        """The translation of `text`, None where there is none; so, too, where a part that is said has none."""
        if text in self.exact:
            return self.exact[text].format()
        for template, translation in self.templates:
            values = template.match(text)
            if values is not None and (said := self._said(values)) is not None:
                return translation.format(**said)
        return None

    def _said(self, values: dict[str, str]) -> dict[str, str] | None:
        said = {}
        for name, value in values.items():
            found: str | None = value
            if name.startswith("said"):
                found = (self.fragments.find(value) if self.fragments else None) or self.find(value)
                if found is None and name == "said_near":  # one name alone
                    found = value
            if found is None:
                return None
            said[name] = found
        return said


@cache
def _catalogue(code: str) -> Catalogue | None:
    if code != language.CHINESE:
        return None
    fragments = Catalogue.of({**FRAGMENTS, **TITLES})
    return Catalogue.of({**MESSAGES, **SUMMARIES, **DESCRIPTIONS, **TITLES}, fragments)


def translate(text: str) -> str:
    """A line of the engine's in the language that is spoken; as it is where nobody has translated it."""
    return _translated(text, language.current())


def translate_list(text: str) -> str:
    """Names with commas between them, each as `translate` says it."""
    return (", " if language.current() == language.ENGLISH else "，").join(map(translate, text.split(", ")))


def translate_paragraph(text: str) -> str:
    """A paragraph of a method's documentation in the language that is spoken; as it is where it is a formula."""
    return DOCUMENTATION.get(" ".join(text.split()), text) if language.current() == language.CHINESE else text


@lru_cache(4096)
def _translated(text: str, code: str) -> str:
    catalogue = _catalogue(code)
    if catalogue is None or len(text) > LONGEST:
        return text
    fragments = catalogue.fragments
    return catalogue.find(text) or (fragments and fragments.find(text)) or text
