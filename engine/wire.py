"""HTTP as the hub needs it: one request, bounded in time and bytes; a token goes to its own host and to no other.

An error of this file never holds a header: what is raised may be shown and logged.
"""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from email.message import Message
from typing import IO
from urllib.parse import urljoin, urlsplit

from engine.errors import HubError, short

REDIRECTS = 6
CHUNK = 1 << 16
AGENT = "maquette"
PORTS = {"http": 80, "https": 443}


class Unreachable(HubError):
    """No answer came: no network, no such host, or silence."""


@dataclass(frozen=True)
class Ask:
    """One request. `start`: from this byte on; `stop`: up to this one, not included."""

    url: str
    token: str = field(default="", repr=False)
    method: str = "GET"
    start: int = 0
    stop: int | None = None
    timeout: float = 10.0

    def headers(self, origin: tuple[str, str, int]) -> dict[str, str]:
        found = {"User-Agent": AGENT, "Accept-Encoding": "identity"}
        if self.start or self.stop is not None:
            found["Range"] = f"bytes={self.start}-{'' if self.stop is None else self.stop - 1}"
        if self.token and origin == origin_of(self.url):
            found["Authorization"] = f"Bearer {self.token}"
        return found


@dataclass(frozen=True)
class Answer:
    """The head of an answer; `url` is where it came from in the end."""

    status: int
    headers: Mapping[str, str]
    url: str

    @property
    def size(self) -> int | None:
        """Bytes of the whole file, where the answer tells."""
        _, _, whole = self.headers.get("content-range", "").partition("/")
        text = self.headers.get("x-linked-size") or whole or self.headers.get("content-length", "")
        return int(text) if text.isdigit() else None

    @property
    def etag(self) -> str:
        """The name of the content, without quotes."""
        text = self.headers.get("x-linked-etag") or self.headers.get("etag", "")
        return text.removeprefix("W/").strip('"')


def origin_of(url: str) -> tuple[str, str, int]:
    """Scheme, host and port."""
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or PORTS.get(parts.scheme, 0)


@contextmanager
def answered(ask: Ask, *, leave: bool = True) -> Iterator[tuple[Answer, IO[bytes]]]:
    """The answer and its body, whatever its status. Redirects are followed; a HEAD is not followed to another host.

    leave: whether a GET may be led to another host, where the token is not sent.

    Raises:
        HubError: no answer came, or it leads nowhere.
    """
    url = ask.url
    for _ in range(REDIRECTS):
        answer, body = _once(ask, url)
        target = urljoin(url, answer.headers.get("location", ""))
        if answer.status not in (301, 302, 303, 307, 308) or target == url:
            with closing(body):
                yield answer, body
            return
        foreign = origin_of(target) != origin_of(ask.url)
        if foreign and ask.method == "HEAD":
            with closing(body):
                yield answer, body
            return
        body.close()
        if urlsplit(target).scheme not in PORTS or (foreign and not leave):
            raise HubError(f"The hub leads to {short(urlsplit(target).netloc)}, where nothing was expected.")
        if urlsplit(url).scheme == "https" and urlsplit(target).scheme != "https":
            raise HubError("The hub leads to an address that is not encrypted; it is not followed.")
        url = target
    raise HubError("The hub leads in a circle: too many redirects.")


def read(ask: Ask, limit: int, *, patience: float = 20.0, leave: bool = True) -> tuple[Answer, bytes]:
    """The answer with its body, at most `limit` bytes of it, within `patience` seconds.

    Raises:
        HubError: no answer came, or too slowly, or it broke off.
    """
    until = time.monotonic() + patience
    with answered(ask, leave=leave) as (answer, body):
        found = b"".join(parts(body, until, limit))
    told = answer.headers.get("content-length", "")
    if ask.method == "GET" and answer.status < 300 and told.isdigit() and len(found) < min(int(told), limit):
        raise Unreachable("The hub's answer broke off. Try again.")
    return answer, found


def parts(body: IO[bytes], until: float, limit: int) -> Iterator[bytes]:
    """A body in pieces as they come, until the time is up or `limit` bytes have come.

    Raises:
        HubError: the time is up, or the connection broke.
    """
    left = limit
    while left > 0:
        if time.monotonic() > until:
            raise Unreachable("The hub answers too slowly. Try again later.")
        try:
            # read1 gives what has come, where read would wait for the whole piece
            piece = body.read1(min(CHUNK, left))  # type: ignore[attr-defined]
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(f"The connection to the hub broke: {_reason(error)}.") from None
        if not piece:
            return
        left -= len(piece)
        yield piece


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows nothing: `answered` does, and looks where it goes."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


def _once(ask: Ask, url: str) -> tuple[Answer, IO[bytes]]:
    request = urllib.request.Request(url, headers=ask.headers(origin_of(url)), method=ask.method)
    try:
        body = urllib.request.build_opener(_Stay).open(request, timeout=ask.timeout)
    except urllib.error.HTTPError as error:
        body = error
    except (OSError, http.client.HTTPException, ValueError) as error:
        host = urlsplit(url).netloc
        raise Unreachable(f"The hub at {short(host)} cannot be reached: {_reason(error)}.") from None
    return Answer(body.status, {key.lower(): value for key, value in body.headers.items()}, url), body


def _reason(error: Exception) -> str:
    if isinstance(error, ValueError):
        return "the address or the token holds characters that cannot be sent"  # the message would quote them
    inner = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(inner, TimeoutError):
        return "it does not answer in time"
    if isinstance(inner, OSError) and inner.strerror:
        return inner.strerror
    return short(inner) or type(inner).__name__
