"""A process that has imported everything and waits to be the worker of the next run.

Importing torch and transformers takes 3 to 8 s, which whoever presses Start would wait for. So a server keeps one such
process while nothing runs. It is the server's child in a session of its own, as any worker; told of a run it takes over
the run's files, folder and environment and is that run's worker from then on. It ends with the server.

    python -m engine.runners.standby LINE        LINE: its end of a pair of sockets, an open file

What it is told is a line of JSON, {"request": path, "environment": {...}}, with open files: those that become stdin,
stdout and stderr, and the attempt's lock.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from engine import hardware, worker

PLENTY = 4 << 30  # bytes of free memory without which none is kept: it holds 0.35 GiB
LONGEST = 1 << 16  # bytes of what it is told
FILES = 4
AGAIN = 60.0  # seconds until there is another where one has ended that was not asked to
COMMAND = (sys.executable, "-m", "engine.runners.standby")


class Standby:
    """At most one process that waits, for runs on one `device` in the `environment` that their workers have."""

    def __init__(
        self, device: str, environment: Callable[[], dict[str, str]], command: tuple[str, ...] = COMMAND
    ) -> None:
        self.device, self._environment, self._command = device, environment, command
        self._process: subprocess.Popen[bytes] | None = None
        self._given: dict[str, str] = {}
        self._line: socket.socket | None = None
        self._not_before = 0.0  # monotonic seconds
        self._guard = threading.Lock()

    def prepare(self) -> None:
        """Let one wait, where there is none and memory for it; takes milliseconds."""
        with self._guard:
            if self._process is not None and self._process.poll() is None:
                return
            self._end()
            if time.monotonic() < self._not_before or hardware.free_memory() < PLENTY:
                return
            self._not_before = time.monotonic() + AGAIN
            ours, its = socket.socketpair()
            self._given = self._environment()
            with its:
                self._process = subprocess.Popen(
                    [*self._command, str(its.fileno())],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
                    start_new_session=True, pass_fds=[its.fileno()], env=self._given,
                )  # fmt: skip
            self._line = ours

    def start(self, request: Path, added: dict[str, str], files: Sequence[IO[bytes]]) -> subprocess.Popen[bytes] | None:
        """The process that waited, now at work on a request; None where none did.

        added: to its environment. files: stdin, stdout, stderr and the lock of the request's folder.
        """
        with self._guard:
            if self._process is None or self._line is None:
                return None
            told = {"request": str(request), "environment": added}
            try:
                if self._given != self._environment():
                    raise OSError("it is another environment by now")
                socket.send_fds(self._line, [json.dumps(told).encode() + b"\n"], [each.fileno() for each in files])
            except OSError:  # or it was killed
                self._end()
                return None
            self._line.close()
            process, self._process, self._line, self._not_before = self._process, None, None, 0.0
            return process

    def held(self, device: str) -> int:
        """Bytes of the device's memory that a run there would take over with it."""
        with self._guard:
            if self._process is None or not self.device == device == "cpu":
                return 0
            return hardware.own_memory(self._process.pid)

    def close(self) -> None:
        """End it."""
        with self._guard:
            self._end()

    def _end(self) -> None:
        if self._line is not None:
            self._line.close()
        if self._process is not None:
            with suppress(OSError):
                self._process.kill()
            self._process.wait()
        self._process = self._line = None


def main() -> int:
    """Import, wait, be a worker."""
    worker.step_back("run")
    line = socket.socket(fileno=int(sys.argv[1]))
    worker.import_pipeline()
    text, files, _, _ = socket.recv_fds(line, LONGEST, FILES)
    while text and not text.endswith(b"\n"):
        more = line.recv(LONGEST)
        text = text + more if more else b""
    if not text:
        return 0  # the server is gone
    line.close()
    told = json.loads(text)
    for number, file in enumerate(files[:-1]):
        os.dup2(file, number)
        os.close(file)
    os.chdir(Path(told["request"]).parent)
    os.environ.update(told["environment"])
    tempfile.tempdir = None  # where it was looked for already
    return worker.main([told["request"], "--lock", str(files[-1])])


if __name__ == "__main__":
    sys.exit(main())
