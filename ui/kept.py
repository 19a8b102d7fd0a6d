"""Gradio's scripts and styles, read and packed once and then sent from memory; browsers keep them too.

A page loads some 75 of these files, and Gradio reads and packs each of them anew for every visitor: 3 to 6 ms each,
more than all else that a page costs. Their names hold a hash of what is in them, so no answer can become wrong.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HASHED = re.compile(r"/assets/[\w.-]+-[\w-]{8}\w?\.\w+")
FOREVER = "public, max-age=31536000, immutable"
ENCODINGS = ("br", "gzip")  # as Gradio prefers them


@dataclass(frozen=True)
class Answer:
    """What an app answered, as a whole."""

    status: int
    headers: Headers
    body: bytes

    def saying(self, body: bytes, **headers: str) -> Answer:
        """The same with another body and more headers."""
        head = MutableHeaders(raw=list(self.headers.raw))
        head["content-length"] = str(len(body))
        for name, value in headers.items():
            head[name.replace("_", "-")] = value
        return Answer(self.status, head, body)

    async def send(self, send: Send) -> None:
        """Give it."""
        await send({"type": "http.response.start", "status": self.status, "headers": self.headers.raw})
        await send({"type": "http.response.body", "body": self.body})


async def ask(app: ASGIApp, scope: Scope, receive: Receive) -> Answer:
    """The answer of an app."""
    messages: list[Message] = []

    async def keep(message: Message) -> None:
        messages.append(message)

    await app(scope, receive, keep)
    start, *rest = messages
    body = b"".join(message.get("body", b"") for message in rest)
    return Answer(int(start["status"]), Headers(raw=list(start["headers"])), body)


class Kept:
    """Middleware around an app that has such files."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._answers: dict[tuple[str, str], Answer] = {}  # no more than there are files and encodings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        asks_part = any(name in headers for name in ("range", "if-none-match", "if-modified-since"))
        if scope.get("method") != "GET" or asks_part or not HASHED.fullmatch(scope["path"]):
            await self._app(scope, receive, send)
            return
        accepted = headers.get("accept-encoding", "")
        key = scope["path"], next((each for each in ENCODINGS if each in accepted), "")
        answer = self._answers.get(key)
        if answer is None:
            answer = await ask(self._app, scope, receive)
            if answer.status == 200:
                answer = self._answers[key] = answer.saying(answer.body, cache_control=FOREVER)
        await answer.send(send)
