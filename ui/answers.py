"""An answer of an app as a whole, for middleware that keeps or changes it."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send


@dataclass(frozen=True)
class Answer:
    """Status, headers and body."""

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
