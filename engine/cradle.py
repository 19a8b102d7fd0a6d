"""Where the children of a run are born: a process that has imported everything and computed nothing.

Importing torch and transformers takes 3 to 8 s of a processor, and a run wants two or three fresh processes, for what
reads a model back or measures it must not find what others left. So a worker forks a process as soon as it has
imported all that its children need, before it starts a thread or touches a weight; that one forks each child when it is
asked to, and goes with the worker. What it holds are the worker's own pages.

Only on Linux, on a CPU and in a process without other threads: elsewhere forking is not safe, and children start as any
process does.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NoReturn, Protocol

NAME, BORN = "mq-cradle", "mq-child"  # of its process and its children's, as Linux tells them; 15 letters at most
PR_SET_NAME = 15
LONGEST = 1 << 16  # bytes of a path

Main = Callable[[list[str]], int]  # of a child: its arguments; the exit code


class Child(Protocol):
    """A process that works on a request and says what it has to say in lines."""

    @property
    def stdout(self) -> IO[bytes] | None:
        """What it says."""

    def poll(self) -> int | None:
        """Its exit code, where it has ended."""

    def wait(self) -> int:
        """Its exit code, once it has ended."""

    def kill(self) -> None:
        """End it, where it has not."""


@contextlib.contextmanager
def cradle(main: Main) -> Iterator[None]:
    """While this lasts, children of this process are forked and call `main`; where that is safe.

    To be entered once all is imported and before there are threads.
    """
    global _own
    alone = threading.active_count() == 1
    if not (sys.platform.startswith("linux") and os.environ.get("CUDA_VISIBLE_DEVICES") == "" and alone):
        yield
        return
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    gc.collect()
    gc.freeze()  # else a look for garbage writes to every page, and each process has its own copy then
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            _rock(its, main)
        finally:
            os._exit(0)  # whatever happens: what the worker would do next is not for its copy
    its.close()
    _own = ours
    try:
        yield
    finally:
        _own = None
        ours.close()  # it ends then
        os.waitpid(pid, 0)


_own: socket.socket | None = None  # this process's end of its cradle's line


def start(request: Path) -> Child:
    """A fresh process of `engine.worker` for a request; its output is a pipe, its errors go where ours go."""
    if _own is not None:
        return Forked(_own, request)
    command = [sys.executable, "-m", "engine.worker", str(request)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)


class Forked:
    """A child of the cradle. One at a time."""

    def __init__(self, line: socket.socket, request: Path) -> None:
        self._line = line
        self._code: int | None = None
        reading, writing = os.pipe()
        self.stdout: IO[bytes] | None = os.fdopen(reading, "rb", buffering=0)
        try:
            socket.send_fds(line, [os.fsencode(request)], [writing])
        finally:
            os.close(writing)
        self.pid = int(line.recv(32))
        try:
            self._handle = os.pidfd_open(self.pid)
        except OSError:  # it has ended already
            self._handle = -1

    def poll(self) -> int | None:
        return self._result(socket.MSG_DONTWAIT)

    def wait(self) -> int:
        code = self._result(0)
        assert code is not None
        return code

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    def _result(self, flags: int) -> int | None:
        if self._code is None:
            try:
                said = self._line.recv(32, flags)
            except BlockingIOError:
                return None
            self._code = int(said) if said else -signal.SIGKILL  # the cradle itself was killed, and more with it
            if self._handle >= 0:
                os.close(self._handle)
                self._handle = -1
        return self._code


def _rock(line: socket.socket, main: Main) -> None:
    """Fork a child for each request until nobody asks any more."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # who asks for it to end closes the line
    for handle in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:  # its lock must end with the worker
        if handle > 2 and handle != line.fileno():
            with contextlib.suppress(OSError):  # that of the folder which tells
                os.close(handle)
    _call(NAME)
    while True:
        request, handles, _, _ = socket.recv_fds(line, LONGEST, 1)
        if not request:
            return
        pid = os.fork()
        if pid == 0:
            line.close()
            _be_born(os.fsdecode(request), handles[0], main)
        os.close(handles[0])
        line.send(str(pid).encode())
        _, status = os.waitpid(pid, 0)
        line.send(str(os.waitstatus_to_exitcode(status)).encode())


def _call(name: str) -> None:
    """Give this process a name."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode(), 0, 0, 0)


def _be_born(request: str, output: int, main: Main) -> NoReturn:
    """Work on a request as a process that has just started does, and end."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    _call(BORN)
    code = 1
    try:
        os.dup2(output, 1)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        for handle in (output, nothing):
            os.close(handle)
        code = main([request])
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
