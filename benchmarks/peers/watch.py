"""Run one compression in a process of its own: how long it took from loading to saved, and its largest memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.environments import ENVIRONMENT
from engine import hardware

INTERVAL = 0.2  # seconds between looks at the memory of the process group


@dataclass(frozen=True)
class Watched:
    """One run: seconds between two marks, the largest memory until the second, bytes; and what else it said."""

    seconds: float
    peak: int
    words: dict[str, str]


def run(
    command: list[str],
    request: dict[str, str],
    folder: Path,
    log: Path,
    between: tuple[str, str] = ("loading", "saved"),
) -> Watched:
    """Start `command` with a request in `folder` and watch it until it ends; what it says on stderr goes to `log`.

    The peak is the largest of the samples of its process group, taken from outside, and of what the kernel counted.

    Raises:
        RuntimeError: it failed.
    """
    environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(hardware.cores())}
    log.parent.mkdir(parents=True, exist_ok=True)
    marks: dict[str, tuple[float, int]] = {}
    words: dict[str, str] = {}
    samples = [0]
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*command, json.dumps(request)], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=errors,
            text=True, start_new_session=True,
        )  # fmt: skip

        def sample() -> None:
            while between[1] not in marks and process.poll() is None:
                samples.append(hardware.group_memory(process.pid))
                ended.wait(INTERVAL)

        ended = threading.Event()
        sampler = threading.Thread(target=sample)
        sampler.start()
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith("@mark "):
                    _, name, when, peak = line.split()
                    marks[name] = (float(when), int(peak))
                if line.startswith("@said "):
                    _, name, value = line.split(maxsplit=2)
                    words[name] = value.strip()
            code = process.wait()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            ended.set()
            sampler.join()
    if code or between[1] not in marks:
        raise RuntimeError(f"{command[-1]} failed ({code}); see {log}")
    (first, _), (last, highest) = (marks[name] for name in between)
    return Watched(last - first, max(max(samples), highest), words)
