"""Runs on this machine: one process group per worker.

A worker has a session of its own, so that its whole family can be signalled; it lowers its own priority
when it starts (a function between fork and exec is unsafe in a process with threads).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO

import psutil

from engine import hardware
from engine.attempts import ASIDE, is_live, read_pid, take_lock, write_pid
from engine.runners.standby import Standby

ROOT = Path(__file__).parent.parent.parent
COMMAND = (sys.executable, "-m", "engine.worker")


def environment(device: str, threads: int) -> dict[str, str]:
    """The environment of a worker: its device and threads, and nothing fetched or executed behind our back."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {
        **os.environ,
        "PYTHONPATH": path,
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads)),
        **({} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}),  # one run at a time has all GPUs
        "PYTHONSAFEPATH": "1",  # the working folder is no place to import from
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }


def signal_group(group: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Signal all processes of a group whose leader is our unreaped child."""
    with suppress(ProcessLookupError, PermissionError):  # macOS refuses to signal a group of zombies
        os.killpg(group, number)


class LocalRunner:
    """Starts `command REQUEST --lock FD` on this machine.

    threads: for the worker's tensor work; by default all cores but one, which keeps the page answering. standby: who is
    asked first, where a process of it may be there already.
    """

    def __init__(
        self, command: tuple[str, ...] = COMMAND, threads: int | None = None, standby: Standby | None = None
    ) -> None:
        self._command = command
        self._threads = threads or hardware.worker_threads()
        self._standby = standby

    def start(self, request: Path, device: str, secret: str = "") -> LocalWorker:
        folder = request.parent
        aside = folder / ASIDE
        aside.mkdir(exist_ok=True)
        lock = take_lock(folder)
        assert lock is not None, f"a worker lives in the new folder {folder}"
        added = {"TMPDIR": str(aside)}  # deleted also where it is killed
        with ExitStack() as files:
            # The worker inherits the locked file: it never looks dead before it has started.
            files.enter_context(lock)
            output = files.enter_context(open(folder / "worker.log", "ab"))
            stdin = files.enter_context(_told(f"{secret}\n" if secret else ""))
            process = None
            if self._standby is not None and self._standby.device == device:
                process = self._standby.start(request, added, (stdin, output, output, lock))
            if process is None:
                process = subprocess.Popen(
                    [*self._command, str(request), "--lock", str(lock.fileno())],
                    stdin=stdin, stdout=output, stderr=output, cwd=folder, start_new_session=True,
                    pass_fds=[lock.fileno()], env={**environment(device, self._threads), **added},
                )  # fmt: skip
            write_pid(lock, process.pid)
        return LocalWorker(process)

    def adopt(self, folder: Path) -> AdoptedWorker | None:
        worker = AdoptedWorker(folder)
        if is_live(folder):
            return worker
        worker.kill()  # its children may have outlived it
        return None


def _told(text: str) -> IO[bytes]:
    """The end of a pipe from which a text can be read, and nothing else; it fits in what a pipe holds."""
    reading, writing = os.pipe()
    with open(writing, "wb") as file:
        file.write(text.encode())
    return open(reading, "rb")


class LocalWorker:
    """A worker that this process started."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    def alive(self) -> bool:
        # Looks without reaping: as long as the dead leader is there, its group's number belongs to no one else.
        if self._process.returncode is not None:
            return False
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def resident(self) -> int:
        return hardware.group_memory(self.pid)

    def ask(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()

    def exit_code(self) -> int | None:
        return self._process.poll()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            signal_group(self.pid, number)


class AdoptedWorker:
    """A worker that an earlier scheduler started: known by its lock and its process group."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def alive(self) -> bool:
        return is_live(self._folder)

    def resident(self) -> int:
        pid = read_pid(self._folder)
        return hardware.group_memory(pid) if pid is not None else 0

    def ask(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def exit_code(self) -> int | None:
        return None

    def _signal(self, number: signal.Signals) -> None:
        pid = read_pid(self._folder)
        if pid is None:
            return
        # The group's number may belong to strangers by now: only processes that work in our folder are signalled.
        for process in psutil.process_iter():
            with suppress(psutil.Error, ProcessLookupError, PermissionError):
                if os.getpgid(process.pid) == pid and process.cwd() == str(self._folder):
                    process.send_signal(number)
