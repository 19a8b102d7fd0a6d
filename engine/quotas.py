"""What a visitor may name, and how much disk and time a run may take: refused before work, ended while it works.

Before work: models and texts by where they come from, a model by its size, the disk by what the visitor's runs hold
already. While it works: seconds of this start, the visitor's disk, and what must stay free for everybody. Files of
runs that have ended are deleted when their time is over; what was measured stays. Where the disk gets full, models of
the hub and those kept between steps make room, the ones used longest ago first, but never one in use.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter, itemgetter
from pathlib import Path

from engine import headers, intermediate, places
from engine.errors import BadModel, TooBig, short
from engine.fields import field_kind
from engine.files import Unused
from engine.hub import Hub
from engine.methods import get
from engine.modes import GIB, Limits
from engine.records import Model, Recipe, Run
from engine.sizes import WIDTHS
from engine.sources import Repo, classify, is_path, named, split
from engine.store import Store

log = logging.getLogger(__name__)

BUNDLED = frozenset({"demo", ""})
LOOK_EVERY = 1.0  # seconds between looks at the disk
EXPIRE_EVERY = 60.0
ALL = 1_000_000  # runs


@dataclass(frozen=True)
class Breach:
    """A running run that must end; `discard`: with its files, for they are what is too much."""

    run: str
    reason: str
    discard: bool = False


class Quotas:
    """The limits of one data folder's visitors.

    free: how many bytes its disk has left. warm: the folders of the models that are held for writing.
    """

    def __init__(
        self, home: Path, store: Store, limits: Limits, free: Callable[[], int] | None = None, hub: Hub | None = None,
        warm: Callable[[], Iterable[Path]] = tuple,
    ) -> None:  # fmt: skip
        self._home, self._store, self._limits, self._hub = home, store, limits, hub
        self._free = free or (lambda: shutil.disk_usage(home).free)
        self._warm = warm
        self._began: dict[tuple[str, int], float] = {}  # monotonic: a clock that jumps ends no run
        self._next_look = self._next_expiry = 0.0

    def check(self, recipe: Recipe, owner: str, token: str = "", resumed: str | None = None) -> int:
        """Refuse what is too much for this visitor, before any work; the most bytes that the run leaves on disk.

        These are counted as all weights of the largest model that it reads, as they are loaded: more than a packed
        artifact holds, but while it works the run holds the finished blocks of each step, too, and its visitor's disk
        is bounded then as well. What is kept between steps is not a visitor's, and makes room for others.

        resumed: a run whose files it goes on with.

        Raises:
            BadModel: a source that may not be named here.
            TooBig: the model is too large here, or the disk too full; with the numbers and a way out.
        """
        limits = self._limits
        check_sources(recipe, limits)
        if not self._bounded:
            return 0
        name, parameters, size = max(
            ((_name(model), *model_size(recipe, model, self._hub, token)) for model in places.models(recipe)),
            key=itemgetter(2),
        )
        if limits.parameters is not None and parameters > limits.parameters:
            raise TooBig(
                f"{name} has {parameters / 1e9:.2f} billion parameters; this server takes up to "
                f"{limits.parameters / 1e9:.2f} billion. Choose a smaller one, or run Maquette on your own machine."
            )
        if limits.model_bytes is not None and size > limits.model_bytes:
            raise TooBig(
                f"The files of {name} hold {_bytes(size)}; this server takes up to "
                f"{_bytes(limits.model_bytes)}. Choose a smaller one, or run Maquette on your own machine."
            )
        size -= min(size, self._size(resumed)) if resumed else 0
        if limits.disk is not None and (used := self.used(owner)) + size > limits.disk:
            raise TooBig(
                f"Your runs hold {_bytes(used)} of the {_bytes(limits.disk)} that a visitor has, and this one "
                f"needs up to {_bytes(size)}. Delete a run on the Runs tab, or choose a smaller model."
            )
        download = 0
        if self._hub is not None:
            for model in places.models(recipe):
                origin = places.open_model(model, self._hub, token)
                download += self._hub.missing(model, origin)
                if origin.folder is not None:
                    self._hub.here.use(origin.folder)
        needed = size + download
        self.make_room(recipe, needed)
        if (free := self._free()) - needed < limits.floor:
            raise TooBig(
                f"The server's disk has {_bytes(free)} left; the run needs up to {_bytes(needed)}, and "
                f"{_bytes(limits.floor)} stay free. Delete runs of yours, or come back later."
            )
        return size

    def check_export(self, run: Run, size: int) -> None:
        """Refuse an export of a run that leaves so many bytes on disk, where that is too much.

        Raises:
            TooBig: for its owner, or for the disk; with the numbers and a way out.
        """
        limits = self._limits
        if not self._bounded:
            return
        if limits.disk is not None and (used := self.used(run.owner)) + size > limits.disk:
            raise TooBig(
                f"Your runs hold {_bytes(used)} of the {_bytes(limits.disk)} that a visitor has, and the export needs "
                f"up to {_bytes(size)}. Delete a run on the Runs tab."
            )
        self.make_room(run.recipe, size)
        if (free := self._free()) - size < limits.floor:
            raise TooBig(
                f"The server's disk has {_bytes(free)} left; the export needs up to {_bytes(size)}, and "
                f"{_bytes(limits.floor)} stay free. Delete runs of yours, or come back later."
            )

    def make_room(self, recipe: Recipe, needed: int) -> None:
        """Delete what nobody uses until a run of the recipe finds so many bytes of the disk, or nothing is left."""
        self._release(lambda: self._free() - needed >= self._limits.floor, partial(self._unused, recipe))

    def spare(self, recipe: Recipe) -> int:
        """Bytes of the disk that are not free and that `make_room` could give to a run of the recipe."""
        return sum(map(folder_size, {each.folder for each in self._unused(recipe)})) if self._bounded else 0

    def used(self, owner: str) -> int:
        """Bytes on disk of a visitor's runs."""
        return sum(self._size(run.id) for run in self._store.runs(owner, ALL) if run.expired is None)

    def look(self, running: Sequence[Run], now: float | None = None) -> list[Breach]:
        """The running runs that must end; looks about once a second."""
        now = time.monotonic() if now is None else now
        if now < self._next_look:
            return []
        self._next_look = now + LOOK_EVERY
        if self._hub is not None and (most := self._limits.downloads) is not None:
            downloads = self._hub.here.folder
            self._release(lambda: folder_size(downloads) <= most, self._unused_downloads)
        self._release(lambda: self._free() >= self._limits.floor, self._unused)
        found = [breach for run in running for breach in (self._late(run, now), self._overdrawn(run)) if breach]
        # Before work all of the floor was free, so what works may use half of it before it must end.
        if running and not found and (free := self._free()) < self._limits.floor // 2:
            largest = max(running, key=lambda run: self._size(run.id))
            reason = f"The server's disk has {_bytes(free)} left. Choose a smaller model, or come back later."
            found.append(Breach(largest.id, reason, discard=True))
        return found

    def expired(self, now: float | None = None) -> list[Run]:
        """Runs whose files have been kept long enough; looks about once a minute. `now`: seconds since the epoch.

        Models of the hub that were not used for as long are deleted here.
        """
        if self._limits.keep is None or (now is None and time.monotonic() < self._next_expiry):
            return []
        self._next_expiry = time.monotonic() + EXPIRE_EVERY
        before = (time.time() if now is None else now) - self._limits.keep
        if self._hub is not None:
            for name in self._hub.here.evict(before, self._repos_in_use(self._hub)):
                log.info("%s was kept long enough: its files are deleted", name)
        return self._store.ended_before(before)

    @property
    def _bounded(self) -> bool:
        """Whether anything but the number of runs is limited here; where nothing is, nothing makes room either."""
        limits = self._limits
        bounds = (limits.parameters, limits.model_bytes, limits.disk, limits.downloads, limits.floor or None)
        return any(bound is not None for bound in bounds)

    def _release(self, enough: Callable[[], bool], unused: Callable[[], list[Unused]]) -> None:
        """Delete what was used longest ago, one by one until it is enough, or all that is left is in use."""
        found = [] if enough() else sorted(unused(), key=attrgetter("used"), reverse=True)
        while found and not enough():
            oldest = found.pop()
            oldest.remove()
            log.info("%s was used longest ago: its files make room", oldest.name)

    def _unused(self, *recipes: Recipe) -> list[Unused]:
        """What neither an unfinished run uses, nor these recipes, nor whoever writes."""
        if self._hub is None:
            return []
        if kept := intermediate.unused(self._home / "cache"):
            spared = {key for recipe in self._wanted(*recipes) for key in intermediate.keys(recipe, self._hub)}
            kept = [each for each in kept if each.folder.stem not in spared]  # also one that is being written
        return [*kept, *self._unused_downloads(*recipes)]

    def _unused_downloads(self, *recipes: Recipe) -> list[Unused]:
        """The models of the hub among it."""
        return [] if self._hub is None else self._hub.here.unused(self._repos_in_use(self._hub, *recipes))

    def _repos_in_use(self, hub: Hub, *recipes: Recipe) -> set[str]:
        """The repos that runs or these recipes wait for or work on, and whose models are held for writing."""
        names = {*map(hub.here.name_of, self._warm())}
        return names | {repo.name for recipe in self._wanted(*recipes) for repo in places.repos(recipe)}

    def _wanted(self, *recipes: Recipe) -> list[Recipe]:
        """These, and those of all runs that wait or work."""
        return [*recipes, *(run.recipe for run in self._store.unfinished())]

    def _late(self, run: Run, now: float) -> Breach | None:
        key = (run.id, run.attempt)
        if key not in self._began:
            self._began = {key: self._began[key] for key in list(self._began)[-20:]}
            self._began[key] = now - max(0.0, time.time() - (run.started or time.time()))
        limit = self._limits.seconds
        if limit is None or now - self._began[key] <= limit:
            return None
        return Breach(
            run.id,
            f"The run took longer than the {limit / 60:g} minutes that a run has here. Use a smaller model, fewer "
            "steps or fewer measurements, or run Maquette on your own machine.",
        )

    def _overdrawn(self, run: Run) -> Breach | None:
        limit = self._limits.disk
        if limit is None or (used := self.used(run.owner)) <= limit:
            return None
        return Breach(
            run.id,
            f"Your runs hold {_bytes(used)} on disk; a visitor has {_bytes(limit)}. This one was ended and "
            "its files are deleted. Delete a run on the Runs tab, or choose a smaller model.",
            discard=True,
        )

    def _size(self, run_id: str) -> int:
        return folder_size(self._home / "runs" / run_id)


def check_sources(recipe: Recipe, limits: Limits) -> None:
    """Refuse folders of a server that belongs to somebody else, and models of organisations that are not listed.

    Raises:
        BadModel: with what may be named instead.
    """
    if limits.folders:
        return
    texts, models = [recipe.calibration], [recipe.model]
    for step in recipe.steps:
        params = get(step.method).params
        fields = params.model_fields
        files = {k for k in fields if field_kind(fields[k]) == "str"} - params.PATTERNS - params.MODELS
        texts += [str(value) for key, value in step.params.items() if key in files]
        for key in params.MODELS & set(step.params):
            models += [named(each) for each in _words(str(step.params[key]))]
    for text in texts:
        if text not in BUNDLED:
            raise BadModel(
                f"{short(text)!r}: on a shared server the bundled text is used; set it to demo or leave it out."
            )
    for model in models:
        _check_model(model, limits)


def _words(text: str) -> list[str]:
    """The names in a setting of models; where a quote is not closed, the whole as one that is none."""
    try:
        return split(text)
    except ValueError:
        return [text]


def _check_model(model: Model, limits: Limits) -> None:
    source = model.source
    if source in BUNDLED:
        return
    if is_path(model):
        raise BadModel(
            f"{short(source)!r} cannot be used on a shared server: name demo, or a model of the hub as owner/name."
        )
    found = classify(model, folders=False)
    allowed = limits.organisations
    if isinstance(found, Repo) and allowed is not None and _owner(found) not in {name.lower() for name in allowed}:
        raise BadModel(f"Models of {short(_owner(found))!r} are not offered here, those of {', '.join(allowed)} are.")


def _name(model: Model) -> str:
    """As an error names a model; of a folder the last part."""
    return short(Path(model.source).name if is_path(model) else model.label)


def _owner(repo: Repo) -> str:
    """Whose a repo is; the hub's oldest models have no owner in their names."""
    return repo.name.rpartition("/")[0].lower() or repo.name.lower()


def model_size(
    recipe: Recipe, model: Model | None = None, hub: Hub | None = None, token: str = ""
) -> tuple[int, int]:  # fmt: skip
    """Parameters of a recipe's model, or of another, and the most bytes a run of it leaves on disk, by its headers.

    Raises:
        MaquetteError: it cannot be read.
    """
    shape = headers.inspect(places.open_model(model or recipe.model, hub, token))
    return shape.parameters, shape.parameters * WIDTHS[recipe.model.dtype]


def folder_size(folder: Path) -> int:
    """Bytes that a folder takes on the disk; what vanishes while it is counted counts nothing."""
    total, folders = 0, [str(folder)]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    else:
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
        except OSError:
            continue
    return total


def _bytes(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / (1 << 20):.1f} MiB"
