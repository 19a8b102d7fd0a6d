"""The page in each visitor's language: what Gradio builds once, and the document around it.

Gradio's own `I18n` translates labels in the browser by the browser's language. It knows neither the visitor's choice
nor the texts inside of HTML and of choices. So the page is laid out once for each language, and every visitor is sent
the layout of theirs. Components, their order and so their ids in Gradio's events are the same: only the first layout
serves events. The few words that Gradio's scripts say themselves follow `navigator.language`, which we set.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import gradio as gr
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from ui import language
from ui.answers import Answer, ask

Config = Any  # Gradio's BlocksConfigDict, a TypedDict of its own; only "components" matters here
Props = dict[str, object]
YEAR = 365 * 86_400
ADDRESSED = ("host", "x-forwarded-host", "x-forwarded-proto", "x-gradio-server")  # of which Gradio makes the address
DEEP = "deep_link"  # a query of Gradio's, which changes the document
DOCUMENTS = 16  # that are kept; who asked for none for longest is written to anew


class Page(gr.Blocks):
    """Blocks whose `config`, from which Gradio makes the document, is in the language of the request."""

    _config: Config

    @property
    def config(self) -> Config:
        """What Gradio sends to a browser."""
        props = self._translations().get(language.current())
        if props is None:
            return self._config
        pairs = zip(self._config["components"], props, strict=True)
        return {**self._config, "components": [{**component, "props": each} for component, each in pairs]}

    @config.setter
    def config(self, made: Config) -> None:
        self._config = made

    def add_translation(self, code: str, twin: gr.Blocks) -> None:
        """Keep the texts of `twin`, which is this page laid out in another language."""
        ours, theirs = self.get_config_file()["components"], twin.get_config_file()["components"]
        assert [c["type"] for c in ours] == [c["type"] for c in theirs], "the layout depends on the language"
        self._translations()[code] = [c["props"] for c in theirs]

    def _translations(self) -> dict[str, list[Props]]:
        found: dict[str, list[Props]] = self.__dict__.setdefault("_props", {})  # Gradio sets config in __init__
        return found


def in_each(lay_out: Callable[[], Page]) -> Page:
    """The page that `lay_out` makes, with its translations; the English one serves events."""
    with language.use(language.ENGLISH):
        page = lay_out()
    for code in language.LANGUAGES:
        if code != language.ENGLISH:
            with language.use(code):
                page.add_translation(code, lay_out())
    return page


class InLanguage:
    """Middleware: answer each request in its visitor's language; the document says which, and a choice is kept.

    Gradio takes 20 ms to write the document, which is the same for all who speak a language and reach the page by the
    same address: it is written once for each.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._documents: OrderedDict[tuple[str, ...], Answer] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        code = language.of_request(request)
        with language.use(code):
            if request.method == "GET" and scope["path"] == "/":
                answer = await self._document(request, code, receive)
                await remembering(answer, request).send(send)
            else:
                await self._app(scope, receive, send)

    async def _document(self, request: Request, code: str, receive: Receive) -> Answer:
        named = (request.headers.get(name, "") for name in ADDRESSED)
        key = (code, request.scope["scheme"], request.scope.get("root_path", ""), *named)
        found = self._documents.get(key)
        if found is None or DEEP in request.query_params:
            found = await ask(self._app, request.scope, receive)
            headers = found.headers
            if headers.get("content-type", "").startswith("text/html") and "content-encoding" not in headers:
                found = found.saying(written(found.body, code))
            if found.status == 200 and DEEP not in request.query_params:
                self._documents[key] = found
        if key in self._documents:
            self._documents.move_to_end(key)
        while len(self._documents) > DOCUMENTS:
            self._documents.popitem(last=False)
        return found


def remembering(answer: Answer, request: Request) -> Answer:
    """The document with what its visitor's choice of a language adds to it."""
    headers = MutableHeaders(raw=list(answer.headers.raw))
    headers.add_vary_header("Accept-Language, Cookie")
    asked = request.query_params.get(language.KEY)
    if asked in language.LANGUAGES:
        headers.append("set-cookie", _cookie(request, str(asked)))
    return Answer(answer.status, headers, answer.body)


def written(document: bytes, code: str) -> bytes:
    """An HTML document that says its language, to readers and to Gradio's scripts."""
    script = f'<script>Object.defineProperty(navigator, "language", {{value: {json.dumps(code)}}})</script>'
    document = document.replace(b'lang="en"', f'lang="{code}"'.encode(), 1)
    return document.replace(b"<head>", b"<head>" + script.encode(), 1)


def _cookie(request: Request, code: str) -> str:
    secure = request.headers.get("x-forwarded-proto", request.url.scheme).split(",")[0] == "https"
    scope = "SameSite=None; Secure; Partitioned" if secure else "SameSite=Lax"
    return f"{language.COOKIE}={code}; Path=/; Max-Age={YEAR}; HttpOnly; {scope}"
