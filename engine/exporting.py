"""A run's artifact in another format, for the page: made by a worker of its own, kept beside the artifact.

    HOME/runs/<run>/attempt-<n>/exports/<format>/      what `python -m engine export` writes

So it is on its visitor's account, and goes when the run's files go. It is made in the scratch folder and moved here
whole: what is left of one that was ended is deleted, at the latest by the next server.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from engine import export, hardware
from engine.attempts import EXPORTS
from engine.errors import BadModel, Cancelled, InputError, RunError, TooMany, UnknownName
from engine.export import offered, room
from engine.files import MANIFEST, publish
from engine.records import Run, Status
from engine.runners.local import COMMAND, environment, signal_group

__all__ = ["Exports", "made", "notes", "offered", "place"]

LONGEST = 6 * 3600.0  # seconds
POLL = 0.1


def made(artifact: Path) -> list[str]:
    """The formats in which an artifact has been exported already."""
    return sorted(file.parent.name for file in artifact.parent.glob(f"{EXPORTS}/*/{MANIFEST}"))


def place(artifact: Path, name: str) -> Path:
    """The folder of an artifact's export.

    Raises:
        UnknownName: there is no such format.
    """
    if name not in export.formats():
        raise UnknownName("format", name, export.formats())
    return artifact.parent / EXPORTS / name


def notes(artifact: Path, name: str) -> list[str]:
    """What is to be said of an artifact's export: where it differs from the artifact.

    Raises:
        UnknownName: there is no such format.
    """
    return export.notes(place(artifact, name))


class Exports:
    """The exports that are being made below a scratch folder, one at a time for each owner of runs.

    seconds: that one may take.
    """

    def __init__(self, scratch: Path, seconds: float | None = None) -> None:
        self._scratch, self._seconds = scratch, seconds or LONGEST
        self._working: dict[str, subprocess.Popen[bytes] | None] = {}
        self._guard = threading.Lock()

    def write(
        self, run: Run, name: str, check: Callable[[int], None], stop: threading.Event | None = None
    ) -> Iterator[float]:
        """Export a run's artifact; yields, about once a second, how many seconds that has taken.

        check: refuses so many bytes of disk. Nothing happens where that export is there already.

        Raises:
            UnknownName: there is no such format.
            BadModel: the run has no artifact, or did not succeed.
            TooMany: its owner has another export being made.
            InputError: the artifact cannot be held in that format, or there is no room for it.
            Cancelled: `stop` was set.
            RunError: it took too long, failed, or the run was deleted meanwhile.
        """
        if run.status is not Status.SUCCEEDED or not run.artifact or not Path(run.artifact).is_dir():
            raise BadModel(f"Run {run.id} has no model to export: its files were deleted, or it did not finish.")
        artifact = Path(run.artifact)
        folder = place(artifact, name)
        with self._guard:
            if run.owner in self._working:
                raise TooMany("An export of yours is being made already. Wait for it, or stop it.")
            self._working[run.owner] = None
        try:
            if not folder.exists():
                check(room(artifact, name))
                yield from self._write(run.owner, artifact, folder, stop or threading.Event())
        finally:
            del self._working[run.owner]

    def close(self) -> None:
        """End all that are being made."""
        for process in [*self._working.values()]:
            if process is not None and process.returncode is None:
                signal_group(process.pid)

    def _write(self, owner: str, artifact: Path, folder: Path, stop: threading.Event) -> Iterator[float]:
        self._scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="export-", dir=self._scratch) as home:
            request, target = Path(home, "request.json"), Path(home, folder.name)
            asked = {"kind": "export", "artifact": str(artifact), "format": folder.name, "folder": str(target)}
            request.write_text(json.dumps(asked))
            process = subprocess.Popen(
                [*COMMAND, str(request)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, cwd=home,
                start_new_session=True, env=environment("cpu", hardware.worker_threads()),
            )  # fmt: skip
            self._working[owner] = process
            try:
                yield from self._wait(process, stop)
                said = process.stdout.read() if process.stdout else b""
            finally:
                if process.returncode is None:
                    signal_group(process.pid)
                process.wait()
                if process.stdout is not None:
                    process.stdout.close()
            try:
                _judge(said)
                folder.parent.mkdir(exist_ok=True)
                publish(target, folder)
            except (OSError, RunError):
                if artifact.is_dir():
                    raise
                raise RunError("The run's files were deleted while they were exported.") from None

    def _wait(self, process: subprocess.Popen[bytes], stop: threading.Event) -> Iterator[float]:
        began = told = time.monotonic()
        yield 0.0
        while process.poll() is None:
            now = time.monotonic()
            if stop.is_set():
                raise Cancelled("Stopped; nothing of the export is left.")
            if now - began > self._seconds:
                raise RunError(
                    f"The export took longer than the {self._seconds / 60:g} minutes that it has here and was ended. "
                    "Export a smaller model, or run Maquette on your own machine."
                )
            if now - told >= 1:
                told = now
                yield now - began
            with suppress(subprocess.TimeoutExpired):
                process.wait(POLL)


def _judge(said: bytes) -> None:
    """Return where a worker says that it has succeeded.

    Raises:
        InputError, RunError: what it says instead.
    """
    try:
        data = json.loads(said.splitlines()[-1])["data"]
    except (ValueError, IndexError, KeyError):
        raise RunError("The export ended without a word; memory may have run out. Try again later.") from None
    if data["status"] != Status.SUCCEEDED:
        raise (InputError if data["status"] == Status.REFUSED else RunError)(data["reason"])
