"""The run store: one SQLite file, one writer connection in one process, numbered migrations.

    store = Store(home() / "maquette.db")
    run = store.add_run(recipe)

A run's status is decided by its `finished` event and by nothing else: `append` applies it in the same
transaction in which the event is kept. Write-ahead log with synchronous=FULL; every write begins
IMMEDIATE; readers open the file read-only. Not for network file systems. A file that is lost or damaged is made
again from the files of the runs (`engine.rebuild`); a damaged one is kept beside it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import JsonValue

from engine import database, rebuild
from engine.attempts import attempt_folder
from engine.errors import DiskFull, StoreBusy, StoreError, StoreTooNew, UnknownName, os_reason
from engine.records import Divergence, Event, EventKind, Measurement, Output, Recipe, Record, Run, Status

log = logging.getLogger(__name__)

RECIPES = 2000  # that are kept read
PATIENCE = 250  # milliseconds of a write, for which the scheduler looks after nobody
MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE runs (
        id TEXT PRIMARY KEY, owner TEXT NOT NULL, recipe TEXT NOT NULL, status TEXT NOT NULL,
        attempt INTEGER NOT NULL DEFAULT 0, created REAL NOT NULL, started REAL, finished REAL,
        reason TEXT NOT NULL DEFAULT '', artifact TEXT
    ) STRICT;
    CREATE INDEX runs_created ON runs (created);
    CREATE TABLE events (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, run TEXT NOT NULL REFERENCES runs ON DELETE CASCADE,
        attempt INTEGER NOT NULL, number INTEGER NOT NULL, time REAL NOT NULL, kind TEXT NOT NULL, data TEXT NOT NULL,
        UNIQUE (run, attempt, number)
    ) STRICT;
    CREATE INDEX events_run ON events (run, seq);
    CREATE TABLE votes (
        id INTEGER PRIMARY KEY, time REAL NOT NULL, owner TEXT NOT NULL,
        run_a TEXT NOT NULL, run_b TEXT NOT NULL, prompt TEXT NOT NULL, winner TEXT NOT NULL
    ) STRICT;
    """,
    """
    ALTER TABLE runs ADD COLUMN shared INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE runs ADD COLUMN expired REAL;
    CREATE INDEX runs_owner ON runs (owner);
    """,
)


class Vote(Record):
    """A visitor preferred one of two texts without knowing which model wrote which. `winner`: a run id or `tie`."""

    owner: str
    run_a: str
    run_b: str
    prompt: str
    winner: str
    time: float


def home() -> Path:
    """The data folder: the first of $MAQUETTE_HOME, /data and the user's cache folder that can be written.

    Raises:
        StoreError: none of them can.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    named = os.environ.get("MAQUETTE_HOME")
    for folder in [*([Path(named).expanduser()] if named else []), Path("/data"), cache / "maquette"]:
        if folder == Path("/data") and not folder.is_dir():  # never made, only used where a host offers it
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK | os.X_OK):
            return folder.resolve()
    raise StoreError("No data folder can be written: set MAQUETTE_HOME to a folder of yours.")


def scratch_of(home: Path) -> Path:
    """Below a data folder, what is of no use to a later server: the next one begins by deleting it."""
    return home / "scratch"


class Store:
    """The runs of one data folder, the folder that `path` lies in.

    With `read_only` another process may be the writer; writing then is our own mistake and fails.

    Raises:
        StoreBusy: another process writes to this folder.
        StoreTooNew: the file is of a later version.
        StoreError: the file or its folder cannot be used.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self._path = path
        self._guard = threading.Lock()
        self._writer: sqlite3.Connection | None = None
        self._lock: int | None = None
        self._reserve = database.Reserve(path.parent)
        self._recipes: dict[str, Recipe] = {}
        if read_only:
            if not path.exists():
                raise StoreError(f"There are no runs in {path.parent} yet.")
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(path.parent)
            self._writer, fresh = database.begin(path, _migrate)
            self._writer.execute(f"PRAGMA busy_timeout = {PATIENCE}")
            self._reserve.keep()
            if fresh:
                self._restore()
        except (OSError, sqlite3.Error) as error:
            self.close()
            raise StoreError(f"The run store {path} cannot be used: {error}.") from error
        except StoreError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Write everything out and let another process have the folder."""
        with self._guard:
            if self._writer is not None:
                self._writer.close()
                self._writer = None
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    @property
    def home(self) -> Path:
        """The data folder."""
        return self._path.parent

    # Runs

    def add_run(self, recipe: Recipe, owner: str = "") -> Run:
        """A new queued run."""
        run = Run(id=secrets.token_hex(4), recipe=recipe, owner=owner, created=time.time())
        self._note(run)
        with self._write() as db:
            db.execute(
                "INSERT INTO runs (id, owner, recipe, status, created) VALUES (?, ?, ?, ?, ?)",
                (run.id, owner, recipe.model_dump_json(), run.status, run.created),
            )
        return run

    def run(self, run_id: str) -> Run:
        """The run of that id.

        Raises:
            UnknownName: there is none.
        """
        with self._read() as db:
            row = db.execute("SELECT * FROM runs WHERE id = ?", (run_id,)).fetchone()
        if row is None:
            raise UnknownName("run", run_id, ())  # no list of those that exist: they may be another visitor's
        return self._as_run(row)

    def runs(
        self, owner: str | tuple[str, ...] | None = None, limit: int = 200, *, shared: bool = False
    ) -> list[Run]:  # fmt: skip
        """The runs of `owner`, of several, or of all (None), newest first; `shared`: with what others share."""
        owners = (owner,) if isinstance(owner, str) else owner
        only = "" if owners is None else f"WHERE owner IN ({', '.join('?' * len(owners))}) OR (? AND shared)"
        values = () if owners is None else (*owners, shared)
        with self._read() as db:
            rows = db.execute(
                f"SELECT * FROM runs {only} ORDER BY created DESC, rowid DESC LIMIT ?", (*values, limit)
            ).fetchall()
        return [self._as_run(row) for row in rows]

    def ended_before(self, moment: float) -> list[Run]:
        """Runs that had ended by then and whose files have not been deleted."""
        with self._read() as db:
            rows = db.execute("SELECT * FROM runs WHERE finished < ? AND expired IS NULL ORDER BY finished", (moment,))
            return [self._as_run(row) for row in rows]

    def share(self, run_id: str, shared: bool) -> Run:
        """Let others look at a run, or no more."""
        run = self.run(run_id).model_copy(update={"shared": shared})
        if (self.home / "runs" / run_id / rebuild.NAME).exists():  # else its files are gone, and nothing comes back
            self._note(run)
        with self._write() as db:
            db.execute("UPDATE runs SET shared = ? WHERE id = ?", (shared, run_id))
        return self.run(run_id)

    def expire(self, run_id: str) -> None:
        """Note that the files of a run that has ended are gone; what it measured stays."""
        with self._write() as db:
            db.execute(
                "UPDATE runs SET artifact = NULL, expired = ? WHERE id = ? AND finished IS NOT NULL",
                (time.time(), run_id),
            )

    def unfinished(self) -> list[Run]:
        """Runs that are queued or running, oldest first."""
        with self._read() as db:
            rows = db.execute("SELECT * FROM runs WHERE status IN ('queued', 'running') ORDER BY created, rowid")
            return [self._as_run(row) for row in rows]

    def waiting(self, owner: str | None = None) -> int:
        """How many runs of an owner are queued; of all (None)."""
        only = "" if owner is None else "AND owner = ?"
        values = () if owner is None else (owner,)
        with self._read() as db:
            return int(db.execute(f"SELECT COUNT(*) FROM runs WHERE status = 'queued' {only}", values).fetchone()[0])

    def begin_attempt(self, run_id: str) -> Run:
        """Mark the next start of a run; events of earlier attempts no longer count."""
        with self._write() as db:
            db.execute(
                "UPDATE runs SET attempt = attempt + 1, status = 'running', started = ?, finished = NULL, reason = '',"
                " artifact = NULL, expired = NULL WHERE id = ?",
                (time.time(), run_id),
            )
        return self.run(run_id)

    def requeue(self, run_id: str, recipe: Recipe | None = None) -> Run:
        """Put a run that ended without a result back into the queue, with another recipe where one is given."""
        if recipe is not None:
            self._note(self.run(run_id).model_copy(update={"recipe": recipe}))
        with self._write() as db:
            db.execute(
                "UPDATE runs SET status = 'queued', finished = NULL, reason = '', recipe = COALESCE(?, recipe)"
                " WHERE id = ? AND status IN ('interrupted', 'failed')",
                (recipe and recipe.model_dump_json(), run_id),
            )
        return self.run(run_id)

    def delete_run(self, run_id: str) -> None:
        """Forget a run and its events."""
        with self._write() as db:
            db.execute("DELETE FROM runs WHERE id = ?", (run_id,))
        self._reserve.keep()

    # Events

    def append(self, events: Iterable[Event]) -> None:
        """Keep events, and apply `artifact` and `finished` to their run in the same transaction.

        Left out: events seen before, of a stale attempt, or of a run that has ended. While a run is queued only
        the scheduler speaks for it; its events have negative numbers, a worker's count from 1.
        """
        events = list(events)
        try:
            self._keep(events)
        except DiskFull:
            if not self._reserve.give_up():
                raise
            self._keep(events)

    def _keep(self, events: Sequence[Event]) -> None:
        with self._write() as db:
            for event in events:
                row = db.execute("SELECT attempt, status FROM runs WHERE id = ?", (event.run,)).fetchone()
                if row is None or row["attempt"] != event.attempt or Status(row["status"]).final:
                    continue
                if row["status"] == Status.QUEUED and event.number > 0:
                    continue
                added = db.execute(
                    "INSERT OR IGNORE INTO events (run, attempt, number, time, kind, data) VALUES (?, ?, ?, ?, ?, ?)",
                    (event.run, event.attempt, event.number, event.time, event.kind, json.dumps(event.data)),
                )
                if added.rowcount:
                    _apply(db, event)

    def say(self, run: Run, kind: EventKind, data: dict[str, JsonValue]) -> None:
        """Append an event of the scheduler's own, numbered downwards from -1."""
        with self._read() as db:
            (lowest,) = db.execute(
                "SELECT MIN(number) FROM events WHERE run = ? AND attempt = ?", (run.id, run.attempt)
            ).fetchone()
        number = min(lowest or 0, 0) - 1
        self.append([Event(run=run.id, attempt=run.attempt, number=number, time=time.time(), kind=kind, data=data)])

    def events(self, run_id: str, after: int = 0, kinds: Sequence[EventKind] | None = None) -> list[Event]:
        """A run's events of all attempts, in the order they came.

        `number` of what is returned is a position in the store: pass the last one as `after` to read on.
        """
        marks = ", ".join("?" * len(kinds or ()))
        only = f" AND kind IN ({marks})" if kinds is not None else ""
        with self._read() as db:
            rows = db.execute(
                f"SELECT * FROM events WHERE run = ? AND seq > ?{only} ORDER BY seq",
                (run_id, after, *(kinds or ())),
            )
            return [
                Event(
                    run=row["run"], attempt=row["attempt"], number=row["seq"], time=row["time"], kind=row["kind"],
                    data=json.loads(row["data"]),
                )
                for row in rows
            ]  # fmt: skip

    def measurements(self, run_id: str) -> dict[str, Measurement]:
        """What the last attempt measured, by name; of one name the latest counts."""
        found = (Measurement.model_validate(event.data) for event in self._last_attempt(run_id, "measurement"))
        return {measurement.name: measurement for measurement in found}

    def outputs(self, run_id: str) -> list[Output]:
        """What the last attempt's model wrote after the fixed prompts."""
        return [Output.model_validate(event.data) for event in self._last_attempt(run_id, "output")]

    def divergences(self, run_id: str) -> list[Divergence]:
        """The trainings of all attempts that diverged, in the order they did."""
        found = self.events(run_id, kinds=("diverged",))
        return [Divergence.model_validate({**event.data, "attempt": event.attempt}) for event in found]

    # Votes

    def add_vote(self, owner: str, run_a: str, run_b: str, prompt: str, winner: str) -> None:
        """Keep one blind vote."""
        with self._write() as db:
            db.execute(
                "INSERT INTO votes (time, owner, run_a, run_b, prompt, winner) VALUES (?, ?, ?, ?, ?, ?)",
                (time.time(), owner, run_a, run_b, prompt, winner),
            )

    def votes(self) -> list[Vote]:
        """All blind votes, oldest first."""
        with self._read() as db:
            rows = db.execute("SELECT owner, run_a, run_b, prompt, winner, time FROM votes ORDER BY id")
            return [Vote.model_validate(dict(row)) for row in rows]

    def _last_attempt(self, run_id: str, kind: EventKind) -> list[Event]:
        attempt = self.run(run_id).attempt
        return [event for event in self.events(run_id, kinds=(kind,)) if event.attempt == attempt]

    def _as_run(self, row: sqlite3.Row) -> Run:
        values = dict(row)
        values["recipe"] = self._recipe(row["recipe"])
        if row["artifact"] is not None:  # kept relative, so that the data folder can be moved
            values["artifact"] = str(attempt_folder(self.home, row["id"], row["attempt"]) / row["artifact"])
        return Run.model_validate(values)

    def _recipe(self, text: str) -> Recipe:
        """A recipe, read once: fifty pages ask for the same ones every second."""
        known = self._recipes.get(text)
        if known is None:
            known = Recipe.model_validate_json(text)
            while len(self._recipes) >= RECIPES:
                self._recipes.pop(next(iter(self._recipes)), None)
            self._recipes[text] = known
        return known

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with self._guard:
            assert self._writer is not None, "the store is closed or read-only"
            try:
                self._writer.execute("BEGIN IMMEDIATE")
                yield self._writer
                self._writer.execute("COMMIT")
            except sqlite3.DatabaseError as error:
                raise database.refusal(error) from error
            finally:
                if self._writer.in_transaction:  # a full disk ends it by itself, and not always
                    self._writer.execute("ROLLBACK")

    def _note(self, run: Run) -> None:
        try:
            rebuild.note(self.home, run)
        except OSError as error:
            full = error.errno == errno.ENOSPC
            raise (DiskFull if full else StoreError)(os_reason(error)) from error

    def _restore(self) -> None:
        """Take in the runs of which files are left."""
        for found in rebuild.find(self.home):
            run = found.run
            with self._write() as db:
                db.execute(
                    "INSERT INTO runs (id, owner, recipe, status, created, shared) VALUES (?, ?, ?, ?, ?, ?)",
                    (run.id, run.owner, run.recipe.model_dump_json(), Status.QUEUED, run.created, run.shared),
                )
            for number, begun, events in found.attempts:
                with self._write() as db:
                    db.execute(
                        "UPDATE runs SET attempt = ?, status = 'running', started = ?, finished = NULL, reason = '',"
                        " artifact = NULL WHERE id = ?",
                        (number, begun, run.id),
                    )
                self.append(events)
            log.warning("run %s was found among the files: %s", run.id, self.run(run.id).status)

    @contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        try:
            db = sqlite3.connect(f"{self._path.absolute().as_uri()}?mode=ro", uri=True, timeout=5)
            db.row_factory = sqlite3.Row
            with closing(db):
                yield db
        except sqlite3.DatabaseError as error:
            raise StoreError(f"The run store {self._path} cannot be read: {error}.") from error


def _apply(db: sqlite3.Connection, event: Event) -> None:
    if event.kind == "artifact":
        db.execute("UPDATE runs SET artifact = ? WHERE id = ?", (event.data["path"], event.run))
    elif event.kind == "finished":
        db.execute(
            "UPDATE runs SET status = ?, reason = ?, finished = ? WHERE id = ?",
            (Status(str(event.data["status"])), event.data.get("reason") or "", event.time, event.run),
        )


def _lock(folder: Path) -> int:
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise StoreBusy(
            f"Another Maquette uses the folder {folder}. Stop it, or choose another with --home or MAQUETTE_HOME."
        ) from None
    return handle


def _migrate(db: sqlite3.Connection, path: Path) -> None:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > len(MIGRATIONS):
        raise StoreTooNew(
            f"{path} was written by a later version of Maquette (schema {version}; this one knows {len(MIGRATIONS)}). "
            "Update Maquette, or choose another folder with MAQUETTE_HOME."
        )
    if 0 < version < len(MIGRATIONS):
        backup = path.with_name(f"{path.name}.schema-{version}.backup")
        backup.unlink(missing_ok=True)
        db.execute("VACUUM INTO ?", (str(backup),))
    for number in range(version, len(MIGRATIONS)):
        db.executescript(f"BEGIN IMMEDIATE; {MIGRATIONS[number]} PRAGMA user_version = {number + 1}; COMMIT;")
