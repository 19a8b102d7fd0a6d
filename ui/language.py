"""Which language a visitor reads: asked for in the address, kept in a cookie, or as the browser prefers.

It stands in a context variable, so that whatever makes text need not be handed it. A thread takes the context along
in which it was begun, but a step of a generator may run in another one: `edge` sets the language around each step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType

ENGLISH, CHINESE = "en", "zh-CN"
LANGUAGES: Mapping[str, str] = MappingProxyType({ENGLISH: "English", CHINESE: "简体中文"})  # as each calls itself
COOKIE = "maquette_language"
KEY = "lang"  # of the address: `?lang=zh-CN`

_current: ContextVar[str] = ContextVar("language", default=ENGLISH)


def current() -> str:
    """The language in which text is made now."""
    return _current.get()


@contextmanager
def use(code: str) -> Iterator[None]:
    """Make text in this language meanwhile."""
    token = _current.set(code)
    try:
        yield
    finally:
        _current.reset(token)


def chosen(query: Mapping[str, str], cookies: Mapping[str, str], accepted: str) -> str:
    """What the address asks for, else what the visitor chose before, else the best that the browser accepts."""
    for code in (query.get(KEY), cookies.get(COOKIE)):
        if code in LANGUAGES:
            return str(code)
    return preferred(accepted)


def preferred(accepted: str) -> str:
    """Of an Accept-Language header the first language that we have; English where it names none of them.

    Any Chinese counts as ours: who reads traditional characters reads simplified ones sooner than English.
    """
    wanted: list[tuple[float, str]] = []
    for item in accepted[:500].split(","):
        tag, _, weight = item.strip().partition(";")
        try:
            share = float(weight.strip().removeprefix("q=")) if weight else 1.0
        except ValueError:
            continue
        if share > 0:
            wanted.append((-share, tag.strip().lower().split("-")[0]))
    for _, tag in sorted(wanted, key=lambda each: each[0]):  # stable: of equal weights the first
        for code in LANGUAGES:
            if tag == code.lower().split("-")[0]:
                return code
    return ENGLISH


def of_request(request: object) -> str:
    """The language of a request: Starlette's, Gradio's, or none at all."""
    query, cookies, headers = (getattr(request, part, None) or {} for part in ("query_params", "cookies", "headers"))
    return chosen(query, cookies, str(headers.get("accept-language", "")))
