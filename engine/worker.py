"""`python -m engine.worker REQUEST.json`: one request, one process.

    {"kind": "run", "run": id, "attempt": n, "folder": attempt folder, "recipe": {...}, "hub": {...}, "secret": bool,
     "said": [what its log begins with]}
        Downloads models that are not here, then runs the pipeline. Events go to events.jsonl in the folder, the last
        one is `finished`. Where a `secret` is announced it is the first line of stdin: the token for the hub.
    {"kind": "probe" | "verify" | "measure", ...}
        A child of a run, or of the command line: the work is in a process of its own so that it starts fresh.
        Events go to stdout, a line `{"kind", "data"}` each; the last one is `finished`.
    {"kind": "export", "artifact": folder, "format": name, "folder": where it is to be}
        Writes an artifact in another format; says nothing but `finished`, to stdout.
    {"kind": "train", ...}
        One of several processes that train together, as RANK and WORLD_SIZE say; see `engine.ranks`.
    {"kind": "serve", "model": source, "device": device}
        Keeps a model warm and writes text; see `engine.serve`.

SIGTERM and SIGINT ask the work to stop at its next safe point. This is the one place that catches every
exception: whatever happens to a request becomes a status and one line that a user can read.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import signal
import sys
import threading
import types
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import TextIO

from pydantic import JsonValue

from engine.attempts import EventReader, EventWriter, cache_folder, is_cancelled, take_lock, write_pid
from engine.cradle import cradle
from engine.errors import (
    Cancelled,
    HubError,
    InputError,
    Interrupted,
    MaquetteError,
    NeedsToken,
    RunError,
    os_reason,
    short,
)
from engine.imports import swift_imports
from engine.methods import Emit
from engine.records import EventKind, Recipe, Status
from engine.sources import named

log = logging.getLogger(__name__)

Request = dict[str, JsonValue]
Pipeline = Callable[[Recipe, Path, Emit, Callable[[], None]], object]
NICE = {"serve": 5}  # somebody is watching; everything else stays out of the way of the page
HIGHEST_NICE = 19


class Stop:
    """Whether the work was asked to stop, and why: the user cancelled, or the process is being ended."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._asked = threading.Event()

    def ask(self) -> None:
        self._asked.set()

    def check(self) -> None:
        """Return while the work may go on.

        Raises:
            Cancelled: the user cancelled.
            Interrupted: the process is being ended; the run can be resumed.
        """
        if self._asked.is_set():
            if self._folder is not None and is_cancelled(self._folder):
                raise Cancelled("Cancelled.")
            raise Interrupted("Stopped before it was done; it can be resumed.")

    def listen(self) -> None:
        """Let SIGTERM and SIGINT ask."""

        def on_signal(number: int, frame: types.FrameType | None) -> None:
            self.ask()

        signal.signal(signal.SIGTERM, on_signal)
        signal.signal(signal.SIGINT, on_signal)


def import_pipeline() -> None:
    """All that a run and its children will want; takes seconds."""
    with swift_imports():
        from engine import pipeline, probe, verify  # noqa: F401
        from engine.measure import suite  # noqa: F401


def run_pipeline(recipe: Recipe, folder: Path, emit: Emit, check_cancelled: Callable[[], None]) -> object:
    """The real pipeline, imported here so that even a broken installation ends as a failed run."""
    import_pipeline()
    from engine import pipeline

    with cradle(main):
        return pipeline.run(recipe, folder, emit, check_cancelled)


def bring_models(request: Request, token: str, emit: Emit, check_cancelled: Callable[[], None]) -> None:
    """Download the models of the hub that a run reads, where they are not here.

    Raises:
        RunError: it cannot be had now; the run can be resumed.
        InputError: it cannot be had at all.
    """
    asked = request.get("hub")
    if not isinstance(asked, dict) or not isinstance(texts := asked["models"], list) or not texts:
        return
    from engine import outline
    from engine.fetch import fetch
    from engine.hub import Hub

    folder = cache_folder(Path(str(request["folder"]))) / "hub"
    hub = Hub(folder, endpoint=str(asked["endpoint"]), offline=asked["offline"] is True)
    wanted = [named(str(text)) for text in texts]
    try:
        for model in wanted:
            with suppress(HubError):  # who downloads is more patient
                if (origin := hub.origin(model, token)).folder is None:
                    outline.check(origin)
        for model in wanted:
            fetch(model, hub, token, emit, check_cancelled)
    except NeedsToken as error:  # it may have been forgotten: with one the run can go on
        raise RunError(f"{error} Resume the run with it.") from None


def execute(request: Request, stop: Stop, pipeline: Pipeline = run_pipeline, token: str = "") -> Status:
    """Run one attempt to its `finished` event."""
    folder = Path(str(request["folder"]))
    writer = EventWriter(folder, str(request["run"]), int(str(request["attempt"])))

    def work() -> None:
        recipe = Recipe.model_validate(request["recipe"])
        for text in said if isinstance(said := request.get("said"), list) else ():
            writer.emit("log", {"text": text})
        bring_models(request, token, writer.emit, stop.check)
        pipeline(recipe, folder, writer.emit, stop.check)

    try:
        return _finish(writer.emit, work, stop)
    finally:
        writer.close()


def bring(request: Request, stop: Stop, token: str) -> bool:
    """Download an attempt's models before its work; whether that can begin. Where not, the attempt has finished."""
    writer = EventWriter(Path(str(request["folder"])), str(request["run"]), int(str(request["attempt"])))

    def emit(kind: EventKind, data: dict[str, JsonValue]) -> None:
        if kind != "finished" or data["status"] != Status.SUCCEEDED:
            writer.emit(kind, data)

    def work() -> None:
        bring_models(request, token, emit, stop.check)

    try:
        return _finish(emit, work, stop) is Status.SUCCEEDED
    finally:
        writer.close()


def fail(request: Request, stop: Stop, reason: str) -> None:
    """Finish an attempt whose work was done elsewhere and ended without its own word: failed, unless it was stopped."""
    folder = Path(str(request["folder"]))
    if any(event.kind == "finished" for event in EventReader(folder).read()):
        return
    writer = EventWriter(folder, str(request["run"]), int(str(request["attempt"])))

    def work() -> None:
        raise RunError(reason)

    try:
        _finish(writer.emit, work, stop)
    finally:
        writer.close()


def _finish(emit: Emit, work: Callable[[], object], stop: Stop | None = None) -> Status:
    """Do the work and emit how it ended."""
    status, reason = Status.SUCCEEDED, ""
    try:
        try:
            work()
        except Exception:
            if stop is not None:
                stop.check()  # the same signal ended a child: what came of that is no failure
            raise
    except MaquetteError as error:
        status, reason = _status_of(error), str(error)
    except Exception as error:  # the worker's edge
        log.exception("the request failed")
        status, reason = Status.FAILED, _explain(error)
    with suppress(OSError):  # a full disk: the scheduler sees the process end without a word
        emit("finished", {"status": str(status), "reason": reason})
    return status


def _status_of(error: MaquetteError) -> Status:
    for kind, status in (
        (InputError, Status.REFUSED),
        (Cancelled, Status.CANCELLED),
        (Interrupted, Status.INTERRUPTED),
    ):
        if isinstance(error, kind):
            return status
    return Status.FAILED


def _explain(error: Exception) -> str:
    """One line for the user about an exception that nobody foresaw."""
    # By name: torch need not be loaded to know its error; the CPU allocator raises a bare RuntimeError.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error):
        return "Out of memory. Use fewer calibration samples, a smaller batch or a smaller model, or free some memory."
    if isinstance(error, OSError) and error.errno is not None:
        return os_reason(error)
    if "os error 28" in str(error) or "No space left" in str(error):  # as safetensors says it
        return os_reason(OSError(errno.ENOSPC, ""))
    message = short(" ".join(str(error).split()), 300)
    return f"Internal error, please report it: {type(error).__name__}: {message} (the log has the details)"


def _child(request: Request, replies: TextIO) -> Status:
    def emit(kind: EventKind, data: dict[str, JsonValue]) -> None:
        _reply(replies, {"kind": kind, "data": data})

    def work() -> None:
        if request["kind"] == "export":
            with swift_imports():
                from engine import export

                write = export.exporter(str(request["format"]))
            write(Path(str(request["artifact"])), Path(str(request["folder"])))
            return
        with swift_imports():
            from engine import pipeline, probe, ranks, verify
        if request["kind"] == "train":
            ranks.work(request, emit)
        elif request["kind"] == "probe":
            source = Path(str(request["source"]))
            probe.probe(Recipe.model_validate(request["recipe"]), source, str(request["device"]), emit)
        elif request["kind"] == "verify":
            emit("log", {"text": verify.verify(request)})
        else:
            pipeline.measure(request, emit)

    return _finish(emit, work)


def _serve(request: Request, replies: TextIO) -> Status:
    def emit(kind: EventKind, data: dict[str, JsonValue]) -> None:
        if data["reason"]:
            _reply(replies, {"event": "error", "text": data["reason"]})

    def work() -> None:
        with swift_imports():
            from engine.serve import serve
        serve(str(request["model"]), str(request["device"]), sys.stdin, replies)

    return _finish(emit, work)


def _reply(replies: TextIO, body: Request) -> None:
    replies.write(json.dumps(body) + "\n")
    replies.flush()


def niceness(kind: str, highest: str = "") -> int:
    """How far a process of this kind steps back: 0 to 19, and no further than `highest`, where that is a number."""
    most = min(int(highest), HIGHEST_NICE) if highest.isdigit() else HIGHEST_NICE
    return min(NICE.get(kind, HIGHEST_NICE), most)


def step_back(kind: str) -> None:
    """Let the page go first, and let the kernel take this process first when memory runs out."""
    nice = niceness(kind, os.environ.get("MAQUETTE_NICE", ""))
    missing = nice - os.nice(0)
    if missing > 0:
        os.nice(missing)
    values = {"oom_score_adj": "1000"}
    if os.getsid(0) == os.getpid():
        # Where Linux groups processes by session, nice counts only inside a session; between them the group's does.
        values["autogroup"] = str(nice)
    for name, value in values.items():
        with suppress(OSError):  # no such file on macOS, or no grouping
            Path("/proc/self", name).write_text(value)


def main(arguments: list[str] | None = None, pipeline: Pipeline = run_pipeline) -> int:
    """Serve one request; the exit code is 0 where it succeeded."""
    parser = argparse.ArgumentParser(prog="python -m engine.worker", description="Work on one request.")
    parser.add_argument("request", type=Path)
    parser.add_argument("--lock", type=int, help="open file that already holds the attempt's lock")
    options = parser.parse_args(arguments)
    request: Request = json.loads(options.request.read_text())
    kind = str(request["kind"])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    step_back(kind)
    if kind != "run":
        replies = sys.stdout  # to themselves: what a library prints goes to the log
        with redirect_stdout(sys.stderr):
            return int((_serve if kind == "serve" else _child)(request, replies) is not Status.SUCCEEDED)
    folder = Path(str(request["folder"]))
    stop = Stop(folder)
    stop.listen()
    lock = take_lock(folder) if options.lock is None else os.fdopen(options.lock, "r+b")
    if lock is None:
        log.error("another worker lives in %s", folder)
        return 1
    os.set_inheritable(lock.fileno(), False)  # a child must not keep a dead worker's lock
    token = sys.stdin.readline().strip() if request.get("secret") is True else ""
    with lock:
        write_pid(lock, os.getpid())
        return int(execute(request, stop, pipeline, token) is not Status.SUCCEEDED)


if __name__ == "__main__":
    sys.exit(main())
