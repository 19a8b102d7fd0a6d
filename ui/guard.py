"""The door: every request passes here first, and every answer last, also errors, files and streams.

Gradio serves some sixty routes, among them a proxy, uploads, files, recordings and an editor for its own source, and
checks a login on two thirds of them. So a list says which routes the page needs, and the others are closed. What is
open is then asked in this order: is this our name (no DNS rebinding), does the request come from our own page, who
is it, is it too much, does the Gradio session that it names belong to this visitor, and does it name files elsewhere,
which Gradio would fetch from whatever address a visitor gives for any input of any handler.

Behind the door the visitor's cookie holds the name that was proved, and `x-maquette-address` the address.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.modes import Limits, Mode, is_loopback
from engine.rates import RateLimits
from ui import language
from ui.visitors import COOKIE, SESSION, Pages, Visitors
from ui.wording import say

READ, WRITE = ("GET", "HEAD"), ("POST",)
OPEN: tuple[tuple[tuple[str, ...], re.Pattern[str]], ...] = tuple(
    (methods, re.compile(pattern))
    for methods, pattern in (
        (READ, r"/"),
        (READ, r"/config/?|/gradio_api/info/?|/gradio_api/startup-events"),
        (READ, r"/(assets|static|svelte)/[^\0]+"),
        (READ, r"(/gradio_api)?/theme\.css|/favicon\.ico|/robots\.txt"),
        (READ, r"/gradio_api/heartbeat/\w+|/gradio_api/queue/data"),
        (WRITE, r"/gradio_api/queue/join|/gradio_api/run/\w+/?"),
        (READ, r"/healthz|/runs/[\w-]+/[\w.-]+|/compare/[\w.-]+"),
    )
)
EVENTS = re.compile(r"/gradio_api/(queue/join|run/\w+)/?")
VIEW = re.compile(r"/|/config/?|/(runs|compare)/.*")
UPLOADS = ((WRITE, re.compile(r"/gradio_api/upload")), (READ, re.compile(r"/gradio_api/upload_progress")))
DOOR = (((*READ, *WRITE), re.compile(r"/login")), (WRITE, re.compile(r"/logout")))  # of a team server
WITHOUT_LOGIN = re.compile(r"/login|/healthz|/favicon\.ico|/robots\.txt|/gradio_api/startup-events")
BODY = 2 << 20  # bytes of a request
UPLOAD = 256 << 10  # of one with a file: a set of prompts; what is uploaded counts in no quota
MOST_OPEN = 64  # requests of one visitor at a time, streams of events among them
AT_ONCE = 15  # the part of a minute's requests that may come together: each holds the server some 10 ms
VIEWS = 120  # documents, reports and files of one visitor in a minute: each takes some 60 ms to make
PLAIN = re.compile(r"[\w.:+/=-]*")
SESSION_NAME = re.compile(r"[\w-]{1,64}")
PAGES = 30  # new pages of one visitor in a minute, a third of them together; Gradio keeps the state of some of them
YEAR = 365 * 86_400
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors "
)
FRAMES = {Mode.PUBLIC: "'self' https://huggingface.co https://*.hf.space"}  # Spaces frame their pages
ADDRESS = "x-maquette-address"


@dataclass(frozen=True)
class House:
    """What the door knows. proxies: how many of our own stand before us, each adding to X-Forwarded-For.

    hosts: names of ours beside the one that a request was sent to. uploads: whether the page takes files.
    """

    mode: Mode
    limits: Limits
    visitors: Visitors
    rates: RateLimits
    proxies: int = 0
    hosts: frozenset[str] = frozenset()
    uploads: bool = False


def house(
    mode: Mode,
    limits: Limits,
    visitors: Visitors,
    environment: Mapping[str, str] = os.environ,
    *,
    uploads: bool = False,
) -> House:
    """As the environment describes it; a Space stands behind one proxy and has a name of its own."""
    count = environment.get("MAQUETTE_PROXIES", "1" if environment.get("SPACE_ID") else "0")
    named = [environment.get("SPACE_HOST", ""), *environment.get("MAQUETTE_HOSTS", "").split(",")]
    hosts = frozenset(filter(None, (each.strip().lower() for each in named)))
    return House(mode, limits, visitors, RateLimits(), int(count) if count.isdigit() else 0, hosts, uploads)


class Guard:
    """The middleware."""

    def __init__(self, app: ASGIApp, house: House) -> None:
        self._app, self._house = app, house
        self._pages, self._open = Pages(), Counter[str]()
        self._ways = (*OPEN, *(DOOR if house.mode is Mode.TEAM else ()), *(UPLOADS if house.uploads else ()))
        frames = FRAMES.get(house.mode, "'self'")
        self._headers = {
            "content-security-policy": POLICY + frames,
            "x-content-type-options": "nosniff",
            "referrer-policy": "same-origin",
            "permissions-policy": "camera=(), microphone=(), geolocation=()",
            "cross-origin-resource-policy": "same-origin",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # nothing of ours speaks over web sockets
            await send({"type": "websocket.close", "code": 1008})
            return
        request = Request(scope)
        with language.use(language.of_request(request)):
            await self._guard(request, receive, send)

    async def _guard(self, request: Request, receive: Receive, send: Send) -> None:
        scope = request.scope
        owner = self._house.visitors.owner(request.cookies)
        cookie = self._new_cookie(request, owner)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": self._answer_headers(message.get("headers", []), cookie)}
            await send(message)

        refusal = self._refusal(request, owner)
        if refusal is not None:
            await refusal(scope, receive, guarded)
            return
        several = {owner, self._address(request)} - {""}
        self._open.update(several)
        try:
            await self._let_in(request, owner, receive, guarded)
        finally:
            self._open.subtract(several)
            for who in several:
                if not self._open[who]:
                    del self._open[who]

    async def _let_in(self, request: Request, owner: str, receive: Receive, send: Send) -> None:
        session = request.query_params.get("session_hash")
        if request.scope["path"].startswith("/gradio_api/heartbeat/"):
            session = request.scope["path"].rsplit("/", 1)[-1]
        if request.method == "POST":
            upload = request.scope["path"].startswith("/gradio_api/upload")
            body = await _read(receive, UPLOAD if upload else BODY)
            if body is None:
                await PlainTextResponse(say("door.body"), 413)(request.scope, receive, send)
                return
            if EVENTS.fullmatch(request.scope["path"]):
                asked = _asked(body or b"{}")  # which Gradio refuses itself
                if asked is None or _names_address(asked):
                    code = 422 if asked is None else 404
                    await PlainTextResponse(say("door.closed"), code)(request.scope, receive, send)
                    return
                session = str(asked.get("session_hash") or "")
            receive = _again(body, receive)
        if session and not SESSION_NAME.fullmatch(session):
            await PlainTextResponse(say("door.closed"), 404)(request.scope, receive, send)
            return
        if session and session not in self._pages and self._house.limits.requests is not None:
            wait = self._wait("page", owner, self._address(request), PAGES, PAGES // 3)
            if wait:
                await _too_often(wait)(request.scope, receive, send)
                return
        if session and not self._pages.belongs(session, owner):
            await PlainTextResponse(say("door.closed"), 404)(request.scope, receive, send)
            return
        await self._app(self._proved(request, owner), receive, send)

    def _refusal(self, request: Request, owner: str) -> Response | None:
        """Why a request does not get in, before its body is read."""
        path, method = request.scope["path"], request.method
        if not any(method in methods and pattern.fullmatch(path) for methods, pattern in self._ways):
            return PlainTextResponse(say("door.closed"), 404)
        if self._house.mode is Mode.LOCAL and not is_loopback(_name(request.headers.get("host", ""))):
            return PlainTextResponse(say("door.host"), 421)
        if not self._same_site(request):
            return PlainTextResponse(say("door.origin"), 403)
        limits, address = self._house.limits, self._address(request)
        if method == "POST" or path == "/gradio_api/queue/data":
            per = limits.requests
            wait = self._wait("request", owner, address, per, per and max(1, per // AT_ONCE))
            if path.startswith("/gradio_api/upload"):
                wait = wait or self._wait("upload", owner, address, limits.starts, None)
            if wait:
                return _too_often(wait)
        if limits.requests is not None and VIEW.fullmatch(path):
            wait = self._wait("view", owner, address, VIEWS, VIEWS // 4)
            if wait:
                return _too_often(wait)
        crowded = self._open[address] >= MOST_OPEN * limits.crowd or self._open[owner] >= MOST_OPEN
        if limits.requests is not None and crowded:
            return _too_often(5)
        if self._house.mode is Mode.TEAM and not owner and not WITHOUT_LOGIN.fullmatch(path):
            if path == "/":
                query = f"?{request.url.query}" if request.url.query else ""
                return RedirectResponse(f"./login{query}", 303)
            return PlainTextResponse(say("door.login"), 401)
        return None

    def _wait(self, what: str, owner: str, address: str, per_minute: int | None, at_once: int | None) -> float:
        """Seconds until somebody may do something again; an address holds several visitors."""
        rates, crowd = self._house.rates, self._house.limits.crowd
        if per_minute is None:
            return 0.0
        wait = rates.take(what, owner, per_minute, at_once=at_once) if owner else 0.0
        return wait or rates.take(what, f"at {address}", per_minute * crowd, at_once=at_once and at_once * crowd)

    def _same_site(self, request: Request) -> bool:
        """Whether a browser says that the request comes from our own page. Who is no browser says nothing."""
        origin = request.headers.get("origin")
        if origin is None:
            return True
        ours = {request.headers.get("host", "").lower(), *self._house.hosts}
        return urlsplit(origin).netloc.lower() in ours - {""}

    def _address(self, request: Request) -> str:
        """Where a request comes from; of what is forwarded only that which our own proxies have added."""
        lines = ",".join(request.headers.getlist("x-forwarded-for"))  # the client's own line may be the first of them
        chain = [part.strip() for part in lines.split(",") if part.strip()]
        if 0 < self._house.proxies <= len(chain):
            return chain[-self._house.proxies][:64]
        return request.client.host if request.client else "nowhere"

    def _proved(self, request: Request, owner: str) -> Scope:
        """The request as those behind the door see it."""
        kept = [(k, v) for k, v in request.scope["headers"] if k not in (b"cookie", ADDRESS.encode())]
        # Ours alone, and of plain characters: a quoted value may hold a second cookie.
        wanted = {language.COOKIE, *([SESSION] if request.scope["path"] in ("/login", "/logout") else [])}
        cookies = {k: v for k, v in request.cookies.items() if k in wanted and PLAIN.fullmatch(v)}
        cookies |= {COOKIE: owner} if owner else {}
        if cookies:
            kept.append((b"cookie", "; ".join(f"{k}={v}" for k, v in cookies.items()).encode("latin-1", "ignore")))
        kept.append((ADDRESS.encode(), self._address(request).encode("latin-1", "ignore")))
        return {**request.scope, "headers": kept}

    def _new_cookie(self, request: Request, owner: str) -> str | None:
        """A name for a new visitor, with the page itself."""
        if owner or request.scope["path"] != "/" or request.method != "GET":
            return None
        value = self._house.visitors.welcome()
        return None if value is None else set_cookie(request, COOKIE, value, YEAR)

    def _answer_headers(self, headers: list[tuple[bytes, bytes]], cookie: str | None) -> list[tuple[bytes, bytes]]:
        ours = {name.encode(): value.encode() for name, value in self._headers.items()}
        # No other site reads our answers, whatever the framework would allow it.
        kept = [(k, v) for k, v in headers if k.lower() not in ours and not k.lower().startswith(b"access-control-")]
        if not any(k.lower() == b"cache-control" for k, _ in kept):
            kept.append((b"cache-control", b"private, no-cache"))  # what one visitor got is no other's
        return [*kept, *ours.items(), *([(b"set-cookie", cookie.encode())] if cookie else [])]


def set_cookie(request: Request, name: str, value: str, seconds: int) -> str:
    """A cookie hidden from scripts. Behind HTTPS the visitor's may be framed, as Spaces frame their pages."""
    secure = request.headers.get("x-forwarded-proto", request.url.scheme).split(",")[0].strip() == "https"
    framed = secure and name == COOKIE
    scope = "SameSite=None; Secure; Partitioned" if framed else f"SameSite=Lax{'; Secure' if secure else ''}"
    return f"{name}={value}; Path=/; Max-Age={seconds}; HttpOnly; {scope}"


def _too_often(wait: float) -> Response:
    return PlainTextResponse(say("door.often"), 429, {"Retry-After": str(int(wait) + 1)})


async def _read(receive: Receive, most: int) -> bytes | None:
    """The whole body; None where it has more bytes."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b"".join(parts)
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            return None
        if not message.get("more_body"):
            return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """A body that was read, to be read once more."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def once() -> Message:
        return waiting.pop() if waiting else await receive()

    return once


def _asked(body: bytes) -> dict[str, object] | None:
    """What an event's body says; None where it is no JSON object."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _names_address(body: object) -> bool:
    """Whether a file in it is one of another server."""
    left = [body]
    while left:
        each = left.pop()
        if isinstance(each, dict):
            path = each.get("path")
            if isinstance(path, str) and "://" in path:
                return True
            left.extend(each.values())
        elif isinstance(each, list):
            left.extend(each)
    return False


def _name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host.partition("]")[0][1:]
    return host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() and ":" in host else host
