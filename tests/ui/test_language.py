"""Which language a visitor reads, and that the page comes in it as a whole."""

from __future__ import annotations

import asyncio
import string
from collections.abc import Iterator

import gradio as gr
import httpx
import pytest
from gradio.context import LocalContext
from starlette.types import Message, Receive, Scope, Send

from ui import language, translated, wording
from ui.chinese import CHINESE
from ui.edge import edge
from ui.words import ENGLISH


def placeholders(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def test_both_dictionaries_say_the_same_things() -> None:
    plural = {key for key in ENGLISH if key.endswith(".one")}  # Chinese needs no form of its own for one
    assert ENGLISH.keys() - plural == CHINESE.keys() - plural
    assert CHINESE.keys() <= ENGLISH.keys()
    assert {key for key in CHINESE if placeholders(CHINESE[key]) != placeholders(ENGLISH[key])} == set()
    assert {key for words in (ENGLISH, CHINESE) for key, text in words.items() if not text.strip()} == set()


@pytest.mark.parametrize(
    ("accepted", "code"),
    [
        ("", "en"),
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh-CN"),
        ("zh", "zh-CN"),
        ("en-GB,en;q=0.9,zh-CN;q=0.8", "en"),
        ("de-DE,de;q=0.9", "en"),
        ("de,en;q=0.3,zh;q=0.5", "zh-CN"),
        ("zh;q=0, en", "en"),
        ("zh;q=many, *;q=0.1", "en"),
        ("," * 10_000, "en"),
    ],
)
def test_the_browser_says_what_it_prefers(accepted: str, code: str) -> None:
    assert language.preferred(accepted) == code


def test_the_address_comes_before_the_cookie_and_that_before_the_browser() -> None:
    cookie = {language.COOKIE: "zh-CN"}
    assert language.chosen({}, {}, "en") == "en"
    assert language.chosen({}, cookie, "en") == "zh-CN"
    assert language.chosen({"lang": "en"}, cookie, "zh") == "en"
    assert language.chosen({"lang": "../etc"}, {language.COOKIE: "<b>"}, "zh") == "zh-CN"


def test_one_thing_is_one_in_english() -> None:
    assert wording.say("panes.tokens", count=1) == "1 token"
    assert wording.say("panes.tokens", count=2) == "2 tokens"
    with language.use("zh-CN"):
        assert wording.say("panes.tokens", count=1) == "1 个词元"


def test_numbers_and_spans_are_written_as_a_language_writes_them() -> None:
    with language.use("zh-CN"):
        assert wording.percent(0.924) == "92.4%"
        assert [wording.duration(span) for span in (4.2, 60, 200, 7500)] == [
            "4.2 秒", "1 分钟", "3 分 20 秒", "2 小时 5 分",
        ]  # fmt: skip
        assert wording.when(0, 240) == "4 分钟前"
    assert wording.percent(0.924) == "92.4 %"


class Asked:
    """What a handler's request tells of the language."""

    def __init__(self, code: str) -> None:
        self.cookies, self.query_params, self.headers = {language.COOKIE: code}, {}, {}


def test_every_step_of_a_handler_speaks_its_visitors_language() -> None:
    @edge
    def steps() -> Iterator[object]:
        yield wording.say("run")
        yield wording.say("model")

    @edge
    def once() -> object:
        return wording.say("run")

    token = LocalContext.request.set(Asked("zh-CN"))  # type: ignore[arg-type]
    try:
        made = steps()
        assert isinstance(made, Iterator)
        assert next(made) == "运行"
        assert language.current() == "en"  # between the steps it is somebody else's turn
        LocalContext.request.set(None)  # as Gradio leaves it after each step
        assert next(made) == "模型"
        assert list(made) == []
        LocalContext.request.set(Asked("zh-CN"))  # type: ignore[arg-type]
        assert once() == "运行"
    finally:
        LocalContext.request.reset(token)
    assert once() == "Run"


def test_a_layout_is_sent_in_the_language_of_the_request() -> None:
    def lay_out() -> translated.Page:
        page = translated.Page()
        with page:
            gr.Radio([(wording.say("mode.same"), "same")], label=wording.say("mode"))
        return page

    async def make() -> translated.Page:  # Gradio opens an event loop, and leaves it open, where none is running
        return translated.in_each(lay_out)

    page = asyncio.run(make())
    english = page.config["components"]
    with language.use("zh-CN"):
        chinese = page.config["components"]
    assert [c["id"] for c in english] == [c["id"] for c in chinese]
    assert (english[0]["props"]["label"], chinese[0]["props"]["label"]) == ("Mode", "模式")
    assert chinese[0]["props"]["choices"] == [("同一文本，偏移着色", "same")]


def answer(query: bytes, headers: list[tuple[bytes, bytes]]) -> tuple[dict[str, list[str]], str]:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body = f'<html lang="en"><head></head>{wording.say("run")}</html>'.encode()
        length = (b"content-length", str(len(body)).encode())
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/html"), length]})
        await send({"type": "http.response.body", "body": body[:20], "more_body": True})
        await send({"type": "http.response.body", "body": body[20:]})

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError

    scope = {"type": "http", "method": "GET", "path": "/", "query_string": query, "headers": headers, "scheme": "http",
             "server": ("127.0.0.1", 80)}  # fmt: skip
    asyncio.run(translated.InLanguage(app)(scope, receive, send))
    found: dict[str, list[str]] = {}
    for name, value in sent[0]["headers"]:
        found.setdefault(name.decode(), []).append(value.decode())
    return found, b"".join(message["body"] for message in sent[1:]).decode()


def test_the_document_says_its_language_and_a_choice_is_kept() -> None:
    headers, text = answer(b"lang=zh-CN", [])
    assert '<html lang="zh-CN"><head><script>' in text
    assert "运行" in text
    assert headers["content-length"] == [str(len(text.encode()))]
    assert headers["set-cookie"][0].startswith(f"{language.COOKIE}=zh-CN; ")
    headers, text = answer(b"", [(b"accept-language", b"zh-CN"), (b"cookie", f"{language.COOKIE}=en".encode())])
    assert '<html lang="en">' in text
    assert "set-cookie" not in headers
    headers, text = answer(b"lang=%3Cscript%3E", [])
    assert "set-cookie" not in headers
    assert '<html lang="en">' in text


def test_the_document_is_written_once_for_each_language_and_address() -> None:
    written: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        written.append(language.current())
        headers = [(b"content-type", b"text/html"), (b"content-length", b"13")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"<html></html>"})

    middleware = translated.InLanguage(app)

    def get(query: str = "", **headers: str) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(app=middleware)
            async with httpx.AsyncClient(transport=transport, base_url="http://maquette.example") as asked:
                return await asked.get(f"/{query}", headers={k.replace("_", "-"): v for k, v in headers.items()})

        return asyncio.run(ask())

    assert get().text == get("?recipe=x").text
    assert written == ["en"]
    get(accept_language="zh-CN")
    assert get("?lang=zh-CN").headers["set-cookie"].startswith(f"{language.COOKIE}=zh-CN; ")
    assert "set-cookie" not in get(accept_language="zh-CN").headers  # one visitor's choice is no other's
    assert written == ["en", "zh-CN"]
    get(x_forwarded_host="elsewhere.example")
    get("?deep_link=abc")
    assert written == ["en", "zh-CN", "en", "en"]
    for number in range(translated.DOCUMENTS):
        get(host=f"{number}.example")
    get()
    assert len(written) == 4 + translated.DOCUMENTS + 1
