"""The folder of one attempt: its request, its events, its lock. What a worker writes and the scheduler reads.

    HOME/runs/<run>/attempt-<n>/
        request.json   what the worker was asked
        room           kept free for the worker's last word; gone when it has ended
        events.jsonl   what it said, one Event a line; only its worker writes it
        lock           locked by the worker for its whole life, so the kernel tells when it has died; holds its pid
        cancel         exists once the user cancelled: a signal then means "cancelled", else "interrupted"
        ending.json    how the scheduler ended it, where its worker could not say; the store's copy counts
        worker.log     what the worker wrote to stdout and stderr
        tmp/           what the worker puts aside; deleted when it has ended
        blocks/        finished blocks, moved on to the next attempt
        artifact/      the result, renamed into place when complete
        exports/       the result in other formats, by their names (`engine.exporting`)
    HOME/cache/        what one run measured and others can use

The scheduler takes the lock before the worker exists and hands the open file down, so that there is no
instant at which a live worker looks dead.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from pydantic import JsonValue, ValidationError

from engine.files import publish, sync
from engine.records import Event, EventKind

log = logging.getLogger(__name__)

ROOM = 8192  # bytes
ASIDE = "tmp"
EXPORTS = "exports"
DURABLE = frozenset({"artifact", "finished"})


def attempt_folder(home: Path, run: str, attempt: int) -> Path:
    """Where an attempt lives below the data folder `home`."""
    return home / "runs" / run / f"attempt-{attempt}"


def cache_folder(attempt: Path) -> Path:
    """What is kept for other runs, below the data folder of an attempt; below any other folder that itself."""
    home = attempt.parents[2] if len(attempt.parents) > 2 and attempt.parents[1].name == "runs" else attempt
    return home / "cache"


def prepare(home: Path, run: str, attempt: int, request: dict[str, JsonValue]) -> Path:
    """Make the folder of a new attempt and write its request; returns the request file.

    The newest earlier attempt's finished blocks are moved in; what else was half done there is deleted. The
    earlier workers must be dead. A crash in between loses nothing: the next attempt looks for the blocks again.
    """
    folder = attempt_folder(home, run, attempt)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(attempt - 1, 0, -1):
        earlier = attempt_folder(home, run, number)
        if (earlier / "blocks").is_dir() and not (folder / "blocks").exists():
            (earlier / "blocks").rename(folder / "blocks")
        with suppress(FileNotFoundError):  # by rename, so that what is called `artifact` is always whole
            (earlier / "artifact").rename(earlier / "discarded")
        for leftover in ("discarded", "artifact.tmp", "blocks", EXPORTS, ASIDE):
            shutil.rmtree(earlier / leftover, ignore_errors=True)
    path = folder / "request.json"
    path.write_text(json.dumps({**request, "folder": str(folder)}))
    return path


def take_lock(folder: Path) -> BinaryIO | None:
    """The attempt's lock, held until the file and its inherited copies are closed; None where a worker holds it."""
    file = os.fdopen(os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return None
        raise
    return file


def write_pid(lock: BinaryIO, pid: int) -> None:
    """Note in the lock file who holds it; worker and scheduler both do, whoever is first."""
    os.pwrite(lock.fileno(), b"%d\n" % pid, 0)


def read_pid(folder: Path) -> int | None:
    """The process that holds, or last held, the attempt's lock; None where there was none."""
    try:
        return int((folder / "lock").read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def mark_cancelled(folder: Path) -> None:
    """Note that the user cancelled, so that a worker that is stopped knows why, also after a restart."""
    (folder / "cancel").touch()


def is_cancelled(folder: Path) -> bool:
    """Whether the user cancelled this attempt."""
    return (folder / "cancel").exists()


def note_ending(folder: Path, run: str, attempt: int, data: dict[str, JsonValue]) -> None:
    """Note how an attempt ended whose worker did not say so, for a store that is lost; a full disk keeps no note."""
    event = Event(run=run, attempt=attempt, number=-1, time=time.time(), kind="finished", data=data)
    temporary = folder / "ending.tmp"
    try:
        temporary.write_text(event.model_dump_json())
        publish(temporary, folder / "ending.json")
    except OSError as error:
        log.warning("%s: how it ended stands in the store alone: %s", folder, error)


def read_ending(folder: Path) -> Event | None:
    """What `note_ending` noted; None where nothing was."""
    try:
        return Event.model_validate_json((folder / "ending.json").read_text())
    except (OSError, ValueError):
        return None


def is_live(folder: Path) -> bool:
    """Whether a worker lives in this folder."""
    if not (folder / "lock").exists():
        return False
    lock = take_lock(folder)
    if lock is not None:
        lock.close()
    return lock is None


class EventWriter:
    """Appends a worker's events to its file, numbered from 1; what decides a run's fate is fsynced.

    A second writer of the same attempt goes on where the first has closed.
    """

    def __init__(self, folder: Path, run: str, attempt: int) -> None:
        self._run, self._attempt = run, attempt
        path = folder / "events.jsonl"
        written = path.read_bytes() if path.exists() else b""
        self._number = written.count(b"\n")
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        self._torn = bool(written) and not written.endswith(b"\n")
        self._room = folder / "room"  # for the last word on a full disk
        self._room.write_bytes(bytes(ROOM))
        sync(folder)

    def emit(self, kind: EventKind, data: dict[str, JsonValue]) -> None:
        """Write one event.

        Raises:
            OSError: the disk is full or broken.
        """
        self._number += 1
        event = Event(run=self._run, attempt=self._attempt, number=self._number, time=time.time(), kind=kind, data=data)
        line = event.model_dump_json().encode() + b"\n"
        try:
            self._write(line)
        except OSError:
            if kind not in DURABLE or not self._room.exists():
                raise
            self._room.unlink()
            self._write(line)
        if kind in DURABLE:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        with suppress(OSError):
            self._room.unlink()

    def _write(self, line: bytes) -> None:
        """One write: a reader never sees lines mixed. What a full disk cut off is a line of its own, and no event."""
        whole = b"\n" * self._torn + line
        self._torn = self._file.write(whole) != len(whole)
        if self._torn:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class EventReader:
    """Follows a worker's event file. A torn last line waits until it is whole."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "events.jsonl"
        self._offset = self._next = 0

    def read(self) -> list[Event]:
        """The complete events after the last `advance`; lines that are no events are logged and left out."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                complete, newline, _torn = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        self._next = self._offset + len(complete) + len(newline)
        events = []
        for line in complete.splitlines():
            try:
                events.append(Event.model_validate_json(line))
            except ValidationError as error:
                log.warning("%s: unreadable event: %s", self._path, error.errors()[0]["msg"])
        return events

    def advance(self) -> None:
        """What was read is safe elsewhere: `read` goes on behind it."""
        self._offset = self._next
