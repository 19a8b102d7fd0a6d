"""A store that is lost or damaged comes back from the files of its runs."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from engine import database, rebuild
from engine.attempts import EventWriter, mark_cancelled, prepare
from engine.errors import StoreError
from engine.records import Recipe, Run, Status
from engine.runners.local import LocalRunner
from engine.scheduler import Scheduler
from engine.store import Store
from engine.supervision import finish

DB = "maquette.db"


def add(store: Store, owner: str, *endings: str) -> Run:
    """A run with an attempt for each ending, as a worker leaves its files; `` is a death without a word."""
    run = store.add_run(Recipe(seed=len(store.runs()), steps=[{"quantize/rtn": {"bits": 3}}]), owner)
    for ending in endings:
        if run.status.final:
            store.requeue(run.id)
        run = store.begin_attempt(run.id)
        folder = prepare(store.home, run.id, run.attempt, {"recipe": run.recipe.model_dump(mode="json")}).parent
        writer = EventWriter(folder, run.id, run.attempt)
        writer.emit("phase", {"name": "checking"})
        if ending == "succeeded":
            (folder / "artifact").mkdir()
            (folder / "artifact" / "weights").write_text("four")
            manifest = {"files": {"weights": {"bytes": 4, "sha256": hashlib.sha256(b"four").hexdigest()}}}
            (folder / "artifact" / "MANIFEST.json").write_text(json.dumps(manifest))
            writer.emit("artifact", {"path": "artifact"})
            writer.emit("measurement", {"name": "kl", "value": 0.5, "error": 0.1, "unit": "nat"})
            writer.emit("output", {"prompt": "Ada", "tokens": [{"text": " has", "probability": 0.5}]})
        if ending:
            writer.emit("finished", {"status": ending, "reason": "" if ending == "succeeded" else f"{ending} it is"})
        writer.close()
        store.append(rebuild.EventReader(folder).read())
        run = store.run(run.id)
    return run


def lose(home: Path) -> None:
    for file in home.glob(f"{DB}*"):
        file.unlink()


def truncate(home: Path) -> None:
    raw = (home / DB).read_bytes()
    (home / DB).write_bytes(raw[: len(raw) // 2])


def overwrite(home: Path) -> None:
    (home / DB).write_text("hello " * 1000)


def scramble(home: Path) -> None:
    """Pages in the middle are another's; the head still looks well."""
    raw = bytearray((home / DB).read_bytes())
    raw[4096:12288] = bytes(8192)
    (home / DB).write_bytes(raw)


@pytest.mark.parametrize("damage", [lose, truncate, overwrite, scramble])
def test_runs_recipes_owners_artifacts_and_measurements_come_back(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    with Store(tmp_path / DB) as store:
        add(store, "ada", "succeeded")
        add(store, "ben", "failed")
        add(store, "ada", "interrupted", "succeeded")
        add(store, "", "refused")
        queued = store.add_run(Recipe(seed=9), "ben")
        before = store.runs()
        said = {run.id: (store.measurements(run.id), store.outputs(run.id)) for run in before}
    damaged = (tmp_path / DB).read_bytes()
    damage(tmp_path)
    with Store(tmp_path / DB) as store:
        after = store.runs()
        assert [run.model_copy(update={"started": None}) for run in after] == [
            run.model_copy(update={"started": None}) for run in before
        ]
        assert {run.id: (store.measurements(run.id), store.outputs(run.id)) for run in after} == said
        assert store.run(queued.id).status is Status.QUEUED
    kept = tmp_path / f"{DB}.damaged-1"
    assert kept.exists() == (damage is not lose)
    assert not kept.exists() or kept.read_bytes() != damaged
    with Store(tmp_path / DB) as store:  # and only once
        assert len(store.runs()) == len(before)
        assert not (tmp_path / f"{DB}.damaged-2").exists()


def test_a_worker_that_said_nothing_final_is_concluded_by_the_next_scheduler(tmp_path: Path) -> None:
    with Store(tmp_path / DB) as store:
        dead, cancelled = add(store, "ada", ""), add(store, "ben", "")
    mark_cancelled(tmp_path / "runs" / cancelled.id / "attempt-1")
    lose(tmp_path)
    with Scheduler(tmp_path, runner=LocalRunner(("/no/such/program",))) as scheduler:
        assert scheduler.store.run(dead.id).status is Status.INTERRUPTED
        assert scheduler.store.run(cancelled.id).status is Status.CANCELLED


def test_what_the_scheduler_decided_and_what_is_shared_come_back(tmp_path: Path) -> None:
    with Scheduler(tmp_path, runner=LocalRunner(("/no/such/program",))) as scheduler:
        run = scheduler.submit(Recipe(), "ada")
        shared, private = add(scheduler.store, "ben", "succeeded"), add(scheduler.store, "ben", "succeeded")
        for each, is_shared in ((shared, True), (private, True), (private, False)):
            scheduler.share(each.id, is_shared, "ben")
        while not scheduler.store.run(run.id).status.final:
            time.sleep(0.01)
        before = scheduler.store.run(run.id)
    assert before.status is Status.FAILED
    lose(tmp_path)
    with Store(tmp_path / DB) as store:
        after = store.run(run.id)
        assert (after.status, after.reason, after.attempt) == (before.status, before.reason, 1)
        assert [store.run(each.id).shared for each in (shared, private)] == [True, False]


def test_an_ending_that_could_not_be_stored_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store was locked when the worker was ended, and then the scheduler died."""
    with Store(tmp_path / DB) as store:
        run = add(store, "ada", "")
        folder = tmp_path / "runs" / run.id / "attempt-1"
        with monkeypatch.context() as locked:
            locked.setattr(Store, "say", Mock(side_effect=StoreError("locked")))
            with pytest.raises(StoreError):
                finish(store, run, folder, Status.FAILED, "Out of memory.")
    with Scheduler(tmp_path, runner=LocalRunner(("/no/such/program",))) as scheduler:
        ended = scheduler.store.run(run.id)
        assert (ended.status, ended.reason) == (Status.FAILED, "Out of memory.")


@pytest.mark.parametrize("content", ["lo", "fout"])
def test_success_is_not_believed_without_its_artifact(tmp_path: Path, content: str) -> None:
    with Store(tmp_path / DB) as store:
        run = add(store, "ada", "succeeded")
    (Path(str(run.artifact)) / "weights").write_text(content)
    lose(tmp_path)
    with Store(tmp_path / DB) as store:
        assert (store.run(run.id).status, store.run(run.id).reason) == (Status.FAILED, rebuild.DAMAGED)


def test_more_than_can_be_read_in_time_is_believed_by_its_sizes(tmp_path: Path) -> None:
    with Store(tmp_path / DB) as store:
        artifact = Path(str(add(store, "ada", "succeeded").artifact))
    contents = rebuild.Contents(left=7)
    assert contents.are(artifact)
    (artifact / "weights").write_text("fout")
    assert not rebuild.Contents(left=7).are(artifact)
    assert contents.are(artifact)
    (artifact / "weights").write_text("lo")
    assert not contents.are(artifact)


def test_what_cannot_be_made_out_is_left_alone(tmp_path: Path) -> None:
    with Store(tmp_path / DB) as store:
        good, old, bad = (add(store, owner, "succeeded") for owner in ("ada", "ben", "cleo"))
    (tmp_path / "runs" / old.id / rebuild.NAME).unlink()  # of a version that wrote none
    (tmp_path / "runs" / bad.id / rebuild.NAME).write_text("{")
    (tmp_path / "runs" / "not a run").mkdir()
    lose(tmp_path)
    with Store(tmp_path / DB) as store:
        assert {run.id: run.owner for run in store.runs()} == {good.id: "ada", old.id: ""}
        assert store.run(old.id).recipe == old.recipe
    assert (tmp_path / "runs" / bad.id).is_dir()


def test_a_moved_data_folder_keeps_its_artifacts(tmp_path: Path) -> None:
    with Store(tmp_path / "here" / DB) as store:
        run = add(store, "ada", "succeeded")
    shutil.move(tmp_path / "here", tmp_path / "there")
    lose(tmp_path / "there")
    with Store(tmp_path / "there" / DB) as store:
        assert store.run(run.id).artifact == str(tmp_path / "there" / "runs" / run.id / "attempt-1" / "artifact")


def test_a_full_disk_stores_nothing_and_says_so(tmp_path: Path) -> None:
    with Store(tmp_path / DB) as store:
        run = store.begin_attempt(store.add_run(Recipe(), "ada").id)
        assert store._writer is not None
        (pages,) = store._writer.execute("PRAGMA page_count").fetchone()
        store._writer.execute(f"PRAGMA max_page_count = {pages}")
        fill = "x" * (4096 * (pages + 300))
        with pytest.raises(StoreError, match="The disk is full"):
            store.say(run, "log", {"text": fill})
        said = len(store.events(run.id))
        store._writer.execute("PRAGMA max_page_count = 100000")
        store.say(run, "log", {"text": "there is room again"})
        assert len(store.events(run.id)) == said + 1


def test_another_program_that_holds_the_store_is_named(tmp_path: Path) -> None:
    with Store(tmp_path / DB) as store:
        assert store._writer is not None
        store._writer.execute("PRAGMA busy_timeout = 10")
        stranger = sqlite3.connect(tmp_path / DB, isolation_level=None)
        stranger.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="Another program holds the run store"):
            store.add_run(Recipe())
        stranger.execute("ROLLBACK")
        stranger.close()
        assert store.add_run(Recipe()).status is Status.QUEUED


def test_a_lock_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store(tmp_path / DB).close()
    stranger = sqlite3.connect(tmp_path / DB, isolation_level=None)
    stranger.execute("PRAGMA locking_mode = EXCLUSIVE")
    stranger.execute("BEGIN EXCLUSIVE")
    connect = sqlite3.connect
    monkeypatch.setattr(database.sqlite3, "connect", lambda *a, **k: connect(*a, **{**k, "timeout": 0.01}))
    with pytest.raises(StoreError, match="locked"):
        Store(tmp_path / DB)
    stranger.close()
    assert list(tmp_path.glob(f"{DB}.damaged-*")) == []
