"""A worker whose pipeline does what the recipe's calibration names: `python fake_worker.py REQUEST --lock FD`."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from engine import worker
from engine.methods import Emit
from engine.records import Recipe


def pipeline(recipe: Recipe, folder: Path, emit: Emit, check_cancelled: Callable[[], None]) -> object:
    emit("phase", {"name": recipe.calibration})
    (folder / "blocks").mkdir(exist_ok=True)
    if recipe.calibration == "quick":
        return quick(folder, emit)
    if recipe.calibration in ("deaf", "family"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if recipe.calibration == "family":
        subprocess.Popen(
            [sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"]
        )
        emit("log", {"text": "has a child"})
    if recipe.calibration == "native":
        emit("log", {"text": "in native code"})
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)  # minutes without looking at a signal
    if recipe.calibration == "hungry":
        return hungry()
    if recipe.calibration == "exits":
        os._exit(3)
    if recipe.calibration == "crashes":
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGSEGV)
    done = len(list((folder / "blocks").iterdir()))
    emit("log", {"text": f"found {done} blocks"})
    (folder / "blocks" / str(done)).touch()
    emit("progress", {"done": 1, "total": 4, "unit": "blocks"})
    for _ in range(60_000):
        if recipe.calibration == "polite":
            check_cancelled()
        time.sleep(0.01)
    return None


def quick(folder: Path, emit: Emit) -> None:
    emit("progress", {"done": 1, "total": 2, "unit": "blocks"})
    time.sleep(0.3)
    (folder / "artifact").mkdir()
    (folder / "artifact" / "weights").write_text("1")
    emit("artifact", {"path": "artifact"})
    emit("measurement", {"name": "size.bytes", "value": 1.0, "unit": "B"})


def hungry() -> None:
    held = []
    for _ in range(600_000):
        held.append(bytearray(os.urandom(1 << 20)))
        time.sleep(0.002)


if __name__ == "__main__":
    sys.exit(worker.main(pipeline=pipeline))
