"""Runs on Hugging Face's ZeroGPU: each inside one `@spaces.GPU` call, for small models.

There a GPU belongs to a Space only while such a call lasts. The call is a daemonic fork of the web process: it may have
no child processes, torch.compile does not work in it, nobody outside sees its memory, and it is ended after a time that
was named when the program started. So a run works alone in its call, says itself how much memory it holds, is asked to
stop by a file, and is refused beforehand where the model is large or the estimate is longer than a call may last.
Away from Spaces, `spaces.GPU` passes through and the run works on a thread; without the package likewise.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from pathlib import Path

import psutil

from engine.attempts import take_lock, write_pid
from engine.errors import TooBig, short
from engine.fit import Estimate
from engine.methods import Emit
from engine.records import Recipe
from engine.worker import Pipeline, Stop, bring, execute, fail

log = logging.getLogger(__name__)

SECONDS = 120  # that a call may last
LARGEST = 4 << 30  # bytes that a run may need by its estimate
SAMPLE_EVERY = 0.5  # seconds

Call = Callable[[str], None]


def is_zero() -> bool:
    """Whether this process lives on a Space with ZeroGPU."""
    return os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "true")


def check(recipe: Recipe, estimate: Estimate) -> None:
    """Refuse what one call cannot hold.

    Raises:
        TooBig: too large or too long; one line with the numbers.
    """
    if estimate.total > LARGEST:
        raise TooBig(
            f"The run needs {estimate.total / 2**30:.1f} GiB; on ZeroGPU {LARGEST / 2**30:.0f} can be used. "
            "Choose a smaller model, or run Maquette on a machine of its own."
        )
    if estimate.seconds > SECONDS:
        raise TooBig(
            f"The run would take about {estimate.seconds:.0f} s; on ZeroGPU a run has {SECONDS}. "
            "Use fewer steps, calibration samples or measurements, or run Maquette on a machine of its own."
        )


def decorate(work: Call) -> Call:
    """`work` as one GPU call; as it is where the package `spaces` is not installed."""
    try:
        import spaces
    except ImportError:
        return work
    call: Call = spaces.GPU(duration=SECONDS)(work)
    return call


class ZeroRunner:
    """Runs each request in a call that `gpu` makes; it is made when the program starts, as Spaces want it."""

    def __init__(self, gpu: Callable[[Call], Call] = decorate, pipeline: Pipeline | None = None) -> None:
        self._call = gpu(partial(work, pipeline=pipeline) if pipeline else work)

    def start(self, request: Path, device: str, secret: str = "") -> ZeroWorker:
        return ZeroWorker(request, self._call, secret)

    def adopt(self, folder: Path) -> None:
        """A call does not outlive the process that made it."""


class ZeroWorker:
    """One call on a thread of its own; what has to be downloaded comes before, when no GPU waits for it."""

    def __init__(self, request: Path, call: Call, secret: str = "") -> None:
        self._folder = request.parent
        lock = take_lock(self._folder)
        assert lock is not None, f"a worker lives in the new folder {self._folder}"
        write_pid(lock, os.getpid())

        def run() -> None:
            body, stop = json.loads(request.read_text()), FileStop(self._folder)
            with lock:
                if not bring(body, stop, secret):
                    return
                try:
                    call(str(request))
                except Exception as error:  # the worker's edge, too: there was no GPU, or it was taken away
                    log.exception("the GPU call ended with an error")
                    said = short(" ".join(str(getattr(error, "message", error)).split()), 200)
                    fail(body, stop, f"ZeroGPU gave the run no GPU, or took it away. Resume it later. It said: {said}")

        # In the context of whoever starts it, by whose request the package knows whose daily time the call takes.
        self._thread = threading.Thread(target=copy_context().run, args=(run,), name="zero", daemon=True)
        self._thread.start()

    def alive(self) -> bool:
        return self._thread.is_alive()

    def resident(self) -> int:
        """As the call last said it."""
        with suppress(OSError, ValueError):
            return int((self._folder / "resident").read_text())
        return 0

    def ask(self) -> None:
        (self._folder / "stop").touch()

    def kill(self) -> None:
        """A call cannot be killed from outside: it stops at its next safe point, or when its time is over."""
        self.ask()

    def exit_code(self) -> int | None:
        return None


class FileStop(Stop):
    """Asked to stop by a file: the asker is in another process."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._file = folder / "stop"

    def check(self) -> None:
        if self._file.exists():
            self.ask()
        super().check()


def work(path: str, pipeline: Pipeline | None = None) -> None:
    """Inside the call: one attempt to its `finished` event, with its memory in a file beside it."""
    request = Path(path)
    folder, over = request.parent, threading.Event()

    def sample() -> None:
        while True:
            temporary = folder / "resident.tmp"
            with suppress(OSError):
                temporary.write_text(str(psutil.Process().memory_info().rss))
                temporary.replace(folder / "resident")
            if over.wait(SAMPLE_EVERY):
                return

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        execute(json.loads(request.read_text()), FileStop(folder), pipeline or run_alone)
    finally:
        over.set()
        sampler.join()


def run_alone(recipe: Recipe, folder: Path, emit: Emit, check_cancelled: Callable[[], None]) -> object:
    """The real pipeline, without a child process: torch's own kernels, since ours would be compiled by one."""
    os.environ["MAQUETTE_NATIVE"] = "0"
    from engine import pipeline

    return pipeline.run(recipe, folder, emit, check_cancelled, alone=True)
