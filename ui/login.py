"""Logging in to a team server and out again: one form that works without scripts, and limits on guessing."""

from __future__ import annotations

import asyncio
import logging
import urllib.parse

from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from engine.errors import StoreError
from engine.rates import RateLimits
from ui import markup
from ui.guard import ADDRESS, set_cookie
from ui.markup import tag
from ui.theme import ASSETS
from ui.visitors import SESSION, WEEK, Members
from ui.wording import say

log = logging.getLogger(__name__)

TRIES_BY_ADDRESS, TRIES_BY_NAME = 10, 30  # a minute; a name may be tried by somebody else, so it is not locked soon
MOST_FIELDS, LONGEST_NAME = 10, 256  # of a form, and the characters of a name that are remembered
AT_ONCE = 2  # passwords that are checked at a time: each takes memory and a core


class Door:
    """The routes /login and /logout."""

    def __init__(self, members: Members) -> None:
        self._members, self._rates = members, RateLimits()
        self._checking = asyncio.Semaphore(AT_ONCE)

    def routes(self) -> list[Route]:
        """To be asked before Gradio's own."""
        return [
            Route("/login", self.form, methods=["GET", "HEAD"]),
            Route("/login", self.login, methods=["POST"]),
            Route("/logout", self.logout, methods=["POST"]),
        ]

    async def form(self, request: Request) -> Response:
        """The form; who is in already goes on to the page."""
        if self._members.owner(request.cookies):
            return RedirectResponse(_page(request), 303)
        return _form(request)

    async def login(self, request: Request) -> Response:
        """Let in who gives a name and its password."""
        address = request.headers.get(ADDRESS, "")
        if wait := self._rates.take("address", address, TRIES_BY_ADDRESS):
            return _too_often(request, wait)
        try:
            fields = urllib.parse.parse_qs(
                (await request.body()).decode("utf-8", "replace"), max_num_fields=MOST_FIELDS
            )
        except ValueError:
            return _form(request, say("login.fields"), 400)
        name, password = (fields.get(key, [""])[0] for key in ("name", "password"))
        if wait := self._rates.take("name", name[:LONGEST_NAME], TRIES_BY_NAME):
            return _too_often(request, wait)
        async with self._checking:
            try:
                token = await asyncio.to_thread(self._members.begin, name.strip().lower(), password)
            except StoreError as error:
                log.error("nobody can log in: %s", error)
                return _form(request, say("login.broken"), 500)
        if token is None:
            log.warning("a login failed, from %s", address)  # neither the name nor the password: people mistype
            return _form(request, say("login.wrong"), 403)
        answer = RedirectResponse(_page(request), 303)
        answer.headers["Set-Cookie"] = set_cookie(request, SESSION, token, int(WEEK))
        return answer

    async def logout(self, request: Request) -> Response:
        """End the session."""
        self._members.end(request.cookies)
        answer = RedirectResponse("./login", 303)
        answer.headers["Set-Cookie"] = set_cookie(request, SESSION, "", 0)
        return answer


def _page(request: Request) -> str:
    """The page, with what was asked of it: a link to a recipe or a comparison survives the login."""
    return f"./?{request.url.query}" if request.url.query else "./"


def _too_often(request: Request, wait: float) -> Response:
    answer = _form(request, say("login.often", seconds=round(wait) + 1), 429)
    answer.headers["Retry-After"] = str(round(wait) + 1)
    return answer


def _form(request: Request, problem: str = "", status: int = 200) -> Response:
    query = f"?{request.url.query}" if request.url.query else ""
    fields = []
    for key, kind, hint in (("name", "text", "username"), ("password", "password", "current-password")):
        entry = tag("input", id=key, name=key, type=kind, autocomplete=hint, required=True, maxlength=1024)
        fields.append(tag("p", tag("label", say(f"login.{key}"), for_=key), entry))
    form = tag(
        "form", *fields, tag("button", say("login.enter"), type="submit"), method="post", action=f"./login{query}"
    )
    body = tag("main", tag("h1", "Maquette"), tag("p", say("login.about")), markup.notice(problem, "bad"), form)
    style = (ASSETS / "login.css").read_text()
    return HTMLResponse(markup.document(say("login.title"), style, body), status, {"Cache-Control": "no-store"})
