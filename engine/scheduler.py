"""One queue per device: start workers, carry their events into the store, end them, recover after a crash.

    with Scheduler(home()) as scheduler:
        run = scheduler.submit(recipe)

One thread does the work, ten times a second. What the page and the command line call only writes a row
or sends a signal, and returns in milliseconds.
"""

from __future__ import annotations

import logging
import shutil
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import JsonValue

from engine import hardware, places, preflight, rescue
from engine.attempts import ASIDE, attempt_folder, is_cancelled, prepare
from engine.errors import BadModel, InputError, StoreError, TooBig, TooMany, UnknownName, os_reason
from engine.exporting import Exports
from engine.fit import Estimate
from engine.hub import Hub
from engine.modes import Limits
from engine.quotas import Quotas, check_sources
from engine.rates import RateLimits
from engine.records import Model, Recipe, Run, Status
from engine.repos import check_token
from engine.runners import Runner, Worker, zero
from engine.runners.local import LocalRunner, environment
from engine.runners.standby import Standby
from engine.sources import Repo, classify
from engine.store import Store, scratch_of
from engine.streams import Streams
from engine.supervision import Watch, conclude, finish
from engine.telemetry import Telemetry

log = logging.getLogger(__name__)

TICK = 0.1  # seconds
SETTLES = 10.0  # seconds in which a run that has ended is cleared away
TROUBLES = (OSError, sqlite3.Error, StoreError)  # a full disk, a locked file
BUDGET_SHARE = 0.8  # of the memory that is free, or the run's own already, when its watch begins


@dataclass(frozen=True)
class Waiting:
    """What is known of a run that waits, in memory alone.

    asker: the context in which it was asked for. token: for the hub, where its models are not all here. estimate: None
    where it is resumed or another server took it. left: bytes that it leaves on disk, at most.
    """

    asker: Context = field(default_factory=copy_context)
    token: str = ""
    estimate: Estimate | None = None
    left: int = 0


class Scheduler:
    """Runs the runs of one data folder; `store` holds them.

    runner: by default processes of this machine, or ZeroGPU's calls where this is such a Space. limits: what one
    visitor may take. refuses: says no to recipes that this installation does not take, beyond what preflight refuses.
    memory_budget: bytes that a run and its children may hold; None means a share of what is free when it starts. hub:
    where models are searched and downloaded; by default the public one, with the cache of the data folder. standby:
    keep a process ready for the next run while nothing runs here.

    Raises:
        StoreError: the folder cannot be used, or another scheduler uses it.
    """

    def __init__(
        self, home: Path, *, runner: Runner | None = None, limits: Limits | None = None,
        memory_budget: int | None = None, hub: Hub | None = None, standby: bool = False,
        refuses: Callable[[Recipe, Estimate], None] | None = None,
    ) -> None:  # fmt: skip
        self.home = home.resolve()  # as the kernel names the folder of a process
        self._waiting: dict[str, Waiting] = {}
        self.store = Store(self.home / "maquette.db")
        zero_gpu = runner is None and zero.is_zero()
        self._standby = None
        if standby and runner is None and not zero_gpu:
            device = _best_device()
            self._standby = Standby(device, partial(environment, device, hardware.worker_threads()))
        self._runner = runner or (zero.ZeroRunner() if zero_gpu else LocalRunner(standby=self._standby))
        self._refuses = refuses or (zero.check if zero_gpu else None)
        self.call_limits = (zero.SECONDS, zero.LARGEST) if zero_gpu else None  # seconds and bytes, to be shown
        self.limits = limits or Limits()
        self.hub = hub or Hub(self.home / "cache" / "hub", trusting=self.limits.folders)
        scratch = scratch_of(self.home)
        shutil.rmtree(scratch, ignore_errors=True)  # of a server that was killed
        self._streams = Streams(scratch / "streams")
        self._exports = Exports(scratch / "exports", self.limits.seconds)
        self._quotas = Quotas(self.home, self.store, self.limits, hub=self.hub, warm=self._streams.models)
        self._rates = RateLimits()
        self._memory_budget = memory_budget
        self._watches: dict[str, Watch] = {}  # by device
        self._overdrawn: set[str] = set()  # running runs whose files go with them
        self._served: dict[str, float] = {}  # when a run of an owner was last started
        self._guard = threading.RLock()  # around the watches and every decision about a run
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._telemetry = Telemetry()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Find the runs that an earlier scheduler left, then start working."""
        with self._guard:
            self._recover()
        self._thread = threading.Thread(target=self._work, name="scheduler", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Interrupt what runs (it can be resumed), end warm models and exports, close the store."""
        self._streams.close()
        self._exports.close()
        self._stopping.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        try:
            with self._guard:
                for watch in self._watches.values():
                    watch.interrupt()
                while self._watches:
                    self._look_after()
                    time.sleep(TICK / 2)
        finally:
            if self._standby is not None:
                self._standby.close()
            self._empty_trash()
            self.store.close()

    # What the page and the command line call

    def submit(self, recipe: Recipe, owner: str = "", token: str = "") -> Run:
        """Check a recipe and queue a run of it; a model of the hub is pinned to a commit.

        token: for a gated or private model; kept in memory until the run starts, and told to its worker alone.

        Raises:
            InputError: the recipe cannot work, or is too much for this owner; one helpful line.
            HubError: the hub does not answer.
        """
        check_sources(recipe, self.limits)
        pinned = places.settle(recipe, self.hub, token)
        estimate = self._check(pinned, token)
        if self._refuses is not None:
            self._refuses(pinned, estimate)
        left = self._quotas.check(pinned, owner, token)
        with self._guard:
            self._check_queue(owner)
            self._rates.require("start", owner, self.limits.starts)
            for asked, found in zip(places.models(recipe), places.models(pinned), strict=True):
                if isinstance(classify(found), Repo):
                    self.hub.remember(asked, found)
            run = self.store.add_run(pinned, owner)
            self._waiting[run.id] = Waiting(token=self._needed(token, run), estimate=estimate, left=left)
        self._wake.set()
        return run

    def cancel(self, run_id: str, owner: str | None = "") -> None:
        """Cancel a queued or running run; its files are deleted. Nothing happens to a run that has ended.

        Raises:
            UnknownName: there is no such run of that owner (None: of anybody).
        """
        with self._guard:
            run = self._own(run_id, owner)
            watch = self._watch_of(run_id)
            if watch is not None:
                watch.cancel()
            elif run.status is Status.QUEUED:
                self.store.say(run, "finished", {"status": str(Status.CANCELLED), "reason": "Cancelled."})
                self._waiting.pop(run_id, None)
                self._discard(self.home / "runs" / run_id)
        self._wake.set()

    def resume(self, run_id: str, owner: str | None = "", token: str = "", factor: float | None = None) -> Run:
        """Queue an interrupted or failed run again; blocks that were finished are not computed again.

        factor: after a training that diverged, go on from its last good checkpoint at so many times its learning rate;
            0: end the training there. The run's recipe says so from now on.

        Raises:
            UnknownName: there is no such run of that owner.
            InputError: it did not end that way, its model needs a token, the owner has too many runs waiting, or no
                checkpoint is there for the factor.
        """
        run = self._own(run_id, owner)
        if run.status in (Status.INTERRUPTED, Status.FAILED):
            for model in places.models(run.recipe):  # before the guard: the hub may be asked
                places.open_model(model, self.hub, token)
            self._let_end(run_id)
        with self._guard:
            run = self._own(run_id, owner)
            if run.status not in (Status.INTERRUPTED, Status.FAILED) or self._watch_of(run_id) is not None:
                raise InputError(f"Run {run_id} is {run.status}; only an interrupted or failed run can be resumed.")
            recipe = None if factor is None else rescue.amended(run, self.store.divergences(run_id), factor)
            self._check_queue(run.owner)
            self._quotas.check(run.recipe, run.owner, token, resumed=run.id)
            self._rates.require("start", run.owner, self.limits.starts)
            run = self.store.requeue(run_id, recipe)
            self._waiting[run.id] = Waiting(token=self._needed(token, run))
        self._wake.set()
        return run

    def delete(self, run_id: str, owner: str | None = "") -> None:
        """Forget a run that has ended and delete its files.

        Raises:
            UnknownName: there is no such run of that owner.
            InputError: it has not ended.
        """
        with self._guard:
            run = self._own(run_id, owner)
            if not run.status.final:
                raise InputError(f"Run {run_id} is {run.status}; cancel it first.")
            if self._watch_of(run_id) is not None:
                raise InputError(f"The process of run {run_id} is just ending. Try again in a moment.")
            self.store.delete_run(run_id)
            self._discard(self.home / "runs" / run_id)
        self._wake.set()

    def share(self, run_id: str, shared: bool, owner: str | None = "") -> Run:
        """Let the rest of a team look at a run, or no more.

        Raises:
            UnknownName: there is no such run of that owner.
        """
        with self._guard:
            self._own(run_id, owner)
            return self.store.share(run_id, shared)

    def _let_end(self, run_id: str) -> None:
        """Wait until nobody watches a run whose end is known: its process and its files go a moment later."""
        deadline = time.monotonic() + SETTLES
        while self._watch_of(run_id) is not None and time.monotonic() < deadline:
            time.sleep(TICK / 2)

    def status(self) -> dict[str, JsonValue]:
        """The machine and the engine now; memory in bytes, `cpu` in percent, `eta` in seconds."""
        watch = next(iter(list(self._watches.values())), None)  # without the guard: whoever submits holds it for long
        running = None if watch is None else watch.run.id
        progress = None if watch is None else watch.progress.as_json(time.monotonic())
        return {**self._telemetry.now(), "running": running, "progress": progress, "queued": self.store.waiting()}

    def spare(self, recipe: Recipe) -> int:
        """Bytes that a run would find free beside those that are, were models to end that nobody writes with now."""
        return self._streams.spare(_device(recipe)) + self._waits(recipe)

    def room(self, recipe: Recipe) -> int:
        """Bytes of the disk that a run of the recipe would find free, were what nobody uses there to be deleted."""
        return self._quotas.spare(recipe)

    def history(self) -> dict[str, list[float]]:
        """The last 60 samples of each series in `status`, one a second, oldest first."""
        return self._telemetry.history()

    def stream(
        self, sources: list[str], prompt: str, *, max_tokens: int = 48, temperature: float = 0.0, seed: int = 0,
        same_text: bool = False, top_p: float = 1.0, top_k: int = 0, stop_strings: Sequence[str] = (),
        chat: bool = False, system: str = "", stop: threading.Event | None = None,
    ) -> Iterator[tuple[int, str, dict[str, JsonValue]]]:  # fmt: skip
        """What the models of up to four sources write after a prompt; see `Streams.write`.

        A source is `demo`, a folder, the name of a downloaded model of the hub, or a run's id.

        Raises:
            InputError: a source is no model.
        """
        folders = [self._model_of(source) for source in sources]
        for folder in folders:
            self.hub.here.use(folder)
        return self._streams.write(
            folders, prompt, max_tokens=max_tokens, temperature=temperature, seed=seed, same_text=same_text,
            top_p=top_p, top_k=top_k, stop_strings=stop_strings, chat=chat, system=system, stop=stop,
        )  # fmt: skip

    def export(
        self, run_id: str, name: str, owner: str | None = "", stop: threading.Event | None = None
    ) -> Iterator[float]:
        """Keep a run's artifact in another format beside it; see `Exports.write`.

        Raises:
            UnknownName: there is no such run of that owner.
        """
        run = self._own(run_id, owner)
        return self._exports.write(run, name, partial(self._quotas.check_export, run), stop)

    # The thread

    def _work(self) -> None:
        while not self._stopping.is_set():
            try:
                with self._guard:
                    self._look_after()
                    self._recover()
                    self._hold_to_limits()
                    self._start_next()
                if self._standby is not None and not self._watches:
                    self._standby.prepare()
                self._telemetry.sample([*self._watches.values()], self._streams.pids())
                self._streams.end_idle()
                self._empty_trash()
            except Exception:  # the scheduler's edge: runs go on, and the next tick tries again
                log.exception("the scheduler's tick failed")
                self._hold_out()
            self._wake.wait(TICK)
            self._wake.clear()

    def _hold_out(self) -> None:
        """A second without the store, in which no run exceeds its memory or time."""
        for _ in range(round(1 / TICK)):
            with self._guard:
                for watch in self._watches.values():
                    watch.bound(time.monotonic())
            if self._stopping.wait(TICK):
                break

    def _look_after(self) -> None:
        trouble: Exception | None = None
        for device, watch in list(self._watches.items()):
            try:
                if not watch.tick():
                    try:
                        self._clean_up(self.store.run(watch.run.id))
                    finally:  # only now: who sees no watch may take the files for settled
                        del self._watches[device]
            except TROUBLES as error:  # of one; the others are looked after all the same
                trouble = error
        if trouble is not None:
            raise trouble

    def _hold_to_limits(self) -> None:
        """End what takes too much; delete the files of runs whose time is over, which they say then."""
        for breach in self._quotas.look([watch.run for watch in self._watches.values()]):
            watch = self._watch_of(breach.run)
            if watch is not None:
                watch.fail(breach.reason)
                self._overdrawn |= {breach.run} if breach.discard else set()
        for run in self._quotas.expired():
            self._discard(self.home / "runs" / run.id)
            self.store.expire(run.id)  # only now: after a crash in between it is done again

    def _start_next(self) -> None:
        queued = [run for run in self.store.unfinished() if run.status is Status.QUEUED]
        queued.sort(key=lambda run: self._served.get(run.owner, 0.0))  # who was served longest ago comes first
        for run in queued:
            device = _device(run.recipe)
            owners = [watch.run.owner for watch in self._watches.values()]
            if device not in self._watches and owners.count(run.owner) < self.limits.running:
                self._served[run.owner] = time.monotonic()
                waiting = self._waiting.pop(run.id, None) or Waiting()
                self._make_room(run, waiting)
                self._start_run(run, device, waiting)

    def _make_room(self, run: Run, waiting: Waiting) -> None:
        """End warm models and delete files that nobody uses, as far as the run needs it: both may have come meanwhile.

        Where what it needs is not known, all idle models end.
        """
        estimate = waiting.estimate
        if estimate is None:
            self._streams.end_unused()
            return
        waits = self._waits(run.recipe)
        self._streams.end_unused(lambda: preflight.machine(run.recipe).free + waits >= estimate.total)
        here = all(self.hub.here.find(repo) for repo in places.repos(run.recipe))
        self._quotas.make_room(run.recipe, waiting.left + (0 if here else estimate.download))

    def _start_run(self, run: Run, device: str, waiting: Waiting) -> None:
        run = self.store.begin_attempt(run.id)
        try:
            request = prepare(
                self.home, run.id, run.attempt,
                {
                    "kind": "run", "run": run.id, "attempt": run.attempt, "recipe": run.recipe.model_dump(mode="json"),
                    "hub": {
                        "endpoint": self.hub.endpoint, "offline": self.hub.offline,
                        "models": [f"{repo.name}@{repo.revision}" for repo in places.repos(run.recipe)],
                    },
                    "secret": bool(waiting.token),
                    "said": [rescue.told(each) for each in self.store.divergences(run.id)],
                },
            )  # fmt: skip
            worker = waiting.asker.run(self._runner.start, request, device, waiting.token)
        except OSError as error:
            reason = f"The worker could not be started. {os_reason(error)}"
            finish(self.store, run, attempt_folder(self.home, run.id, run.attempt), Status.FAILED, reason)
            return
        self._watch(run, worker, device)

    def _watch(self, run: Run, worker: Worker, device: str) -> None:
        used, total = hardware.memory()
        available = min(total, total - used + worker.resident())  # an adopted one holds some of it already
        budget = self._memory_budget or int(available * BUDGET_SHARE)
        folder = attempt_folder(self.home, run.id, run.attempt)
        self._watches[device] = Watch(self.store, run, worker, folder, budget)

    def _recover(self) -> None:
        """Adopt, or say the end of, what is to be running and nobody looks after.

        After a start that is what an earlier scheduler has left; later, a run whose start failed when nothing could be
        stored.
        """
        for run in self.store.unfinished():
            if run.status is not Status.RUNNING or self._watch_of(run.id) is not None:
                continue
            folder = attempt_folder(self.home, run.id, run.attempt)
            worker = self._runner.adopt(folder)
            if worker is None:
                conclude(self.store, run, folder)
                self._clean_up(self.store.run(run.id))
                continue
            log.info("run %s still works: adopted", run.id)
            self._watch(run, worker, _device(run.recipe))
            if is_cancelled(folder):
                self._watches[_device(run.recipe)].cancel()

    # Files

    def _clean_up(self, run: Run) -> None:
        """Give the disk back: all of a cancelled run, blocks that are needed no more, a model nobody has checked."""
        self._discard(attempt_folder(self.home, run.id, run.attempt) / ASIDE)
        overdrawn = run.id in self._overdrawn and run.status is not Status.SUCCEEDED
        self._overdrawn.discard(run.id)
        if run.status is Status.CANCELLED or overdrawn:
            self._discard(self.home / "runs" / run.id)
            self._discard_download(run)
        elif run.status is Status.SUCCEEDED:
            self._discard(attempt_folder(self.home, run.id, run.attempt) / "blocks")
        elif run.artifact is None:
            for half in ("artifact", "artifact.tmp"):
                self._discard(attempt_folder(self.home, run.id, run.attempt) / half)

    def _discard(self, folder: Path) -> None:
        """Move a folder out of the way at once; the thread deletes it, which can take long."""
        trash = self.home / "trash"
        trash.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):
            folder.rename(trash / uuid.uuid4().hex)

    def _discard_download(self, run: Run) -> None:
        """Give back what a cancelled run had begun to download, unless another run wants it."""
        others = {repo.name for each in self.store.unfinished() for repo in places.repos(each.recipe)}
        for repo in places.repos(run.recipe):
            if repo.name not in others:
                self.hub.here.discard(repo)

    def _needed(self, token: str, run: Run) -> str:
        """The token where a model of the run has to be downloaded with it; else none is kept."""
        missing = any(self.hub.here.find(repo) is None for repo in places.repos(run.recipe))
        return check_token(token) if token and missing else ""

    def _empty_trash(self) -> None:
        trash = self.home / "trash"
        if trash.is_dir():
            for folder in list(trash.iterdir()):
                shutil.rmtree(folder, ignore_errors=True)

    # Small questions

    def _own(self, run_id: str, owner: str | None) -> Run:
        run = self.store.run(run_id)
        if owner is not None and run.owner != owner:
            raise UnknownName("run", run_id, ())  # the same words as for a run that does not exist
        return run

    def _watch_of(self, run_id: str) -> Watch | None:
        return next((watch for watch in self._watches.values() if watch.run.id == run_id), None)

    def _check(self, recipe: Recipe, token: str) -> Estimate:
        room = partial(self.room, recipe)
        try:
            return preflight.check(recipe, self.hub, token, self._waits(recipe), room)
        except TooBig:
            if not self._streams.end_unused():  # warm models are kept only as long as nothing else needs their room
                raise
            return preflight.check(recipe, self.hub, token, self._waits(recipe), room)

    def _waits(self, recipe: Recipe) -> int:
        """Bytes of memory that a process holds which a run of the recipe would be in."""
        return 0 if self._standby is None else self._standby.held(_device(recipe))

    def _check_queue(self, owner: str) -> None:
        if (waiting := self.store.waiting(owner)) >= self.limits.queued:
            raise TooMany(f"{waiting} of your runs are waiting already. Wait for one to start, or cancel one.")

    def _model_of(self, source: str) -> Path:
        if source != "demo":
            with suppress(UnknownName):
                artifact = self.store.run(source).artifact
                if artifact is None:
                    raise BadModel(f"Run {source} has no model yet.")
                return Path(artifact)
        return places.locate(Model.model_validate(source), self.hub)


def _device(recipe: Recipe) -> str:
    """The queue of a recipe."""
    return _best_device() if recipe.device == "auto" else recipe.device


def _best_device() -> str:
    """Where runs work that do not say where."""
    return "cuda" if hardware.gpu() is not None else "cpu"
