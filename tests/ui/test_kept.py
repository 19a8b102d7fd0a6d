"""Files whose names hold their hash are asked for once."""

from __future__ import annotations

import asyncio

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from ui.kept import FOREVER, Kept

NAME = "/assets/index-DphvyggB.js"


class Shop:
    """An app that counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0
        routes = [Route(NAME, self.give), Route("/assets/plain.js", self.give), Route("/", self.give)]
        self.kept = Kept(Starlette(routes=routes))

    async def give(self, request: Request) -> Response:
        self.asked += 1
        return PlainTextResponse(f"for {request.headers.get('accept-encoding')}", headers={"x-number": str(self.asked)})

    def get(self, path: str, **headers: str) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(app=self.kept)
            async with httpx.AsyncClient(transport=transport, base_url="http://maquette.example") as asked:
                return await asked.get(path, headers={k.replace("_", "-"): v for k, v in headers.items()})

        return asyncio.run(ask())


def test_a_hashed_file_is_asked_for_once_and_may_be_kept_forever() -> None:
    shop = Shop()
    first, second = (shop.get(NAME, accept_encoding="br") for _ in range(2))
    assert shop.asked == 1
    assert first.content == second.content == b"for br"
    assert first.headers["cache-control"] == second.headers["cache-control"] == FOREVER


def test_each_encoding_has_an_answer_of_its_own() -> None:
    shop = Shop()
    assert [shop.get(NAME, accept_encoding=each).text for each in ("gzip", "identity", "gzip, br", "gzip")] == [
        "for gzip", "for identity", "for gzip, br", "for gzip",
    ]  # fmt: skip
    assert shop.asked == 3


def test_everything_else_is_asked_for_each_time() -> None:
    shop = Shop()
    for path, headers in ((NAME, {"range": "bytes=0-3"}), ("/assets/plain.js", {}), ("/", {})):
        before = shop.asked
        answers = [shop.get(path, **headers) for _ in range(2)]
        assert shop.asked == before + 2
        assert all("cache-control" not in answer.headers for answer in answers)


def test_what_is_not_there_is_not_kept() -> None:
    shop = Shop()
    answer = shop.get("/assets/index-AAAAAAAA.js")
    assert answer.status_code == 404
    assert "cache-control" not in answer.headers
