"""Runs in this process, on a thread: for notebooks and tests. Nothing can be killed and no memory is bounded."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import psutil

from engine.worker import Pipeline, Stop, execute, run_pipeline


class InlineRunner:
    """Runs requests with `pipeline`, by default the real one."""

    def __init__(self, pipeline: Pipeline = run_pipeline) -> None:
        self._pipeline = pipeline

    def start(self, request: Path, device: str, secret: str = "") -> InlineWorker:
        return InlineWorker(request, self._pipeline, secret)

    def adopt(self, folder: Path) -> None:
        """A thread does not outlive its process."""


class InlineWorker:
    """One request on a thread of its own. `device` is the recipe's: an environment is not changed in this process."""

    def __init__(self, request: Path, pipeline: Pipeline, secret: str = "") -> None:
        self._stop = Stop(request.parent)
        body = json.loads(request.read_text())
        self._thread = threading.Thread(target=execute, args=(body, self._stop, pipeline, secret), daemon=True)
        self._thread.start()

    def alive(self) -> bool:
        return self._thread.is_alive()

    def resident(self) -> int:
        return psutil.Process().memory_info().rss

    def ask(self) -> None:
        self._stop.ask()

    def kill(self) -> None:
        """A thread cannot be killed: wait for its next safe point."""
        self._stop.ask()
        self._thread.join()

    def exit_code(self) -> int | None:
        return None
