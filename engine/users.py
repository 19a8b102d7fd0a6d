"""The people of a team server: names and salted scrypt hashes in a file that only its owner can read.

    python -m engine user add NAME       asks for a password, or takes a line of stdin
    python -m engine user remove NAME
    python -m engine user list

scrypt (Percival, 2009; RFC 7914): a guess costs as much memory and time as a login does.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import InputError, StoreError, UnknownName, short
from engine.files import publish

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}")
SHORTEST, LONGEST = 8, 1024  # characters of a password
COST, BLOCK, LANES = 1 << 14, 8, 1  # 16 MiB and some 50 ms
Users = dict[str, dict[str, str]]


class UserFile:
    """`HOME/users.json`. Readers take it as it is now: who was removed is out at once."""

    def __init__(self, home: Path) -> None:
        self._path = home / "users.json"

    def names(self) -> list[str]:
        """Everybody who may log in."""
        return sorted(self._read())

    def add(self, name: str, password: str) -> None:
        """Let somebody in, or give a new password; sessions begun with the old one end.

        Raises:
            InputError: no name, or no password, that can be used.
        """
        if not NAME.fullmatch(name):
            raise InputError(
                f"{short(name)!r} is no user name: 1 to 32 of a-z, 0-9, dot, - and _, a letter or digit first."
            )
        if not SHORTEST <= len(password) <= LONGEST:
            raise InputError(f"The password has {len(password)} characters; it needs {SHORTEST} to {LONGEST}.")
        salt = secrets.token_bytes(16)
        with self._change() as users:
            users[name] = {"salt": _text(salt), "hash": _text(_scrypt(password, salt))}

    def remove(self, name: str) -> None:
        """Let somebody in no more. Their runs stay.

        Raises:
            UnknownName: there is nobody of that name.
        """
        with self._change() as users:
            if name not in users:
                raise UnknownName("user", name, users)
            del users[name]

    def check(self, name: str, password: str) -> str | None:
        """The mark of who logs in, or None; as slow for a name that is not there."""
        entry = self._read().get(name)
        if len(password) > LONGEST:
            return None
        salt = base64.b64decode(entry["salt"]) if entry else b"nobody's salt..."
        right = hmac.compare_digest(_text(_scrypt(password, salt)), entry["hash"] if entry else "")
        return _mark(entry) if entry and right else None

    def mark(self, name: str) -> str | None:
        """What changes when the password does; None where there is nobody of that name."""
        entry = self._read().get(name)
        return _mark(entry) if entry else None

    def _read(self) -> Users:
        try:
            found: Users = json.loads(self._path.read_text())["users"]
            return found
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError):
            raise StoreError(
                f"The users file {self._path} cannot be read. Repair it, or delete it and begin anew."
            ) from None

    @contextmanager
    def _change(self) -> Iterator[Users]:
        """The users, written back whole. Two commands at once wait for one another."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(self._path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600), "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            users = self._read()
            yield users
            temporary = self._path.with_suffix(".tmp")
            temporary.unlink(missing_ok=True)
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                json.dump({"users": users}, file, indent=1)
            publish(temporary, self._path)


def _scrypt(password: str, salt: bytes) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, n=COST, r=BLOCK, p=LANES, dklen=32)


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _mark(entry: dict[str, str]) -> str:
    return hashlib.sha256((entry["salt"] + entry["hash"]).encode()).hexdigest()
