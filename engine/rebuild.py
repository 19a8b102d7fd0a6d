"""A lost run store, made again from the files of its runs.

    HOME/runs/<run>/run.json                      who asked for what, when, and whether it is shared
    HOME/runs/<run>/attempt-<n>/events.jsonl      what its workers said: measurements, the artifact, how it ended
    HOME/runs/<run>/attempt-<n>/ending.json       how it ended where the scheduler had to say so
    HOME/runs/<run>/attempt-<n>/artifact/MANIFEST.json      what the artifact must hold

What only the database knew is lost: blind votes, memory samples, and cancelled runs, whose files were deleted. A run
whose last worker said nothing final is left as running: who starts next adopts or concludes it, as after a crash.

Success is believed of artifacts whose files have the content that their manifest says. Reading takes seconds for each
GiB, and nobody is served meanwhile: after `READ` bytes in all only sizes are compared, and the log says so.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from engine.attempts import EventReader, read_ending
from engine.files import digest, publish
from engine.records import RUN_ID, Event, Recipe, Run, Status

log = logging.getLogger(__name__)

NAME = "run.json"
MANIFEST = "MANIFEST.json"
READ = 32 << 30  # bytes
DAMAGED = "The artifact is not what its manifest says; resume the run to make it again."


@dataclass(frozen=True)
class Found:
    """A run as its files tell it: `run` as it was queued, and the events of each attempt, the first one first."""

    run: Run
    attempts: tuple[tuple[int, float, tuple[Event, ...]], ...]  # number, when it was started, what was said


def note(home: Path, run: Run) -> None:
    """Write down who asked for what, and whether it is shared, durably.

    Raises:
        OSError: the disk is full or broken.
    """
    folder = home / "runs" / run.id
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{NAME}.tmp"
    temporary.write_text(run.model_dump_json())
    publish(temporary, folder / NAME)


def find(home: Path) -> Iterator[Found]:
    """Every run of which files are left, in the order in which they were asked for."""
    found, contents = [], Contents()
    for folder in sorted((home / "runs").glob("*")):
        if RUN_ID.fullmatch(folder.name) and (run := _asked(folder)) is not None:
            attempts = sorted(
                (int(each.name[8:]), each) for each in folder.glob("attempt-*") if each.name[8:].isdigit()
            )
            found.append(Found(run, tuple(_said(number, each, contents) for number, each in attempts)))
    yield from sorted(found, key=lambda each: each.run.created)


def _asked(folder: Path) -> Run | None:
    """The run of a folder as it was queued; None where nobody can tell any more."""
    try:
        file = folder / NAME
        if file.is_file():
            known = Run.model_validate_json(file.read_text())
            return Run(
                id=folder.name, recipe=known.recipe, owner=known.owner, created=known.created, shared=known.shared
            )
        # Of a version that wrote no such file: what the worker was asked says all but the owner.
        request = max(folder.glob("attempt-*/request.json"), key=lambda each: each.stat().st_mtime)
        recipe = Recipe.model_validate(json.loads(request.read_text())["recipe"])
        return Run(id=folder.name, recipe=recipe, created=request.stat().st_mtime)
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the run in %s cannot be made out and is left alone: %s", folder, error)
        return None


def _said(number: int, folder: Path, contents: Contents) -> tuple[int, float, tuple[Event, ...]]:
    events = [event for event in EventReader(folder).read() if event.attempt == number]
    begun = events[0].time if events else folder.stat().st_mtime
    said = tuple(_believed(event, folder, contents) for event in events)
    ending = read_ending(folder)
    return number, begun, said if ending is None else (*said, ending)


def _believed(event: Event, folder: Path, contents: Contents) -> Event:
    """The event, or that the run failed where it says well done and the artifact is not whole."""
    if event.kind != "finished" or event.data.get("status") != Status.SUCCEEDED or contents.are(folder / "artifact"):
        return event
    return event.model_copy(update={"data": {"status": str(Status.FAILED), "reason": DAMAGED}})


class Contents:
    """Compares artifacts with their manifests: sizes always, contents until so many bytes have been read."""

    def __init__(self, left: int = READ) -> None:
        self._left = left

    def are(self, artifact: Path) -> bool:
        """Whether every file that the manifest names is there as it says."""
        try:
            files = json.loads((artifact / MANIFEST).read_text())["files"]
            if any((artifact / name).stat().st_size != entry["bytes"] for name, entry in files.items()):
                return False
            self._left -= sum(entry["bytes"] for entry in files.values())
            if self._left < 0:
                log.warning("%s: only the sizes of its files were compared", artifact)
                return True
            return all(digest(artifact / name) == entry["sha256"] for name, entry in files.items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError):
            return False
