"""Where runs execute: what every runner and every started worker can do."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

__all__ = ["Runner", "Worker"]


class Worker(Protocol):
    """One started request."""

    def alive(self) -> bool:
        """Whether it still works."""

    def resident(self) -> int:
        """Bytes of main memory that it and its children hold."""

    def ask(self) -> None:
        """Ask it to stop at its next safe point."""

    def kill(self) -> None:
        """End it and all its children, at once."""

    def exit_code(self) -> int | None:
        """How it ended: 0 or more as it said, below 0 the signal that ended it; None where nobody knows."""


class Runner(Protocol):
    """Starts workers, and finds those that a previous scheduler started."""

    def start(self, request: Path, device: str, secret: str = "") -> Worker:
        """Start a worker on a request file that lies in its attempt folder; it alone is told the `secret`.

        Called in the `contextvars` context in which the run was asked for.
        """

    def adopt(self, folder: Path) -> Worker | None:
        """The worker that lives in an attempt folder; None where it is dead, with all its children then."""
