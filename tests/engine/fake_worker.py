"""A worker whose pipeline does what the recipe's calibration names: `python fake_worker.py REQUEST --lock FD`."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from engine import worker
from engine.methods import Emit
from engine.records import Recipe


def pipeline(recipe: Recipe, folder: Path, emit: Emit, check_cancelled: Callable[[], None]) -> object:
    emit("phase", {"name": recipe.calibration})
    (folder / "blocks").mkdir(exist_ok=True)
    if recipe.calibration == "quick":
        return quick(folder, emit)
    if recipe.calibration == "surroundings":
        return surroundings(emit)
    if recipe.calibration == "careful":
        return careful(folder, emit)
    if recipe.calibration == "downloads":
        return downloads(folder, emit)
    if recipe.calibration in ("deaf", "family"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if recipe.calibration == "family":
        deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
        child = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {deaf!r}]); {deaf}"
        subprocess.Popen([sys.executable, "-c", child])
        until_family(3)
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
    tempfile.mkdtemp()  # nobody deletes it
    done = len(list((folder / "blocks").iterdir()))
    emit("log", {"text": f"found {done} blocks"})
    (folder / "blocks" / str(done)).touch()
    emit("progress", {"done": 1, "total": 4, "unit": "blocks"})
    for _ in range(60_000):
        if recipe.calibration == "polite":
            check_cancelled()
        time.sleep(0.01)
    return None


def surroundings(emit: Emit) -> None:
    sys.stderr.write("written\n")
    for text in (f"cwd {Path.cwd()}", f"temp {tempfile.gettempdir()}", f"stdin {sys.stdin.read()}"):
        emit("log", {"text": text})


def quick(folder: Path, emit: Emit) -> None:
    emit("progress", {"done": 1, "total": 2, "unit": "blocks"})
    time.sleep(0.3)
    (folder / "artifact").mkdir()
    (folder / "artifact" / "weights").write_text("1")
    emit("artifact", {"path": "artifact"})
    emit("measurement", {"name": "size.bytes", "value": 1.0, "unit": "B"})


def until_family(count: int) -> None:
    """Wait until so many processes are in this group."""
    while sum(_group(each) == os.getpgid(0) for each in psutil.pids()) < count:
        time.sleep(0.02)


def _group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return -1


def careful(folder: Path, emit: Emit) -> None:
    """The same 64 KiB each time, piece by piece; the last ones when told to, where somebody is there to tell."""
    emit("log", {"text": "works"})
    (folder / "artifact").mkdir()
    first = folder.parent.parent / "first"
    with open(folder / "artifact" / "weights", "wb") as file:
        for number in range(2048):
            if number == 1024 and first.exists():
                while not (folder / "go").exists():
                    time.sleep(0.01)
            file.write(hashlib.sha256(str(number).encode()).digest())
            file.flush()
    first.touch()
    emit("artifact", {"path": "artifact"})


def downloads(folder: Path, emit: Emit) -> None:
    """A child receives a byte a second from a server that never ends, deaf to SIGTERM as native code is."""
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    receive = (
        "import signal, socket; signal.signal(15, signal.SIG_IGN)\n"
        f"s = socket.create_connection(('127.0.0.1', {port}))\n"
        f"with open('part', 'wb', buffering=0) as file:\n    while got := s.recv(1): file.write(got)"
    )
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen([sys.executable, "-c", receive], cwd=folder)
    connection, _ = server.accept()
    emit("log", {"text": "downloading"})
    while True:
        connection.send(b"x")
        time.sleep(1)


def hungry() -> None:
    held = []
    for number in range(60_000):
        held.append(bytes([1 + number % 255]) * (1 << 24))  # quick also where the machine is busy
        time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(worker.main(pipeline=pipeline))
