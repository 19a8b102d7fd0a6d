"""Gradio's scripts and styles, read and packed once and then sent from memory; browsers keep them too.

A page loads some 75 of these files, and Gradio reads and packs each of them anew for every visitor: 3 to 6 ms each,
more than all else that a page costs. Their names hold a hash of what is in them, so no answer can become wrong.
"""

from __future__ import annotations

import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ui.answers import Answer, ask

HASHED = re.compile(r"/assets/[\w.-]+-[\w-]{8}\w?\.\w+")
FOREVER = "public, max-age=31536000, immutable"
ENCODINGS = ("br", "gzip")  # as Gradio prefers them


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
