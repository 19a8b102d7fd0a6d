"""Watch one running attempt: carry its events into the store, bound its memory, end it, say how it ended."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from engine.attempts import EventReader, is_cancelled, mark_cancelled, note_ending, read_ending
from engine.records import Event, Run, Status
from engine.runners import Worker
from engine.store import Store

GRACE = 3.0  # seconds from asking a worker to stop to killing it; also what it has left after it has finished
SAMPLE_EVERY = 0.5  # seconds
CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE}


@dataclass
class Progress:
    """How far the current phase is: `done` of `total` in `unit` since `began` (monotonic seconds)."""

    phase: str = ""
    done: float = 0
    total: float = 0
    unit: str = ""
    began: float = 0.0
    eta: float | None = None  # seconds, where the worker knows better than the pace so far

    def follow(self, event: Event, now: float) -> None:
        """Take in a phase or progress event."""
        data = event.data
        if event.kind == "phase":
            self.phase, self.began = str(data.get("name", "")), now
            self.done = self.total = 0
            self.unit, self.eta = "", None
        elif event.kind == "progress":
            done, total = data.get("done"), data.get("total")
            if isinstance(done, int | float) and isinstance(total, int | float):
                self.done, self.total, self.unit = done, total, str(data.get("unit", ""))
                self.eta = eta if isinstance(eta := data.get("eta"), int | float) else None

    def as_json(self, now: float) -> dict[str, JsonValue]:
        """With `eta`, the seconds that are left of the phase at the pace so far, or None."""
        pace = (now - self.began) / self.done if self.done > 0 else None
        eta = self.eta
        if eta is None and pace is not None:
            eta = max(0.0, (self.total - self.done) * pace)
        return {"phase": self.phase, "done": self.done, "total": self.total, "unit": self.unit, "eta": eta}


class Watch:
    """One attempt and its worker. `tick` is called about ten times a second until it returns False."""

    def __init__(self, store: Store, run: Run, worker: Worker, folder: Path, budget: int | None) -> None:
        self.run, self.folder, self.progress = run, folder, Progress(began=time.monotonic())
        self.resident = 0
        self._store, self._worker, self._budget = store, worker, budget
        self._reader = EventReader(folder)
        self._next_sample = 0.0
        self._deadline: float | None = None
        self._verdict: tuple[Status, str] | None = None
        self._asked = False

    def cancel(self) -> None:
        """Ask the worker to stop because the user wants it to; killed when it does not."""
        mark_cancelled(self.folder)
        self.interrupt()

    def interrupt(self) -> None:
        """Ask the worker to stop, to be resumed later; killed when it does not."""
        if self._deadline is None:
            self._deadline, self._asked = time.monotonic() + GRACE, True
            self._worker.ask()

    def fail(self, reason: str) -> None:
        """End the worker, at once, as a failed run; nothing where it is ending already."""
        if self._deadline is None:
            self._verdict = (Status.FAILED, reason)
            self._deadline = time.monotonic()

    def tick(self) -> bool:
        """Look after the attempt once; False when it is over.

        Raises:
            StoreError: something could not be stored; memory and deadline were seen to, the next tick stores it.
        """
        now = time.monotonic()
        if not self._worker.alive():
            self._end(now)
            return False
        self.bound(now)  # first: a store that is locked or full must not let a worker go on
        self._carry(now)
        if now >= self._next_sample and self._deadline is None:
            self._store.say(self.run, "sample", {"series": "memory.resident", "value": self.resident, "unit": "B"})
            self._next_sample = now + SAMPLE_EVERY
        return True

    def bound(self, now: float) -> None:
        """Look at memory and deadline alone; nothing is stored."""
        self.resident = self._worker.resident()
        if self._budget is not None and self.resident > self._budget and self._verdict is None:
            self._verdict = (Status.FAILED, _over_budget(self.resident, self._budget))
            self._deadline = now
        if self._deadline is not None and now >= self._deadline:
            self._worker.kill()

    def _carry(self, now: float) -> None:
        events = self._reader.read()
        if not events:
            return
        if self._verdict is not None:  # why it was ended says more than that it was
            events = [event for event in events if event.data.get("status") != str(Status.INTERRUPTED)]
        self._store.append(events)
        self._reader.advance()  # only now: what could not be stored is read again
        for event in events:
            self.progress.follow(event, now)
            if event.kind == "finished" and self._deadline is None:
                self._deadline = now + GRACE  # it has only to exit

    def _end(self, now: float) -> None:
        code = self._worker.exit_code()
        self._worker.kill()  # children that outlived it
        self._carry(now)
        if not self._store.run(self.run.id).status.final:
            found = self._verdict or _verdict(code, is_cancelled(self.folder), asked=self._asked)
            finish(self._store, self.run, self.folder, *found)


def conclude(store: Store, run: Run, folder: Path) -> None:
    """Say how an attempt ended whose worker died unseen: what it said itself counts, else it is interrupted."""
    store.append(EventReader(folder).read())
    if not store.run(run.id).status.final:
        noted = read_ending(folder)  # by a scheduler that could not store it any more
        if noted is not None:
            store.say(run, "finished", noted.data)
        else:
            finish(store, run, folder, *_verdict(None, is_cancelled(folder)))


def finish(store: Store, run: Run, folder: Path, status: Status, reason: str) -> None:
    """Say how an attempt ended whose worker did not, in its folder and in the store."""
    data: dict[str, JsonValue] = {"status": str(status), "reason": reason}
    note_ending(folder, run.id, run.attempt, data)
    store.say(run, "finished", data)


def _verdict(code: int | None, cancelled: bool, asked: bool = False) -> tuple[Status, str]:
    """The status of an attempt whose worker ended without saying so; `asked`: we wanted it to end."""
    if cancelled:
        return Status.CANCELLED, "Cancelled."
    if code is not None and code >= 0:
        return Status.FAILED, f"The worker ended without a result (exit code {code}); worker.log has the details."
    if code is not None and -code in CRASHES:
        name = signal.Signals(-code).name
        return Status.FAILED, f"The worker crashed in native code ({name}); worker.log has the details."
    if code == -signal.SIGKILL and not asked:  # which the kernel sends where memory is short, to our workers first
        return Status.INTERRUPTED, (
            "The worker was killed from outside; memory may have run out. The run can be resumed, with less beside it."
        )
    how = f" ({signal.Signals(-code).name})" if code is not None else ""
    return Status.INTERRUPTED, f"The worker was stopped from outside{how}; the run can be resumed."


def _over_budget(resident: int, budget: int) -> str:
    return (
        f"Out of memory: the run held {resident / 2**30:.2f} GiB, its budget is {budget / 2**30:.2f} GiB. "
        "Use fewer calibration samples or a smaller model, or close other programs."
    )
