"""What one page server knows: the store, the scheduler, the stored comparison, and who may see what.

Every handler of a Gradio page is public HTTP API, so each asks the desk by the visitor's own name and gets
only what that visitor may see: own runs, and those that others share, which only their owner changes. A team sees all
that is shared in its lists; on a public server a link opens it.
Runs started on the command line have no owner; they are shown where the page is served to this machine alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import gradio as gr
from pydantic import JsonValue, ValidationError

from engine.errors import BadModel, BadParams, InputError, TooMany, UnknownName
from engine.hub import Hub
from engine.modes import Limits, Mode
from engine.places import DEMO, models, open_model
from engine.quotas import check_sources
from engine.rates import RateLimits
from engine.records import RUN_ID, USUAL_MEASURES, Divergence, Measurement, Output, Recipe, Record, Run, Status
from engine.scheduler import Scheduler
from engine.store import Store
from ui import language, wording
from ui.edge import has_cookie, visitor
from ui.guard import ADDRESS
from ui.opened import Opened
from ui.shelf import Shelf
from ui.wording import say

log = logging.getLogger(__name__)

STORED = "stored:"
BASELINE = Recipe.model_validate({})
FIRST = Recipe.model_validate({"steps": [{"quantize/gptq": {"bits": 4, "group_size": 64}}]})


class StoredRun(Record):
    """A run of the stored comparison with what it measured and wrote."""

    run: Run
    measurements: tuple[Measurement, ...] = ()
    outputs: tuple[Output, ...] = ()


class StoredComparison(Record):
    """The comparison that ships with the project: measured on `machine`, the baseline first.

    An artifact, where a run has one, is a folder beside the demo model.
    """

    machine: str
    runs: tuple[StoredRun, ...]


@dataclass(frozen=True)
class Entry:
    """Something that can be compared: a finished run, or one of the stored comparison."""

    key: str
    label: str
    run: Run
    measured: Mapping[str, Measurement]
    outputs: tuple[Output, ...] = ()
    diverged: tuple[Divergence, ...] = ()
    stored: bool = False


@dataclass(frozen=True)
class Now:
    """The scheduler's status and the last minute's history of each series."""

    status: Mapping[str, JsonValue]
    history: Mapping[str, list[float]]


class Pulse:
    """Asks the scheduler at most twice a second, however many visitors look; the others get the last answer."""

    def __init__(self) -> None:
        self._asking, self._asked = threading.Lock(), 0.0
        self._now: Now | None = None

    def now(self, scheduler: Scheduler) -> Now:
        """The latest answer, at most half a second old unless the scheduler itself is slow."""
        known = self._now
        if known is not None and time.monotonic() - self._asked < 0.5:
            return known
        if not self._asking.acquire(blocking=known is None):
            assert known is not None
            return known
        try:
            self._now = Now(scheduler.status(), scheduler.history())
            self._asked = time.monotonic()
            return self._now
        finally:
            self._asking.release()


@dataclass(frozen=True)
class Desk:
    """The one object that handlers talk to."""

    store: Store
    scheduler: Scheduler
    stored: StoredComparison | None = None
    mode: Mode = Mode.LOCAL
    shelf: Shelf = field(default_factory=Shelf)
    opened: Opened = field(default_factory=Opened)
    _finished: dict[tuple[str, int, bool, bool, str], Entry] = field(default_factory=dict)
    _pulse: Pulse = field(default_factory=Pulse)
    _rates: RateLimits = field(default_factory=RateLimits)

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the page."""
        return self.mode is Mode.LOCAL

    @property
    def limits(self) -> Limits:
        """What one visitor may take."""
        return self.scheduler.limits

    def enter(self, request: gr.Request, what: Literal["start", "stream"]) -> str:
        """The visitor who wants to start something that costs: a run, or models that write.

        Raises:
            TooMany: this visitor, or the address, did so too often; or keeps no cookie by which to count.
        """
        owner = visitor(request)
        if self.mode is Mode.PUBLIC and not has_cookie(request):
            raise TooMany(say("error.no_cookie"))
        self._count(request, what, self.limits.streams if what == "stream" else self.limits.starts)
        return owner

    def hub(self, request: gr.Request) -> Hub:
        """The hub for one handler of a visitor, which counts as one question where it has to be asked.

        It raises TooMany where this visitor, or the address, asked too often.
        """
        counted = False

        def allow() -> None:
            nonlocal counted
            if not counted:
                self._count(request, "question", self.limits.questions)
                counted = True

        return self.scheduler.hub.allowing(allow)

    def _count(self, request: gr.Request, what: str, most: int | None) -> None:
        address = str(dict(getattr(request, "headers", {})).get(ADDRESS, ""))
        self._rates.require(what, visitor(request), most)  # first: what is refused is not held against the address
        if most is not None and address:
            self._rates.require(what, f"at {address}", most * self.limits.crowd)

    def runs(self, owner: str) -> list[Run]:
        """The visitor's runs and those shared with the team, newest first; on a local page also the command line's."""
        if not self.local:
            return self.store.runs(owner=owner, shared=self.mode is Mode.TEAM)
        return self.store.runs((owner, ""))

    def run(self, run_id: str, owner: str) -> Run:
        """One run.

        Raises:
            UnknownName: there is none, or it belongs to somebody else: nobody can tell which.
        """
        run = self.find(run_id, owner)
        if run is None:
            raise UnknownName("run", str(run_id), [run.id for run in self.runs(owner)[:5]])
        return run

    def find(self, run_id: object, owner: str) -> Run | None:
        """One run, or None where there is none that the visitor may see."""
        if not isinstance(run_id, str) or not RUN_ID.fullmatch(run_id):
            return None
        try:
            run = self.store.run(run_id)
        except UnknownName:
            return None
        shared = run.shared and not self.local
        return run if shared or self.owns(run, owner) else None

    def owns(self, run: Run, owner: str) -> bool:
        """Whether the visitor may change a run, not only look at it."""
        return run.owner == owner or (self.local and run.owner == "")

    def own(self, run_id: str, owner: str) -> Run:
        """One run that the visitor may change.

        Raises:
            UnknownName: there is none that the visitor may see.
            InputError: it is another's, shared to be looked at.
        """
        run = self.run(run_id, owner)
        if not self.owns(run, owner):
            raise InputError(say("error.not_yours"))
        return run

    def share(self, run: Run, owner: str, shared: bool, hub: Hub) -> Run:
        """Let others look at the visitor's own run, or no more.

        Raises:
            UnknownName, InputError: as `own`.
            BadParams: nobody else comes to this server.
            NeedsToken: the model is gated or private, and whoever has a link would get what was made of it.
            MaquetteError: the hub cannot be asked whether it is.
        """
        mine = self.own(run.id, owner)
        if self.local:
            raise BadParams(say("error.no_share"))
        if shared and self.mode is Mode.PUBLIC:
            for model in models(mine.recipe):
                open_model(model, hub)
        return self.scheduler.share(mine.id, shared, owner=mine.owner)

    def open_link(self, keys: Sequence[str], owner: str) -> None:
        """Let the pickers keep what a link names.

        Raises:
            UnknownName: nothing the visitor may see.
        """
        runs = [entry.run for key in keys if not (entry := self.entry(key, owner)).stored]
        self.opened.add(owner, [run.id for run in runs if not self.owns(run, owner)])

    def now(self) -> Now:
        """The machine and the engine as of the last half second; nobody waits while another visitor asks."""
        return self._pulse.now(self.scheduler)

    def entry(self, key: str, owner: str) -> Entry:
        """What a picker's value stands for.

        Raises:
            UnknownName: nothing the visitor may see.
        """
        for entry in self.stored_entries():
            if entry.key == key:
                return entry
        return self._entry(self.run(key, owner))

    def entries(self, owner: str) -> list[Entry]:
        """All that can be compared: finished runs, newest first, what a link has opened, then the stored ones."""
        runs = {run.id: run for run in self.runs(owner)}
        linked = [run for each in self.opened.of(owner) if each not in runs and (run := self.find(each, owner))]
        done = [self._entry(run) for run in (*runs.values(), *linked) if run.status is Status.SUCCEEDED]
        return [*done, *self.stored_entries()]

    def stored_entries(self) -> list[Entry]:
        """The stored comparison's runs."""
        if self.stored is None:
            return []
        return [
            Entry(
                f"{STORED}{index}",
                say("stored.label", title=wording.title(item.run.recipe)),
                item.run,
                {m.name: m for m in item.measurements},
                item.outputs,
                stored=True,
            )
            for index, item in enumerate(self.stored.runs)
        ]

    def baseline(self, recipe: Recipe, owner: str) -> Entry | None:
        """The newest finished run of the same model without steps; for the demo the stored one otherwise."""
        for entry in self.entries(owner):
            if entry.run.recipe.model == recipe.model and is_original(entry.run):
                return entry
        return None

    def twin(self, recipe: Recipe, owner: str) -> Run | None:
        """The visitor's newest run of the same model and steps that finished well and has its artifact."""
        alike = self._alike(recipe, owner)
        return next((run for run in alike if run.status is Status.SUCCEEDED and run.artifact), None)

    def _alike(self, recipe: Recipe, owner: str) -> list[Run]:
        """The visitor's runs of the same model and steps, the newest first."""
        return [r for r in self.runs(owner) if (r.recipe.model, r.recipe.steps) == (recipe.model, recipe.steps)]

    def source(self, entry: Entry, owner: str) -> str:
        """What the scheduler can load for an entry: `demo`, a run's id, or a folder that ships with the project.

        Raises:
            BadModel: the entry is stored numbers only and no run on this machine can stand in.
        """
        if not entry.run.recipe.steps and entry.run.recipe.model.source == "demo":
            return "demo"
        run = self.twin(entry.run.recipe, owner) if entry.stored else entry.run
        if run is None and entry.run.artifact:
            return str(DEMO / entry.run.artifact)
        if run is None:
            working = any(not each.status.final for each in self._alike(entry.run.recipe, owner))
            key = "error.being_made" if working else "error.stored_only"
            raise BadModel(say(key, title=wording.title(entry.run.recipe)))
        if not run.artifact or not Path(run.artifact).is_dir():
            raise BadModel(say("error.no_artifact", run=run.id))
        return run.id

    def check_sources(self, recipe: Recipe) -> None:
        """Folders of the server are for those who sit at it, models for those whom the limits let have them.

        Raises:
            BadModel: a model or text that may not be named here.
        """
        check_sources(recipe, self.limits)

    def _entry(self, run: Run) -> Entry:
        key = (run.id, run.attempt, run.shared, run.expired is None, language.current())  # its label is in words
        if run.status is not Status.SUCCEEDED:
            return self._read(run)
        if key not in self._finished:
            while len(self._finished) >= 500:
                self._finished.pop(next(iter(self._finished)), None)
            self._finished[key] = self._read(run)
        return self._finished[key]

    def _read(self, run: Run) -> Entry:
        measured, outputs = self.store.measurements(run.id), tuple(self.store.outputs(run.id))
        diverged = tuple(self.store.divergences(run.id))
        return Entry(run.id, wording.run_label(run), run, measured, outputs, diverged)


def is_original(run: Run) -> bool:
    """Whether a run measured a model as it is, and more than what its blocks can bear."""
    return not run.recipe.steps and bool(set(run.recipe.measure) & set(USUAL_MEASURES))


def read_stored(path: Path) -> StoredComparison | None:
    """The comparison that ships with the project, or None (and a line in the log) where it cannot be read."""
    try:
        return StoredComparison.model_validate_json(path.read_text())
    except FileNotFoundError:
        log.info("no stored comparison at %s", path)
    except (OSError, ValidationError) as error:
        log.warning("the stored comparison %s cannot be read: %s", path, error)
    return None
