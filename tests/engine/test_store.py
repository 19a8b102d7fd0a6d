"""The store: what events do to a run, what is ignored, migrations, and one writer only."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from pydantic import JsonValue

from engine import database
from engine import store as store_module
from engine.errors import StoreBusy, StoreError, StoreTooNew, UnknownName
from engine.records import Event, EventKind, Measurement, Recipe, Run, Status
from engine.store import Store, home


@pytest.fixture
def store(tmp_path: Path):
    with Store(tmp_path / "maquette.db") as store:
        yield store


def event(run: Run, number: int, kind: EventKind = "log", /, **data: JsonValue) -> Event:
    return Event(run=run.id, attempt=run.attempt, number=number, time=1000.0 + number, kind=kind, data=data)


def started(store: Store, owner: str = "") -> Run:
    return store.begin_attempt(store.add_run(Recipe(seed=7), owner).id)


def test_a_run_comes_back_as_it_was_added(store: Store) -> None:
    run = store.add_run(Recipe(seed=7, steps=[{"quantize/rtn": {"bits": 3}}]), "ada")
    assert store.run(run.id) == run
    assert (run.status, run.attempt, run.owner) == (Status.QUEUED, 0, "ada")


def test_runs_are_newest_first_and_by_owner(store: Store) -> None:
    ids = [store.add_run(Recipe(), owner).id for owner in ("ada", "ben", "ada")]
    assert [run.id for run in store.runs()] == ids[::-1]
    assert [run.id for run in store.runs("ada")] == [ids[2], ids[0]]
    assert [run.id for run in store.runs(limit=1)] == [ids[2]]


def test_an_unknown_run_names_no_other(store: Store) -> None:
    known = store.add_run(Recipe())
    with pytest.raises(UnknownName) as caught:
        store.run("nope")
    assert known.id not in str(caught.value)


def test_finished_decides_the_status(store: Store) -> None:
    run = started(store)
    store.append([event(run, 1, "artifact", path="artifact"), event(run, 2, "finished", status="succeeded", reason="")])
    after = store.run(run.id)
    assert after.status is Status.SUCCEEDED
    assert after.finished == 1002.0
    assert after.artifact == str(store.home / "runs" / run.id / "attempt-1" / "artifact")


def test_events_are_kept_once(store: Store) -> None:
    run = started(store)
    store.append([event(run, 1, text="a"), event(run, 2, text="b")])
    store.append([event(run, 1, text="again"), event(run, 2, text="again"), event(run, 3, text="c")])
    assert [e.data["text"] for e in store.events(run.id)] == ["a", "b", "c"]


def test_a_run_that_ended_hears_nothing_more(store: Store) -> None:
    run = started(store)
    store.append([event(run, 1, "finished", status="cancelled", reason="")])
    store.append([event(run, 2, "finished", status="succeeded", reason=""), event(run, 3, "artifact", path="artifact")])
    assert store.run(run.id).status is Status.CANCELLED
    assert store.run(run.id).artifact is None
    assert len(store.events(run.id)) == 1


def test_a_stale_attempt_is_ignored(store: Store) -> None:
    old = started(store)
    new = store.begin_attempt(old.id)
    store.append([event(old, 1, "finished", status="succeeded", reason=""), event(old, 2, text="late")])
    assert store.run(old.id).status is Status.RUNNING
    assert store.events(old.id) == []
    store.append([event(new, 1, text="now")])
    assert len(store.events(old.id)) == 1


def test_while_queued_only_the_scheduler_speaks(store: Store) -> None:
    run = started(store)
    store.say(run, "finished", {"status": "interrupted", "reason": ""})
    run = store.requeue(run.id)
    store.append([event(run, 9, "finished", status="succeeded", reason="")])
    assert store.run(run.id).status is Status.QUEUED
    store.say(run, "finished", {"status": "cancelled", "reason": ""})
    assert store.run(run.id).status is Status.CANCELLED


def test_the_schedulers_events_do_not_collide_with_the_workers(store: Store) -> None:
    run = started(store)
    store.say(run, "sample", {"series": "s", "value": 1, "unit": "B"})
    store.append([event(run, 1, text="a")])
    store.say(run, "sample", {"series": "s", "value": 2, "unit": "B"})
    assert [e.kind for e in store.events(run.id)] == ["sample", "log", "sample"]


def test_events_can_be_read_on(store: Store) -> None:
    run, other = started(store), started(store)
    store.append([event(run, 1, text="a"), event(other, 1, text="not mine"), event(run, 2, "phase", name="p")])
    first = store.events(run.id)
    assert [e.kind for e in first] == ["log", "phase"]
    assert store.events(run.id, after=first[-1].number) == []
    assert [e.kind for e in store.events(run.id, after=first[0].number)] == ["phase"]
    assert [e.kind for e in store.events(run.id, kinds=["phase"])] == ["phase"]
    assert store.events(run.id, kinds=[]) == []


def test_measurements_are_the_last_attempts(store: Store) -> None:
    run = started(store)
    store.append([event(run, 1, "measurement", **Measurement(name="kl", value=1, unit="nat").model_dump())])
    store.say(run, "finished", {"status": "interrupted", "reason": ""})
    store.requeue(run.id)
    run = store.begin_attempt(run.id)
    assert store.measurements(run.id) == {}
    store.append([event(run, 1, "measurement", name="kl", value=2.0, unit="nat")])
    assert store.measurements(run.id)["kl"].value == 2.0


def test_an_event_and_what_it_does_are_one_transaction(store: Store) -> None:
    run = started(store)
    with pytest.raises(ValueError, match="nonsense"):
        store.append([event(run, 1, text="a"), event(run, 2, "finished", status="nonsense", reason="")])
    assert store.events(run.id) == []
    store.append([event(run, 1, text="a")])
    assert len(store.events(run.id)) == 1


def test_only_what_ended_without_a_result_is_queued_again(store: Store) -> None:
    run = started(store)
    store.append([event(run, 1, "finished", status="succeeded", reason="")])
    assert store.requeue(run.id).status is Status.SUCCEEDED


def test_delete_takes_the_events_along(store: Store) -> None:
    run = started(store)
    store.append([event(run, 1, text="a")])
    store.delete_run(run.id)
    assert store.runs() == []
    assert store.events(run.id) == []


def test_votes(store: Store) -> None:
    store.add_vote("ada", "a", "b", "Why?", "b")
    assert [(v.owner, v.winner, v.prompt) for v in store.votes()] == [("ada", "b", "Why?")]


def test_one_writer_many_readers(store: Store, tmp_path: Path) -> None:
    run = store.add_run(Recipe())
    with pytest.raises(StoreBusy, match=str(tmp_path)):
        Store(tmp_path / "maquette.db")
    assert Store(tmp_path / "maquette.db", read_only=True).run(run.id) == run


def test_it_can_be_read_when_the_writer_has_gone(tmp_path: Path) -> None:
    with Store(tmp_path / "maquette.db") as store:
        run = store.add_run(Recipe())
    assert Store(tmp_path / "maquette.db", read_only=True).runs() == [run]
    with Store(tmp_path / "maquette.db") as store:
        assert store.runs() == [run]


def test_the_writer_uses_a_durable_log(tmp_path: Path) -> None:
    db = database.open_(tmp_path / "x.db")
    assert db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert db.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL


def test_a_later_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "maquette.db"
    Store(path).close()
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version = {len(store_module.MIGRATIONS) + 1}")
    db.close()
    before = path.read_bytes()
    for _ in range(2):  # the lock is given back
        with pytest.raises(StoreTooNew):
            Store(path)
    assert path.read_bytes() == before


def test_an_earlier_schema_is_migrated_after_a_backup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "maquette.db"
    with Store(path) as store:
        run = store.add_run(Recipe())
    more = (*store_module.MIGRATIONS, "ALTER TABLE votes ADD COLUMN comment TEXT NOT NULL DEFAULT '';")
    monkeypatch.setattr(store_module, "MIGRATIONS", more)
    with Store(path) as store:
        assert store.runs() == [run]
    backup = sqlite3.connect(tmp_path / f"maquette.db.schema-{len(more) - 1}.backup")
    assert backup.execute("SELECT id FROM runs").fetchall() == [(run.id,)]
    assert backup.execute("PRAGMA user_version").fetchone() == (len(more) - 1,)


def test_a_migration_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "maquette.db"
    Store(path).close()
    steps = store_module.MIGRATIONS
    monkeypatch.setattr(store_module, "MIGRATIONS", (*steps, "CREATE TABLE fresh (x); SELECT * FROM missing;"))
    with pytest.raises(StoreError):
        Store(path)
    monkeypatch.setattr(store_module, "MIGRATIONS", steps)
    with Store(path) as store, store._read() as db:
        assert db.execute("SELECT name FROM sqlite_master WHERE name = 'fresh'").fetchall() == []


def test_a_store_that_is_not_there_is_an_error_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no runs"):
        Store(tmp_path / "other.db", read_only=True)


def test_home_is_the_first_folder_that_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAQUETTE_HOME", str(tmp_path / "mine"))
    assert home() == tmp_path / "mine"
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("MAQUETTE_HOME", str(blocked / "below"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert home() in (Path("/data"), tmp_path / "cache" / "maquette")
