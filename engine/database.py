"""The SQLite file under the run store: opened durably, set aside where it is damaged, its refusals in words."""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from engine.errors import DiskFull, StoreError, os_reason

log = logging.getLogger(__name__)

RESERVE = 1 << 20  # bytes
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def open_(path: Path) -> sqlite3.Connection:
    # Transactions are begun by hand; the one connection is shared between threads under a lock.
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5)
    db.row_factory = sqlite3.Row
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        db.execute(f"PRAGMA {pragma}")
    return db


def begin(path: Path, migrate: Callable[[sqlite3.Connection, Path], None]) -> tuple[sqlite3.Connection, bool]:
    """The database, and whether it is a new one; one that is damaged is set aside."""
    fresh = not path.exists()
    if fresh:
        _set_aside(path)  # a log without its database
    db: sqlite3.Connection | None = None
    try:
        db = open_(path)
        migrate(db, path)
        (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if verdict == "ok":
            return db, fresh
        problem = str(verdict)
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode & 0xFF not in DAMAGED:
            if db is not None:
                db.close()
            raise
        problem = str(error)
    if db is not None:
        db.close()
    log.error(
        "the run store is damaged (%s): kept as %s, and made anew from the runs' files", problem, _set_aside(path)
    )
    db = open_(path)
    migrate(db, path)
    return db, True


def _set_aside(path: Path) -> Path:
    """Give a database and its log another name, which is free."""
    number = next(n for n in range(1, 1000) if not path.with_name(f"{path.name}.damaged-{n}").exists())
    kept = path.with_name(f"{path.name}.damaged-{number}")
    for tail in ("", "-wal", "-shm"):
        file = path.with_name(path.name + tail)
        if file.exists():
            file.rename(kept.with_name(kept.name + tail))
    return kept


def refusal(error: sqlite3.DatabaseError) -> StoreError:
    """What to say of a write that the database refused."""
    code = error.sqlite_errorcode & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return DiskFull(os_reason(OSError(errno.ENOSPC, "")))
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StoreError("Another program holds the run store: nothing was stored. Close it, then try again.")
    if code == sqlite3.SQLITE_READONLY:
        return StoreError(os_reason(OSError(errno.EROFS, "")))
    return StoreError(f"The run store cannot be written: {error}. The server's log has the details.")


class Reserve:
    """A file that only takes room, given up when the disk is full, so that how a run ended can still be stored."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "reserve"

    def keep(self) -> None:
        """Take the room, where there is some."""
        try:
            with open(self._path, "ab") as file:
                if file.tell() < RESERVE:
                    os.posix_fallocate(file.fileno(), 0, RESERVE)
        except OSError:
            self.give_up()

    def give_up(self) -> bool:
        """Make room; whether there was any to make."""
        with suppress(OSError):
            self._path.unlink()
            return True
        return False
