"""The worker's edge: every ending becomes a status and one line; locks, event files, runners."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.attempts import EventReader, EventWriter, is_live, mark_cancelled, read_pid, take_lock, write_pid
from engine.errors import BadModel, BadParams, Cancelled, Diverged, Interrupted, MaquetteError
from engine.methods import Emit
from engine.records import Event, Recipe, Status
from engine.runners.inline import InlineRunner
from engine.worker import Stop, execute, niceness


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[EventWriter]:
    writer = EventWriter(tmp_path, "abcd", 1)
    yield writer
    writer.close()


def request(folder: Path) -> dict:
    return {
        "kind": "run",
        "run": "abcd",
        "attempt": 1,
        "folder": str(folder),
        "recipe": Recipe().model_dump(mode="json"),
    }


def run(folder: Path, work: Callable[[Emit, Callable[[], None]], object], stop: Stop | None = None) -> list[Event]:
    execute(request(folder), stop or Stop(folder), lambda recipe, folder, emit, check: work(emit, check))
    return EventReader(folder).read()


def test_a_second_writer_goes_on_behind_a_line_that_a_full_disk_cut_off(tmp_path: Path, writer: EventWriter) -> None:
    writer.emit("log", {"text": "whole"})
    writer.close()
    file = tmp_path / "events.jsonl"
    file.write_bytes(file.read_bytes() + b'{"run":"abcd","attempt":1,"num')
    second = EventWriter(tmp_path, "abcd", 1)
    second.emit("finished", {"status": "failed", "reason": "The disk is full."})
    second.close()
    assert [event.kind for event in EventReader(tmp_path).read()] == ["log", "finished"]


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (BadModel("not a model"), "refused", "not a model"),
        (BadParams("bits"), "refused", "bits"),
        (Cancelled("Cancelled."), "cancelled", "Cancelled."),
        (Interrupted("stopped"), "interrupted", "stopped"),
        (Diverged("NaN at step 3"), "failed", "NaN at step 3"),
        (MaquetteError("other"), "failed", "other"),
        (MemoryError(), "failed", "Out of memory"),
        (OutOfMemoryError("CUDA"), "failed", "Out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "failed", "Out of memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "failed", "disk is full"),
        (ZeroDivisionError("division\nby zero"), "failed", "ZeroDivisionError: division by zero"),
    ],
)
def test_every_ending_is_a_status_and_a_line(tmp_path: Path, error: Exception, status: str, says: str) -> None:
    def work(emit: Emit, check: Callable[[], None]) -> None:
        raise error

    (last,) = run(tmp_path, work)
    assert last.kind == "finished"
    assert last.data["status"] == status
    assert says in str(last.data["reason"])
    assert "\n" not in str(last.data["reason"])


def test_success_ends_with_finished(tmp_path: Path) -> None:
    events = run(tmp_path, lambda emit, check: emit("log", {"text": "hello"}))
    assert [(e.number, e.kind) for e in events] == [(1, "log"), (2, "finished")]
    assert events[-1].data == {"status": "succeeded", "reason": ""}


@pytest.mark.parametrize("cancelled", [True, False])
def test_why_a_worker_was_stopped(tmp_path: Path, cancelled: bool) -> None:
    stop = Stop(tmp_path)
    stop.ask()
    if cancelled:
        mark_cancelled(tmp_path)
    (last,) = run(tmp_path, lambda emit, check: check(), stop)
    assert last.data["status"] == ("cancelled" if cancelled else "interrupted")


def test_what_a_stopped_worker_complains_about_is_no_failure(tmp_path: Path) -> None:
    """The signal that stops a worker also ends its children; what it makes of that does not matter."""
    stop = Stop(tmp_path)

    def work(emit: Emit, check: Callable[[], None]) -> None:
        stop.ask()
        raise Diverged("the child ended without a word")

    (last,) = run(tmp_path, work, stop)
    assert last.data["status"] == "interrupted"


def test_a_full_disk_at_the_last_word_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(EventWriter, "emit", full)
    assert execute(request(tmp_path), Stop(tmp_path), lambda *a: None) is Status.SUCCEEDED
    assert EventReader(tmp_path).read() == []


def test_what_decides_is_synced(tmp_path: Path, writer: EventWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(len((tmp_path / "events.jsonl").read_bytes())))
    writer.emit("log", {"text": "a"})
    assert synced == []
    writer.emit("artifact", {"path": "artifact"})
    writer.emit("finished", {"status": "succeeded", "reason": ""})
    assert len(synced) == 2
    assert synced[-1] == (tmp_path / "events.jsonl").stat().st_size


def test_a_torn_line_waits_until_it_is_whole(tmp_path: Path, writer: EventWriter) -> None:
    writer.emit("log", {"text": "one"})
    writer.emit("log", {"text": "two"})
    whole = (tmp_path / "events.jsonl").read_bytes()
    reader = EventReader(tmp_path)
    seen = []
    for end in range(len(whole) + 1):
        (tmp_path / "events.jsonl").write_bytes(whole[:end])
        seen += [event.data["text"] for event in reader.read()]
        reader.advance()
    assert seen == ["one", "two"]


def test_what_was_not_taken_is_read_again(tmp_path: Path, writer: EventWriter) -> None:
    writer.emit("log", {"text": "one"})
    reader = EventReader(tmp_path)
    assert reader.read() == reader.read() != []
    reader.advance()
    assert reader.read() == []


def test_a_line_that_is_no_event_is_left_out(tmp_path: Path, writer: EventWriter) -> None:
    with open(tmp_path / "events.jsonl", "ab") as file:
        file.write(b"\xff\xfe nonsense\n{}\n")
    writer.emit("log", {"text": "one"})
    assert [event.number for event in EventReader(tmp_path).read()] == [1]


def test_one_worker_in_a_folder(tmp_path: Path) -> None:
    assert not is_live(tmp_path)
    lock = take_lock(tmp_path)
    assert lock is not None
    write_pid(lock, 1234)
    write_pid(lock, 1234)
    assert is_live(tmp_path)
    assert take_lock(tmp_path) is None
    assert read_pid(tmp_path) == 1234
    lock.close()
    assert not is_live(tmp_path)
    assert read_pid(tmp_path) == 1234


def test_inline(tmp_path: Path) -> None:
    path = tmp_path / "request.json"
    path.write_text(json.dumps(request(tmp_path)))

    def pipeline(recipe: Recipe, folder: Path, emit: Emit, check: Callable[[], None]) -> None:
        while True:
            check()

    worker = InlineRunner(pipeline).start(path, "cpu")
    assert worker.alive()
    worker.kill()
    assert not worker.alive()
    assert EventReader(tmp_path).read()[-1].data["status"] == "interrupted"


@pytest.mark.parametrize(
    ("kind", "highest", "nice"),
    [("run", "", 19), ("serve", "", 5), ("run", "0", 0), ("serve", "3", 3), ("run", "99", 19), ("run", "-5", 19)],
)
def test_how_far_a_process_steps_back(kind: str, highest: str, nice: int) -> None:
    assert niceness(kind, highest) == nice
