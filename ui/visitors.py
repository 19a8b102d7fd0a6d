"""Who is asking: the visitor that a request's cookies prove, in each of the three modes.

A name is never taken from what a client says about itself: where others can come it is signed (public) or stands
behind a password (team). What cannot be proved is nobody, and gets a new name with the next page.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from engine.users import UserFile

COOKIE = "maquette_visitor"
SESSION = "maquette_session"
MEMBER = "member:"
NAME = re.compile(rf"[A-Za-z0-9_-]{{16,64}}|{MEMBER}[a-z0-9._-]{{1,32}}")
BARE = re.compile(r"[A-Za-z0-9_-]{16,64}")
WEEK = 7 * 86_400.0
MOST = 10_000  # sessions, of pages and of people


class Visitors(Protocol):
    """Tells from cookies who somebody is, and what cookie to give to somebody new (None: no cookie makes one known)."""

    def owner(self, cookies: Mapping[str, str]) -> str: ...

    def welcome(self) -> str | None: ...


class Anyone:
    """Local mode: whoever comes sits at this machine. A random name keeps two browsers apart."""

    def owner(self, cookies: Mapping[str, str]) -> str:
        name = cookies.get(COOKIE, "")
        return name if BARE.fullmatch(name) else ""

    def welcome(self) -> str:
        return new_name()


class Signed:
    """Public mode: a random name and its HMAC-SHA256; a forged or altered cookie is nobody's."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def owner(self, cookies: Mapping[str, str]) -> str:
        name, _, signature = cookies.get(COOKIE, "").partition(".")
        right = hmac.compare_digest(signature.encode(), self._sign(name).encode())
        return name if right and BARE.fullmatch(name) else ""

    def welcome(self) -> str:
        name = new_name()
        return f"{name}.{self._sign(name)}"

    def _sign(self, name: str) -> str:
        return hmac.new(self._secret, name.encode(), hashlib.sha256).hexdigest()


@dataclass(frozen=True)
class Login:
    """Who has logged in, until when, and the mark of the password that was given."""

    name: str
    mark: str
    until: float


class Members:
    """Team mode: people with a password. Sessions live in memory, by the hash of their token: a restart ends them."""

    def __init__(self, users: UserFile) -> None:
        self.users = users
        self._logins: OrderedDict[str, Login] = OrderedDict()
        self._guard = threading.Lock()

    def owner(self, cookies: Mapping[str, str]) -> str:
        login = self._logins.get(_digest(cookies.get(SESSION, "")))
        if login is None or time.monotonic() > login.until or self.users.mark(login.name) != login.mark:
            return ""
        return MEMBER + login.name

    def welcome(self) -> None:
        return None

    def begin(self, name: str, password: str) -> str | None:
        """The token of a new session, or None where name and password do not belong together. Takes some 50 ms."""
        mark = self.users.check(name, password)
        if mark is None:
            return None
        token = secrets.token_urlsafe(32)
        with self._guard:
            self._logins[_digest(token)] = Login(name, mark, time.monotonic() + WEEK)
            while len(self._logins) > MOST:
                self._logins.popitem(last=False)
        return token

    def end(self, cookies: Mapping[str, str]) -> None:
        """Forget a session."""
        with self._guard:
            self._logins.pop(_digest(cookies.get(SESSION, "")), None)


class Pages:
    """Which visitor each Gradio session belongs to: whoever used it first. Its number is chosen by the browser."""

    def __init__(self) -> None:
        self._owners: OrderedDict[str, str] = OrderedDict()
        self._guard = threading.Lock()

    def __contains__(self, session: str) -> bool:
        return session in self._owners

    def belongs(self, session: str, owner: str) -> bool:
        """Whether the visitor may use the session; a new one becomes the visitor's."""
        with self._guard:
            known = self._owners.setdefault(session, owner)
            self._owners.move_to_end(session)
            while len(self._owners) > MOST:
                self._owners.popitem(last=False)
            return known == owner


def new_name() -> str:
    """A name nobody can guess."""
    return secrets.token_urlsafe(24)


def display(owner: str) -> str:
    """A member's name, or nothing for a visitor without one."""
    return owner.removeprefix(MEMBER) if owner.startswith(MEMBER) else ""


def secret(home: Path) -> bytes:
    """The key that signs cookies: made once, and readable by the server's own user alone."""
    path = home / "secret"
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            path.chmod(0o600)
    key = path.read_text().strip()
    if len(key) < 32:  # cut short by a crash: a new key, and every visitor is a new one
        path.unlink()
        return secret(home)
    return bytes.fromhex(key)


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
