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
    """One run: seconds from the begin of loading until the files are written (imports do not count); peak bytes."""

    seconds: float
    peak: int


def run(command: list[str], request: dict[str, str], folder: Path, log: Path) -> Watched:
    """Start `command` with a request in `folder` and watch it until it ends; what it says on stderr goes to `log`.

    The peak is the largest of the samples of its process group, taken from outside, and of what the kernel counted.

    Raises:
        RuntimeError: it failed.
    """
    environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(hardware.cores())}
    log.parent.mkdir(parents=True, exist_ok=True)
    marks: dict[str, tuple[float, int]] = {}
    samples = [0]
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*command, json.dumps(request)], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=errors,
            text=True, start_new_session=True,
        )  # fmt: skip

        def sample() -> None:
            while "saved" not in marks and process.poll() is None:
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
            code = process.wait()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            ended.set()
            sampler.join()
    if code or "saved" not in marks:
        raise RuntimeError(f"{command[-1]} failed ({code}); see {log}")
    return Watched(marks["saved"][0] - marks["loading"][0], max(max(samples), marks["saved"][1]))
