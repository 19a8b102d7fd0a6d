"""Gradio's scripts and styles, read and packed once and then sent from memory; browsers keep them too.

A page loads some 75 of these files, and Gradio reads and packs each of them anew for every visitor: 3 to 6 ms each,
more than all else that a page costs. Their names hold a hash of what is in them, so no answer can become wrong, and
they are the same for everybody, so they are given without asking who wants them.
"""

from __future__ import annotations

import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HASHED = re.compile(r"/assets/[\w.-]+-[\w-]{8}\w?\.\w+")
FOREVER = "public, max-age=31536000, immutable"
ENCODINGS = ("br", "gzip")  # as Gradio prefers them


class Kept:
    """Middleware around an app that has such files."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._answers: dict[tuple[str, str], list[Message]] = {}  # no more than there are files and encodings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        asks_part = any(name in headers for name in ("range", "if-none-match", "if-modified-since"))
        if scope.get("method") != "GET" or asks_part or not HASHED.fullmatch(scope["path"]):
            await self._app(scope, receive, send)
            return
        accepted = headers.get("accept-encoding", "")
        key = scope["path"], next((each for each in ENCODINGS if each in accepted), "")
        if key not in self._answers:
            answer = await self._ask(scope, receive)
            if answer[0]["status"] != 200:
                await _send(answer, send)
                return
            self._answers[key] = answer
        await _send(self._answers[key], send)

    async def _ask(self, scope: Scope, receive: Receive) -> list[Message]:
        """The app's answer, in two messages."""
        messages: list[Message] = []

        async def keep(message: Message) -> None:
            messages.append(message)

        await self._app(scope, receive, keep)
        start = dict(messages[0])
        body = b"".join(message.get("body", b"") for message in messages[1:])
        head = MutableHeaders(raw=list(start["headers"]))
        if start["status"] == 200:
            head["cache-control"] = FOREVER
            head["content-length"] = str(len(body))
        return [{**start, "headers": head.raw}, {"type": "http.response.body", "body": body}]


async def _send(answer: list[Message], send: Send) -> None:
    for message in answer:
        await send(message)
