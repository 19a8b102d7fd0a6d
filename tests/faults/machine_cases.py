"""Bad machines: full, read-only, shared, damaged, and with a clock that jumps."""

from __future__ import annotations

import io
import os
import resource
import shutil
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from engine import cli
from engine.attempts import EventWriter
from engine.errors import MaquetteError
from engine.fetch import fetch
from engine.hub import Hub
from engine.places import DEMO
from engine.recipes import parse_recipe
from engine.records import Model, Run, Status
from engine.runners.inline import InlineRunner
from engine.scheduler import Scheduler
from engine.snapshots import bytes_of
from engine.store import MIGRATIONS, Store, home
from tests import hub as loopback
from tests.faults.scene import ANNA, Case, Ends, Scene
from ui import server

Act = Callable[[Scene, Path, pytest.MonkeyPatch], str]


def machine(name: str, ends: Ends, says: str) -> Callable[[Act], Case]:
    """Makes a case of a function that returns the line."""
    return lambda act: Case(f"machine: {name}", ends, says, act=act)


def line(work: Callable[[], object]) -> str:
    """What a user reads of work that is refused.

    Raises:
        AssertionError: it is not.
    """
    try:
        work()
    except MaquetteError as error:
        return str(error)
    raise AssertionError("it was not refused")


def engine(*arguments: str) -> str:
    """The only line on stderr of `python -m engine`, which must not succeed."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = cli.main(arguments, lambda home: Scheduler(home, runner=InlineRunner()))
    assert code in (1, 2)
    return err.getvalue().removesuffix("\n")


def on(scene: Scene, folder: Path) -> Run:
    """The good recipe on a data folder, to its end."""
    with Scheduler(folder, runner=InlineRunner()) as scheduler:
        run = scheduler.submit(parse_recipe(scene.good()), ANNA)
        while not scheduler.store.run(run.id).status.final:
            time.sleep(0.01)
        return scheduler.store.run(run.id)


@machine("two servers on one folder", "refused", "Another Maquette uses the folder")
def two_servers(scene: Scene, place: Path, patch: pytest.MonkeyPatch) -> str:
    return line(lambda: Scheduler(scene.scheduler.home))


@machine("a command line beside a server", "refused", "Another Maquette uses the folder")
def beside(scene: Scene, place: Path, patch: pytest.MonkeyPatch) -> str:
    (place / "recipe.yaml").write_text("model: demo")
    return engine("run", str(place / "recipe.yaml"), "--home", str(scene.page.home))


@machine("a data folder below a file", "refused", "cannot be used")
def below_a_file(scene: Scene, place: Path, patch: pytest.MonkeyPatch) -> str:
    (place / "file").touch()
    (place / "recipe.yaml").write_text("model: demo")
    return engine("run", str(place / "recipe.yaml"), "--home", str(place / "file" / "home"))


@machine("no folder that can be written", "refused", "No data folder can be written")
def nowhere(scene: Scene, place: Path, patch: pytest.MonkeyPatch) -> str:
    (place / "file").touch()
    patch.setenv("MAQUETTE_HOME", str(place / "file" / "a"))
    patch.setenv("XDG_CACHE_HOME", str(place / "file" / "b"))
    patch.setattr(os, "access", lambda *rest, **more: False)
    return line(home)


@machine("a store of a later version", "refused", "written by a later version")
def newer(scene: Scene, place: Path, patch: pytest.MonkeyPatch) -> str:
    Store(place / "maquette.db").close()
    with sqlite3.connect(place / "maquette.db") as db:
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 5}")
    db.close()
    return line(lambda: Scheduler(place))


@machine("a store that another program holds", "refused", "Another program holds the run store")
def held(scene: Scene, place: Path, patch: pytest.MonkeyPatch) -> str:
    scheduler = Scheduler(place)
    assert scheduler.store._writer is not None
    scheduler.store._writer.execute("PRAGMA busy_timeout = 10")
    stranger = sqlite3.connect(place / "maquette.db", isolation_level=None)
    stranger.execute("BEGIN IMMEDIATE")
    try:
        return line(lambda: scheduler.submit(parse_recipe(scene.good()), ANNA))
    finally:
        stranger.close()
        scheduler.store.close()


@machine("a disk that is full when a run is queued", "refused", "The disk is full")
def full_store(scene: Scene, place: Path, patch: pytest.MonkeyPatch) -> str:
    scheduler = Scheduler(place)
    assert scheduler.store._writer is not None
    (pages,) = scheduler.store._writer.execute("PRAGMA page_count").fetchone()
    scheduler.store._writer.execute(f"PRAGMA max_page_count = {pages}")
    try:
        body = scene.good(measure=["size"] * 9999)
        return line(lambda: scheduler.submit(parse_recipe(body), ANNA))
    finally:
        assert scheduler.store.runs() == []
        scheduler.store.close()


@machine("a run folder that cannot be made", "refused", "could not be used")
def no_runs_folder(scene: Scene, place: Path, patch: pytest.MonkeyPatch) -> str:
    (place / "runs").touch()
    scheduler = Scheduler(place)
    try:
        return line(lambda: scheduler.submit(parse_recipe(scene.good()), ANNA))
    finally:
        assert scheduler.store.runs() == []
        scheduler.store.close()


@machine("a store that is cut in half", "handled", "")
def truncated(scene: Scene, place: Path, patch: pytest.MonkeyPatch) -> str:
    with Store(place / "maquette.db") as store:
        run = store.add_run(parse_recipe(scene.good()), ANNA)
    os.truncate(place / "maquette.db", (place / "maquette.db").stat().st_size // 2)
    with Store(place / "maquette.db") as store:
        assert store.runs() == [run]
    return ""


@machine("no more open files", "failed", "Too many files are open")
def few_files(scene: Scene, place: Path, patch: pytest.MonkeyPatch) -> str:
    lowest = resource.getrlimit(resource.RLIMIT_NOFILE)
    start = InlineRunner.start

    def starved(self: InlineRunner, request: Path, device: str, secret: str = "") -> object:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, lowest[1]))
        try:
            return start(self, request, device, secret)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, lowest)

    patch.setattr(InlineRunner, "start", starved)
    run = on(scene, place)
    assert run.status is Status.FAILED
    return run.reason


@machine("a model that goes away while its run waits", "failed", "There is no model folder")
def gone(scene: Scene, place: Path, patch: pytest.MonkeyPatch) -> str:
    body = {**scene.good(), "model": str(scene.copy(place))}
    with Scheduler(place / "home", runner=InlineRunner()) as scheduler:
        with scheduler._guard:
            run = scheduler.submit(parse_recipe(body), ANNA)
            shutil.rmtree(place / "model")
        while not (ended := scheduler.store.run(run.id)).status.final:
            time.sleep(0.01)
    return ended.reason


@machine("a clock that jumps back a day", "handled", "")
def clock(scene: Scene, place: Path, patch: pytest.MonkeyPatch) -> str:
    began, real = time.monotonic(), time.time
    patch.setattr(time, "time", lambda: real() - (86_400 if time.monotonic() - began > 0.1 else 0))
    run = on(scene, place)
    assert run.status is Status.SUCCEEDED, run.reason
    assert run.finished is not None
    assert run.started is not None
    return ""


@machine("a port that is taken", "refused", "is taken")
def port(scene: Scene, place: Path, patch: pytest.MonkeyPatch) -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        return line(lambda: server.check_free("127.0.0.1", taken.getsockname()[1]))


@machine("an address of another machine", "refused", "cannot be listened on")
def foreign(scene: Scene, place: Path, patch: pytest.MonkeyPatch) -> str:
    return line(lambda: server.check_free("192.0.2.1", 7860))


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[Callable[[int], None]]:
    """A file system of so many KiB at a folder; what is given makes it larger. Skips where none can be mounted."""
    place.mkdir(exist_ok=True)

    def mount(*options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(place)], check=True, capture_output=True)

    try:
        mount("-o", f"size={size}k")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here")
    try:
        yield lambda more: mount("-o", f"remount,size={more}k")
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path, resize: Callable[[int], None], room: int, patch: pytest.MonkeyPatch) -> None:
    """Leave so many KiB of a disk from the beginning of a run's first worker on."""

    def begin(self: EventWriter, folder: Path, run: str, attempt: int) -> None:
        open_events(self, folder, run, attempt)
        if attempt == 1:
            state = os.statvfs(place)
            resize((state.f_blocks - state.f_bfree) * state.f_frsize // 1024 + room)

    open_events = EventWriter.__init__
    patch.setattr(EventWriter, "__init__", begin)


@contextmanager
def disk_of_runs(place: Path) -> Iterator[tuple[Scheduler, Callable[[int], None]]]:
    """A scheduler whose store is on another disk than its runs: what a full store gives up of its own room may be
    just what a worker lacks."""
    with small_disk(place / "disk", 100_000) as resize:
        (place / "disk" / "maquette.db").symlink_to(place / "maquette.db")
        with Scheduler(place / "disk", runner=InlineRunner()) as scheduler:
            yield scheduler, resize


def full_at(room: int) -> Case:
    """A disk with so many KiB left when the worker begins; with more room the run goes on to the same files."""

    def act(scene: Scene, place: Path, patch: pytest.MonkeyPatch) -> str:
        with disk_of_runs(place) as (scheduler, resize):
            fill(scheduler.home, resize, room, patch)
            run = scheduler.submit(parse_recipe(scene.good()), ANNA)
            deadline = time.monotonic() + 20
            while not (ended := scheduler.store.run(run.id)).status.final and time.monotonic() < deadline:
                time.sleep(0.02)
            assert ended.status is Status.FAILED, ended
            assert ended.artifact is None
            while (left := list(scheduler.home.glob("runs/*/*/artifact"))) and time.monotonic() < deadline:
                time.sleep(0.02)  # a run's files go after its end is known
            assert left == []
            resize(100_000)
            scheduler.resume(run.id, ANNA)
            while not (again := scheduler.store.run(run.id)).status.final:
                time.sleep(0.02)
            assert again.status is Status.SUCCEEDED, again.reason
            names = [Path(str(each.artifact), "MANIFEST.json") for each in (again, scene.neighbour)]
            assert names[0].read_bytes() == names[1].read_bytes()
            return ended.reason

    return Case(f"machine: a disk with {room} KiB left", "failed", "disk is full", act=act)


@machine("a store whose disk fills up while a run works", "handled", "")
def full_under_the_store(scene: Scene, place: Path, patch: pytest.MonkeyPatch) -> str:
    with small_disk(place / "disk", 100_000) as resize, small_disk(place / "disk" / "runs", 100_000):
        fill(place / "disk", resize, 0, patch)
        ended = on(scene, place / "disk")
        assert ended.status is Status.SUCCEEDED, ended.reason
        assert not (place / "disk" / "reserve").exists()  # what it kept for this went into the store
    return ""


@machine("a disk that fills up during a download", "failed", "The disk is full. Delete old runs")
def full_while_downloading(scene: Scene, place: Path, patch: pytest.MonkeyPatch) -> str:
    weights = "model.safetensors"
    with loopback.Hub() as server, small_disk(place / "disk", 100_000) as resize:
        server.add("org/tiny", DEMO / "model")
        server.fail("org/tiny", file=weights, method="GET", rate=4_000_000, times=1)
        hub = Hub(place / "disk" / "hub", endpoint=server.url, offline=False)
        pinned = hub.pin(Model(source="org/tiny"))
        cut = False

        def fill_up() -> None:
            nonlocal cut
            if not cut and any(bytes_of(file) for file in hub.here.folder.rglob("*.incomplete")):  # some end meanwhile
                cut, state = True, os.statvfs(place / "disk")
                resize((state.f_blocks - state.f_bfree) * state.f_frsize // 1024 + 200)

        said = line(lambda: fetch(pinned, hub, "", lambda *told: None, fill_up))
        assert len(server.asked("GET", weights)) == 1  # on a full disk it is not tried again
        (partial,) = hub.here.folder.rglob("*.incomplete")
        have = partial.stat().st_size
        resize(100_000)
        folder = fetch(pinned, hub, "", lambda *told: None, lambda: None)
        assert (folder / weights).read_bytes() == (DEMO / "model" / weights).read_bytes()
        assert server.asked("GET", weights)[-1].headers["range"] == f"bytes={have}-"
    return said


@machine("a folder that cannot be written", "refused", "Read-only file system")
def read_only(scene: Scene, place: Path, patch: pytest.MonkeyPatch) -> str:
    with small_disk(place / "disk", 4000):
        Store(place / "disk" / "maquette.db").close()
        subprocess.run(["mount", "-o", "remount,ro", str(place / "disk")], check=True, capture_output=True)
        return line(lambda: Scheduler(place / "disk"))


CASES = [
    two_servers, beside, below_a_file, nowhere, newer, held, full_store, no_runs_folder, truncated, few_files, gone,
    clock, port, foreign, read_only, full_under_the_store, full_while_downloading,
    *(full_at(room) for room in (150, 300, 450)),
]  # fmt: skip
