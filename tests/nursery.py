"""The nursery of the kill loop: forks servers and workers that have imported everything and computed nothing.

    python tests/nursery.py SOCKET

They are the product's own, with three differences: a kill point may be set in a worker, the pipeline's children
(verify, measure) work in the run's own process, and the server's runner asks the nursery instead of Popen. A
mutant breaks the product on purpose.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

SLOW = 0.03  # seconds added to each block, so that a kill at random often meets one
MUTANTS = ("commit-before-publish", "no-temporary-folder", "forgets-blocks")


# In the worker


class KillPoint:
    """Kills this process when the place that `point` names is passed."""

    def __init__(self, point: str | None) -> None:
        self._when, self._what, number = (point or "never:nothing:0").split(":")
        self._left = int(number)

    def around(self, what: str, work: Callable[[], object]) -> None:
        """Do `work`, which is a `what`."""
        hit = what == self._what and self._count()
        if hit and self._when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        work()
        if hit:
            os.kill(os.getpid(), signal.SIGKILL)

    def _count(self) -> bool:
        self._left -= 1
        return self._left == 0


def work(request: Path, lock: int, point: str | None, mutant: str | None) -> int:
    """Be the worker of one request, with a kill point and a mutation."""
    from engine import attempts, pipeline, shards, verify, worker

    place = KillPoint(point)
    emit, replace, fsync, keep = attempts.EventWriter.emit, os.replace, os.fsync, shards.write
    writers: list[attempts.EventWriter] = []

    def killing_emit(self: attempts.EventWriter, kind: str, data: dict) -> None:
        writers[:] = [self]
        place.around(kind, lambda: emit(self, kind, data))

    def killing_replace(source: str | Path, target: str | Path, **options: int) -> None:
        if Path(target).name == "artifact" and mutant == "commit-before-publish":
            emit(writers[0], "artifact", {"path": "artifact"})
            emit(writers[0], "finished", {"status": "succeeded", "reason": ""})
        if Path(target).name == "artifact" and mutant == "no-temporary-folder":
            Path(target).mkdir()
            for file in sorted(Path(source).iterdir()):
                place.around("replace", lambda file=file: shutil.copy(file, target))
        else:
            place.around("replace", lambda: replace(source, target, **options))

    def slow_keep(model: object, parts: object, path: Path) -> None:
        time.sleep(SLOW)
        keep(model, parts, path)

    def child(request: dict, folder: Path, emit: Callable, check_cancelled: Callable) -> None:
        check_cancelled()
        if request["kind"] == "verify":
            verify.verify(request)
        else:
            pipeline.measure(request, emit)

    attempts.EventWriter.emit = killing_emit
    os.replace = killing_replace
    os.fsync = lambda handle: place.around("fsync", lambda: fsync(handle))
    Path.replace = lambda self, target: killing_replace(self, target)
    shards.write = slow_keep
    pipeline.child = child
    if mutant == "forgets-blocks":
        shutil.rmtree(request.parent / "blocks", ignore_errors=True)
    return worker.main([str(request), "--lock", str(lock)])


# In the server


class ForkRunner:
    """A runner whose workers are forked by the nursery. They are not our children: the lock says whether they live."""

    def __init__(self, nursery: str, mutant: str | None) -> None:
        self._nursery, self._mutant = nursery, mutant

    def start(self, request: Path, device: str, secret: str = "") -> object:
        from engine.attempts import take_lock, write_pid
        from engine.runners.local import AdoptedWorker

        folder = request.parent
        file = folder.parent.parent.parent / "kill-point"
        point = file.read_text() if file.exists() else None
        file.unlink(missing_ok=True)
        lock = take_lock(folder)
        assert lock is not None
        with lock:
            body = {"do": "work", "request": str(request), "point": point, "mutant": self._mutant}
            pid = ask(self._nursery, body, lock)
            write_pid(lock, pid)
        return AdoptedWorker(folder)

    def adopt(self, folder: Path) -> object:
        from engine.runners.local import LocalRunner

        return LocalRunner().adopt(folder)


def serve(home: Path, nursery: str, mutant: str | None, commands: BinaryIO) -> int:
    """Be the server of a data folder: submit and resume what is asked, until killed or the pipe ends."""
    from engine.recipes import load_recipe
    from engine.scheduler import Scheduler

    if mutant == "no-temporary-folder":  # and nothing that heals it: what never is half written needs no cleaning
        discard = Scheduler._discard
        Scheduler._discard = lambda self, folder: None if folder.name == "artifact" else discard(self, folder)
    with Scheduler(home, runner=ForkRunner(nursery, mutant)) as scheduler:
        (home / "serving").touch()
        for line in commands:
            command = json.loads(line)
            if command["do"] == "submit":
                scheduler.submit(load_recipe(command["recipe"]))
            else:
                scheduler.resume(command["run"])
    return 0


# The nursery


def nurse(path: str) -> None:
    """Import everything, compute nothing, and fork servers and workers on request until killed."""
    import compressed_tensors  # noqa: F401 - what stock transformers needs to load an artifact
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    from engine import methods, pipeline, scheduler, worker  # noqa: F401

    torch.set_num_threads(1)
    methods.methods()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the dead are buried at once
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen()
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while True:
            connection, _ = listener.accept()
            with connection:
                body, handles, _, _ = socket.recv_fds(connection, 1 << 16, 1)
                if not body:  # a server that was killed while it asked
                    continue
                pid = os.fork()
                if pid == 0:
                    listener.close()
                    connection.close()
                    be(json.loads(body), handles[0])
                os.close(handles[0])
                with suppress(OSError):  # killed while it waited for the answer
                    connection.send(str(pid).encode())


def be(body: dict, handle: int) -> None:
    """A forked child's life; never returns."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        logging.getLogger().handlers.clear()
        if body["do"] == "work":
            request = Path(body["request"])
            os.chdir(request.parent)
            output = os.open("worker.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            code = work(request, handle, body["point"], body["mutant"])
        else:
            with os.fdopen(handle, "rb") as commands:
                code = serve(Path(body["home"]), body["nursery"], body["mutant"], commands)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ask(nursery: str, body: dict, file: BinaryIO) -> int:
    """Have the nursery fork a process that inherits `file`; returns its id."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(nursery)
        socket.send_fds(connection, [json.dumps(body).encode()], [file.fileno()])
        return int(connection.recv(64))


if __name__ == "__main__":
    nurse(sys.argv[1])
