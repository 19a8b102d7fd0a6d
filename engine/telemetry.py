"""Samples of the machine and the engine for the status strip, one a second."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable

import psutil
from pydantic import JsonValue

from engine import hardware
from engine.supervision import Watch

EVERY = 1.0  # seconds
KEPT = 60


class Telemetry:
    """`sample` is called by the scheduler's thread; `now` and `history` by anybody."""

    def __init__(self) -> None:
        self._next = 0.0
        self._now: dict[str, JsonValue] = {}
        self._history: dict[str, deque[float]] = {}
        psutil.cpu_percent(None)  # the first call has nothing to compare with
        self.sample((), ())

    def sample(self, watches: Iterable[Watch], warm: Iterable[int]) -> None:
        """Look at the machine, at the running attempts, and at the warm processes of these ids."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + EVERY
        used, total = hardware.memory()
        gpu = hardware.gpu()
        engine = sum(watch.resident for watch in watches) + sum(hardware.group_memory(pid) for pid in warm)
        cpu = psutil.cpu_percent(None)
        self._now = {
            "cpu": cpu,
            "ram_used": used,
            "ram_total": total,
            "gpu": None if gpu is None else {"used": gpu.used, "total": gpu.total, "name": gpu.name},
            "engine": engine,
        }
        gpu_used = None if gpu is None else gpu.used
        for series, value in {"cpu": cpu, "ram_used": used, "engine": engine, "gpu": gpu_used}.items():
            if value is not None:
                self._history.setdefault(series, deque(maxlen=KEPT)).append(float(value))

    def now(self) -> dict[str, JsonValue]:
        """The latest sample."""
        return dict(self._now)

    def history(self) -> dict[str, list[float]]:
        """The latest samples of each series, oldest first."""
        return {series: list(values) for series, values in list(self._history.items())}
